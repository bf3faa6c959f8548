"""Work in a process of its own: its answer, and that it takes no more than it may."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from hf_soup._util import isolated as module
from hf_soup._util.isolated import IsolationError, run_isolated

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere this process does the work")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of other tests do no harm."""
    monkeypatch.setattr(module, "is_only_thread", lambda: True)


def test_the_answer_of_another_process() -> None:
    number, text = run_isolated(lambda: (os.getpid(), "ä" * 10**6), 60, 1 << 30)
    assert number != os.getpid()
    assert text == "ä" * 10**6
    with pytest.raises(ChildProcessError):
        os.waitpid(number, 0)  # it is gone


@pytest.mark.parametrize(
    ("work", "seconds", "said"),
    [
        (lambda: time.sleep(600), 0.1, "it took more than 0.1 seconds"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 60, "it ended its process, or took more than 1,024 MiB"),
        (lambda: bytes(2 << 30), 60, "it ended its process, or took more than 1,024 MiB"),
        (lambda: sys.exit("done"), 60, "it ended its process, or took more than 1,024 MiB"),
    ],
    ids=["too long", "a crash", "too much", "an exit"],
)
def test_work_that_is_given_up(
    work: Callable[[], object], seconds: float, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(IsolationError, match=said):
        run_isolated(work, seconds, 1 << 30)
    assert capfd.readouterr() == ("", "")


def test_beside_other_threads_this_process_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        assert run_isolated(os.getpid, 60, 1 << 30) == os.getpid()
    finally:
        done.set()
        other.join()
