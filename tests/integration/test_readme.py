"""What the README shows is run as it stands there: its recipe and commands, and its Python."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The code block of a language that holds a text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (found,) = [text for name, text in blocks if name == language and containing in text]
    return str(found)


@pytest.fixture
def local_hub(zoo: LocalHub) -> LocalHub:
    """The Hub of the whole session."""
    return zoo


def test_the_recipe_and_the_commands(cli: Callable[..., Any], tmp_path: Path) -> None:
    """In their order, against stand-ins of the models that they name."""
    (tmp_path / "recipe.yaml").write_text(block("yaml", "ingredients:"))
    commands = [shlex.split(line, comments=True) for line in block("", "hf-soup check zqTensor").splitlines()]
    names = ("check", "cook", "push", "score", "verify", "cook", "push")
    assert [command[:2] for command in commands] == [["hf-soup", name] for name in names]
    printed = []
    for command in commands:
        done = cli(*command[1:])
        assert done.code == 0, (command, done.err)
        printed.append(done.out)
    assert "me/vit-beans-soup" in printed[3]
    assert "identical" in printed[4]
    assert "/me/vit-beans-soup/discussions/1" in printed[6]


def test_the_python(online: LocalHub, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two folders of fine-tunes in the place of the reader's."""
    for name in "ab":
        shutil.copytree(family / name, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    exec(block("python", "import hf_soup"), {})
    assert [record.path for record in online.requests if record.path.endswith("/me/my-soup/commit/main")]
