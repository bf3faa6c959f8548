"""Where every element of the output lies in the sources: output files, runs of tensors, segments.

All of it comes from headers, once for a set of models, before the first weight is read; whatever is made of them lies
so.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

from hf_soup.checkpoint import DTYPES, FLOATS, ITEM_BYTES, LowRankUpdate, TensorInfo
from hf_soup.errors import IncompatibleError
from hf_soup.lineage import AlignedModel

#: Bytes of output that are hashed as one; part of the definition of the digest, so it never changes.
BLOCK_BYTES = 4 << 20
#: Output files are cut at this size, whatever the number of processes.
MAX_FILE_BYTES = 5_000_000_000


class Extent(NamedTuple):
    """Where elements lie in one source: in which file, the byte of the first, and their type there.

    Of an adapter, also what is added to them, and which element of its tensor is the first.
    """

    file: str
    offset: int
    dtype: str
    update: LowRankUpdate | None = None
    element: int = 0

    @property
    def read_as(self) -> str:
        """The type in which they are read: sums with products are not rounded to 16 bits."""
        return self.dtype if self.update is None else "F32" if ITEM_BYTES[self.dtype] == 2 else "F64"

    def behind(self, skipped: int) -> Extent:
        """Where the elements behind the first ones lie."""
        begin, item = self.element + (skipped if self.update else 0), ITEM_BYTES[self.dtype]
        return Extent(self.file, self.offset + skipped * item, self.dtype, self.update, begin)


class Segment(NamedTuple):
    """Elements of a run that every source that has them holds in one piece.

    Args:
        begin, end: Elements of the run.
        extents: Where they lie in every source; None in those that do not have them.
    """

    begin: int
    end: int
    extents: tuple[Extent | None, ...]

    def part(self, begin: int, end: int) -> Segment:
        """Some of its elements."""
        if (begin, end) == (self.begin, self.end):
            return self
        return Segment(begin, end, self.places(begin - self.begin))

    def places(self, skipped: int) -> tuple[Extent | None, ...]:
        """Where the elements behind the first ones lie."""
        return tuple([at and at.behind(skipped) for at in self.extents])


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors that follow each other in the output and in every source, so that they are read and written as one.

    A model of a hundred thousand small tensors that all sources store alike is a run for each file.

    Args:
        first, stop: Numbers of its tensors, none of them empty, all of one dtype; one, where that is not averaged.
        dtype: As written.
        file: Which output file it is in.
        offset: Of its first byte in that file.
        elements: How many numbers it holds.
        segments: All of them, in order: one, but where rows of its one tensor come from several places, as alignments
            move rows, and not every source has all of them.
    """

    first: int
    stop: int
    dtype: str
    file: int
    offset: int
    elements: int
    segments: tuple[Segment, ...]

    @property
    def averaged(self) -> bool:
        """As its tensors."""
        return self.dtype in FLOATS

    @property
    def complete(self) -> bool:
        """Whether every source has all of it."""
        return all(None not in segment.extents for segment in self.segments)

    @property
    def patched(self) -> bool:
        """Whether sources lack some of it, or hold its rows in another order."""
        return len(self.segments) > 1 or not self.complete

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types in the sources that have it."""
        if len(self.segments) == 1:
            return tuple([at.read_as for at in self.segments[0].extents if at])
        held = {n: at.read_as for segment in self.segments for n, at in enumerate(segment.extents) if at}
        return tuple([held[source] for source in sorted(held)])

    def needs(self, end: int) -> dict[int, tuple[str, int]]:
        """What must be here for the elements before ``end``: of which source which file, and up to which byte."""
        reach: dict[int, tuple[str, int]] = {}
        for segment in self.segments:
            if segment.begin >= end:
                break
            count = min(end, segment.end) - segment.begin
            for source, at in enumerate(segment.extents):
                if at:
                    known = reach[source][1] if source in reach else 0
                    reach[source] = at.file, max(known, at.offset + count * ITEM_BYTES[at.dtype])
        return reach

    def pieces(self, begin: int, end: int) -> Iterator[Segment]:
        """The elements from ``begin`` to ``end`` as parts of segments."""
        for segment in self.segments:
            if segment.begin < end and begin < segment.end:
                yield segment.part(max(begin, segment.begin), min(end, segment.end))

    def slices(self, begin: int, end: int, step: int, *, across: bool = False) -> Iterator[list[Segment]]:
        """The elements from ``begin`` to ``end`` in slices of at most ``step``, each of one segment, or ``across``
        several, where every source has all of them.
        """
        if across:
            yield from (list(self.pieces(start, min(end, start + step))) for start in range(begin, end, step))
            return
        for piece in self.pieces(begin, end):
            for start in range(piece.begin, piece.end, step):
                yield [piece.part(start, min(piece.end, start + step))]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Args:
        name: Its name, the donor's.
        dtype: As written.
        shape: Its shape.
        file: Which output file it is in.
        offset: Of its first byte in that file.
        elements: How many numbers it holds.
        size: In bytes, as written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    elements: int
    size: int

    @property
    def averaged(self) -> bool:
        """False for integers and booleans, which pass when all sources agree."""
        return self.dtype in FLOATS

    @property
    def blocks(self) -> int:
        """How many blocks it is hashed in; an empty tensor has none."""
        return -(-self.size // BLOCK_BYTES)


@dataclass(frozen=True)
class OutputFile:
    """A file of the output: its name, its safetensors header (with the length before it) and its size in bytes."""

    name: str
    header: bytes = field(repr=False)
    size: int


@dataclass(frozen=True)
class Layout:
    """Output files and tensors, and where they lie in the sources.

    Sources have numbers: the ingredients from 0 on in the order of the recipe, and behind them the base.

    Args:
        names: What mixtures call the ingredients.
        labels: What errors call every source.
        states: What identifies their bytes.
        files: In order.
        tensors: All of them, in the order of the output.
        runs: As long as can be, in that order too.
        bases: Of every source that is an adapter, what identifies the bytes of its base; none where none is one.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    states: tuple[str, ...]
    files: tuple[OutputFile, ...]
    tensors: tuple[OutputTensor, ...] = field(repr=False)
    runs: tuple[Run, ...] = field(repr=False)
    bases: tuple[str | None, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        ingredients: Sequence[AlignedModel],
        base: AlignedModel | None = None,
        *,
        patched: Collection[str] = (),
        dtype: str | None = None,
    ) -> Layout:
        """Lay out the output.

        Args:
            ingredients: In the order of the recipe.
            base: What task vectors are measured from.
            patched: Tensors that some sources do not have, or not all rows of, or in other places: averaged over those
                who have them. All sources have all others.
            dtype: torch's name of the type to write; by default each tensor's common one, or the widest.

        Raises:
            IncompatibleError: A tensor is missing in a source, or has another shape.
        """
        sources = [*ingredients, *([base] if base else [])]
        groups = _cut(_laid(sources, len(ingredients), patched, dtype))
        files: list[OutputFile] = []
        tensors: list[OutputTensor] = []
        runs: list[Run] = []
        for number, group in enumerate(groups):
            sizes = [entry.size for entry in group]
            ends = list(accumulate(sizes))
            # Spelled entry by entry: as one mapping, a hundred thousand of them would be most of what a merge holds.
            entries = [
                f'{json.dumps(entry.name)}:{{"dtype":"{entry.dtype}","shape":[{",".join(map(str, entry.shape))}],'
                f'"data_offsets":[{end - size},{end}]}}'
                for entry, size, end in zip(group, sizes, ends, strict=True)
            ]
            text = "".join(['{"__metadata__":{"format":"pt"}', *(f",{entry}" for entry in entries), "}"]).encode()
            text += b" " * (-len(text) % 8)
            header = len(text).to_bytes(8, "little") + text
            title = "model.safetensors"
            if len(groups) > 1:
                title = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
            files.append(OutputFile(title, header, len(header) + (ends[-1] if ends else 0)))
            runs += _runs(group, number, len(tensors), len(header))
            tensors += [
                OutputTensor(
                    entry.name, entry.dtype, entry.shape, number, len(header) + end - size,
                    size // ITEM_BYTES[entry.dtype], size,
                )
                for entry, size, end in zip(group, sizes, ends, strict=True)
            ]  # fmt: skip
        names = tuple(source.name for source in ingredients)
        labels, states = tuple(source.label for source in sources), tuple(source.state for source in sources)
        bases = tuple(source.base_state for source in sources)
        bases = bases if any(bases) else ()
        return cls(names, labels, states, tuple(files), tuple(tensors), tuple(runs), bases)

    @property
    def base(self) -> int | None:
        """The number of the base, where there is one."""
        return len(self.names) if len(self.labels) > len(self.names) else None

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Those of the ingredients."""
        return {name: number for number, name in enumerate(self.names)}

    @property
    def size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)

    @property
    def dtype(self) -> str:
        """torch's name of the commonest floating-point type that is written."""
        held: dict[str, int] = {}
        for run in self.runs:
            if run.averaged:
                held[run.dtype] = held.get(run.dtype, 0) + run.elements
        spelled = {value: key for key, value in DTYPES.items()}
        return spelled[max(held, key=lambda dtype: held[dtype])] if held else "float32"

    @property
    def index(self) -> dict[str, Any] | None:
        """``model.safetensors.index.json``, or None for a single file."""
        if len(self.files) == 1:
            return None
        return {
            "metadata": {"total_size": sum(tensor.size for tensor in self.tensors)},
            "weight_map": {tensor.name: self.files[tensor.file].name for tensor in self.tensors},
        }

    @cached_property
    def identity(self) -> str:
        """The sha256 of where everything lies, and in what."""
        found = hashlib.sha256(json.dumps([self.names, self.labels, self.states]).encode())
        for file in self.files:
            found.update(f"{file.name} {file.size}\n".encode())
            found.update(file.header)
        for run in self.runs:
            found.update(json.dumps([run.first, run.stop, run.dtype, run.offset, run.segments]).encode())
        return found.hexdigest()

    @cached_property
    def patched_runs(self) -> tuple[Run, ...]:
        """Those that some sources do not have, or have in other places."""
        return tuple(run for run in self.runs if run.patched)

    @cached_property
    def multiplied(self) -> frozenset[str]:
        """The tensors to which some source adds a product, whose last bits differ between machines."""
        changed = (run for run in self.runs if any(at and at.update for part in run.segments for at in part.extents))
        return frozenset(self.tensors[run.first].name for run in changed)

    @cached_property
    def source_identities(self) -> tuple[str, ...]:
        """Of every source the sha256 of where its tensors lie that it has as a whole, and what becomes of them; the
        same, whoever else is in the layout.
        """
        found = [hashlib.sha256(state.encode()) for state in self.states]
        for number, tensor in enumerate(self.tensors):
            run = self.run_of(number) if tensor.size else None
            narrow = run and all(ITEM_BYTES[dtype] == 2 for dtype in run.dtypes)  # how wide sums are
            here = run.segments[0].extents if run and not run.patched else [None] * len(found)
            for each, at in zip(found, here, strict=True):
                each.update(repr((tensor.name, tensor.dtype, tensor.shape, narrow, at and tuple(at))).encode())
        return tuple(each.hexdigest() for each in found)

    def run_of(self, tensor: int) -> Run:
        """A tensor, which must not be empty, as a run of its own."""
        run = self.runs[bisect_right(self.runs, tensor, key=lambda run: run.first) - 1]
        return run if run.stop - run.first == 1 else self.cut_out(run, tensor, tensor + 1)

    @cached_property
    def tensor_runs(self) -> tuple[Run, ...]:
        """Every tensor that is not empty as a run of its own."""
        return tuple([self.cut_out(run, n, n + 1) for run in self.runs for n in range(run.first, run.stop)])

    def split(self, kind: Callable[[OutputTensor], object]) -> Iterator[Run]:
        """The runs, where tensors that follow each other stay together if they are of one kind."""
        for run in self.runs:
            for _, group in groupby(range(run.first, run.stop), lambda number: kind(self.tensors[number])):
                numbers = list(group)
                yield self.cut_out(run, numbers[0], numbers[-1] + 1)

    def cut_out(self, run: Run, first: int, stop: int) -> Run:
        """Some tensors of a run."""
        offset, last = self.tensors[first].offset, self.tensors[stop - 1]
        begin = (offset - run.offset) // ITEM_BYTES[run.dtype]
        end = (last.offset + last.size - run.offset) // ITEM_BYTES[run.dtype]
        if (first, stop) == (run.first, run.stop):
            return run
        segment = Segment(0, end - begin, run.segments[0].places(begin))
        return Run(first, stop, run.dtype, run.file, offset, end - begin, (segment,))

    def blocks(self, tensor: int, block: int) -> Iterator[tuple[int, int, int]]:
        """``(tensor number, block number, size in bytes)`` of all blocks from one on."""
        for number in range(tensor, len(self.tensors)):
            size = self.tensors[number].size
            for start in range(block * BLOCK_BYTES, size, BLOCK_BYTES):
                yield number, start // BLOCK_BYTES, min(BLOCK_BYTES, size - start)
            block = 0


class _Laid(NamedTuple):
    """A tensor of the output before it has a place: its size in bytes, its places in the sources, and whether these are
    all of them, each with all rows in their places and as they are stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    places: Sequence[TensorInfo | None]
    whole: bool


def _laid(sources: Sequence[AlignedModel], counted: int, patched: Collection[str], dtype: str | None) -> list[_Laid]:
    """All tensors in the order of the output; of the base, which follows those that count, the type has no say."""
    tensors = [source.tensors for source in sources]
    names: Collection[str] = tensors[0].keys()
    if any(mine is not tensors[0] and mine.keys() != names for mine in tensors[1:]):
        names = dict.fromkeys(name for mine in tensors for name in mine)
        for name in names:
            lacking = [source for source in sources if name not in source.tensors]
            if lacking and name not in patched:
                who = lacking[0].label
                raise IncompatibleError(f"Cannot average '{name}': {who} does not have it.", subjects=[who])
    laid: list[tuple[tuple[int, bool, str, int], _Laid]] = []
    for name in names:
        places: Sequence[TensorInfo | None]
        if name in patched:
            places = [mine.get(name) for mine in tensors]
            having = [place for place in places if place]
            written = _written(name, [place for place in places[:counted] if place], dtype)
        else:
            places = having = [mine[name] for mine in tensors]
            shape = having[0].shape
            # Counted by identity first: sources that were saved alike share what their headers say.
            if having.count(having[0]) < len(having) and any(place.shape != shape for place in having):
                labels = [source.label for source in sources]
                shown = "\n".join(f"  {who}  {place.shape}" for who, place in zip(labels, having, strict=True))
                raise IncompatibleError(
                    f"Cannot average '{name}': the ingredients disagree on its shape.\n{shown}", subjects=labels
                )
            written = _written(name, having[:counted], dtype)
        first, item = having[0], ITEM_BYTES[written]
        # The donor's own order, so that inputs are read forwards; wide types first, so that every tensor is aligned;
        # empty tensors where they interrupt no run.
        order = (-item, not first.size, first.file, first.offset)
        whole = name not in patched and not any(place.update for place in having)
        laid.append((order, _Laid(name, written, first.shape, math.prod(first.shape) * item, places, whole)))
    laid.sort(key=lambda entry: entry[0])
    return [entry for _, entry in laid]


def _written(name: str, places: Sequence[TensorInfo], dtype: str | None) -> str:
    """The type in which a tensor is written."""
    alike = places.count(places[0]) == len(places)
    types = [places[0].dtype] if alike else list(dict.fromkeys(place.dtype for place in places))
    if all(each in FLOATS for each in types):
        if dtype is not None:
            return DTYPES[dtype]
        # Of the two 16-bit types bfloat16 has the range of both; a wider one would double the model.
        return max(types, key=lambda each: (ITEM_BYTES[each], each == "BF16"))
    if len(types) > 1:
        raise IncompatibleError(f"Cannot combine '{name}': its element types are {', '.join(types)}.")
    return types[0]


def _cut(laid: Sequence[_Laid]) -> list[list[_Laid]]:
    """Tensors in files: a new one where the next tensor would not fit."""
    groups: list[list[_Laid]] = [[]]
    held = 0
    for entry in laid:
        if groups[-1] and held + entry.size > MAX_FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.size
    return groups


def _runs(group: Sequence[_Laid], file: int, first: int, offset: int) -> Iterator[Run]:
    """The runs of one output file, whose first tensor has the number ``first`` and begins at ``offset``."""
    begin = elements = 0  # of the run that grows
    segments: tuple[Segment, ...] = ()
    dtype = ""
    ends: tuple[tuple[str, int, str], ...] = ()  # where it ends in every source

    def closed(stop: int) -> Iterator[Run]:
        if stop > begin:
            whole = segments if len(segments) > 1 else (Segment(0, elements, segments[0].extents),)
            yield Run(first + begin, first + stop, dtype, file, offset, elements, whole)

    for number, entry in enumerate(group):
        # Plain tuples, as of a hundred thousand tensors most only continue a run; an empty one continues none.
        grows = entry.whole and entry.size
        starts = tuple([(at.file, at.offset, at.dtype) for at in entry.places if at]) if grows else None
        if starts != ends or entry.dtype != dtype or dtype not in FLOATS:
            yield from closed(number)
            offset, elements = offset + elements * ITEM_BYTES.get(dtype, 0), 0
            begin, segments, dtype = number, _segments(entry), entry.dtype
        if not entry.size:
            begin = number + 1
        elements += entry.size // ITEM_BYTES[dtype]
        # A tensor that some do not have, or whose rows come from several places, is a run of its own.
        ends = tuple([(at.file, at.offset + at.size, at.dtype) for at in entry.places if at]) if grows else ()
    yield from closed(len(group))


def _segments(entry: _Laid) -> tuple[Segment, ...]:
    """Those of a tensor that is not empty."""
    elements = math.prod(entry.shape)
    if not any(at.rows for at in entry.places if at):
        extents = tuple([Extent(at.file, at.offset, at.dtype, at.update) if at else None for at in entry.places])
        return (Segment(0, elements, extents),)
    row = math.prod(entry.shape[1:])
    moved = [rows for at in entry.places if at for rows in at.rows]
    edges = {edge * row for rows in moved for edge in (rows.target, rows.target + rows.count)}
    inside = sorted({0, elements, *(edge for edge in edges if 0 < edge < elements)})
    return tuple(
        Segment(begin, end, tuple([_extent(at, begin, row) if at else None for at in entry.places]))
        for begin, end in pairwise(inside)
    )


def _extent(at: TensorInfo, element: int, row: int) -> Extent | None:
    """Where an element of the output's tensor lies in a source's; None where that does not have its row."""
    if at.rows:
        target = element // row
        rows = at.rows[bisect_right(at.rows, target, key=lambda rows: rows.target) - 1]
        if not rows.target <= target < rows.target + rows.count:
            return None
        element += (rows.source - rows.target) * row
    return Extent(at.file, at.offset, at.dtype, at.update).behind(element)
