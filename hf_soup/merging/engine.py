"""Units of the output from the sources' files: read slices of every ingredient, combine, round once, hash, write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_soup._util.io import ShortReadError, begin_writing, open_file, read_all, shrunk, write_all
from hf_soup.checkpoint import ITEM_BYTES, TORCH, bytes_of, widened
from hf_soup.errors import ValuesError
from hf_soup.merging.arithmetic import (
    Aids,
    all_finite,
    combine,
    fits,
    measured,
    not_finite,
    shared_infinity,
    tensor_at,
    unravel,
    vectors,
)
from hf_soup.merging.digest import Blocks
from hf_soup.merging.layout import Layout, Run, Segment
from hf_soup.merging.low_rank import LowRankProducts, ProductError
from hf_soup.merging.plan import Plan
from hf_soup.merging.weight_files import WeightFiles
from hf_soup.merging.workspace import CompletedUnit
from hf_soup.methods import METHODS, Slices, round_into


class Buffers:
    """Memory that a thread reads into and writes from, again and again."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self.products = LowRankProducts()

    def part(self, source: int, size: int, dtype: str) -> tuple[Tensor, memoryview]:
        """``size`` bytes for a source, as elements and as memory."""
        held = self._held.get(source)
        if held is None or held.numel() < size:
            held = self._held[source] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(TORCH[dtype]), bytes_of(held[:size])

    def output(self, size: int, dtype: str) -> tuple[Tensor, memoryview]:
        """The same for what is written."""
        return self.part(-1, size, dtype)


class Reading:
    """The sources of a layout, opened.

    Args:
        layout: Names, shapes and places.
        paths: For every source, its weight files on this machine.
    """

    def __init__(self, layout: Layout, paths: Sequence[Mapping[str, Path]]) -> None:
        self._layout = layout
        self._stack = ExitStack()
        self._files = [{file: open_file(self._stack, path) for file, path in source.items()} for source in paths]
        self._mine = threading.local()

    @property
    def _products(self) -> LowRankProducts:
        """Of this thread."""
        if not hasattr(self._mine, "products"):
            self._mine.products = LowRankProducts()
        products: LowRankProducts = self._mine.products
        return products

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, run: Run, segment: Segment, source: int) -> Tensor:
        """A segment of a run as a source that has it stores it, flat, or as float64 where that is written; of an
        adapter as `LowRankProducts.added`.

        Raises:
            MergeError: The file is shorter than its header says, or NaN is among the elements.
        """
        at = segment.extents[source]
        assert at is not None, "only those that have it are asked"
        try:
            values = self._stored(source, segment)
            if at.update:
                files = self._files[source]
                values = self._products.added(values, at, run.dtype, files[at.file], files[at.update.file])
        except ShortReadError:
            name = self._layout.tensors[run.first].name
            raise shrunk(self._layout.labels[source], at.file, name) from None
        except ProductError:
            raise _infinite(self._layout, run, source) from None
        if values.is_floating_point() and values.aminmax().min.isnan():
            # Named here, where it is known whose it is; as a model's answer it would only be "not a number".
            index = int(values.isnan().nonzero()[0]) + segment.begin
            raise not_finite(self._layout, run, [source], index, float("nan"))
        return widened(values, run.dtype)

    def mean(self, plan: Plan, run: Run, pieces: Sequence[Segment], groups: Sequence[Sequence[int]]) -> Tensor | None:
        """As `LowRankProducts.mean`; None where that fails or is not finite: who reads one by one says whose it is."""
        try:
            mixed = self._products.mean(
                plan, run, pieces, groups, self._stored, lambda source, file: self._files[source][file]
            )
        except (ShortReadError, ProductError):
            return None
        return mixed if mixed.isfinite().all() else None

    def _stored(self, source: int, segment: Segment) -> Tensor:
        """A segment as it is stored, without what an adapter adds."""
        at = segment.extents[source]
        assert at is not None, "only those that have it are asked"
        values = torch.empty(segment.end - segment.begin, dtype=TORCH[at.dtype])
        read_all(self._files[source][at.file], bytes_of(values.view(torch.uint8)), at.offset)
        return values


#: Elements that are combined at once: large enough that Python does not show, small enough for the cache.
SLICE_ELEMENTS = 1 << 18
#: Bytes of slices that all threads of a process hold together; with many threads or ingredients slices get smaller.
_SLICES_BYTES = 96 << 20
#: Bytes of whole tensors that all threads of a process hold together, where one of each source is not more by itself.
_TENSORS_BYTES = 1 << 30


class Engine:
    """Computes units of a plan's output from the sources' files."""

    def __init__(self, plan: Plan, supply: WeightFiles, outputs: Sequence[int], threads: int, aids: Aids) -> None:
        self.plan = plan
        self.aids = aids
        self.supply = supply
        self.outputs = outputs
        self.threads = threads
        self._free = _TENSORS_BYTES
        self._freed = threading.Condition()

    def write(self, number: int, buffers: Buffers) -> CompletedUnit:
        """Compute a unit and write it."""
        run = self.plan.runs[self.plan.units[number].run]
        if not self.at_once(run):
            return self._write(number, run, buffers)
        tensor = self.plan.layout.tensors[run.first].name
        beside = self.aids.statistics.held_bytes(self.plan.method_of(run), tensor)
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

    def _write(self, number: int, run: Run, buffers: Buffers) -> CompletedUnit:
        plan = self.plan
        unit = plan.units[number]
        item = ITEM_BYTES[run.dtype]
        output = self.outputs[run.file]
        blocks = Blocks([size for _, _, size in plan.blocks_of(unit)])
        differ = False
        known = self._measured(run, buffers)
        for pieces in run.slices(unit.begin, unit.end, self._step(run), across=plan.is_whole(run)):
            begin, end = pieces[0].begin, pieces[-1].end
            read = partial(self._read, run, pieces, buffers)
            together = self._together(run, pieces, buffers)
            piece, data = buffers.output((end - begin) * item, run.dtype)
            if run.averaged:
                self._combine(run, read, begin, piece, known, together)
            else:
                first, *others = read().values()
                piece.copy_(first)
                differ = differ or any(not torch.equal(part, first) for part in others)
            blocks.update(data)
            write_all(output, data, run.offset + begin * item)
        begin_writing(output, run.offset + unit.begin * item, unit.size)
        return CompletedUnit(number, blocks.hex(), (run.first,) if differ else ())

    def follow(self, number: int) -> None:
        """Hash the sources' files up to where a unit, which was written just now, has read them."""
        unit = self.plan.units[number]
        run = self.plan.runs[unit.run]
        if run.patched:
            return
        for source, (name, stop) in run.needs(unit.end).items():
            file = self.supply.sources[source][name]
            if file.follow:
                file.hasher().follow(stop)

    def _read(self, run: Run, pieces: Sequence[Segment], buffers: Buffers) -> dict[int, Tensor]:
        """Pieces of a run, which lie one after the other, from all sources that they are made of."""
        begin, end = pieces[0].begin, pieces[-1].end
        parts: dict[int, Tensor] = {}
        for source in self.plan.sources_of(run, pieces[0]):
            held = Buffers() if self.at_once(run) else buffers  # whole tensors are let go one by one
            memory: memoryview | None = None
            made: list[Tensor] = []
            for piece in pieces:
                at = piece.extents[source]
                assert at is not None, "pieces that are read together are of the same sources"
                size = ITEM_BYTES[at.dtype]
                if memory is None:
                    parts[source], memory = held.part(source, (end - begin) * size, at.dtype)
                try:
                    place = slice((piece.begin - begin) * size, (piece.end - begin) * size)
                    stored = self.supply.sources[source][at.file].open()
                    read_all(stored, memory[place], at.offset)
                    if at.update:
                        values = parts[source][piece.begin - begin : piece.end - begin]
                        factors = self.supply.sources[source][at.update.file].open()
                        made.append(buffers.products.added(values, at, run.dtype, stored, factors))
                except ShortReadError:
                    name = tensor_at(self.plan.layout, run, begin)[0].name
                    raise shrunk(self.plan.layout.labels[source], at.file, name) from None
                except ProductError:
                    raise _infinite(self.plan.layout, run, source) from None
            if made:
                parts[source] = made[0] if len(made) == 1 else torch.cat(made)
        return {source: widened(part, run.dtype) for source, part in parts.items()}

    def _together(self, run: Run, pieces: Sequence[Segment], buffers: Buffers) -> Tensor | None:
        """The mean of adapters that are read together, where there are such and it can be written."""
        groups = self.plan.groups(run, pieces[0])
        if not groups:
            return None

        def stored(source: int, piece: Segment) -> Tensor:
            at = piece.extents[source]
            assert at is not None, "groups are of those that have it"
            values, memory = buffers.part(source, (piece.end - piece.begin) * ITEM_BYTES[at.dtype], at.dtype)
            read_all(self.supply.sources[source][at.file].open(), memory, at.offset)
            return values

        def opened(source: int, file: str) -> int:
            return self.supply.sources[source][file].open()

        try:
            mixed = buffers.products.mean(self.plan, run, pieces, groups, stored, opened)
        except (ShortReadError, ProductError):
            return None  # read again, one by one, it is said whose file that is
        return mixed if fits(mixed, TORCH[run.dtype]) else None

    def _step(self, run: Run) -> int:
        """How many elements to combine at once."""
        if self.at_once(run):
            return run.elements
        return min(SLICE_ELEMENTS, max(1 << 13, _SLICES_BYTES // (self._bytes_each(run) * self.threads)))

    def _bytes_each(self, run: Run) -> int:
        """Bytes that are held for each element that is combined."""
        wide = 4 if run.dtype != "F64" and all(ITEM_BYTES[dtype] == 2 for dtype in run.dtypes) else 8
        # The slices themselves, the accumulator, what a method makes on the way, and the output.
        each = sum(ITEM_BYTES[dtype] for dtype in run.dtypes) + 3 * wide
        sources = len(self.plan.layout.labels)
        each += sources * wide if self.plan.layout.base is not None else 0  # task vectors
        each += sources * 8 if self._hides(run) else 0  # random numbers, masks
        return each

    def _measured(self, run: Run, buffers: Buffers) -> Mapping[str, object] | None:
        """What the method of a run wants to know of its whole tensor, where it is then combined slice by slice."""
        if not self.plan.is_whole(run) or self.at_once(run):
            return None

        def read(begin: int, end: int) -> Tensor:
            parts = self._read(run, list(run.pieces(begin, end)), buffers)
            if not _modest(parts):
                shared = shared_infinity(self.plan.layout, run, parts, begin)
                parts = _with_room({source: part.masked_fill(shared, 0.0) for source, part in parts.items()})
            found, _ = vectors(self.plan, run, parts)
            return found if isinstance(found, Tensor) else torch.stack(list(found))

        weights = list(self.plan.weights_of(run).values())
        return measured(self.plan, run, Slices(read, len(weights), run.elements), weights)

    def _combine(
        self,
        run: Run,
        read: Callable[[], dict[int, Tensor]],
        begin: int,
        piece: Tensor,
        known: Mapping[str, object] | None,
        together: Tensor | None,
    ) -> None:
        if together is not None:
            round_into(together, piece)
            return
        parts = read()
        at_once = self.at_once(run)
        # What is trimmed does not show every NaN, and what is decomposed may hold none.
        if self._hides(run) and not all_finite(parts):
            mixed = self._settle(run, parts, begin, piece.dtype, known)
        else:
            parts = _with_room(parts) if at_once else parts
            mixed = combine(self.plan, run, parts, self.aids, begin=begin, known=known, release=at_once)
            if not fits(mixed, piece.dtype):
                mixed = self._settle(run, read(), begin, piece.dtype, known)
        round_into(mixed, piece)

    def at_once(self, run: Run) -> bool:
        """Whether the method wants its tensor in one piece."""
        return self.plan.is_whole(run) and not METHODS[self.plan.method_of(run).method].elementwise

    def _hides(self, run: Run) -> bool:
        method = METHODS[self.plan.method_of(run).method]
        return bool(method.given) or not method.elementwise

    def _settle(
        self, run: Run, parts: dict[int, Tensor], begin: int, dtype: torch.dtype, known: Mapping[str, object] | None
    ) -> Tensor:
        """Tell what is wrong with a slice that holds NaN or Inf, or give the result where nothing is."""
        first, shared = next(iter(parts.values())), shared_infinity(self.plan.layout, run, parts, begin)
        parts = {source: part.masked_fill(shared, 0.0) for source, part in parts.items()}
        parts = _with_room(parts) if self.at_once(run) else parts
        mixed = combine(self.plan, run, parts, self.aids, begin=begin, known=known)
        fine = mixed.isfinite()
        if mixed.dtype == torch.float32 and not fine.all():
            # Finite numbers whose sum is too large for float32: those, and no others, are added up in float64, so
            # that no entry's bits depend on the slice that it is in.
            wide = {source: part.double() for source, part in parts.items()}
            mixed = torch.where(
                fine, mixed.double(), combine(self.plan, run, wide, self.aids, begin=begin, known=known)
            )
        mixed = torch.where(shared, first.to(mixed.dtype), mixed)
        rounded = torch.empty_like(mixed, dtype=dtype)
        round_into(mixed, rounded)
        lost = ~(rounded.isfinite() | shared)
        if lost.any():
            index = int(lost.nonzero()[0])
            tensor, place = tensor_at(self.plan.layout, run, begin + index)
            raise ValuesError(
                f"'{tensor.name}' at {unravel(place, tensor.shape)} would be {mixed[index].item():g}, "
                f"which {str(dtype).removeprefix('torch.')} cannot hold.",
                hint="Set `dtype: bfloat16` or `dtype: float32` in the recipe."
                if dtype == torch.float16
                else "Give the method smaller numbers, as its `scale`, or the ingredients smaller weights.",
                code="overflow",
            )
        return mixed


def _infinite(layout: Layout, run: Run, source: int) -> ValuesError:
    label = layout.labels[source]
    return ValuesError(
        f"What the adapter {label} adds to '{layout.tensors[run.first].name}' is not finite.",
        hint="Its factors hold NaN or Inf, or are too large; leave it out.",
        code="not-finite",
        subjects=[label],
    )


def _modest(parts: Mapping[int, Tensor]) -> bool:
    """Whether float32 can hold all differences between them."""
    return all(fits(part, torch.float32, of=0.5) for part in parts.values())


def _with_room(parts: dict[int, Tensor]) -> dict[int, Tensor]:
    """The same numbers, in a type that can hold their differences."""
    return parts if _modest(parts) else {source: part.double() for source, part in parts.items()}
