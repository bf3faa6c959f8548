"""The plain sum of task vectors of which a random part is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods._signs import masked
from hf_soup.methods._sums import weighted_sum


@merge_method(
    elementwise=True, neutral={"density": 1.0, "scale": lambda total: 1 / total}, needs_base=True, sums=True, bound=0.0
)
def dare_linear(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    random: Sequence[Tensor],
    density: Annotated[float, Within("(0, 1]")] = 0.5,
    scale: Annotated[float, Within("(-inf, inf)")] = 1.0,
) -> Tensor:
    r"""Add up task vectors after dropping entries at random and enlarging the others.

    .. math:: \theta = \theta_0 + \frac{\lambda}{d} \sum_i w_i m_i \tau_i, \qquad m_i = [u_i < d]

    with ``density`` :math:`d` and uniform random numbers :math:`u_i`, so that the mean over the draws is the plain
    sum. Dropping is on the entries of each ingredient by itself.

    It is the plain sum of the paper's DARE with task arithmetic, so ``scale`` is the step on the whole: with ``1`` and
    equal ingredients it goes as many times too far as there are ingredients, unless the weights sum to one.

    mergekit divides by the sum of the weights where asked to normalize; here ``scale`` is the way to that.

    When:
        For fine-tunes on different tasks that changed little: in the paper, where it was by less than about 0.002 an
        entry, as in instruction tuning, nine entries in ten could be dropped at no loss, and then few of those that
        stay collide.

    When not:
        Where they changed much, as after continued pretraining. For several fine-tunes on one task: with a ``scale``
        of 1 their sum goes as many times as far as each of them went.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers.
        random: ``n`` float32 tensors of that shape, uniform in [0, 1).
        density: Share of the entries kept, the paper's :math:`1-p`.
        scale: :math:`\lambda`.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Yu et al., Language models are super Mario, ICML 2024, arXiv:2311.03099.

    >>> import torch
    >>> learned, drawn = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 0.9, 0.4, 0.5])
    >>> dare_linear([learned], [1.0], random=[drawn], density=0.5)
    tensor([2., 0., 6., 0.])
    """
    pairs = zip(deltas, random, strict=True)
    kept = (masked(delta, drawn.clone().lt_(density).to(delta.dtype)) for delta, drawn in pairs)
    return weighted_sum(kept, weights, deltas[0].dtype).mul_(scale).div_(density)
