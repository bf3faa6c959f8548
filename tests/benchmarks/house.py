"""The house in figures: rooms, files, statements, and what the contracts of setup.cfg hold.

    python tests/benchmarks/house.py [CHECKOUT]

Statements are those of the syntax tree, without docstrings. A module is under contract when it lies in a room that
the contract on layers names, or above them all. Each exception to a contract is printed with the comment above it,
which names what will make it needless.
"""

from __future__ import annotations

import argparse
import ast
import configparser
from pathlib import Path


def statements(path: Path) -> int:
    """How many a file has."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    texts = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    docstrings = sum(isinstance(node.value.value, str) for node in texts)
    return sum(isinstance(node, ast.stmt) for node in nodes) - docstrings


def layers(settings: str) -> list[str]:
    """The rooms that the contract on layers names, from above."""
    parser = configparser.ConfigParser()
    parser.read_string(settings)
    named = parser.get("importlinter:contract:rooms", "layers", fallback="")
    return [room.strip() for line in named.split("\n") for room in line.split("|") if room.strip()]


def exceptions(settings: str) -> list[tuple[str, str]]:
    """Every exception to a contract, and the comment above it."""
    found, comment = [], ""
    for line in (line.strip() for line in settings.split("\n")):
        if line.startswith("#"):
            comment = line.removeprefix("# ")
        elif " -> " in line:
            found.append((line, comment))
    return found


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[2])
    root = parser.parse_args().checkout
    package = root / "hf_soup"
    modules = sorted(package.rglob("*.py"))
    settings = (root / "setup.cfg").read_text()
    rooms: dict[str, list[Path]] = {}
    for path in modules:
        rooms.setdefault(path.relative_to(package).parts[0].removesuffix(".py"), []).append(path)
    held = layers(settings)
    print(f"{'room':<14}{'files':>6}{'lines':>8}{'statements':>12}")
    for room in [*held, *sorted(rooms.keys() - set(held))]:
        lines = sum(path.read_text().count("\n") for path in rooms[room])
        print(f"{room:<14}{len(rooms[room]):>6}{lines:>8,}{sum(map(statements, rooms[room])):>12,}")
    total, tests = sum(map(statements, modules)), sum(map(statements, (root / "tests").rglob("*.py")))
    print(f"\nstatements: hf_soup {total:,}, tests {tests:,}")
    print(f"files directly in hf_soup: {len(list(package.glob('*.py')))}")
    above = [room for room in ("__init__", "__main__") if held]  # they may use every room, by what it exports
    placed = sum(len(rooms[room]) for room in [*held, *above] if room in rooms)
    print(f"modules under contract: {placed} of {len(modules)}")
    print(f"exceptions: {len(exceptions(settings))}")
    for line, comment in exceptions(settings):
        print(f"  {line}\n      {comment}")


if __name__ == "__main__":
    main()
