"""The exponential moving average over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods._recent import mean_of_recent


@merge_method(elementwise=True, neutral={"decay": 1.0}, ordered=True)
def ema(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    decay: Annotated[float, Within("[0, 1]")] = 0.9,
    last: Annotated[int, Within("[0, inf)")] = 0,
    stride: Annotated[int, Within("[1, inf)")] = 1,
) -> Tensor:
    r"""Average the checkpoints of one run, the latest most.

    With the checkpoints that go in :math:`\theta_1, \dots, \theta_k` in the order of their steps, and :math:`\beta`
    the ``decay``,

    .. math:: \theta = \frac{\sum_{i=1}^k w_i\,\beta^{k-i}\,\theta_i}{\sum_{i=1}^k w_i\,\beta^{k-i}}

    This is :math:`m_i = \beta m_{i-1} + (1-\beta)\theta_i` from :math:`m_0 = 0`, divided by :math:`1-\beta^k`. Started
    at the first checkpoint instead, as is common where every step is averaged, that one would have the share
    :math:`\beta^{k-1}`, which with a few checkpoints is most of the sum.

    It is `swa` at :math:`\beta = 1` and the last checkpoint at 0.

    When:
        For a run that still moves, where early checkpoints are worth less than late ones.

    When not:
        Where the learning rate was annealed to zero: the last checkpoint is there already. A model with batch
        normalisation needs `calibration` in the recipe, with which its running statistics are collected again.

    Args:
        tensors: ``n`` tensors of one shape, as stored, the latest last.
        weights: ``n`` numbers of zero or more, not all of those that go in zero. The paper's are equal.
        decay: :math:`\beta`, from one checkpoint to the next. One that is meant by step, such as 0.999, is to the
            power of the steps between two checkpoints here: 0.61 for 500. The paper gives none.
        last: How many go in at most; 0 is all.
        stride: Every which one goes in, counted back from the latest.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Reference:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, arXiv:1512.00567.

    >>> import torch
    >>> ema([torch.tensor([4.0]), torch.tensor([1.0])], [1.0, 1.0], decay=0.5)
    tensor([2.], dtype=torch.float64)
    """
    return mean_of_recent(tensors, weights, last, stride, decay)
