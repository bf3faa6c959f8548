"""Task vectors without what is small or loses the vote on signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from hf_soup.methods import Within, merge_method, shares
from hf_soup.methods._signs import agreeing_mean, within


@merge_method(elementwise=True, neutral={"density": 1.0, "scale": 1.0}, needs_base=True, bound=0.0)
def ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    cutoffs: Sequence[float],
    density: Annotated[float, Within("(0, 1]")] = 0.2,
    scale: Annotated[float, Within("(-inf, inf)")] = 1.0,
    scope: Literal["model", "tensor"] = "model",
) -> Tensor:
    r"""Average task vectors without entries that are small or lose the vote on signs.

    With :math:`\hat\tau_i` the task vector whose entries below the ``density`` largest magnitudes are zero,

    .. math:: \theta = \theta_0 + \lambda \frac{\sum_{i\in A} w_i\hat\tau_i}{\sum_{i\in A} w_i}, \qquad
        A = \Bigl\{i : \operatorname{sign}\hat\tau_i = \operatorname{sign}\sum_j w_j\hat\tau_j \ne 0\Bigr\}

    entry by entry, and :math:`\theta_0` where :math:`A` is empty, as where the vote is a draw.

    The paper trims over the whole task vector, so that a tensor that changed little may vanish; that is
    ``scope: model``, the default. mergekit trims every tensor by itself, which is ``scope: tensor``.

    When:
        For fine-tunes on different tasks that a plain mean would water down.

    When not:
        For fine-tunes on one task: they have mostly noise in common beside what they learned, and their mean is as good
        and simpler. On mixed language models TIES costs a few points (arXiv:2511.21437).

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        cutoffs: For each task vector the least magnitude that is kept, as a float32; the magnitudes are compared as
            float32 too, and equal ones are all kept.
        density: Share of the entries that is kept of each task vector; 0.2 is the paper's likewise.
        scale: :math:`\lambda`; 1 is the paper's where nothing can be tuned.
        scope: Whether the largest are those of the whole model or of each tensor. It and the density say what the
            cutoffs are; here nothing looks at them.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Yadav et al., TIES-Merging, NeurIPS 2023, arXiv:2306.01708.

    >>> import torch
    >>> learned = [torch.tensor([4.0, 1.0, 0.5]), torch.tensor([-2.0, 3.0, 0.1])]
    >>> ties(learned, [1.0, 1.0], cutoffs=[1.0, 2.0], density=2 / 3)  # 4 beats -2; 1 and 3 agree; the rest is small
    tensor([4., 2., 0.])
    """
    flat = [delta.reshape(-1) for delta in deltas]

    def trim(place: int, block: slice) -> Tensor:
        return within(flat[place][block], cutoffs[place])

    return agreeing_mean(deltas, shares(weights), trim).mul_(scale)
