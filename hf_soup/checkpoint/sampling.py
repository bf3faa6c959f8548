"""Samples of rows of weights: which, and how they come, in few range requests and few bytes a model.

Norm weights and biases say nothing about kinship, as they look alike in every model; so only tensors of two dimensions
or more are sampled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hf_soup._util.parallel import in_parallel
from hf_soup.checkpoint.checkpoint import Checkpoint
from hf_soup.checkpoint.headers import FLOATS, ITEM_BYTES, TensorInfo
from hf_soup.errors import SoupError

#: Tensors of a body and of a head that are sampled, and bytes of each: 22 requests and less than 2 MB a model.
BODY_TENSORS, HEAD_TENSORS = 20, 2
_BYTES = 88_000
_MOST_ROWS = 64
#: Bytes between two samples that are read along, where both then take one request.
_GAP = 1 << 14
#: A model whose matrices are no larger than this together is read whole.
_SMALL = 1_500_000
#: Numbers of all samples of a check together, 512 MB: with very many models each gives fewer.
_ALL = 1 << 27
#: Bytes of samples that a model costs at most, whatever lies between them.
_MOST_BYTES = 1_900_000

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class RowSample:
    """Rows of a tensor to look at: from ``start`` to ``stop``, each of ``columns`` numbers."""

    name: str
    start: int
    stop: int
    columns: int


def choose_rows(
    shapes: Mapping[str, tuple[int, ...]], tensors: int = BODY_TENSORS, *, models: int = 2, item: int = 4
) -> list[RowSample]:
    """Which rows to sample, of tensors of two dimensions or more.

    Every kind of tensor (its name without numbers) is there before any is there twice, and those of one kind come
    from other depths than those of the next. Of a small model all tensors are read.

    >>> choose_rows({"a.weight": (100, 1024), "a.bias": (100,)})
    [RowSample(name='a.weight', start=48, stop=69, columns=1024)]
    """
    wide = [name for name, shape in shapes.items() if len(shape) > 1 and shape[0] > 1 and all(shape)]
    if item * sum(int(np.prod(shapes[name])) for name in wide) > _SMALL:
        kinds: dict[str, list[str]] = {}
        for name in wide:
            kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        turns = []
        for number, members in enumerate(kinds.values()):
            for turn in range(min(tensors, len(members))):
                # Steps of the golden ratio leave no part of the depth out, whatever the number of layers.
                place = int(((turn + number / len(kinds)) * 0.618034) % 1.0 * len(members))
                turns.append((turn, number, members[place]))
        found = dict.fromkeys(name for _, _, name in sorted(turns))
        wide = sorted(list(found)[:tensors], key=wide.index)
    most = min(_BYTES // item, _ALL // max(1, models * len(wide)))
    picks: list[RowSample] = []
    for name in wide:
        rows, columns = shapes[name][0], int(np.prod(shapes[name][1:]))
        count = max(1, min(rows, _MOST_ROWS, most // columns))
        # From the middle of a table of tokens, whose first rows are special and unused ones; of others from places that
        # differ, so that no order of neurons leaves all that is read where it was.
        depth = 0.5 if rows > 4 * columns else (0.618034 * (len(picks) + 1)) % 1.0
        start = int((rows - count) * depth)
        picks.append(RowSample(name, start, start + count, min(columns, most)))
    return picks


def read_samples(
    wanted: Sequence[tuple[Checkpoint, Mapping[str, TensorInfo]]],
    picks: Sequence[RowSample],
    requests: int = BODY_TENSORS,
    *,
    needed: int | None = None,
) -> tuple[list[dict[str, Array]], dict[int, SoupError]]:
    """The picked rows of every model that has them, ``(rows, columns)`` float32, fetched in parallel.

    Args:
        wanted: Checkpoints, and their tensors under the names that the picks use.
        picks: From `choose`.
        requests: How many a model may cost.
        needed: How many of the first models have to be readable; all by default.

    Returns:
        The samples, and for models that are not needed and cannot be read the reason.
    """
    jobs: list[tuple[int, _Span]] = []
    for index, (_, tensors) in enumerate(wanted):
        here = [_place(pick, tensors[pick.name]) for pick in picks if pick.name in tensors]
        jobs += [(index, span) for span in _joined([place for place in here if place], requests)]

    def read(job: tuple[int, _Span]) -> bytes | SoupError:
        index, span = job
        try:
            return wanted[index][0].weights.source.read(span.file, span.start, span.stop)
        except SoupError as error:
            if needed is None or index < needed:
                raise
            return error

    found: list[dict[str, Array]] = [{} for _ in wanted]
    failed: dict[int, SoupError] = {}
    for (index, span), data in zip(jobs, in_parallel(read, jobs, threads=32), strict=True):
        if isinstance(data, SoupError):
            failed.setdefault(index, data)
            continue
        for place in span.places:
            numbers = _numbers(data[place.start - span.start : place.stop - span.start], place.dtype)
            found[index][place.pick.name] = numbers.reshape(-1, place.pick.columns)[place.order]
    return [{} if index in failed else each for index, each in enumerate(found)], failed


@dataclass(frozen=True)
class _Place:
    """Where a pick lies in a model's file, and in which order its rows do."""

    pick: RowSample
    file: str
    start: int
    stop: int
    dtype: str
    order: slice | list[int]


@dataclass(frozen=True)
class _Span:
    """Places in a file that are read at once."""

    file: str
    start: int
    stop: int
    places: tuple[_Place, ...]


def _place(pick: RowSample, tensor: TensorInfo) -> _Place | None:
    """Where to read a pick; None where the tensor is none of numbers, has no such rows, or has them far apart."""
    if tensor.dtype not in FLOATS:
        return None
    item, columns = ITEM_BYTES[tensor.dtype], int(np.prod(tensor.shape[1:]))
    order: slice | list[int] = slice(None)
    first, stop = pick.start, pick.stop
    if tensor.rows:
        came = {rows.target + n: rows.source + n for rows in tensor.rows for n in range(rows.count)}
        rows = [came.get(row, -1) for row in range(pick.start, pick.stop)]
        first, stop = min(rows), max(rows) + 1
        if first < 0 or columns != pick.columns or (stop - first) * columns * item > 2 * _BYTES:
            return None
        order = [row - first for row in rows]
    elif stop > tensor.shape[0] or columns < pick.columns or (columns > pick.columns and stop - first > 1):
        return None  # an ancestor with fewer tokens, or a tensor of another shape
    start = tensor.offset + first * columns * item
    # A row may be longer than what is looked at of it.
    end = start + (stop - first) * min(columns, pick.columns) * item
    return _Place(pick, tensor.file, start, end, tensor.dtype, order)


def _joined(places: Sequence[_Place], most: int) -> list[_Span]:
    """Places that lie near each other, as one request each.

    Where there are more than ``most``, what lies between is read along; and where that would be too many bytes, some
    places are left out, as a stranger's file may have anything between them.
    """
    if not places:
        return []
    near = _merged(places, dict.fromkeys((place.file for place in places), _GAP))
    if len(near) > most:
        allowed = {}
        for file in dict.fromkeys(place.file for place in places):
            mine = sorted((place for place in places if place.file == file), key=lambda place: place.start)
            gaps = sorted((after.start - before.stop for before, after in pairwise(mine)), reverse=True)
            share = max(1, most * len(mine) // len(places))
            allowed[file] = max(_GAP, *gaps[share - 1 : share], 0)
        wide = _merged(places, allowed)
        near = wide if len(wide) <= most and _bytes(wide) <= _MOST_BYTES else _every(near, most)
    # Numbers that take more bytes than those that the picks were made for.
    return near if _bytes(near) <= _MOST_BYTES else _every(near, len(near) * _MOST_BYTES // _bytes(near))


def _bytes(spans: Sequence[_Span]) -> int:
    return sum(span.stop - span.start for span in spans)


def _every(spans: Sequence[_Span], most: int) -> list[_Span]:
    """So many of them, from everywhere."""
    return [spans[int(turn * len(spans) / max(1, most))] for turn in range(most)]


def _merged(places: Sequence[_Place], allowed: Mapping[str, int]) -> list[_Span]:
    """Places with no more than so many bytes between them, file by file."""
    spans: list[_Span] = []
    for place in sorted(places, key=lambda place: (place.file, place.start)):
        last = spans[-1] if spans else None
        if last and last.file == place.file and place.start - last.stop <= allowed[place.file]:
            spans[-1] = _Span(place.file, last.start, max(last.stop, place.stop), (*last.places, place))
        else:
            spans.append(_Span(place.file, place.start, place.stop, (place,)))
    return spans


def _numbers(data: bytes, dtype: str) -> Array:
    """Stored numbers as float32, without torch, which takes a second to import."""
    if dtype == "BF16":
        # The upper half of a float32.
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.frombuffer(data, dtype={"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)
