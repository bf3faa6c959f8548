"""Magnitudes by their rank among many, found without a sort: exactly, mostly in one pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_soup.methods import Slices

#: No float32 has higher bits without its sign, NaN included.
_HIGHEST = (1 << 31) - 1
#: Numbers that all searches together hold at most; of more they count how many are in each of so many bins, as a power
#: of two.
_HELD, _BINS = 1 << 24, 21
#: Tensors of at most so many entries need no sample.
_FEW = 1 << 18
#: Elements that are looked at for the first bounds: so many places, at most, and so many elements at each, of up to
#: four tensors.
_PLACES, _EACH = 256, 4096
#: Groups of a sample by which it is told how far off it may be, and how many standard errors the first bounds are away.
_GROUPS, _AWAY = 64, 5.0

#: Applies a function to each of some values, as `map` does, or several at a time, as that of a pool of threads.
Mapper = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]


class Parts(Protocol):
    """Of several tensors, in order."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, place: int, /) -> Iterable[Tensor]:
        """One of each."""


def ranked(
    slices: Parts, wanted: Sequence[int], size: int, samples: Sequence[Tensor], mapper: Mapper = map
) -> list[list[float]]:
    """For every ingredient the magnitudes of its entries that have the ranks ``wanted``, as float32s.

    For each rank those between two bounds are kept, or counted where they are many; the bounds are narrowed until one
    number is left. The first ones are guessed from a sample, which decides how long it takes, but not what is found.

    Args:
        slices: Of ``n`` tensors, each time they are asked for.
        wanted: From 1, the largest, to ``size``.
        size: How many entries each has.
        samples: Some of the entries of each, in their order.
        mapper: Goes through the slices.

    >>> tensors = [torch.tensor([0.5, -3.0]), torch.tensor([2.0, 1.0])]
    >>> ranked([[tensors[0]], [tensors[1]]], [1, 3], 4, [tensors[0]])
    [[3.0, 1.0]]
    """
    searches = []
    for sample in samples:
        bits = _bits(sample) if size > 2 * sample.numel() else _bits(sample[:0])
        searches.append([_Search(rank, bits, size, _HELD // (len(samples) * len(wanted))) for rank in wanted])

    def look(place: int) -> None:
        for tensor, mine in zip(slices[place], searches, strict=True):
            if left := [search for search in mine if search.found is None]:
                bits = _bits(tensor)
                for search in left:
                    search.look(bits)

    while any(search.found is None for mine in searches for search in mine):
        for _ in mapper(look, range(len(slices))):
            pass
        for mine in searches:
            for search in mine:
                if search.found is None:
                    search.narrow()
    return [
        [float(torch.tensor(search.found, dtype=torch.int32).view(torch.float32)) for search in mine]
        for mine in searches
    ]


def sampled(slices: Slices) -> list[Tensor]:
    """Some elements of every tensor from all over it, as a sample for `ranked`; none where they are few."""
    size = slices.size
    if size <= _FEW:
        return [torch.empty(0)] * slices.count
    places = min(_PLACES, size >> 17)
    each = max(64, _EACH * 4 // max(4, slices.count))
    starts = range(0, size - each, size // places)
    return list(torch.cat([slices.read(start, start + each) for start in starts], dim=1))


def cutoff(values: Tensor, density: float) -> float:
    """The magnitude that the `count_kept` largest entries reach or exceed, as a float32; found without a sort.

    Entries that are equal to it as float32 are kept with it, so there may be more of them.

    >>> cutoff(torch.tensor([0.5, -3.0, 2.0, 1.0]), 0.5)
    2.0
    """
    slices = Slices.of([values.detach()])
    if not slices.size:
        return 0.0
    return ranked(slices, [count_kept(slices.size, density)], slices.size, sampled(slices))[0][0]


def count_kept(size: int, density: float) -> int:
    """How many of ``size`` entries a density keeps: :math:`\\max(1, \\lfloor density \\cdot size \\rfloor)`.

    A product that misses a whole number by a rounding is that number.

    >>> count_kept(10, 0.2), count_kept(10, 0.29), count_kept(10, 0.0), count_kept(100, 0.29)
    (2, 2, 1, 29)
    """
    exact = density * size
    near = round(exact)
    return max(1, near if math.isclose(exact, near, rel_tol=1e-12) else math.floor(exact))


def _bits(values: Tensor) -> Any:
    """Magnitudes as float32, and these as numpy's int32: bits of floats that are not negative sort as the floats do.

    numpy compares and selects three times as fast as torch.
    """
    return values.detach().abs().float().view(torch.int32).cpu().numpy()


def _bounds(share: float, sample: Any) -> tuple[int, int]:
    """Between which the number most likely is that a share of all numbers reaches or exceeds.

    A sample of a few places in weights is further off than chance alone would have it, as rows differ in size: how far,
    is seen in how much the places differ.
    """
    groups = min(_GROUPS, len(sample) // 32)
    if groups < 2:
        return 0, _HIGHEST
    ranked = sample.copy()
    ranked.sort()  # ten times as fast as torch's
    middle = ranked[min(round((1 - share) * len(ranked)), len(ranked) - 1)]
    above = sample[: len(sample) // groups * groups].reshape(groups, -1) > middle
    away = _AWAY * float(above.mean(axis=1).std()) / math.sqrt(groups)
    first, last = (round((1 - share + each) * len(ranked)) for each in (-away, away))
    return (
        int(ranked[first]) if 0 <= first < len(ranked) else 0,
        int(ranked[last]) if 0 <= last < len(ranked) else _HIGHEST,
    )


class _Search:
    """For the number of one rank: bounds, and what of a pass lies between them."""

    def __init__(self, rank: int, sample: Any, size: int, most: int) -> None:
        self.rank = rank
        self.most = most
        self.found: int | None = None
        self._lock = threading.Lock()
        low, high = _bounds(rank / size, sample)
        self._within(min(low, high - 1), high)  # what equals both would be counted twice

    def _within(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.shift = max(0, (high - low).bit_length() - _BINS)
        self.near: list[Any] = []
        self.counts: Any = None
        self.above = self.highest = self.between = self.lowest = 0

    def look(self, bits: Any) -> None:
        """Keep or count what of an array lies between the bounds.

        What equals a bound is only counted: differences of 16-bit numbers have few values, each of many entries.
        """
        from_low, above_low = bits >= self.low, bits > self.low
        from_high, above_high = bits >= self.high, bits > self.high
        near = bits.take((above_low ^ from_high).nonzero()[0])  # faster than by the Booleans
        with self._lock:
            self.above += int(np.count_nonzero(above_high))
            self.highest += int(np.count_nonzero(from_high ^ above_high))
            self.between += len(near)
            self.lowest += int(np.count_nonzero(from_low ^ above_low))
            self.near.append(near)
            if sum(map(len, self.near)) > self.most:
                self._count()

    def _count(self) -> None:
        """How many numbers are in each bin, with those counted before."""
        counts = np.bincount((np.concatenate(self.near) - self.low) >> self.shift, minlength=1 << _BINS)
        self.counts = counts if self.counts is None else self.counts + counts
        self.near = []

    def narrow(self) -> None:
        """Find the number, or bounds for the next pass."""
        place = self.rank - self.above  # from 1, among those that are not above
        if place < 1:
            self._within(self.high + 1, _HIGHEST)
        elif place <= self.highest:
            self.found = self.high
        elif (place := place - self.highest) <= self.between:
            self._look_between(place)
        elif place - self.between <= self.lowest:
            self.found = self.low
        else:
            self._within(0, self.low - 1)
        if self.low == self.high:
            self.found = self.low

    def _look_between(self, place: int) -> None:
        if self.counts is None:
            self.found = _largest(np.concatenate(self.near), place)
            return
        if self.near:
            self._count()
        bin_, _ = _bin(self.counts, place)
        low = self.low + (bin_ << self.shift)
        self._within(low, min(self.high, low + (1 << self.shift) - 1))


def _largest(values: Any, place: int) -> int:
    """The number that comes at a place, from 1, the largest; partitions are slow with many that are alike."""
    while (low := int(values.min())) != (high := int(values.max())):
        bins = (values - low) >> max(0, (high - low).bit_length() - 12)
        bin_, place = _bin(np.bincount(bins), place)
        values = values[bins == bin_]
    return low


def _bin(counts: Any, place: int) -> tuple[int, int]:
    """In which bin the number at a place is, the largest is at 1, and at which place there."""
    more = counts[::-1].cumsum()
    at = int(np.searchsorted(more, place))
    return len(counts) - 1 - at, place - (int(more[at - 1]) if at else 0)
