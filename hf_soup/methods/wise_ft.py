"""Between the ancestor and a fine-tune, or a soup of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods._sums import mean


@merge_method(elementwise=True, neutral={"alpha": 1.0}, needs_base=True, combination=True, bound=0.0)
def wise_ft(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    alpha: Annotated[float, Within("(-inf, inf)")] = 0.5,
) -> Tensor:
    r"""Interpolate between the ancestor and the mean of the ingredients.

    .. math:: \theta = (1-\alpha)\,\theta_0 + \alpha\,\bar\theta
        = \theta_0 + \alpha\,\frac{\sum_i w_i \tau_i}{\sum_i w_i}

    With one ingredient this is WiSE-FT as published, with several the WiSE-FT of their soup. Give ``alpha`` as a
    list and the best on validation data is taken.

    When:
        Where fine-tuning cost robustness under distribution shift: a way back towards the ancestor often wins it back.

    When not:
        Where nothing counts but data like those of the fine-tuning: there is little to win back.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        alpha: 0 is the ancestor, 1 the soup.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv:2109.01903.

    >>> import torch
    >>> wise_ft([torch.tensor([1.0, 2.0])], [1.0], alpha=0.25)
    tensor([0.2500, 0.5000])
    """
    return mean(deltas, weights, deltas[0].dtype).mul_(alpha)
