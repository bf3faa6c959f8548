"""What the methods that leave entries out have in common: masks, and the vote on signs of TIES."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_soup.methods import BLOCK


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values where a mask of ones and zeros, of the same type, has a one; a new tensor.

    A product, as torch takes ten times as long where it selects by Booleans.
    """
    return values * mask


def within(values: Tensor, low: float, high: float = math.inf) -> Tensor:
    """A new tensor of the values whose magnitude as float32 is from ``low`` to ``high``, both float32s, else of zeros.

    >>> within(torch.tensor([0.5, -1.0, 2.0, -3.0]), 1.0, 2.0)
    tensor([ 0., -1.,  2.,  0.])
    """
    if values.dtype == torch.float32:
        # Drops magnitudes up to a bound, in one pass instead of four.
        found = hardshrink(values, _below(low)) if low > 0 else values.clone()
        return found - hardshrink(found, high) if high < math.inf else found
    magnitudes = values.detach().abs().float()
    return values * magnitudes.ge(low).logical_and_(magnitudes.le(high)).to(values.dtype)


@lru_cache(64)
def _below(value: float) -> float:
    """The next smaller float32."""
    return torch.nextafter(torch.tensor(value), torch.tensor(-math.inf)).item()


def agreeing_mean(
    deltas: Sequence[Tensor],
    votes: Sequence[float],
    trim: Callable[[int, slice], Tensor],
    factors: Sequence[float | Tensor] | None = None,
) -> Tensor:
    r"""The mean, entry by entry, over the ingredients whose entry has the sign that the vote gives.

    .. math:: \frac{\sum_{i\in A} f_i\tau_i}{\sum_{i\in A} f_i}, \qquad
        A = \{i : \operatorname{sign}\tau_i = \operatorname{sign}\sum_j v_j\tau_j \ne 0\}

    Zero where :math:`A` is empty or all its factors are zero.

    Args:
        deltas: ``n`` task vectors of one shape.
        votes: :math:`v_i`, ``n`` numbers of zero or more.
        trim: ``trim(i, block)``: the elements ``block`` of flat :math:`\tau_i` that count, the others zero; a tensor
            of its own.
        factors: :math:`f_i`, zero or more; ``votes`` if absent.

    Returns:
        The same shape and dtype.

    >>> deltas = [torch.tensor([4.0, 1.0]), torch.tensor([-2.0, 3.0])]
    >>> agreeing_mean(deltas, [1.0, 1.0], lambda i, block: deltas[i][block].clone())
    tensor([4., 2.])
    """
    out = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    flat = out.view(-1)
    for start in range(0, flat.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        parts = [trim(place, block) for place in range(len(deltas))]
        if factors is None:
            # What counts in the vote counts in the mean too, and is multiplied once.
            parts = [_times(each, share) for each, share in zip(parts, votes, strict=True)]
        vote: Tensor | None = None
        for each, share in zip(parts, votes, strict=True):
            vote = _plus(vote, each if factors is None or share == 1.0 else each * share)
        assert vote is not None
        elected = vote.sign_()
        mean: Tensor | None = None
        total: Tensor | None = None
        for place, share in enumerate(votes):
            # Magnitudes of those that agree. Turned to the elected sign, all others are zero or less.
            agreed = parts[place].mul_(elected).clamp_(min=0.0)
            counted = agreed.detach().sign()
            factor = share if factors is None else factors[place]
            mean = _plus(mean, agreed if factors is None else _times(agreed, factor))
            total = _plus(total, _times(counted, factor))
        assert mean is not None
        assert total is not None
        flat[block] = mean.div_(total.add_(total.detach() == 0)).mul_(elected)
    return out


def _times(values: Tensor, factor: float | Tensor) -> Tensor:
    """Their product, in the memory of the values."""
    return values if isinstance(factor, float) and factor == 1.0 else values.mul_(factor)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """Their sum, in the memory of the total; at first a total of its own."""
    return part.clone() if total is None else total.add_(part)
