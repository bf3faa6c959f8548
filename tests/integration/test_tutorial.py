"""The tutorial is followed as a reader would: its files are saved, and its commands typed in their order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

Terminal = Callable[[str], str]


@pytest.fixture
def first_terminal(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs the first command, which is the Hub, on a port that is free."""
    language, command = BLOCKS[0]
    assert (language, command) == ("bash", "hf-soup hub\n")
    with subprocess.Popen(
        f"exec {command.strip()} --port 0", shell=True, cwd=tmp_path, env=_environment(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
    ) as hub:  # fmt: skip
        yield hub
        hub.send_signal(signal.SIGINT)
        hub.wait(20)


@pytest.fixture
def type_in(first_terminal: subprocess.Popen[str], tmp_path: Path) -> Terminal:
    """Runs a command in the second terminal, where the line was pasted that the Hub printed."""
    assert first_terminal.stdout
    pasted = first_terminal.stdout.readline()
    assert pasted.startswith("export HF_ENDPOINT=http://127.0.0.1:")

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", f"{pasted}{command}"], cwd=tmp_path, env=_environment(tmp_path),
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

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
