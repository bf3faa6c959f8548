"""Work in a process of its own, which may take so many seconds and bytes and no more.

For what runs on strangers' files and cannot be stopped from within: a library that counts in no steps of Python's, that
gives up by ending the process, or that asks for all memory there is.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import TMonitor

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_T = TypeVar("_T")


class IsolationError(Exception):
    """What was to be done apart took too long or too much, or ended its process."""


def is_only_thread() -> bool:
    """Whether no other thread does anything.

    Else fork may wait for it for ever, as OpenBLAS does where it is at work, and so may a new process for a lock that
    it held.
    """
    return all(each is threading.current_thread() or isinstance(each, TMonitor) for each in threading.enumerate())


def run_isolated(work: Callable[[], _T], seconds: float, size: int) -> _T:
    """What ``work`` returns, in a process that is forked for it; in this one where others of its threads are at work.

    Args:
        work: Returns plain data, and raises nothing.
        seconds: That it may take.
        size: Bytes that it may take beside those of this process.

    Raises:
        IsolationError: It did not come to an end within that.
    """
    if sys.platform != "linux" or current_process().daemon or not is_only_thread():
        return work()
    context = get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, writing, seconds, size))
    with warnings.catch_warnings():
        # That others of this process's threads may hold locks: those of libraries, which are at rest.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    writing.close()
    try:
        if not reading.poll(seconds):
            raise IsolationError(f"it took more than {seconds:g} seconds")
        answer: _T = reading.recv()
    except (EOFError, OSError):
        raise IsolationError(f"it ended its process, or took more than {size >> 20:,} MiB") from None
    finally:
        reading.close()
        child.kill()
        child.join()
    return answer


def limit_memory(size: int) -> None:
    """Let this process take so many bytes more and no others, where the system does so."""
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + size, held + size))


def _work(work: Callable[[], object], writing: Connection, seconds: float, size: int) -> None:
    """The new process: it has one thread, tells nobody anything but the answer, and ends without a word."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # those of the process that began this one are not here
        limit_memory(size)
        processor = int(seconds * (os.cpu_count() or 1)) + 1  # where nobody is left who waits for it
        resource.setrlimit(resource.RLIMIT_CPU, (processor, processor))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        writing.send(work())
    finally:
        os._exit(0)
