"""Task vectors where they differ most, weighted by their energy, without the signs of the minority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import BLOCK, Within, accumulator, cutoff, merge_method
from hf_soup.methods._signs import agreeing_mean
from hf_soup.methods.linear import shares

#: Blocks whose energies are added up together, as many small sums would cost more than the squares.
_BLOCKS = 4


@merge_method(elementwise=False, neutral={"select_topk": 1.0}, needs_base=True)
def sce(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    select_topk: Annotated[float, Within("(0, 1]")] = 1.0,
) -> Tensor:
    r"""Take the entries that differ most, weigh by what is left, drop minority signs.

    With :math:`\hat\tau_i` the task vector at the ``select_topk`` of entries whose variance over the ingredients is
    largest, and zero elsewhere,

    .. math:: \theta = \theta_0 + \frac{\sum_{i\in A} w_ie_i\hat\tau_i}{\sum_{i\in A} w_ie_i}, \qquad
        e_i = \sum_k \hat\tau_{i,k}^2, \qquad
        A = \Bigl\{i : \operatorname{sign}\hat\tau_i = \operatorname{sign}\sum_j w_j\hat\tau_j \ne 0\Bigr\}

    tensor by tensor, and :math:`\theta_0` where :math:`A` is empty. Whoever changed a tensor most has the most to say
    in it, by the square: an ingredient that went three times as far counts nine times.

    The paper has no weights; here they count in the variance, in the vote and in the mean, so that an ingredient of
    weight zero is as good as absent. mergekit takes its share of the entries whose variance is not zero, and so drops
    everything where all agree; here the share is of all entries, and those of equal variance are all kept.

    When:
        For models that learned different things in different places, with no values to tune.

    When not:
        Where one diverged, or was trained much longer than the others: it takes over.

    Args:
        deltas: ``n`` task vectors of one shape, float32 or float64. Standard deviations are compared as float32.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        select_topk: Share of the entries selected; 1 selects all.

    Returns:
        The task vector of the mix, float64.

    Reference:
        Wan et al., FuseChat, 2024, arXiv:2408.07990.

    >>> import torch
    >>> sce([torch.tensor([3.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 1.0])], [1.0, 1.0])  # weights are 10 and 3
    tensor([2.5385, 1.0000, 0.0000], dtype=torch.float64)
    """
    wide, factors = accumulator(deltas), shares(weights)
    size = deltas[0].numel()
    if not size:
        return torch.zeros(deltas[0].shape, dtype=wide, device=deltas[0].device)
    flat = [delta.reshape(-1) for delta in deltas]
    power = 1.0
    if select_topk < 1.0 or deltas[0].dtype != torch.float32:  # whose squares are all within float64
        # Scaled by a power of two, which rounds nothing, so that no square over- or underflows that would count.
        largest = max(float(end.abs()) for delta in flat for end in torch.aminmax(delta.detach()))
        power = math.ldexp(1.0, -max(math.frexp(largest)[1], -1000))
    blocks = [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]
    mask: Tensor | None = None
    if select_topk < 1.0:
        spread = torch.cat([_spread([each[block] for each in flat], factors, power, wide) for block in blocks])
        mask = spread.ge_(cutoff(spread, select_topk))

    def trim(place: int, block: slice) -> Tensor:
        part = flat[place][block]
        return part.to(wide, copy=True) if mask is None else part.to(wide) * mask[block].to(wide)

    energies = []
    for place, share in enumerate(factors):
        parts = []
        for start in range(0, size, _BLOCKS * BLOCK):
            part = trim(place, slice(start, start + _BLOCKS * BLOCK))
            squares = (part if power == 1.0 else part.mul_(power)).square()
            full = len(squares) // BLOCK * BLOCK
            pieces = (squares[:full].view(-1, BLOCK), squares[full:].view(1, -1))
            parts += [_sums(piece) for piece in pieces if piece.numel()]
        energies.append(_sums(torch.cat(parts)) * share)
    most = max(float(energy.detach()) for energy in energies)
    return agreeing_mean(deltas, factors, trim, [energy / (most or 1.0) for energy in energies])


def _spread(parts: Sequence[Tensor], weights: Sequence[float], power: float, wide: torch.dtype) -> Tensor:
    """The standard deviation over the ingredients, up to a factor, as float32."""
    scaled = [part.detach().to(wide) * power for part in parts]
    mean, squares = torch.zeros_like(scaled[0]), torch.zeros_like(scaled[0])
    for each, weight in zip(scaled, weights, strict=True):
        mean.add_(each * weight)
    mean.div_(math.fsum(weights))
    for each, weight in zip(scaled, weights, strict=True):
        squares.add_(each.sub_(mean).square_().mul_(weight))
    return squares.sqrt_().float()


def _sums(values: Tensor) -> Tensor:
    """The sums over the last dimension, in an order that is the same for any machine and number of threads, as
    `torch.sum`'s is not.

    They are added up in the memory of the values.
    """
    while (size := values.shape[-1]) > 1:
        half = (size + 1) // 2
        values[..., : size - half].add_(values[..., half:])
        values = values[..., :half]
    return values[..., 0].clone()  # a view would hold the memory of all of them
