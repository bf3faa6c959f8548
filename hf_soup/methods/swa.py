"""Stochastic weight averaging: the mean over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods._recent import mean_of_recent


@merge_method(elementwise=True, neutral={}, ordered=True)
def swa(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    last: Annotated[int, Within("[0, inf)")] = 0,
    stride: Annotated[int, Within("[1, inf)")] = 1,
) -> Tensor:
    r"""Average the checkpoints of one run.

    With the checkpoints :math:`\theta_1, \dots, \theta_n` in the order of their steps, :math:`c` the ``stride`` and
    :math:`k` the number that go in,

    .. math:: \theta = \frac{\sum_{j=0}^{k-1} w_{n-cj}\,\theta_{n-cj}}{\sum_{j=0}^{k-1} w_{n-cj}}

    ``stride`` takes the ends of cycles, ``last`` leaves the way there out.

    When:
        For a run whose learning rate stays high or goes up and down: its checkpoints lie around a flat minimum, and
        their mean is nearer to the middle.

    When not:
        Where the learning rate was annealed to zero: the last checkpoint is there already. A model with batch
        normalisation needs `calibration` in the recipe, with which its running statistics are collected again.

    Args:
        tensors: ``n`` tensors of one shape, as stored, the latest last.
        weights: ``n`` numbers of zero or more, not all of those that go in zero. The paper's are equal.
        last: How many go in at most; 0, the default as in the paper, is all.
        stride: Every which one goes in, counted back from the latest; in the paper the length of a cycle.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Reference:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018, arXiv:1803.05407.

    >>> import torch
    >>> swa([torch.tensor([9.0]), torch.tensor([1.0]), torch.tensor([2.0])], [1.0, 1.0, 1.0], last=2)
    tensor([1.5000], dtype=torch.float64)
    """
    return mean_of_recent(tensors, weights, last, stride)
