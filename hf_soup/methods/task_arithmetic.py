"""The ancestor, and the task vectors added to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods._sums import weighted_sum


@merge_method(
    elementwise=True,
    neutral={"scale": lambda total: 1 / total},
    needs_base=True,
    sums=True,
    combination=True,
    bound=0.0,
)
def task_arithmetic(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: Annotated[float, Within("(-inf, inf)")] = 0.3,
) -> Tensor:
    r"""Add the task vectors of the ingredients to their ancestor.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \tau_i

    The plain sum: with ``scale`` :math:`1/n` and equal weights it is the uniform soup.

    When:
        For models of different tasks, all of which one model is to do; or to take away what an ingredient has learned,
        with a negative weight.

    When not:
        For fine-tunes on one task: as they agree, their sum goes too far, unless ``scale`` makes it the mean, which
        `linear` is.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers.
        scale: :math:`\lambda`; the paper tunes it on validation data, which a list of values does here.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv:2212.04089.

    >>> import torch
    >>> task_arithmetic([torch.tensor([1.0]), torch.tensor([2.0])], [1.0, -1.0], scale=0.5)
    tensor([-0.5000])
    """
    return weighted_sum(deltas, weights, deltas[0].dtype).mul_(scale)
