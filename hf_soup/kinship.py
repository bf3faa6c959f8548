"""Do weights show a common ancestor? Samples of rows, by range requests, and what they have in common.

Fine-tuning moves weights little and keeps every neuron in its place. So for siblings, and for a model and its
ancestor, the same rows of the same tensors point the same way, while for models that were initialised apart they
are as good as orthogonal. Norm weights and biases say nothing: they look alike in every model, so only tensors of
two dimensions or more are sampled. docs/lineage.md has the distributions behind the thresholds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from hf_soup import hub
from hf_soup.checkpoint import Checkpoint
from hf_soup.headers import FLOATS, ITEM_BYTES, TensorInfo

#: Median cosine of the body below which two models are strangers.
STRANGERS = 0.05
#: Share of rows that find themselves below which they are too, whatever the cosine: a common mean is no kinship.
SAME_ROWS = 0.05
#: Median cosine of the body below which siblings have drifted apart.
DRIFTED = 0.9
#: Cosine below which a single tensor is apart, …
APART = 0.1
#: … where the median cosine is at least this: below it, hard training may have done it.
SURE = 0.5
#: Cosine of the heads below which they were initialised apart.
HEADS_APART = 0.3
#: Lowest cosine of siblings' task vectors above which the ancestor they are measured from is hardly theirs …
WRONG_BASE = 0.8
#: … where they have at least this size, relative to the ancestor: short runs on the same data move alike too.
FAR_FROM_BASE = 0.35

#: Tensors of a body and of a head that are sampled, and bytes of each: 22 requests and less than 2 MB a model.
BODY, HEAD = 20, 2
_BYTES = 88_000
_MOST_ROWS = 64
#: Bytes between two samples that are read along, where both then take one request.
_GAP = 1 << 14
#: A model whose matrices are no larger than this together is read whole.
_SMALL = 1_500_000
#: Numbers of all samples of a check together, 512 MB: with very many models each gives fewer.
_ALL = 1 << 27
#: Models of which each is compared with each row by row; of more, only with the last one.
_BY_ROWS = 12
_FEWEST_ROWS = 16

Array = np.ndarray[Any, np.dtype[np.float32]]
Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Pick:
    """Rows of a tensor to look at: from ``start`` to ``stop``, each of ``columns`` numbers."""

    name: str
    start: int
    stop: int
    columns: int


def choose(shapes: Mapping[str, tuple[int, ...]], tensors: int = BODY, *, models: int = 2, item: int = 4) -> list[Pick]:
    """Which rows to sample, of tensors of two dimensions or more.

    Every kind of tensor (its name without numbers) is there before any is there twice, and those of one kind come
    from other depths than those of the next. Of a small model all tensors are read.

    >>> choose({"a.weight": (100, 1024), "a.bias": (100,)})
    [Pick(name='a.weight', start=39, stop=60, columns=1024)]
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
    picks = []
    for name in wide:
        rows, columns = shapes[name][0], int(np.prod(shapes[name][1:]))
        count = max(1, min(rows, _MOST_ROWS, most // columns))
        # From the middle: an embedding's first rows are its special and unused tokens.
        start = (rows - count) // 2
        picks.append(Pick(name, start, start + count, min(columns, most)))
    return picks


def sample(
    wanted: Sequence[tuple[Checkpoint, Mapping[str, TensorInfo]]], picks: Sequence[Pick], requests: int = BODY
) -> list[dict[str, Array]]:
    """The picked rows of every model that has them, ``(rows, columns)`` float32, fetched in parallel.

    Args:
        wanted: Checkpoints, and their tensors under the names that the picks use.
        picks: From `choose`.
        requests: How many a model may cost, where it has no more files than that.
    """
    jobs: list[tuple[int, _Span]] = []
    for index, (_, tensors) in enumerate(wanted):
        here = [_place(pick, tensors[pick.name]) for pick in picks if pick.name in tensors]
        jobs += [(index, span) for span in _joined([place for place in here if place], requests)]

    def read(job: tuple[int, _Span]) -> bytes:
        index, span = job
        tensor = TensorInfo("", "U8", (), span.file, 0, 0)
        return wanted[index][0].read(tensor, span.start, span.stop)

    found: list[dict[str, Array]] = [{} for _ in wanted]
    for (index, span), data in zip(jobs, hub.in_parallel(read, jobs, threads=32), strict=True):
        for place in span.places:
            numbers = _numbers(data[place.start - span.start : place.stop - span.start], place.dtype)
            found[index][place.pick.name] = numbers.reshape(-1, place.pick.columns)[place.order]
    return found


@dataclass(frozen=True)
class _Place:
    """Where a pick lies in a model's file, and in which order its rows do."""

    pick: Pick
    file: str
    start: int
    stop: int
    dtype: str
    order: slice | list[int] = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class _Span:
    """Places in a file that are read at once."""

    file: str
    start: int
    stop: int
    places: tuple[_Place, ...]


def _place(pick: Pick, tensor: TensorInfo) -> _Place | None:
    """Where to read a pick; None where the tensor is none of numbers, or its rows are too far from each other."""
    if tensor.dtype not in FLOATS:
        return None
    item, columns = ITEM_BYTES[tensor.dtype], int(np.prod(tensor.shape[1:]))
    first, stop, order = pick.start, pick.stop, slice(None)
    if tensor.rows:
        came = {rows.target + n: rows.source + n for rows in tensor.rows for n in range(rows.count)}
        rows = [came.get(row, -1) for row in range(pick.start, pick.stop)]
        first, stop = min(rows), max(rows) + 1
        if first < 0 or columns != pick.columns or (stop - first) * columns * item > 2 * _BYTES:
            return None
        start = tensor.offset + first * columns * item
        end = tensor.offset + stop * columns * item
        return _Place(pick, tensor.file, start, end, tensor.dtype, [row - first for row in rows])
    if stop > tensor.shape[0]:
        return None  # an ancestor with fewer tokens
    start = tensor.offset + first * columns * item
    # A row may be longer than what is looked at of it.
    end = start + (stop - first) * min(columns, pick.columns) * item
    return _Place(pick, tensor.file, start, end, tensor.dtype, order)


def _joined(places: Sequence[_Place], most: int) -> list[_Span]:
    """Places that lie near each other, as one request each, at most so many or one a file."""
    spans: list[_Span] = []
    for file in dict.fromkeys(place.file for place in places):
        mine = sorted((place for place in places if place.file == file), key=lambda place: place.start)
        gaps = sorted((after.start - before.stop for before, after in pairwise(mine)), reverse=True)
        share = max(1, most * len(mine) // len(places))
        allowed = max(_GAP, *gaps[share - 1 : share], 0)
        first = len(spans)
        for place in mine:
            last = spans[-1] if len(spans) > first else None
            if last and place.start - last.stop <= allowed:
                spans[-1] = _Span(file, last.start, max(last.stop, place.stop), (*last.places, place))
            else:
                spans.append(_Span(file, place.start, place.stop, (place,)))
    return spans


def _numbers(data: bytes, dtype: str) -> Array:
    """Stored numbers as float32, without torch, which takes a second to import."""
    if dtype == "BF16":
        # The upper half of a float32.
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.frombuffer(data, dtype={"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)


@dataclass(frozen=True)
class Kinship:
    r"""How alike models are in a part of their weights, each with each.

    For models :math:`a, b` and a sampled tensor :math:`t` it holds :math:`\langle\theta_a^t,\theta_b^t\rangle`, from
    which cosines follow, those of task vectors too: :math:`\langle\theta_a-\theta_0,\theta_b-\theta_0\rangle`.

    Args:
        part: ``body`` or ``head``.
        names: Whose.
        tensors: Which were sampled.
        products: ``(tensors, models, models)`` float64; NaN where one of two does not have the tensor.
        rows: ``(models, models)`` float64, the median share of rows whose nearest row in the other model is the one of
            the same number; NaN where that was not looked at.
        same: ``(models, models)``, whether every sampled number is equal.
    """

    part: str
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    products: Matrix = field(repr=False)
    rows: Matrix = field(repr=False)
    same: np.ndarray[Any, np.dtype[np.bool_]] = field(repr=False)

    @cached_property
    def by_tensor(self) -> Matrix:
        """``(tensors, models, models)``, the cosine of each tensor."""
        lengths = np.sqrt(np.diagonal(self.products, axis1=1, axis2=2))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = self.products / (lengths[:, :, None] * lengths[:, None, :])
        return np.where(np.isfinite(cosines), np.clip(cosines, -1, 1), np.nan)

    @cached_property
    def cosines(self) -> Matrix:
        """``(models, models)``, the median over tensors; NaN where two share none."""
        return _median(self.by_tensor)

    def kin(self, a: int, b: int) -> bool | None:
        """Whether two come from one initialisation; None where nothing can be compared."""
        cosine, rows = self.cosines[a, b], self.rows[a, b]
        if np.isnan(cosine):
            return None
        return bool(cosine >= STRANGERS and not rows < SAME_ROWS)

    def apart(self, a: int, b: int) -> list[str]:
        """Tensors that have nothing in common in two models that otherwise do."""
        if not self.cosines[a, b] >= SURE:
            return []
        return [name for name, cosine in zip(self.tensors, self.by_tensor[:, a, b], strict=True) if cosine < APART]

    def moved(self, models: Sequence[int], base: int) -> tuple[float, float] | None:
        """The lowest cosine of two task vectors measured from ``base``, and their size relative to it.

        Measured from the right ancestor some pair has a low one, or all are small; from another one all task vectors
        are mostly the way between the two ancestors.
        """
        products, own = self.products[:, models][:, :, models], self.products[:, models, base]
        norm = self.products[:, base, base]
        between = products - own[:, :, None] - own[:, None, :] + norm[:, None, None]
        squares = np.diagonal(between, axis1=1, axis2=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            lengths = np.sqrt(np.where(squares > 0, squares, np.nan))
            cosines = _median(between / (lengths[:, :, None] * lengths[:, None, :]))
            sizes = lengths / np.sqrt(norm)[:, None]
        pairs = cosines[np.triu_indices(len(models), 1)]
        if not np.isfinite(pairs).any() or not np.isfinite(sizes).any():
            return None
        return float(np.nanmin(pairs)), float(np.nanmedian(sizes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rounded to what the sample can say."""
        return {
            "part": self.part,
            "names": list(self.names),
            "tensors": list(self.tensors),
            "cosine": _plain(self.cosines, 4),
            "rows": _plain(self.rows, 3),
        }


def compare(samples: Sequence[Mapping[str, Array]], names: Sequence[str], part: str) -> Kinship:
    """Each of several samples with each.

    Args:
        samples: From `sample`.
        names: Whose they are.
        part: ``body`` or ``head``.

    >>> import numpy as np
    >>> one, other = np.eye(2, 3, dtype=np.float32), np.eye(2, 3, k=1, dtype=np.float32)
    >>> compare([{"w": one}, {"w": 2 * one}, {"w": other}], ["a", "b", "c"], "body").cosines.round(6).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    count = len(samples)
    tensors = tuple(dict.fromkeys(name for each in samples for name in each))
    products = np.full((len(tensors), count, count), np.nan)
    shares: list[Matrix] = []
    same = np.ones((count, count), dtype=bool)
    for number, tensor in enumerate(tensors):
        shape = next(each[tensor].shape for each in samples if tensor in each)
        having = [i for i, each in enumerate(samples) if tensor in each and each[tensor].shape == shape]
        stack = np.stack([samples[i][tensor].ravel() for i in having]).astype(np.float64)  # (models, numbers)
        with np.errstate(invalid="ignore", over="ignore"):
            products[number][np.ix_(having, having)] = stack @ stack.T
        kinds: dict[bytes, int] = {}
        content = [kinds.setdefault(row.tobytes(), len(kinds)) for row in stack]
        lacking = [-1] * count
        for i, kind in zip(having, content, strict=True):
            lacking[i] = kind
        same &= np.equal.outer(lacking, lacking)
        if shape[0] >= _FEWEST_ROWS:
            shares.append(_shares([each.get(tensor) if i in having else None for i, each in enumerate(samples)]))
    rows = _median(np.stack(shares)) if shares else np.full((count, count), np.nan)
    return Kinship(part, tuple(names), tensors, products, rows, same & bool(tensors))


def _shares(samples: Sequence[Array | None]) -> Matrix:
    """For pairs of models, the share of one tensor's rows that are nearest to the row of the same number."""
    count = len(samples)
    found = np.full((count, count), np.nan)
    units = [None if each is None else _unit(each) for each in samples]
    pairs = [(a, b) for b in range(count) for a in range(b) if count <= _BY_ROWS or b == count - 1]
    for a, b in pairs:
        one, other = units[a], units[b]
        if one is not None and other is not None:
            near = (one @ other.T).argmax(axis=1)
            found[a, b] = found[b, a] = float((near == np.arange(len(near))).mean())
    return found


def families(linked: Mapping[tuple[int, int], bool | None], count: int) -> list[list[int]]:
    """Groups of models that are linked, the largest first; a link passes from one to the next.

    >>> families({(0, 1): False, (0, 2): True, (1, 2): False}, 3)
    [[0, 2], [1]]
    """
    group = list(range(count))
    for (a, b), link in sorted(linked.items()):
        if link and group[a] != group[b]:
            old, new = group[b], group[a]
            group = [new if each == old else each for each in group]
    members: dict[int, list[int]] = {}
    for index, each in enumerate(group):
        members.setdefault(each, []).append(index)
    return sorted(members.values(), key=lambda family: (-len(family), family[0]))


def _unit(rows: Array) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0), dtype=np.float32)


def _median(stacked: Matrix) -> Matrix:
    """The median over the first axis of what is a number; NaN where nothing is."""
    if not len(stacked):
        return np.full(stacked.shape[1:], np.nan)
    known = np.isfinite(stacked)
    ordered = np.sort(np.where(known, stacked, np.inf), axis=0)
    count = known.sum(axis=0)
    low, high = (np.take_along_axis(ordered, np.maximum(0, at)[None], 0)[0] for at in ((count - 1) // 2, count // 2))
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, (low + high) / 2, np.nan)


def _plain(matrix: Matrix, digits: int) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), digits) for value in row] for row in matrix]
