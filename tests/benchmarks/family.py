"""What a process and those that it begins take: time, and the memory that they hold together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: Starts a command. A process of its own, and a small one: what a child is said to have held at most begins with what
#: the one that started it held.
_LAUNCH = """
import json, os, subprocess, sys, time
told = open(int(sys.argv[1]), "w")
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
print(process.pid, file=told, flush=True)
_, status, usage = os.wait4(process.pid, 0)
wall, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
print(json.dumps([status, wall, cpu, usage.ru_maxrss]), file=told)
"""


@dataclass(frozen=True)
class Took:
    """What a process and those that it began took, in seconds and MB."""

    wall: float
    cpu: float
    peak: float


def run(
    command: Sequence[object], stdout: int | IO[str] | IO[bytes], stderr: int | IO[bytes], env: Mapping[str, str]
) -> Took:
    """A whole process, from its start to its end.

    Raises:
        CalledProcessError: It failed.
    """
    words = [str(word) for word in command]
    inlet, outlet = os.pipe()
    with open(inlet) as told, open(outlet, "w") as mine:  # noqa: PTH123
        launcher = [sys.executable, "-S", "-c", _LAUNCH, str(outlet), *words]
        with subprocess.Popen(launcher, stdout=stdout, stderr=stderr, env=env, pass_fds=[outlet]):
            mine.close()
            with watched(int(told.readline())) as held:
                status, wall, cpu, largest = json.loads(told.readline())
    if status:
        raise subprocess.CalledProcessError(status, words)
    return Took(wall, cpu, max(largest / 1000, *held))


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
