"""The processes that merge and score together, as Accelerate sees them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from hf_soup._util.logs import PrintableLogger
from hf_soup.errors import MergeError, ScoringError, SoupError

logger = PrintableLogger(__name__)
#: torch gives up after half an hour; the first process may download for longer while the others wait.
_PATIENCE = timedelta(days=30)
#: Seconds after which it is said that others do not come.
_SAID_AFTER = 60.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that work together.

    Args:
        rank: This one's number.
        size: How many there are.
        barrier: Waits for all.
        broadcast: Gives all what the first one gives.
        gather: Gives all what each gives, in their order.
        close: Ends the connections: those who wait for this process, or will, get an error.
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = field(default=lambda: None, repr=False)
    broadcast: Callable[[Any], Any] = field(default=lambda value: value, repr=False)
    gather: Callable[[Any], list[Any]] = field(default=lambda value: [value], repr=False)
    close: Callable[[], None] = field(default=lambda: None, repr=False)


def launched() -> int:
    """How many processes a launcher has announced.

    Raises:
        MergeError: That is no number.
    """
    said = os.environ.get("WORLD_SIZE") or "1"
    if not (said.isdecimal() and int(said)):
        raise MergeError(
            f"WORLD_SIZE is '{said}', which is no number of processes.", hint="Launchers set it; unset it."
        )
    return int(said)


def require_alone(work: str) -> None:
    """Refuse several processes, each of which would do all of the work.

    Raises:
        ScoringError: Several were launched.
    """
    if (count := launched()) > 1:
        raise ScoringError(
            f"{work} is for one process, and there are {count}.",
            hint="Start it without a launcher; one process uses all cores by itself.",
        )


def in_step(lead: Callable[[ProcessGroup], _T], follow: Callable[[ProcessGroup], object]) -> _T:
    """What the first process makes, or the error of any of them: the same in all processes, when all are done.

    Args:
        lead: The first one's part.
        follow: The part of every other.

    Raises:
        SoupError: Any of the processes failed, or ended.
    """
    if launched() == 1:
        return lead(ProcessGroup())
    # What is worked with is left by whoever fails, so that the others come out of whatever they wait for.
    here, end = process_group(), process_group()
    made: _T | None = None
    failed: Exception | None = None
    try:
        try:
            if here.rank == 0:
                made = lead(here)
            else:
                follow(here)
        except Exception as error:  # noqa: BLE001 -- it is raised below, here and elsewhere
            failed = error
        finally:
            here.close()
        try:
            outcomes = end.gather((made, _told(failed, here.rank)))
        except MergeError as left:
            if failed and left.code == "left" and getattr(failed, "code", "") != "left":
                raise failed from None
            raise left from None
    finally:
        end.close()
    errors = [error for _, error in outcomes if error]
    if not errors:
        soup: _T = outcomes[0][0]
        return soup
    # That others left is a consequence of why one did.
    cause = next((error for error in errors if error.code != "left"), errors[0])
    if failed and cause is outcomes[here.rank][1]:
        raise failed
    cause.elsewhere = here.rank > 0
    raise cause


def _told(error: Exception | None, rank: int) -> SoupError | None:
    """An error as other processes are told it."""
    if error is None or isinstance(error, SoupError):
        return error
    return MergeError(
        f"Process {rank} of those that work together failed: {type(error).__name__}: {error}",
        hint="Its own traceback says where.",
    )


def process_group() -> ProcessGroup:
    """The world that Accelerate sees; a single process when none was launched.

    Whoever called for it leaves it.

    Raises:
        MergeError: Several processes are announced, but they cannot find each other: each would do all the work.
    """
    count = launched()
    if count == 1:
        return ProcessGroup()
    hint = (
        "Start them with `accelerate launch --multi_gpu --num_processes N -m hf_soup …` or "
        "`torchrun --nproc-per-node N -m hf_soup …`."
    )
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        # Without them Accelerate waits for processes that nobody starts.
        raise MergeError(f"WORLD_SIZE is {count}, but no launcher set {', '.join(missing)}.", hint=hint)
    import torch
    from accelerate import PartialState

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else Accelerate warns that it sets torch's threads, as we do
    waiting = threading.Timer(
        _SAID_AFTER,
        logger.warning,
        [
            f"waiting for the others of {count} processes. Each has to call `cook`; "
            '`cook(…, processes="main")` is for the first one alone.'
        ],
    )
    waiting.daemon = True
    waiting.start()

    def meet() -> tuple[PartialState, list[Any]]:
        # On the CPU also where there are GPUs, as the work is.
        state = PartialState(cpu=True, backend="gloo", timeout=_PATIENCE)
        if state.num_processes != count:
            raise MergeError(f"{count} processes were launched, but Accelerate sees {state.num_processes}.", hint=hint)
        # Connections of its own: those of a program that trains may be others' than gloo's, and are not ours to end.
        return state, [torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)]

    try:
        state, held = _heard(meet)
    except (RuntimeError, ValueError) as error:
        raise MergeError(f"{count} processes were launched, but they cannot meet: {error}", hint=hint) from None
    finally:
        waiting.cancel()

    def together(act: Callable[..., object], *arguments: Any) -> None:
        def met() -> bool:
            # The error is dropped: what it holds would keep the connections open, and others waiting.
            with suppress(RuntimeError):
                act(*arguments, group=held[0])
                return True
            return False

        if _heard(met):
            return
        raise MergeError(
            "Another of the processes that work together has ended early.",
            hint="Its own error says why. What is finished is kept; run the same command again.",
            code="left",
        )

    def broadcast(value: Any) -> Any:
        shared = [value]
        together(torch.distributed.broadcast_object_list, shared, 0)
        return shared[0]

    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * state.num_processes
        together(torch.distributed.all_gather_object, found, value)
        return found

    def close() -> None:
        if held:
            torch.distributed.destroy_process_group(held.pop())

    barrier = partial(together, torch.distributed.barrier)
    return ProcessGroup(state.process_index, state.num_processes, barrier, broadcast, gather, close)


def _heard(act: Callable[[], _T]) -> _T:
    """What it returns, from a thread of its own: torch waits in C++, where signals are not heard."""
    future = Future[_T]()

    def work() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # noqa: BLE001 -- it is raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result()


def close_all() -> None:
    """End the connections to the others: their threads abort a process that ends before them."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
