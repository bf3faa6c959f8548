"""The arrows between modules, the public names, and how light it is to start."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_soup
from hf_soup.cli.app import cli

ROOT = Path(hf_soup.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}
HEAVY = {"torch", "transformers", "datasets", "evaluate", "huggingface_hub"}
#: Third-party package → the rooms (a module and what lies in it) that may import it; setup.cfg has more of them.
ONLY = {
    "pydantic": ("hf_soup.recipe",),
    "starlette": ("hf_soup.local_hub",),
    "uvicorn": ("hf_soup.local_hub",),
    "click": ("hf_soup.cli",),
    "jinja2": ("hf_soup.publishing.card",),
    "accelerate": ("hf_soup.merging.processes",),
    "pylatexenc": ("hf_soup.cli.method_help",),
    "matplotlib": ("hf_soup.publishing.plots",),
    "sklearn": ("hf_soup.evaluation", "hf_soup.demo"),
    "pytest": ("hf_soup.testing",),
    "hypothesis": ("hf_soup.testing",),
}
#: Room → all that it may import beside the standard library and itself.
MAY = {
    "hf_soup.errors": set(),
    "hf_soup.methods": {"torch", "numpy", "hf_soup._util.registry"},
    "hf_soup.selection": {"torch", "numpy", "hf_soup.errors", "hf_soup._util.registry"},
    "hf_soup.recipe": {
        "pydantic",
        "yaml",
        "torch",
        "hf_soup.errors",
        "hf_soup._util",
        "hf_soup.methods",
        "hf_soup.selection",
    },
    "hf_soup._util": {"torch", "tqdm", "yaml", "hf_soup.errors"},
    "hf_soup.local_hub": {"filelock", "starlette", "uvicorn", "yaml", "hf_soup.errors", "hf_soup._util"},
    "hf_soup.testing": {
        "torch",
        "safetensors",
        "numpy",
        "pytest",
        "hypothesis",
        "hf_soup.errors",
        "hf_soup.evaluation",
        "hf_soup.methods",
        "hf_soup.recipe",
        "hf_soup.selection",
        "hf_soup._util.lazy",
    },
    "hf_soup.publishing.plots": {"PIL", "numpy", "matplotlib", "hf_soup._util", "hf_soup.recipe"},
}
#: Rooms in which each file is one thing that others use.
OPEN = {"_util", "cli", "workflows"}


def imports(name: str, *, late: bool = True) -> Iterator[str]:
    """What a module imports, in full; with ``late=False`` only what it imports when it is imported itself."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]) if late else _at_import(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively to {package}"
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield longer if longer in FILES else str(node.module)


def imported_names(name: str) -> Iterator[tuple[str, str]]:
    """The modules of this package that a module imports from, and what."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "hf_soup":
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield (longer, "") if longer in FILES else (str(node.module), alias.name)


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not typing_only:
            yield child
            yield from _at_import(child)


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def exports_of(room: str) -> dict[str, str]:
    """The names that a room exports lazily, and the module that each comes from."""
    return {
        alias.name: str(node.module)
        for block in TREES[room].body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_soup")
        for alias in node.names
    }


ROOMS = [name for name in FILES if FILES[name].name == "__init__.py" and name != "hf_soup"]
CONTRACTS = configparser.ConfigParser()
CONTRACTS.read(ROOT.parent / "setup.cfg")


def listed(contract: str, key: str) -> list[str]:
    """The lines of a setting of a contract."""
    return CONTRACTS[f"importlinter:contract:{contract}"].get(key, "").split()


def test_no_contract_has_an_exception() -> None:
    assert not [section for section in CONTRACTS.sections() if CONTRACTS[section].get("ignore_imports")]


def test_every_room_has_its_place_and_its_inside_is_its_own() -> None:
    """The contracts, of which `lint-imports` sees whether the code keeps them."""
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    order = listed("rooms", "layers")
    assert {each for each in order if each != "|"} == rooms | {"errors"}
    assert ":" not in order
    for room in rooms - OPEN:
        assert listed(f"inside_{room}", "type") == ["protected"], room
        assert listed(f"inside_{room}", "protected_modules") == [f"hf_soup.{room}.*"]
        assert listed(f"inside_{room}", "allowed_importers") == [f"hf_soup.{room}"]
    assert listed("local_hub", "allowed_importers") == ["hf_soup.cli", "hf_soup.demo"]
    assert listed("client", "allowed_importers") == ["hf_soup.hub"]
    assert listed("data", "allowed_importers") == ["hf_soup.evaluation"]


def test_a_room_exports_nothing_that_is_called_as_one_of_its_modules() -> None:
    """Whoever imports the module would put it in the place of what is exported."""
    for room in ROOMS:
        assert not [name for name in exports_of(room) if f"{room}.{name}" in FILES], room


def test_no_import_goes_in_a_circle() -> None:
    """Between files, through what rooms export; registries and the files that they load are one."""
    registries = ("hf_soup.methods", "hf_soup.selection", "hf_soup.local_hub", "hf_soup.demo")

    def node(module: str) -> str:
        return next((each for each in registries if within(module, each)), module)

    graph: dict[str, set[str]] = {}
    for name in FILES:
        if name in ROOMS and exports_of(name) and node(name) == name:
            graph.setdefault(node(name), set())
            continue
        for module, imported in imported_names(name):
            if module != "hf_soup":
                place = exports_of(module).get(imported, module) if module in ROOMS else module
                if node(place) != node(name):
                    graph.setdefault(node(name), set()).add(node(place))
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", ONLY)
def test_a_library_is_imported_by_its_room_only(package: str) -> None:
    for name in FILES:
        if any(found.partition(".")[0] == package for found in imports(name)):
            assert any(within(name, room) for room in ONLY[package]), f"{name} imports {package}"


@pytest.mark.parametrize("room", MAY)
def test_a_room_imports_no_more_than_it_may(room: str) -> None:
    for name in (name for name in FILES if within(name, room)):
        for found in imports(name):
            if found.partition(".")[0] in sys.stdlib_module_names or within(found, room):
                continue
            assert any(within(found, allowed) for allowed in MAY[room]), f"{name} imports {found}"


def test_the_public_names() -> None:
    assert hf_soup.__all__ == [
        "ConnectivityReport", "IncompatibleError", "Ingredient", "LineageReport", "MergeError", "PublishError",
        "Recipe", "RecipeError", "ResolveError", "Scoring", "ScoringError", "SearchResult", "Soup", "SoupError",
        "SoupReport", "Update", "VerificationReport", "check", "connectivity", "cook", "score", "search", "verify",
    ]  # fmt: skip
    for name in hf_soup.__all__:
        assert getattr(hf_soup, name).__module__.startswith("hf_soup.")
        assert name in dir(hf_soup)
    with pytest.raises(AttributeError, match="no attribute 'soups'"):
        _ = hf_soup.soups


def test_what_is_public_is_documented() -> None:
    missing = []
    for name, tree in TREES.items():
        if ast.get_docstring(tree) is None:
            missing.append(name)
        for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]:
            for node in owner.body:
                public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                setter = public and any(ast.unparse(each).endswith(".setter") for each in node.decorator_list)
                if public and not setter and ast.get_docstring(node) is None:
                    missing.append(f"{name}:{node.lineno} {node.name}")
    assert missing == []


def test_no_error_is_passed_over_in_silence() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(each, ast.Pass) for each in node.body)
                assert not silent, f"{name}:{node.lineno}"
                assert node.type is not None, f"{name}:{node.lineno}"


def test_starting_loads_nothing_heavy() -> None:
    """Neither an import, nor a recipe, nor a help page pays for torch."""
    code = (
        "import sys, hf_soup; from hf_soup.cli.app import main; from hf_soup import Recipe, SoupError\n"
        "Recipe(ingredients=['a/b'])\n"
        "for arguments in (['--help'], ['cook', '--help'], ['push', '--help'], ['--version']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        f"print('loaded', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_help_comes_at_once() -> None:
    """Of all that the package requires it loads what reads a command line."""
    code = (
        "import sys; from hf_soup.cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('loaded', sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1].removeprefix("loaded ")))
    required = {canonicalize_name(Requirement(text).name) for text in requires("hf-soup") or () if "extra" not in text}
    places = packages_distributions()
    packages = {name for name, owners in places.items() if required & {canonicalize_name(owner) for owner in owners}}
    assert {"click", "torch", "numpy", "pydantic", "yaml"} <= packages
    assert loaded & packages == {"click"}


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_shows_an_example(name: str) -> None:
    """And explains each of its options."""
    command = cli.commands[name]
    # Under its parent: click keeps the first help option that it makes, and its names come from there.
    page = command.get_help(click.Context(command, click.Context(cli, **cli.context_settings), name))
    assert f"Example: hf-soup {name}" in " ".join(page.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
