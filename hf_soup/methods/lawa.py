"""Latest weight averaging: the mean of a window over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods._recent import mean_of_recent


@merge_method(elementwise=True, neutral={}, ordered=True)
def lawa(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    last: Annotated[int, Within("[0, inf)")] = 6,
    stride: Annotated[int, Within("[1, inf)")] = 1,
) -> Tensor:
    r"""Average the latest checkpoints of one run.

    With the checkpoints :math:`\theta_1, \dots, \theta_n` in the order of their steps, the :math:`k` latest at a
    ``stride`` :math:`\nu` are averaged:

    .. math:: \theta = \frac{\sum_{j=0}^{k-1} w_{n-\nu j}\,\theta_{n-\nu j}}{\sum_{j=0}^{k-1} w_{n-\nu j}}

    The formula of `swa`, with a window that moves along.

    When:
        For a run that is not at its end: the mean is as good as a checkpoint many epochs later.

    When not:
        Where the learning rate was annealed to zero: it gains little. A model with batch normalisation needs
        `calibration`
        in the recipe, with which its running statistics are collected again.

    Args:
        tensors: ``n`` tensors of one shape, as stored, the latest last.
        weights: ``n`` numbers of zero or more, not all of those that go in zero. The paper's are equal.
        last: The window: how many go in at most; 0 is all. The default is ours; in the paper a checkpoint is an epoch.
        stride: Every which one goes in, counted back from the latest.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Reference:
        Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging, 2022,
        arXiv:2209.14981.

    >>> import torch
    >>> lawa([torch.tensor([float(step)]) for step in range(10)], [1.0] * 10, last=3, stride=2)
    tensor([7.], dtype=torch.float64)
    """
    return mean_of_recent(tensors, weights, last, stride)
