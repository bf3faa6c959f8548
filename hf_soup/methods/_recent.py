"""The latest of ingredients in order, and their mean."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_soup.methods import shares
from hf_soup.methods.linear import linear


def recent(count: int, last: int, stride: int) -> list[int]:
    """Numbers of those that go in: counted back from the latest, every ``stride``-th, ``last`` of them.

    >>> recent(7, last=3, stride=2), recent(4, last=0, stride=1), recent(2, last=5, stride=1)
    ([2, 4, 6], [0, 1, 2, 3], [0, 1])
    """
    numbers = range(count)[::-stride]
    return sorted(numbers[:last] if last else numbers)


def mean_of_recent(
    tensors: Sequence[Tensor], weights: Sequence[float], last: int, stride: int, decay: float = 1.0
) -> Tensor:
    """The weighted mean of the latest, each of which counts ``decay`` times as much as the one after it.

    Raises:
        ValueError: All of them have weight zero.
    """
    pairs = list(zip(tensors, shares(weights), strict=True))
    taken = [pairs[number] for number in recent(len(pairs), last, stride)]
    ages = range(len(taken))[::-1]
    factors = [weight * decay**age for (_, weight), age in zip(taken, ages, strict=True)]
    if not any(factors):
        raise ValueError(f"the shares of the {len(taken)} latest of {len(pairs)} ingredients are all zero")
    return linear([tensor for tensor, _ in taken], factors)
