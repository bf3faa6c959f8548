"""The tutorial is followed as a reader would: its files are saved, and its commands typed in their order."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

Terminal = Callable[[str], str]


@pytest.fixture
def first_terminal(tmp_path: Path) -> Iterator[str]:
    """Runs the first command, which is the Hub, on a port that is free; the line that it prints."""
    language, command = BLOCKS[0]
    assert (language, command) == ("bash", "hf-soup hub\n")
    with subprocess.Popen(
        f"exec {command.strip()} --port 0", shell=True, cwd=tmp_path, env=_environment(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
    ) as hub:  # fmt: skip
        assert hub.stdout
        yield hub.stdout.readline()
        hub.send_signal(signal.SIGINT)
        hub.wait(20)


@pytest.fixture
def type_in(
    first_terminal: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Terminal:  # fmt: skip
    """Runs a command in the second terminal, where the line was pasted that the Hub printed.

    What loads torch, for many seconds, runs in this process, which is told what that line says.
    """
    assert first_terminal.startswith("export HF_ENDPOINT=http://127.0.0.1:")
    exported = dict(word.split("=") for word in first_terminal.split()[1:])
    hub = exported["HF_ENDPOINT"]
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", exported["HF_TOKEN"])

    def run(command: str) -> str:
        program, *arguments = shlex.split(command)
        if program == "python":
            capsys.readouterr()
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", arguments)
                runpy.run_path(arguments[0], run_name="__main__")
            return capsys.readouterr().out
        if arguments[0] != "push":
            done = cli(*arguments)
            assert not done.code, (command, done)
            return str(done.out)
        typed = subprocess.run(
            ["bash", "-c", f"{first_terminal}{command}"], cwd=tmp_path, env=_environment(tmp_path),
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert typed.returncode == 0, (command, typed.stdout, typed.stderr)
        return typed.stdout

    return run


def _environment(home: Path) -> dict[str, str]:
    """That of a reader who knows no Hub yet, with the commands of the virtual environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "PYTEST"))}
    return {**kept, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}


def test_the_tutorial(type_in: Terminal, tmp_path: Path) -> None:
    """It ends with a pushed soup that is better than chance, is verified, and is loaded by plain transformers."""
    printed = {}
    for language, text in BLOCKS[1:]:
        if language in ("python", "yaml"):
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif language == "bash":
            (command,) = text.splitlines()
            printed[command] = type_in(command)
        else:
            assert language == "text", "what the page shows is a file, a command, or what a command prints"
    verbs = ["python", "check", "cook", "score", "push", "verify", "python"]
    assert [re.sub("hf-soup ", "", command).split()[0] for command in printed] == verbs
    told = dict(zip(["make", "check", "cook", "score", "push", "verify", "use"], printed.values(), strict=True))
    assert told["check"].startswith("proven")
    taken = re.findall(r"^  (me/digits-\d) \*", told["cook"], re.MULTILINE)
    assert len(taken) > 1, "the soup is one of several"
    assert "me/digits-4" not in taken, "the page says that the poor one stays out"
    assert "Pushed me/digits-soup as commit" in told["push"]
    assert told["verify"].startswith("identical")
    read = re.findall(r"^written: (\w+) read: (\w+)$", told["use"], re.MULTILINE)
    assert len(read) == 5
    assert sum(written == answer for written, answer in read) >= 3
