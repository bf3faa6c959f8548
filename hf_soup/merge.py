"""The streaming engine: read slices of every ingredient, combine, round once, hash, write; and continue.

The output is cut into units of 16 MiB, which processes and threads share out. A unit's bytes depend on the plan alone,
so neither the number of threads or processes nor the size of slices nor an interruption shows in them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_soup.collected import Collected
from hf_soup.combine import Cutoffs, combine, not_finite, unravel
from hf_soup.cutoffs import cutoffs_for
from hf_soup.digests import Blocks, digest_of, remember, stamp_of
from hf_soup.errors import MergeError, ValuesError
from hf_soup.files import ShortReadError, begin_writing, in_memory, open_file, read_all, shrunk, write_all
from hf_soup.headers import ITEM_BYTES
from hf_soup.methods import METHODS, round_into
from hf_soup.plan import Plan, PlannedTensor
from hf_soup.progress import bar
from hf_soup.reading import Buffers
from hf_soup.runs import Piece, Run, Unit
from hf_soup.staging import Finished, Staging
from hf_soup.supply import SourceFile, Supply
from hf_soup.tensors import keep_freed
from hf_soup.world import World

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

#: Elements that are combined at once: large enough that Python does not show, small enough for the cache.
SLICE_ELEMENTS = 1 << 18
#: Bytes of slices that all threads of a process hold together; with many threads or ingredients slices get smaller.
_SLICES_BYTES = 96 << 20
#: Bytes of whole tensors that all threads of a process hold together, where one of each source is not more by itself.
_TENSORS_BYTES = 1 << 30


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
    supply: Supply,
    staging: Staging,
    *,
    world: World | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> Merged:
    """Write the output files of a plan into a staging folder.

    Args:
        plan: What to write.
        supply: The sources' weight files.
        staging: Where; units that an interrupted run finished are checked again and kept.
        world: The processes that share the work.
        threads: Of this process; by default one a core, and a few more where files must come from the disk.
        quiet: No progress bar.

    Raises:
        MergeError: An ingredient holds NaN or Inf, a file is shorter than its header says, or the disk is full.
        ResolveError: A file could not be fetched.
    """
    world = world or World()
    threads = threads or _threads(supply)
    with ExitStack() as stack:
        # The threads below are the parallelism; torch's own would fight them for the cores.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        keep_freed()
        stack.enter_context(staging.disk_errors())
        if world.rank == 0:
            staging.allocate((file.name, file.header, file.size) for file in plan.files)
        world.barrier()
        outputs = [open_file(stack, staging.folder / file.name, os.O_RDWR) for file in plan.files]
        if world.rank == 0:
            staging.restart(_still_right(plan, outputs, staging.finished(), threads, quiet))
        world.barrier()
        kept = {entry.unit for entry in staging.finished()}
        # Every process must see the same journal before any of them writes to one.
        world.barrier()
        resumed = sum(plan.units[number].size for number in kept)
        stack.callback(supply.close)
        followed = [file for file in supply.files() if file.follow]
        for number, file in enumerate(followed):
            file.follow = number % world.size == world.rank
        mine = [file for file in followed if file.follow]
        fetch = sum(file.missing for file in supply.files())
        title = "Fetching and merging" if fetch else "Merging"
        with bar(title, plan.size + fetch, initial=resumed, quiet=quiet or world.rank > 0) as shown:
            supply.fetched = shown.update
            collected = stack.enter_context(closing(Collected(plan)))
            engine = _Engine(plan, supply, outputs, threads, collected, cutoffs_for(plan, supply, world, threads))
            share = _share(plan, kept, world)
            _run(engine, share, lambda entries: staging.note(world.rank, entries), threads, shown.update)
            with ThreadPoolExecutor(threads) as pool:
                hashes = list(pool.map(SourceFile.finish, mine))
        if world.size > 1:
            staging.note_hashes(world.rank, [(str(f.path), digest) for f, digest in zip(mine, hashes, strict=True)])
    world.barrier()
    if world.rank > 0:
        return Merged("", {}, 0, ())
    finished = {entry.unit: entry for entry in staging.finished()}
    missing = len(plan.units) - len(finished)
    if missing:
        raise MergeError(
            f"{missing} parts of '{staging.output.name}' were not written.",
            hint="All processes need the same file system, and the same output folder.",
        )
    for path, digest in staging.hashes():
        if path not in {file.path for file in followed}:
            continue  # the journal is a file that anyone may have written to
        # Whether a file changed meanwhile is seen by those who hold its stamp from before.
        stamp = stamp_of(path)
        remember(path, stamp, digest, since=max(stamp[3:]) + 100_000_000)
    roots = tensor_roots(plan, finished)
    differing = {number for entry in finished.values() for number in entry.differing} & set(range(len(plan.tensors)))
    return Merged(
        digest=digest_of((tensor.name, tensor.dtype, tensor.shape, roots[tensor.name]) for tensor in plan.tensors),
        roots=roots,
        resumed=resumed,
        differing=tuple(sorted(plan.tensors[number].name for number in differing)),
    )


def tensor_roots(plan: Plan, finished: Mapping[int, Finished]) -> dict[str, str]:
    """The root of every tensor, from the sha256s of the blocks of all units."""
    roots = [hashlib.sha256(b"").hexdigest()] * len(plan.tensors)
    held = b""  # of the tensor that is not complete
    for number, unit in enumerate(plan.units):
        digests = bytes.fromhex(finished[number].digests)
        for place, (tensor, block, _) in enumerate(plan.blocks_of(unit)):
            held += digests[32 * place : 32 * place + 32]
            if block + 1 == plan.tensors[tensor].blocks:
                roots[tensor] = hashlib.sha256(held).hexdigest()
                held = b""
    return {tensor.name: root for tensor, root in zip(plan.tensors, roots, strict=True)}


def merge_along(output: Path, world: World, threads: int | None) -> None:
    """The part that every process but the first has in a merge, of which the first one wrote all that is needed."""
    staging = Staging(output)
    values = staging.join()
    places = [{name: Path(path) for name, path in source.items()} for source in values["paths"]]
    stamps = {Path(path): tuple(stamp) for path, stamp in values["stamps"].items()}
    supply = Supply.here(places, {Path(path) for path in values["follow"]}, stamps)
    merge(Plan.from_dict(values["plan"]), supply, staging, world=world, threads=threads, quiet=True)


class _Engine:
    """Computes units of a plan's output from the sources' files."""

    def __init__(
        self, plan: Plan, supply: Supply, outputs: Sequence[int], threads: int, statistics: Collected,
        cutoffs: Cutoffs | None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.statistics = statistics
        self.cutoffs = cutoffs
        self.supply = supply
        self.outputs = outputs
        self.threads = threads
        self._free = _TENSORS_BYTES
        self._freed = threading.Condition()

    def write(self, number: int, buffers: Buffers) -> Finished:
        """Compute a unit and write it."""
        run = self.plan.runs[self.plan.units[number].run]
        if not run.whole:
            return self._write(number, run, buffers)
        beside = self.statistics.held_bytes(self.plan.mixing(run), self.plan.tensors[run.first].name)
        need = min(_TENSORS_BYTES, run.elements * self._bytes_each(run) + beside)
        with self._freed:
            self._freed.wait_for(lambda: self._free >= need)
            self._free -= need
        try:
            return self._write(number, run, Buffers())
        finally:
            with self._freed:
                self._free += need
                self._freed.notify_all()

    def _write(self, number: int, run: Run, buffers: Buffers) -> Finished:
        plan = self.plan
        unit = plan.units[number]
        item = ITEM_BYTES[run.dtype]
        files = [
            source[part.file] if part else None for source, part in zip(self.supply.sources, run.parts, strict=True)
        ]
        descriptors = [file.open() if file else -1 for file in files]
        output = self.outputs[run.file]
        blocks = Blocks([size for _, _, size in plan.blocks_of(unit)])
        differing: set[int] = set()
        for pieces in run.slices(unit.begin, unit.end, self._step(run)):
            begin, end = pieces[0].begin, pieces[-1].end
            read = partial(self._read, run, pieces, descriptors, buffers)
            piece, data = buffers.output((end - begin) * item, run.dtype)
            if run.averaged:
                self._combine(run, read, begin, piece)
            else:
                first, *others = read().values()
                piece.copy_(first)
                if any(not torch.equal(part, first) for part in others):
                    differing |= self._differing(run, first, others, begin)
            blocks.update(data)
            write_all(output, data, run.offset + begin * item)
        begin_writing(output, run.offset + unit.begin * item, unit.size)
        for file, part in zip(files, run.parts, strict=True):
            if file and part and not run.patched:
                file.read_up_to(part.offset + unit.end * ITEM_BYTES[part.dtype])
        return Finished(number, blocks.hex(), tuple(sorted(differing)))

    def _read(self, run: Run, pieces: Sequence[Piece], files: Sequence[int], buffers: Buffers) -> dict[int, Tensor]:
        """Pieces of a run, which lie one after the other, from all sources that have them."""
        (begin, _, sources), end = pieces[0], pieces[-1].end
        parts: dict[int, Tensor] = {}
        for source in sources:
            part = run.parts[source]
            assert part is not None, "a piece is of those that have it"
            size = ITEM_BYTES[part.dtype]
            held = Buffers() if run.whole else buffers  # whole tensors are let go one by one
            parts[source], memory = held.part(source, (end - begin) * size, part.dtype)
            try:
                for start, stop, offsets in pieces:
                    place = slice((start - begin) * size, (stop - begin) * size)
                    read_all(files[source], memory[place], offsets[source])
            except ShortReadError:
                raise shrunk(self.plan.sources[source], part.file, self._at(run, begin)[0].name) from None
        return parts

    def _step(self, run: Run) -> int:
        """How many elements to combine at once."""
        return min(SLICE_ELEMENTS, max(1 << 13, _SLICES_BYTES // (self._bytes_each(run) * self.threads)))

    def _bytes_each(self, run: Run) -> int:
        """Bytes that are held for each element that is combined."""
        wide = 4 if all(ITEM_BYTES[dtype] == 2 for dtype in run.dtypes) else 8
        # The slices themselves, the accumulator, what a method makes on the way, and the output.
        each = sum(ITEM_BYTES[dtype] for dtype in run.dtypes) + 3 * wide
        each += len(run.parts) * wide if self.plan.with_base else 0  # task vectors
        each += len(run.parts) * 8 if self._hides(run) else 0  # random numbers, masks
        return each

    def _at(self, run: Run, element: int) -> tuple[PlannedTensor, int]:
        """The tensor of an element of a run, and which of its elements that is."""
        tensors = self.plan.tensors
        offset = run.offset + element * ITEM_BYTES[run.dtype]
        number = bisect_right(tensors, offset, run.first, run.stop, key=lambda tensor: tensor.offset) - 1
        return tensors[number], (offset - tensors[number].offset) // ITEM_BYTES[run.dtype]

    def _differing(self, run: Run, first: Tensor, others: Sequence[Tensor], begin: int) -> set[int]:
        """Numbers of the tensors on which a slice of the sources disagrees."""
        found, length = set(), len(first)
        for number in range(run.first, run.stop):
            tensor = self.plan.tensors[number]
            start = (tensor.offset - run.offset) // ITEM_BYTES[run.dtype] - begin
            low, high = max(0, start), min(length, start + tensor.elements)
            if low < high and any(not torch.equal(part[low:high], first[low:high]) for part in others):
                found.add(number)
        return found

    def _combine(self, run: Run, read: Callable[[], dict[int, Tensor]], begin: int, piece: Tensor) -> None:
        parts = read()
        # What is trimmed or decomposed does not show every NaN.
        hidden = self._hides(run) and not all(_fits(part, torch.float64) for part in parts.values())
        mixed = self._mixed(run, parts, begin, release=run.whole)
        if hidden or not _fits(mixed, piece.dtype):
            mixed = self._settle(run, read(), begin, piece.dtype, mixed)
        round_into(mixed, piece)

    def _hides(self, run: Run) -> bool:
        method = METHODS[self.plan.mixing(run).method]
        return bool(method.given) or not method.elementwise

    def _mixed(self, run: Run, parts: dict[int, Tensor], begin: int, *, release: bool = False) -> Tensor:
        shares, every = dict(enumerate(self.plan.shares(run))), range(len(self.plan.sources))
        return combine(
            self.plan, run, parts, shares,
            mixed=every, begin=begin, cutoffs=self.cutoffs, statistics=self.statistics, release=release,
        )  # fmt: skip

    def _settle(self, run: Run, parts: dict[int, Tensor], begin: int, dtype: torch.dtype, mixed: Tensor) -> Tensor:
        """Tell what is wrong with a slice that holds NaN or Inf, or give the result where nothing is."""
        first = next(iter(parts.values()))
        infinite = [part.isinf() & (part.to(first.dtype) == first) for part in parts.values()]
        shared = torch.stack(infinite).all(0)
        for source, part in parts.items():
            label = self.plan.sources[source]
            bad = ~(part.isfinite() | shared)
            if bad.any():
                index = int(bad.nonzero()[0])
                tensor, place = self._at(run, begin + index)
                raise not_finite(label, tensor.name, part[index].item(), place, tensor.shape)
        if self._hides(run) and shared.any():
            parts = {source: part.masked_fill(shared, 0.0) for source, part in parts.items()}
            mixed = self._mixed(run, parts, begin)
        fine = mixed.isfinite() | shared
        if mixed.dtype == torch.float32 and not fine.all():
            # Finite numbers whose sum is too large for float32: those, and no others, are added up in float64, so
            # that no entry's bits depend on the slice that it is in.
            wide = self._mixed(run, {source: part.double() for source, part in parts.items()}, begin)
            mixed = torch.where(fine, mixed.double(), wide)
        # Where all have the same infinity it stays, also where a share is so small that their sum is no number.
        mixed = torch.where(shared, first.to(mixed.dtype), mixed)
        rounded = torch.empty_like(mixed, dtype=dtype)
        round_into(mixed, rounded)
        lost = ~(rounded.isfinite() | shared)
        if lost.any():
            index = int(lost.nonzero()[0])
            tensor, place = self._at(run, begin + index)
            raise ValuesError(
                f"'{tensor.name}' at {unravel(place, tensor.shape)} would be {mixed[index].item():g}, "
                f"which {str(dtype).removeprefix('torch.')} cannot hold.",
                hint="Set `dtype: bfloat16` or `dtype: float32` in the recipe.",
            )
        return mixed


def _fits(mixed: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number is finite and stays so in ``dtype``; one pass, as NaN passes through min and max."""
    low, high = mixed.aminmax()
    # As Python's numbers: in a float32 tensor's comparison the largest float64 would be infinity, which Inf equals.
    return -torch.finfo(dtype).max <= low.item() and high.item() <= torch.finfo(dtype).max


def _run(
    engine: _Engine,
    share: Sequence[int],
    note: Callable[[Sequence[Finished]], None],
    threads: int,
    progress: Callable[[int], object],
) -> None:
    """Compute units on several threads; when one fails, the others stop after theirs."""
    supply, units = engine.supply, engine.plan.units
    numbers = {units[number]: number for number in share}
    written: dict[Unit, Finished] = {}

    def work() -> None:
        buffers = Buffers()
        while (unit := supply.take()) is not None:
            written[unit] = engine.write(numbers[unit], buffers)
            sure = supply.done(unit)
            note([written.pop(each) for each in sure])
            progress(unit.size)

    supply.begin(engine.plan, [units[number] for number in share])
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work) for _ in range(threads)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            note([written.pop(each) for each in supply.wait()])
        finally:
            supply.stop()


def _threads(supply: Supply) -> int:
    """One a core; where these would wait for the disk, a few more that compute meanwhile."""
    here = [file.path for file in supply.files() if file.right and file.path and file.path.exists()]
    slow = any(not in_memory(path) for path in here[:: max(1, len(here) // 16)])
    return len(os.sched_getaffinity(0)) + (4 if slow else 0)


def _share(plan: Plan, kept: AbstractSet[int], world: World) -> list[int]:
    """Numbers of the units that this process does: as many bytes as every other's, one after the other."""
    todo = [number for number in range(len(plan.units)) if number not in kept]
    total = sum(plan.units[number].size for number in todo)
    low, high = total * world.rank // world.size, total * (world.rank + 1) // world.size
    share, position = [], 0
    for number in todo:
        if low <= position < high:
            share.append(number)
        position += plan.units[number].size
    return share


def _still_right(
    plan: Plan, outputs: Sequence[int], finished: Iterator[Finished], threads: int, quiet: bool
) -> list[Finished]:
    """The finished units whose bytes still have the sha256s that were noted."""
    entries = [entry for entry in dict.fromkeys(finished) if 0 <= entry.unit < len(plan.units)]
    total = sum(plan.units[entry.unit].size for entry in entries)

    def check(entry: Finished) -> bool:
        unit = plan.units[entry.unit]
        run = plan.runs[unit.run]
        offset = run.offset + unit.begin * ITEM_BYTES[run.dtype]
        found = []
        for _, _, size in plan.blocks_of(unit):
            found.append(hashlib.sha256(os.pread(outputs[run.file], size, offset)).hexdigest())
            offset += size
        shown.update(unit.size)
        return "".join(found) == entry.digests

    with bar("Checking what is finished", total, quiet=quiet) as shown, ThreadPoolExecutor(threads) as pool:
        return [entry for entry, right in zip(entries, pool.map(check, entries), strict=True) if right]
