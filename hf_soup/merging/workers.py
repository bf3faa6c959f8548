"""Processes that compute units of a merge: threads of one process wait for each other between any two operations."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, current_process, get_context

from hf_soup._util.isolated import is_only_thread
from hf_soup.errors import MergeError
from hf_soup.merging.engine import Buffers, Engine
from hf_soup.merging.workspace import CompletedUnit

Write = Callable[[int], CompletedUnit]

#: Bytes of output for each process below which it is not worth to have them.
_WORTH = 32 << 20
#: Seconds in which processes begin, which takes some milliseconds.
_PATIENCE = 30
_PR_SET_PDEATHSIG = 1


def may_fork(engine: Engine, size: int, count: int) -> bool:
    """Whether several processes may do the work, and it is worth it.

    They see what this one knew when they began, so files must be here; and they do not wait for each other with tensors
    that are held whole, of which all together may not take too much memory. Pools and data loaders let none of theirs
    begin others.

    Args:
        engine: That computes.
        size: Bytes of all that it is to compute.
        count: How many processes there would be.
    """
    return (
        sys.platform == "linux"
        and not current_process().daemon
        and is_only_thread()
        and count > 1
        and size >= count * _WORTH
        and all(file.verified and not file.dropped for file in engine.supply.files())
        and not any(engine.at_once(run) for run in engine.plan.runs)
    )


@contextmanager
def forked(engine: Engine, count: int) -> Iterator[Write | None]:
    """Processes that know what this one knows, and a function that has one of them compute a unit and waits for it.

    None where the system lets this one begin no others.
    """
    earlier = set(active_children())
    with ExitStack() as stack:
        try:
            pool = ProcessPoolExecutor(count, get_context("fork"), _begin, (engine, os.getpid()))
            _fork(pool)
            stack.enter_context(pool)
        except BaseException as error:
            # The pool forgets those that it has begun when it cannot begin all.
            for process in set(active_children()) - earlier:
                process.kill()
                process.join()
            if not isinstance(error, OSError | RuntimeError):
                raise
            # As where there is no shared memory for semaphores, or no more processes or threads may be begun.
            yield None
            return

        def write(number: int) -> CompletedUnit:
            try:
                return pool.submit(_write, number).result()
            except BrokenProcessPool:
                raise MergeError(
                    "A process that averages was ended from outside: by somebody, or by the system for want of memory.",
                    hint="What is finished is kept; run the same command again.",
                ) from None

        yield write


def _fork(pool: ProcessPoolExecutor) -> None:
    """Begin all processes, in this thread, as they end with the one that began them."""
    gc.freeze()  # or the first collection in each process would copy all pages
    # Until they have set aside what this process does about signals, they get none.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # That others of this process's threads may hold locks: the new ones use none that these might hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            first = pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        gc.unfreeze()
    # One more reason to give up: the pool waits for ever where its own threads could not be begun.
    first.result(_PATIENCE)


_engine: Engine
_buffers: Buffers


def _begin(engine: Engine, parent: int) -> None:
    global _engine, _buffers
    _engine, _buffers = engine, Buffers()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)  # the first process tells what becomes of the work
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    # What this process writes it must not write when the first one was killed, and with it the lock of the output.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write(number: int) -> CompletedUnit:
    return _engine.write(number, _buffers)
