"""The streaming engine: read slices of every ingredient, combine, round once, write, hash; and continue.

Work is cut into blocks of the output (4 MiB), which threads and processes share out by byte range. A block's
bytes depend on the plan alone, so neither the number of threads or processes nor an interruption shows in them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from hf_soup.errors import MergeError
from hf_soup.files import TORCH, bytes_of, open_file, read_all, write_all
from hf_soup.headers import ITEM_BYTES, TensorInfo
from hf_soup.methods import METHODS, round_into
from hf_soup.plan import BLOCK_BYTES, Plan, PlannedTensor
from hf_soup.staging import Block, Staging

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

#: Elements that are combined at once: large enough that Python does not show, small enough for the cache.
SLICE_ELEMENTS = 1 << 18
#: Most bytes of output that one thread finishes before it notes them.
_UNIT_BYTES = 64 << 20


@dataclass(frozen=True)
class World:
    """The processes that merge together: this one's number, how many, and how to wait for all."""

    rank: int = 0
    size: int = 1
    barrier: Callable[[], None] = field(default=lambda: None, repr=False)


def world() -> World:
    """The world that Accelerate sees; a single process when none was launched.

    Raises:
        MergeError: Several processes are announced, but they cannot find each other: each would do all the work.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched == 1:
        return World()
    hint = (
        "Start them with `accelerate launch --multi_gpu --num_processes N -m hf_soup …` or "
        "`torchrun --nproc-per-node N -m hf_soup …`."
    )
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        # Without them Accelerate waits for processes that nobody starts.
        raise MergeError(f"WORLD_SIZE is {launched}, but no launcher set {', '.join(missing)}.", hint=hint)
    from accelerate import PartialState

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else Accelerate warns that it sets torch's threads, as we do
    try:
        # On the CPU also where there are GPUs, as the work is.
        state = PartialState(cpu=True, backend="gloo")
    except (RuntimeError, ValueError) as error:
        raise MergeError(f"{launched} processes were launched, but they cannot meet: {error}", hint=hint) from None
    if state.num_processes != launched:
        raise MergeError(f"{launched} processes were launched, but Accelerate sees {state.num_processes}.", hint=hint)

    def barrier() -> None:
        try:
            # Accelerate's own gives up after half an hour; the first process may download and score for longer.
            torch.distributed.monitored_barrier(timeout=timedelta(days=30))
        except RuntimeError:
            raise MergeError(
                "Another of the processes that merge together has ended early.",
                hint="Its own error says why. What is finished is kept; run the same command again.",
            ) from None

    return World(state.process_index, state.num_processes, barrier)


@dataclass(frozen=True)
class Merged:
    """What a merge leaves behind.

    Args:
        digest: Over all tensors: sha256 of the lines ``name dtype shape root`` in name order, ``root`` the sha256
            of the concatenated sha256s of a tensor's 4 MiB blocks.
        roots: ``root`` of every tensor.
        resumed: Bytes that an interrupted run had already written.
        differing: Integer and boolean tensors on which the sources disagree; the first source's were kept.
    """

    digest: str
    roots: Mapping[str, str] = field(repr=False)
    resumed: int
    differing: tuple[str, ...]


def merge(
    plan: Plan,
    paths: Sequence[Mapping[str, Path]],
    staging: Staging,
    *,
    world: World | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> Merged:
    """Write the output files of a plan into a staging folder.

    Args:
        plan: What to write.
        paths: For every source, its weight files on this machine.
        staging: Where; blocks that an interrupted run finished are checked again and kept.
        world: The processes that share the work.
        threads: Of this process; by default one a core.
        quiet: No progress bar.

    Raises:
        MergeError: An ingredient holds NaN or Inf, a file is shorter than its header says, or the disk is full.
    """
    world = world or World()
    threads = threads or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        # The threads below are the parallelism; torch's own would fight them for the cores.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(staging.disk_errors())
        if world.rank == 0:
            staging.allocate((file.name, file.header, file.size) for file in plan.files)
        world.barrier()
        outputs = [open_file(stack, staging.folder / file.name, os.O_RDWR) for file in plan.files]
        inputs = [{file: open_file(stack, path) for file, path in source.items()} for source in paths]
        if world.rank == 0:
            staging.restart(_still_right(plan, outputs, staging.finished(), threads))
        world.barrier()
        kept = {(tensor, block) for tensor, block, _ in staging.finished()}
        # Every process must see the same journal before any of them writes to one.
        world.barrier()
        resumed = sum(_block_bytes(plan.tensors[tensor], block) for tensor, block in kept)
        engine = _Engine(plan, inputs, outputs)
        bar = tqdm(
            total=plan.size,
            initial=resumed,
            unit="B",
            unit_scale=True,
            desc="Merging",
            disable=True if quiet or world.rank > 0 else None,
            leave=False,
        )
        with bar:
            _run(engine, _units(plan, kept, world, threads), partial(staging.note, world.rank), threads, bar.update)
    world.barrier()
    if world.rank > 0:
        return Merged("", {}, 0, ())
    blocks = {(tensor, block): digest for tensor, block, digest in staging.finished()}
    missing = sum(tensor.blocks for tensor in plan.tensors) - len(blocks)
    if missing:
        raise MergeError(
            f"{missing} blocks of '{staging.output.name}' were not written.",
            hint="All processes need the same file system, and the same output folder.",
        )
    roots = tensor_roots(plan, blocks)
    return Merged(
        digest=digest_of((tensor.name, tensor.dtype, tensor.shape, roots[tensor.name]) for tensor in plan.tensors),
        roots=roots,
        resumed=resumed,
        differing=tuple(sorted(engine.differing)),
    )


def tensor_roots(plan: Plan, blocks: Mapping[tuple[int, int], str]) -> dict[str, str]:
    """The root of every tensor, from the sha256s of its blocks."""
    return {
        tensor.name: hashlib.sha256(
            b"".join(bytes.fromhex(blocks[number, block]) for block in range(tensor.blocks))
        ).hexdigest()
        for number, tensor in enumerate(plan.tensors)
    }


def digest_of(tensors: Iterator[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The digest of a soup from ``(name, dtype, shape, root)`` of its tensors.

    >>> digest_of(iter([]))
    'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    lines = sorted((name, f"{name} {dtype} {list(shape)} {root}\n") for name, dtype, shape, root in tensors)
    return hashlib.sha256("".join(line for _, line in lines).encode()).hexdigest()


class _Engine:
    """Computes blocks of a plan's output from open files."""

    def __init__(self, plan: Plan, inputs: Sequence[Mapping[str, int]], outputs: Sequence[int]) -> None:
        self.plan = plan
        self.inputs = inputs
        self.outputs = outputs
        self.method = METHODS[plan.method]
        self.differing: set[str] = set()

    def write(self, number: int, block: int, buffers: _Buffers) -> str:
        """Compute a block, write it, and return its sha256."""
        tensor = self.plan.tensors[number]
        item = ITEM_BYTES[tensor.dtype]
        start = block * BLOCK_BYTES // item
        stop = min(tensor.elements, start + BLOCK_BYTES // item)
        out = buffers.output((stop - start) * item).view(TORCH[tensor.dtype])
        step = min(SLICE_ELEMENTS, max(1 << 14, (1 << 22) // len(tensor.parts)))
        for begin in range(start, stop, step):
            end = min(stop, begin + step)
            parts = [
                self._read(source, part, begin, end, buffers.part(source, (end - begin) * ITEM_BYTES[part.dtype]))
                for source, part in enumerate(tensor.parts)
            ]
            piece = out[begin - start : end - start]
            if tensor.averaged:
                self._combine(tensor, parts, begin, piece)
            else:
                piece.copy_(parts[0])
                if any(not torch.equal(part, parts[0]) for part in parts[1:]):
                    self.differing.add(tensor.name)
        data = bytes_of(out.view(torch.uint8))
        write_all(self.outputs[tensor.file], data, tensor.offset + block * BLOCK_BYTES)
        return hashlib.sha256(data).hexdigest()

    def _combine(self, tensor: PlannedTensor, parts: list[Tensor], begin: int, piece: Tensor) -> None:
        mixed = self.method.function(parts, self.plan.weights, **self.plan.parameters)
        if not _fits(mixed, piece.dtype):
            mixed = self._settle(tensor, parts, begin, piece.dtype, mixed)
        round_into(mixed, piece)

    def _settle(
        self, tensor: PlannedTensor, parts: list[Tensor], begin: int, dtype: torch.dtype, mixed: Tensor
    ) -> Tensor:
        """Tell what is wrong with a slice that holds NaN or Inf, or give the result where nothing is."""
        infinite = [part.isinf() & (part.to(parts[0].dtype) == parts[0]) for part in parts]
        shared = torch.stack(infinite).all(0)
        for label, part in zip(self.plan.sources, parts, strict=True):
            bad = ~(part.isfinite() | shared)
            if bad.any():
                index = int(bad.nonzero()[0])
                raise not_finite(label, tensor.name, part[index].item(), begin + index, tensor.shape)
        fine = mixed.isfinite() | shared
        if mixed.dtype == torch.float32 and not fine.all():
            # Finite numbers whose sum is too large for float32: those, and no others, are added up in float64, so
            # that no entry's bits depend on the slice that it is in.
            wide = self.method.function([part.double() for part in parts], self.plan.weights, **self.plan.parameters)
            mixed = torch.where(fine, mixed.double(), wide)
        # Where all have the same infinity it stays, also where a share is so small that their sum is no number.
        mixed = torch.where(shared, parts[0].to(mixed.dtype), mixed)
        rounded = torch.empty_like(mixed, dtype=dtype)
        round_into(mixed, rounded)
        lost = ~(rounded.isfinite() | shared)
        if lost.any():
            index = int(lost.nonzero()[0])
            raise MergeError(
                f"'{tensor.name}' at {_unravel(begin + index, tensor.shape)} would be {mixed[index].item():g}, "
                f"which {str(dtype).removeprefix('torch.')} cannot hold.",
                hint="Set `dtype: bfloat16` or `dtype: float32` in the recipe.",
            )
        return mixed

    def _read(self, source: int, part: TensorInfo, begin: int, end: int, buffer: Tensor) -> Tensor:
        item = ITEM_BYTES[part.dtype]
        read_all(self.inputs[source][part.file], buffer, part.offset + begin * item, self.plan.sources[source], part)
        return buffer.view(TORCH[part.dtype])


class _Buffers:
    """Memory that a thread reads into and writes from, again and again."""

    def __init__(self) -> None:
        self._parts: dict[int, Tensor] = {}
        self._output = torch.empty(BLOCK_BYTES, dtype=torch.uint8)

    def output(self, size: int) -> Tensor:
        return self._output[:size]

    def part(self, source: int, size: int) -> Tensor:
        held = self._parts.get(source)
        if held is None or held.numel() < size:
            held = self._parts[source] = torch.empty(size, dtype=torch.uint8)
        return held[:size]


def _fits(mixed: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number is finite and stays so in ``dtype``; one pass, as NaN passes through min and max."""
    low, high = mixed.aminmax()
    # As Python's numbers: in a float32 tensor's comparison the largest float64 would be infinity, which Inf equals.
    return -torch.finfo(dtype).max <= low.item() and high.item() <= torch.finfo(dtype).max


def _run(
    engine: _Engine,
    units: Sequence[Sequence[tuple[int, int]]],
    note: Callable[[Sequence[Block]], None],
    threads: int,
    progress: Callable[[int], object],
) -> None:
    """Compute all units on several threads; when one fails, the others stop after their block."""
    todo = deque(units)
    stopped = threading.Event()

    def work() -> None:
        buffers = _Buffers()
        while todo and not stopped.is_set():
            try:
                unit = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            done: list[Block] = []
            try:
                for number, block in unit:
                    if stopped.is_set():
                        return
                    done.append((number, block, engine.write(number, block, buffers)))
                    progress(_block_bytes(engine.plan.tensors[number], block))
            finally:
                if done:
                    note(done)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
        for future in done:
            future.result()


def _units(plan: Plan, kept: AbstractSet[tuple[int, int]], world: World, threads: int) -> list[list[tuple[int, int]]]:
    """This process's share of the blocks that are to be done, in runs that a thread finishes at a time."""
    todo = [
        (number, block)
        for number, tensor in enumerate(plan.tensors)
        for block in range(tensor.blocks)
        if (number, block) not in kept
    ]
    sizes = [_block_bytes(plan.tensors[number], block) for number, block in todo]
    total = sum(sizes)
    unit_bytes = min(_UNIT_BYTES, max(BLOCK_BYTES, total // (world.size * threads * 8)))
    low, high = total * world.rank // world.size, total * (world.rank + 1) // world.size
    units: list[list[tuple[int, int]]] = [[]]
    position = held = 0
    for entry, size in zip(todo, sizes, strict=True):
        # The first process does all that is not averaged, because it reports where the sources disagree.
        if low <= position < high if plan.tensors[entry[0]].averaged else world.rank == 0:
            if units[-1] and held + size > unit_bytes:
                units.append([])
                held = 0
            units[-1].append(entry)
            held += size
        position += size
    return units


def _still_right(plan: Plan, outputs: Sequence[int], finished: Iterator[Block], threads: int) -> list[Block]:
    """The finished blocks whose bytes still have the sha256 that was noted."""

    def check(entry: Block) -> bool:
        number, block, noted = entry
        if not (0 <= number < len(plan.tensors) and 0 <= block < plan.tensors[number].blocks):
            return False
        tensor = plan.tensors[number]
        if not tensor.averaged:
            return False  # small, and done again to see whether the sources agree
        data = os.pread(outputs[tensor.file], _block_bytes(tensor, block), tensor.offset + block * BLOCK_BYTES)
        return hashlib.sha256(data).hexdigest() == noted

    entries = list(dict.fromkeys(finished))
    with ThreadPoolExecutor(threads) as pool:
        return [entry for entry, right in zip(entries, pool.map(check, entries), strict=True) if right]


def _block_bytes(tensor: PlannedTensor, block: int) -> int:
    return min(BLOCK_BYTES, tensor.size - block * BLOCK_BYTES)


def not_finite(label: str, tensor: str, value: float, index: int, shape: tuple[int, ...]) -> MergeError:
    """The error for a number of an ingredient that cannot be averaged; ``index`` counts in the flat tensor."""
    return MergeError(
        f"'{tensor}' of {label} holds {value} at {_unravel(index, shape)}.",
        hint="That model is broken, most likely by a training run that diverged; leave it out.",
    )


def _unravel(index: int, shape: tuple[int, ...]) -> str:
    place: list[int] = []
    for length in reversed(shape):
        place.append(index % length)
        index //= length
    return f"[{', '.join(str(number) for number in reversed(place))}]"
