"""Runs of tensors, the pieces in which they come from the sources, and the units in which they are worked on."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from hf_soup.headers import FLOATS, ITEM_BYTES, Rows, TensorInfo


class Mixing(NamedTuple):
    """How tensors are combined: the name of a method, and its parameters."""

    method: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """Where the elements of a run lie in one source.

    Args:
        file: In which.
        offset: Of the first.
        dtype: Their type there.
        rows: Where rows of the run's one tensor come from, if not all of them from the same place: alignments move
            rows, and not every source has all of them.
    """

    file: str
    offset: int
    dtype: str
    rows: tuple[Rows, ...] = ()


class Piece(NamedTuple):
    """Elements of a run that lie together in all sources that have them: source number → offset of the first."""

    begin: int
    end: int
    offsets: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors that follow each other in the output and in every source, so that they are read and written as one.

    A model of a hundred thousand small tensors that all sources store alike is a run for each file.

    Args:
        first, stop: Numbers of its tensors, none of them empty, all of one dtype.
        dtype: As written.
        file: Which output file it is in.
        offset: Of its first byte in that file.
        elements: How many numbers it holds.
        parts: Where it lies in every source; None in those that do not have it.
        row: How many numbers a row has, where parts speak of rows.
        whole: Whether its one tensor is worked on at once.
    """

    first: int
    stop: int
    dtype: str
    file: int
    offset: int
    elements: int
    parts: tuple[Part | None, ...]
    row: int = 1
    whole: bool = False

    @property
    def averaged(self) -> bool:
        """As its tensors."""
        return self.dtype in FLOATS

    @property
    def patched(self) -> bool:
        """Whether sources lack some of it, or hold its rows in another order."""
        return any(part is None or part.rows for part in self.parts)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types in the sources that have it."""
        return tuple([part.dtype for part in self.parts if part])

    def reach(self, part: Part, end: int) -> int:
        """Up to where a source's file must be here for the elements before ``end``; for moved rows, all of them."""
        last = max(rows.source + rows.count for rows in part.rows) * self.row if part.rows else end
        return part.offset + last * ITEM_BYTES[part.dtype]

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """The elements from ``begin`` to ``end`` in pieces."""
        cuts = {begin, end}
        for part in self.parts:
            for rows in part.rows if part else ():
                edges = (rows.target * self.row, (rows.target + rows.count) * self.row)
                cuts.update(edge for edge in edges if begin < edge < end)
        for start, stop in pairwise(sorted(cuts)):
            offsets = {}
            for number, part in enumerate(self.parts):
                if part is not None and (element := self._element(part, start)) is not None:
                    offsets[number] = part.offset + element * ITEM_BYTES[part.dtype]
            yield Piece(start, stop, offsets)

    def slices(self, begin: int, end: int, step: int) -> Iterator[list[Piece]]:
        """The elements from ``begin`` to ``end`` in slices of at most ``step``, each of one piece, or where all sources
        have all pieces, as of a tensor that is worked on whole, of several.
        """
        if self.whole:
            yield from (list(self.pieces(start, min(end, start + step))) for start in range(begin, end, step))
            return
        for piece in self.pieces(begin, end):
            for start in range(piece.begin, piece.end, step):
                moved = {
                    source: offset + (start - piece.begin) * ITEM_BYTES[part.dtype]
                    for source, offset in piece.offsets.items()
                    if (part := self.parts[source])
                }
                yield [Piece(start, min(piece.end, start + step), moved)]

    def _element(self, part: Part, element: int) -> int | None:
        """Which element of a source's tensor an element of the run is."""
        if not part.rows:
            return element
        row = element // self.row
        rows = part.rows[bisect_right(part.rows, row, key=lambda rows: rows.target) - 1]
        if not rows.target <= row < rows.target + rows.count:
            return None
        return element + (rows.source - rows.target) * self.row


@dataclass(frozen=True, slots=True)
class Unit:
    """Blocks of a run that are finished, noted and checked together: 16 MiB, or what is left of the run.

    Args:
        run: Its number.
        begin, end: Elements of the run.
        tensor, block: Where its first block belongs.
        size: In bytes, as written.
    """

    run: int
    begin: int
    end: int
    tensor: int
    block: int
    size: int


#: Name and type of a tensor of the output, its places where there are any, and its place in every source.
Laid = tuple[str, str, tuple[TensorInfo, ...], Sequence[TensorInfo | None]]


#: What tensors of one run have in common: shares of their own, how they are combined, and what kind of method that is.
Own = tuple[Sequence[float] | None, Mixing, str]


def cut(laid: Sequence[Laid], max_file_bytes: int) -> list[list[Laid]]:
    """Tensors in files: a new one where the next tensor would not fit."""
    groups: list[list[Laid]] = [[]]
    held = 0
    for entry in laid:
        size = math.prod(entry[2][0].shape) * ITEM_BYTES[entry[1]]
        if groups[-1] and held + size > max_file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    return groups


def runs_of(group: Sequence[Laid], file: int, first: int, offset: int, own: Callable[[str, str], Own]) -> list[Run]:
    """The runs of one output file, whose first tensor has the number ``first`` and begins at ``offset``."""
    runs: list[Run] = []
    begin = elements = 0
    ends: tuple[tuple[str, int, str], ...] = ()  # where the run ends in every source
    common: Own | None = None

    def close(stop: int) -> None:
        nonlocal offset, elements
        if stop > begin:
            _, written, having, places = group[begin]
            parts = tuple([Part(at.file, at.offset, at.dtype, at.rows) if at else None for at in places])
            row = math.prod(having[0].shape[1:])
            run = Run(first + begin, first + stop, written, file, offset, elements, parts, row)
            if common is not None and common[2] == "whole":
                # One that some lack, or some rows of which, is averaged.
                whole = all(len(piece.offsets) == len(parts) for piece in run.pieces(0, elements))
                run = replace(run, whole=whole)
            runs.append(run)
            offset += elements * ITEM_BYTES[written]
        elements = 0

    for number, (name, written, parts, places) in enumerate(group):
        if not parts[0].size:
            close(number)
            begin, ends = number + 1, ()
            continue
        starts = tuple([(part.file, part.offset, part.dtype) for part in parts])
        whole = places is parts
        mine = own(name, written)
        if not whole or starts != ends or written != group[begin][1] or mine != common or mine[2]:
            close(number)
            begin, common = number, mine
        elements += math.prod(parts[0].shape)
        # Nothing continues a tensor whose rows come from several places.
        ends = tuple([(part.file, part.offset + part.size, part.dtype) for part in parts]) if whole else ()
    close(len(group))
    return runs


def plain(run: Run) -> list[Any]:
    """A run as plain data."""
    parts = [
        part and [part.file, part.offset, part.dtype, [[rows.source, rows.target, rows.count] for rows in part.rows]]
        for part in run.parts
    ]
    return [run.first, run.stop, run.dtype, run.file, run.offset, run.elements, parts, run.row, run.whole]


def run_from(values: Sequence[Any]) -> Run:
    """The inverse of `plain`."""
    first, stop, dtype, file, offset, elements, parts, row, whole = values
    made = [part and Part(part[0], part[1], part[2], tuple(Rows(*rows) for rows in part[3])) for part in parts]
    return Run(first, stop, dtype, file, offset, elements, tuple(made), row, whole)
