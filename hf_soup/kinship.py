"""Do weights show a common ancestor? What samples of rows have in common.

Fine-tuning moves weights little and keeps every neuron in its place. So for siblings, and for a model and its
ancestor, the same rows of the same tensors point the same way, while for models that were initialised apart they
are as good as orthogonal. docs/lineage.md has the distributions behind the thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hf_soup.samples import Array

#: Median cosine of the body below which two models are strangers.
STRANGERS = 0.05
#: Share of rows that find themselves below which they are too, whatever the cosine: a common mean is no kinship.
SAME_ROWS = 0.05
#: Median cosine of the body below which siblings have drifted apart.
DRIFTED = 0.9
#: Cosine below which a single tensor has nothing in common …
APART = 0.1
#: … where the median cosine is at least this, so that hard training has not done it.
SURE = 0.6
#: Share of the median cosine below which a single tensor is worth a word.
FAR_BELOW = 0.6
#: Cosine of the heads below which they were initialised apart.
HEADS_APART = 0.3
#: Lowest cosine of siblings' task vectors above which the ancestor they are measured from is hardly theirs …
WRONG_BASE = 0.8
#: … where they have at least this size, relative to the ancestor: short runs on the same data move alike too.
FAR_FROM_BASE = 0.35

#: Models of which each is compared with each row by row; of more, with the first two and the last.
_BY_ROWS = 12
#: Rows, and numbers in each, below which single rows say nothing.
_FEWEST = 16

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Kinship:
    r"""How alike models are in a part of their weights, each with each.

    For models :math:`a, b` and a sampled tensor :math:`t`, less its mean, which says nothing about kinship, it holds
    :math:`\langle\theta_a^t,\theta_b^t\rangle`, from which cosines follow, those of task vectors too:
    :math:`\langle\theta_a-\theta_0,\theta_b-\theta_0\rangle`.

    Args:
        part: ``body`` or ``head``.
        names: Whose.
        tensors: Which were sampled.
        products: ``(tensors, models, models)`` float64; NaN where one of two does not have the tensor.
        rows: ``(models, models)`` float64, the median share of rows whose nearest row in the other model is the one of
            the same number, less what chance gives; NaN where that was not looked at.
        same: ``(models, models)``, whether every sampled number is equal.
    """

    part: str
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    products: Matrix = field(repr=False)
    rows: Matrix = field(repr=False)
    same: Flags = field(repr=False)

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

    @cached_property
    def related(self) -> Flags:
        """``(models, models)``, which two come from one initialisation."""
        with np.errstate(invalid="ignore"):
            return (self.cosines >= STRANGERS) & ~(self.rows < SAME_ROWS)

    def kin(self, a: int, b: int) -> bool | None:
        """Whether two do; None where nothing can be compared."""
        return None if np.isnan(self.cosines[a, b]) else bool(self.related[a, b])

    @cached_property
    def apart(self) -> Flags:
        """``(tensors, models, models)``, which have nothing in common in two models that otherwise clearly do."""
        with np.errstate(invalid="ignore"):
            return (self.by_tensor < APART) & (self.cosines >= SURE)

    @cached_property
    def low(self) -> Flags:
        """``(tensors, models, models)``, which have far less in common than the other tensors of two models."""
        with np.errstate(invalid="ignore"):
            return self.by_tensor < np.maximum(APART, FAR_BELOW * self.cosines)

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
    >>> one, other = np.array([[1, -1, 0, 0]], np.float32), np.array([[0, 0, 1, -1]], np.float32)
    >>> compare([{"w": one}, {"w": 2 * one}, {"w": other}], ["a", "b", "c"], "body").cosines.round(6).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    count = len(samples)
    tensors = tuple(dict.fromkeys(name for each in samples for name in each))
    products = np.full((len(tensors), count, count), np.nan)
    finding = np.full((len(tensors), count, count), np.nan)
    same = np.ones((count, count), dtype=bool)
    for number, tensor in enumerate(tensors):
        shape = next(each[tensor].shape for each in samples if tensor in each)
        having = [i for i, each in enumerate(samples) if tensor in each and each[tensor].shape == shape]
        stack = np.stack([samples[i][tensor].ravel() for i in having]).astype(np.float64)  # (models, numbers)
        kinds: dict[bytes, int] = {}
        content = [kinds.setdefault(row.tobytes(), len(kinds)) for row in stack]
        lacking = [-1] * count
        for i, kind in zip(having, content, strict=True):
            lacking[i] = kind
        same &= np.equal.outer(lacking, lacking)
        # A padding token's row is zeros, and a pruned one: those say nothing.
        full = np.any(stack.reshape(len(having), shape[0], -1) != 0, axis=2)
        stack -= stack.mean(axis=1, keepdims=True)
        products[number][np.ix_(having, having)] = stack @ stack.T
        if min(shape[0], stack.shape[1] // shape[0]) >= _FEWEST:
            rows = [
                np.where(held[:, None], row.reshape(shape), 0.0) for row, held in zip(stack, list(full), strict=True)
            ]
            finding[number] = _by_rows(dict(zip(having, rows, strict=True)), count)
    return Kinship(part, tuple(names), tensors, products, _median(finding), same & bool(tensors))


def _by_rows(rows: Mapping[int, Matrix], count: int) -> Matrix:
    """``(models, models)``: for pairs of models the share of one tensor's rows that find themselves; see `Kinship`."""
    found = np.full((count, count), np.nan)
    units = {index: _unit(each) for index, each in rows.items()}
    holding = {index: np.any(each != 0, axis=1) for index, each in rows.items()}
    hubs = range(count) if count <= _BY_ROWS else (0, 1, count - 1)
    for a, b in {
        (min(hub, other), max(hub, other)) for hub in hubs for other in units if hub in units and hub != other
    }:
        holds = holding[a] & holding[b]
        if holds.sum() < _FEWEST:
            continue
        near = units[a][holds] @ units[b][holds].T
        finds, chance = float((near.argmax(axis=1) == np.arange(len(near))).mean()), 1 / len(near)
        found[a, b] = found[b, a] = max(0.0, (finds - chance) / (1 - chance))
    return found


def families(linked: Flags) -> list[list[int]]:
    """Groups of models that are linked, the largest first; a link passes from one to the next.

    >>> families(np.array([[0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=bool))
    [[0, 2], [1]]
    """
    count = len(linked)
    group, either = np.arange(count), linked | linked.T | np.eye(count, dtype=bool)
    while (least := np.where(either, group, count).min(axis=1, initial=count)).tolist() != group.tolist():
        group = least[least]  # whom those are linked to, so that a chain takes few turns
    members: dict[int, list[int]] = {}
    for index, first in enumerate(group.tolist()):
        members.setdefault(first, []).append(index)
    return sorted(members.values(), key=lambda family: (-len(family), family[0]))


def _unit(rows: Matrix) -> Array:
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
