"""How much memory a process and those that it begins hold together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def watched(process: int) -> Iterator[list[float]]:
    """Fills a list with the MB that a process and its children hold in memory, twenty times a second.

    What several hold together counts once (``Pss``), and so does what they read from files by memory maps.
    """
    held, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            held.append(sum(_resident(each) for each in _family(process)) / 1000)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield held
    finally:
        ended.set()
        watcher.join()


def _family(process: int) -> list[int]:
    family = [process]
    for each in family:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):  # where that thread has just ended
                family += map(int, children.read_text().split())
    return family


def _resident(process: int) -> int:
    """Of one process, in kB."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0  # it has just ended
    return int(rollup.partition("\nPss:")[2].split()[0])
