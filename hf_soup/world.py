"""The processes that merge and score together, as Accelerate sees them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

from hf_soup.errors import MergeError, ScoringError

#: torch gives up after half an hour; the first process may download for longer while the others wait.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """The processes that work together.

    Args:
        rank: This one's number.
        size: How many there are.
        barrier: Waits for all.
        share: Gives all what the first one gives.
        gather: Gives all what each gives, in their order.
    """

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = field(default=lambda: None, repr=False)
    share: Callable[[Any], Any] = field(default=lambda value: value, repr=False)
    gather: Callable[[Any], list[Any]] = field(default=lambda value: [value], repr=False)


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


def world() -> World:
    """The world that Accelerate sees; a single process when none was launched.

    Raises:
        MergeError: Several processes are announced, but they cannot find each other: each would do all the work.
    """
    count = launched()
    if count == 1:
        return World()
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
    try:
        # On the CPU also where there are GPUs, as the work is.
        state = PartialState(cpu=True, backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise MergeError(f"{count} processes were launched, but they cannot meet: {error}", hint=hint) from None
    if state.num_processes != count:
        raise MergeError(f"{count} processes were launched, but Accelerate sees {state.num_processes}.", hint=hint)

    def together(act: Callable[..., object], *arguments: Any, **options: Any) -> None:
        try:
            act(*arguments, **options)
        except RuntimeError:
            raise MergeError(
                "Another of the processes that work together has ended early.",
                hint="Its own error says why. What is finished is kept; run the same command again.",
            ) from None

    def share(value: Any) -> Any:
        held = [value]
        together(torch.distributed.broadcast_object_list, held)
        return held[0]

    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * state.num_processes
        together(torch.distributed.all_gather_object, found, value)
        return found

    barrier = partial(together, torch.distributed.monitored_barrier, timeout=_PATIENCE)
    return World(state.process_index, state.num_processes, barrier, share, gather)


def leave() -> None:
    """End the connections to the others: their threads abort a process that ends before them."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
