"""What the methods that leave entries out have in common: masks, and the vote on signs of TIES."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from hf_soup.methods import BLOCK
from hf_soup.methods._sums import weighted_sum


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
    flat, ones = out.view(-1), [1.0] * len(deltas)
    for start in range(0, flat.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        parts = [trim(place, block) for place in range(len(deltas))]
        if factors is None:
            # What counts in the vote counts in the mean too, and is multiplied once.
            parts = [part.mul_(share) for part, share in zip(parts, votes, strict=True)]
        elected = weighted_sum(parts, ones if factors is None else votes, out.dtype).sign_()
        # Magnitudes of those that agree. Turned to the elected sign, all others are zero or less.
        agreed = [part.mul_(elected).clamp_(min=0.0) for part in parts]
        mean = weighted_sum(agreed, ones if factors is None else factors, out.dtype)
        counted = (each.detach().sign() for each in agreed)
        total = weighted_sum(counted, votes if factors is None else factors, out.dtype)
        flat[block] = mean.div_(total.add_(total.detach() == 0)).mul_(elected)
    return out
