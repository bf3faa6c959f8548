"""Task vectors of which a random part is dropped, averaged where their signs win the vote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method, shares
from hf_soup.methods._signs import agreeing_mean, masked


@merge_method(elementwise=True, neutral={"density": 1.0, "scale": 1.0}, needs_base=True, bound=0.0)
def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    random: Sequence[Tensor],
    density: Annotated[float, Within("(0, 1]")] = 0.5,
    scale: Annotated[float, Within("(-inf, inf)")] = 1.0,
) -> Tensor:
    r"""Drop entries at random, then average those whose sign wins the vote.

    With ``density`` :math:`d`, uniform random numbers :math:`u_i` and :math:`\hat\tau_i = [u_i < d]\,\tau_i / d`,

    .. math:: \theta = \theta_0 + \lambda \frac{\sum_{i\in A} w_i\hat\tau_i}{\sum_{i\in A} w_i}, \qquad
        A = \Bigl\{i : \operatorname{sign}\hat\tau_i = \operatorname{sign}\sum_j w_j\hat\tau_j \ne 0\Bigr\}

    entry by entry, and :math:`\theta_0` where :math:`A` is empty.

    An entry that one ingredient alone kept is not divided by how many there are, so what survives is larger than in a
    mean, by up to :math:`1/d`: where that is too much, lower ``scale``.

    The paper's runs trim by magnitude as well, after dropping, with TIES' own density. Here, as in mergekit, dropping
    takes the place of trimming, so that one number says how much is kept.

    When:
        For fine-tunes on different tasks that changed little; see `dare_linear`.

    When not:
        Where they changed much, as after continued pretraining.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        random: ``n`` float32 tensors of that shape, uniform in [0, 1).
        density: Share of the entries kept, the paper's :math:`1-p`.
        scale: :math:`\lambda`.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Yu et al., Language models are super Mario, ICML 2024, arXiv:2311.03099.

    >>> import torch
    >>> learned = [torch.tensor([3.0, 3.0, 1.0]), torch.tensor([-1.0, -1.0, 1.0])]
    >>> drawn = [torch.tensor([0.2, 0.7, 0.0]), torch.tensor([0.3, 0.1, 0.9])]
    >>> dare_ties(learned, [1.0, 1.0], random=drawn, density=0.5)  # 6 beats -2; 3 was dropped; 1 is there once
    tensor([ 6., -2.,  2.])
    """
    flat = [(delta.reshape(-1), drawn.reshape(-1)) for delta, drawn in zip(deltas, random, strict=True)]

    def trim(place: int, block: slice) -> Tensor:
        delta, drawn = (each[block] for each in flat[place])
        return masked(delta, drawn.clone().lt_(density).to(delta.dtype))

    return agreeing_mean(deltas, shares(weights), trim).mul_(scale).div_(density)
