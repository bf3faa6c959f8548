"""Long work is seen: a bar at a terminal, lines in a log, nothing when it is not wanted."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest

from hf_soup._util import progress
from hf_soup._util.progress import bar

CODE = """
import sys, time
from hf_soup._util import progress
progress._PAUSE = 0.05
with progress.bar("Merging", 8_000_000, quiet=sys.argv[1] == "quiet") as shown:
    for _ in range(8):
        time.sleep(0.03)
        shown.update(1_000_000)
"""


def test_lines_where_there_is_no_terminal() -> None:
    """Each whole, with bytes, rate and time left; none of a terminal's signs."""
    done = subprocess.run([sys.executable, "-c", CODE, "loud"], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert 2 <= len(lines) <= 8
    for line in lines:
        assert re.fullmatch(r"Merging: \d+ %, \d\.\d\dM of 8\.00M, [\d.]+[kM]?B/s, \d\d:\d\d left", line), line
    assert "\r" not in done.stderr


def test_short_work_writes_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("Merging", 10, quiet=False) as shown:
        shown.update(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("said", "setting"), [("quiet", "0"), ("loud", "1")])
def test_quiet_is_quiet(said: str, setting: str) -> None:
    """By the option, or by the setting that the Hub's client has for all its bars."""
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": setting}
    command = [sys.executable, "-c", CODE, said]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout + done.stderr == ""


def test_a_bar_at_a_terminal() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", CODE, "loud"], stderr=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # how a terminal whose other end is closed says it on Linux
        assert child.wait(60) == 0
    os.close(master)
    text = shown.decode()
    assert "\r" in text
    assert re.search(r"Merging: +\d+%\|.*MB/s", text)


def test_several_threads_may_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with bar("Merging", 80_000, quiet=False) as shown:
        threads = [threading.Thread(target=lambda: [shown.update(1) for _ in range(10_000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shown.n == 80_000
    assert progress._PAUSE == 10.0
