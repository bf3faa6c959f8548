"""Work in several threads at once, and how many cores there are for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


def in_order(pool: ThreadPoolExecutor, call: Callable[[Any], _T], items: Iterable[Any], ahead: int) -> Iterator[_T]:
    """``call(item)`` of each, in order; at most ``ahead`` of them are begun before the first of these is taken."""
    waiting: deque[Future[_T]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
