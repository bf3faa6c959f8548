"""Task vectors where they differ most, weighted by their energy, without the signs of the minority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Slices, Within, merge_method, shares
from hf_soup.methods._ranks import count_kept, ranked, sampled
from hf_soup.methods._signs import agreeing_mean
from hf_soup.methods._span import FAINT
from hf_soup.methods._sums import weighted_sum


def _measure(slices: Slices, weights: Sequence[float], *, select_topk: float) -> tuple[float, list[Tensor]]:
    """The least standard deviation that is selected, as a float32, and :math:`w_ie_i` over the largest of them."""
    factors, size, least = shares(weights), slices.size, 0.0
    if select_topk < 1.0 and size:

        def spread(begin: int, end: int) -> Tensor:
            return _spread(slices.read(begin, end).unbind(), factors)[None]

        spreads = Slices(spread, 1, size)
        ((least,),) = ranked(spreads, [count_kept(size, select_topk)], size, sampled(spreads))
    energies = [torch.zeros((), dtype=torch.float64) for _ in factors]
    for tensors in slices:
        kept = _selected(tensors.unbind(), factors, least)
        for place, (tensor, share) in enumerate(zip(kept, factors, strict=True)):
            energy = _sum(tensor.square())
            if not energy.isfinite() or (energy < FAINT and tensor.any()):
                energy = _sum(tensor.double().square())
            energies[place] = energies[place] + energy.double() * share
    most = max(float(energy.detach()) for energy in energies)
    return least, [energy / (most or 1.0) for energy in energies]


def _selected(tensors: Sequence[Tensor], factors: Sequence[float], least: float) -> Sequence[Tensor]:
    """The entries whose standard deviation is large enough, and zero in the place of others."""
    if not least > 0.0:
        return tensors
    mask = _spread(tensors, factors).ge(least).to(tensors[0].dtype)
    return [tensor * mask for tensor in tensors]


@merge_method(elementwise=True, neutral={"select_topk": 1.0}, needs_base=True, measure=_measure, bound=0.0)
def sce(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    measured: tuple[float, Sequence[Tensor]],
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
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64. Standard deviations are compared as
            float32.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        measured: The least standard deviation selected, as a float32, and the :math:`w_ie_i` over the largest of them.
        select_topk: Share of the entries selected; 1 selects all.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Wan et al., FuseChat, 2024, arXiv:2408.07990.

    >>> import torch
    >>> deltas, weights = [torch.tensor([3.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 1.0])], [1.0, 1.0]
    >>> sce(deltas, weights, measured=_measure(Slices.of(deltas), weights, select_topk=1.0))  # weights are 10 and 3
    tensor([2.5385, 1.0000, 0.0000])
    """
    factors = shares(weights)
    least, energies = measured
    flat = [delta.reshape(-1) for delta in deltas]
    kept = _selected(flat, factors, least)
    # The sign of a vote that overflows on the way may be the wrong one.
    votes = [math.ldexp(factor, -len(factors).bit_length()) for factor in factors]
    return agreeing_mean(deltas, votes, lambda place, block: kept[place][block].clone(), energies)


def _spread(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The standard deviation over the ingredients, up to a factor, as float32."""
    wide = [part.detach().double() for part in parts]
    mean = weighted_sum(wide, weights, torch.float64).div_(math.fsum(weights))
    squares = torch.zeros_like(mean)
    for each, weight in zip(wide, weights, strict=True):
        squares.add_((each - mean).square_().mul_(weight))
    return squares.sqrt_().float()


def _sum(values: Tensor) -> Tensor:
    """The sum, in an order that is the same for any machine and number of threads, as `torch.sum`'s is not.

    They are added up in the memory of the values.
    """
    while (size := len(values)) > 1:
        half = (size + 1) // 2
        values[: size - half].add_(values[half:])
        values = values[:half]
    return values.sum()
