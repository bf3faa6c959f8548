"""Work in several threads at once, and how many cores there are for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar


def usable_cores() -> int:
    """How many cores this process may run on; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_T = TypeVar("_T")


def in_parallel(call: Callable[[Any], _T], items: Sequence[Any], threads: int = 8) -> list[_T]:
    """``[call(item) for item in items]`` on several threads, in order; the first error in order is raised."""
    if len(items) < 2:
        return [call(item) for item in items]
    pool = ThreadPoolExecutor(min(threads, len(items)))
    interrupted = False
    try:
        futures = [pool.submit(call, item) for item in items]
        return [future.result() for future in futures]
    except KeyboardInterrupt:
        interrupted = True  # and nobody waits for threads that wait for the network
        raise
    finally:
        pool.shutdown(wait=not interrupted, cancel_futures=True)
