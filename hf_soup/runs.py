"""Runs of tensors, the pieces in which they come from the sources, and the units in which they are worked on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from hf_soup.headers import FLOATS, ITEM_BYTES, Rows


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
    """

    first: int
    stop: int
    dtype: str
    file: int
    offset: int
    elements: int
    parts: tuple[Part | None, ...]
    row: int = 1

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


def plain(run: Run) -> list[Any]:
    """A run as plain data."""
    parts = [
        part and [part.file, part.offset, part.dtype, [[rows.source, rows.target, rows.count] for rows in part.rows]]
        for part in run.parts
    ]
    return [run.first, run.stop, run.dtype, run.file, run.offset, run.elements, parts, run.row]


def run_from(values: Sequence[Any]) -> Run:
    """The inverse of `plain`."""
    first, stop, dtype, file, offset, elements, parts, row = values
    made = [part and Part(part[0], part[1], part[2], tuple(Rows(*rows) for rows in part[3])) for part in parts]
    return Run(first, stop, dtype, file, offset, elements, tuple(made), row)
