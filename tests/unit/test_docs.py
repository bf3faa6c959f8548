"""The documentation says what the code does: the command reference is generated, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click

from hf_soup.cli import cli

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "cli.md"
_HEAD = """# Command line
Made from `--help` by `python tests/unit/test_docs.py`; a test compares the two.

Exit codes: 0 done; 1 an error, explained on stderr (with `--json`: `{"error": {"type", "message", "hint"}}` on
stdout); 2 wrong usage; 3 `check` refused, or `forage -o` found no group; 130 interrupted. Results go to stdout,
progress and warnings to stderr.
"""


def reference() -> str:
    """The help of every command, one after the other."""
    parts = [_HEAD]
    whole = click.Context(cli, info_name="hf-soup", terminal_width=100, **cli.context_settings)
    contexts = [whole, *(click.Context(command, whole, name) for name, command in cli.commands.items())]
    for context in contexts:
        text = context.command.get_help(context).rstrip()
        parts.append(f"## {context.command_path}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def test_the_command_reference_is_what_help_says() -> None:
    """`python tests/unit/test_docs.py` writes it anew."""
    assert REFERENCE.read_text() == reference()


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link in the README and in docs/ names a file that exists."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_option_of_a_documented_command_exists() -> None:
    """Command lines in the README and in docs/ use commands and options that there are."""
    options = {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in cli.commands.items()
    }
    found = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name, rest in re.findall(r"^(?:\$ )?hf-soup ([a-z]+)(.*)$", page.read_text(), re.MULTILINE):
            found += 1
            assert name in options, f"{page.name}: hf-soup {name}"
            used = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest.partition("#")[0]))
            assert used <= options[name] | {"--help"}, f"{page.name}: hf-soup {name}{rest}"
    assert found > 4


if __name__ == "__main__":
    REFERENCE.write_text(reference())
