"""The plain sum of task vectors without their largest and their smallest entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Slices, Within, merge_method
from hf_soup.methods._ranks import count_kept, ranked, sampled
from hf_soup.methods._signs import within
from hf_soup.methods._sums import weighted_sum


def _cutoffs(
    slices: Slices, weights: Sequence[float], *, density: float, gamma: float, scale: float
) -> list[tuple[float, float]]:
    """The least and the largest magnitude that is kept of each task vector."""
    if density + gamma > 1 + 1e-9:
        raise ValueError(
            f"`density` {density:g} and `gamma` {gamma:g} are {density + gamma:g} together: nobody can keep and drop "
            f"more than everything. Set `gamma` to at most {1 - density:g}, or `density` to at most {1 - gamma:g}."
        )
    size = slices.size
    if not size:
        return [(0.0, math.inf)] * len(weights)
    dropped = count_kept(size, gamma + 1 / size) - 1
    last = dropped + min(count_kept(size, density), size - dropped)
    ranks = [last, dropped + 1] if dropped else [last]
    found = ranked(slices, ranks, size, sampled(slices))
    return [(low, high[0] if high else math.inf) for low, *high in found]


@merge_method(
    elementwise=True,
    neutral={"density": 1.0, "gamma": 0.0, "scale": lambda total: 1 / total},
    needs_base=True,
    sums=True,
    measure=_cutoffs,
    bound=0.0,
)
def breadcrumbs(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    measured: Sequence[tuple[float, float]],
    density: Annotated[float, Within("(0, 1]")] = 0.9,
    gamma: Annotated[float, Within("[0, 1)")] = 0.01,
    scale: Annotated[float, Within("(-inf, inf)")] = 0.3,
) -> Tensor:
    r"""Add up task vectors without the largest and smallest entries of each tensor.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i m_i \tau_i, \qquad
        m_i = [\,c_i^- \le |\tau_i| \le c_i^+\,]

    where of :math:`s` entries :math:`c_i^+` lets the :math:`\lfloor\gamma s\rfloor` largest go and :math:`c_i^-` keeps
    the :math:`\max(1, \lfloor ds \rfloor)` next, with ``density`` :math:`d`. Entries as large as either cutoff are
    kept, so where magnitudes repeat more may stay.

    The paper names both ends; here, as in mergekit, it is what is kept and what is dropped as the largest, so that
    ``density`` reads as it does for other methods.

    When:
        For many fine-tunes on different tasks: the values that are good for a few tasks are good for more.

    When not:
        Where a few large entries are what was learned, as in a norm or a bias: dropping them is a loss; lower ``gamma``
        there.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64. Magnitudes are compared as float32.
        weights: ``n`` numbers.
        measured: :math:`c_i^-` and :math:`c_i^+` of each task vector, as float32s.
        density: Share of the entries kept.
        gamma: Share of the entries dropped as the largest. Together they are at most 1.
        scale: :math:`\lambda`.

    Returns:
        The task vector of the mix, in their dtype.

    Raises:
        ValueError: ``density`` and ``gamma`` are more than 1 together.

    Reference:
        Davari and Belilovsky, Model breadcrumbs, ECCV 2024, arXiv:2312.06795.

    >>> import torch
    >>> breadcrumbs([torch.tensor([9.0, 2.0, -3.0, 0.1])], [1.0], measured=[(2.0, 3.0)], scale=1.0)
    tensor([ 0.,  2., -3.,  0.])
    """
    kept = (within(delta, low, high) for delta, (low, high) in zip(deltas, measured, strict=True))
    return weighted_sum(kept, weights, deltas[0].dtype).mul_(scale)
