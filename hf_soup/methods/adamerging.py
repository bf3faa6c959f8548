"""The ancestor, and each task vector added to it by as much as makes the mix sure of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods.linear import weighted_sum


@merge_method(elementwise=True, neutral=None, needs_base=True, sums=True, statistics="coefficients", bound=1e-4)
def adamerging(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    statistics: Sequence[Tensor],
    examples: Annotated[int, Within("[1, inf)")] = 1024,
    by: Literal["layer", "ingredient"] = "layer",
    init: Annotated[float, Within("[0, 1]")] = 0.3,
    lr: Annotated[float, Within("(0, inf)")] = 1e-3,
    steps: Annotated[int, Within("[1, inf)")] = 500,
    batch_size: Annotated[int, Within("[1, inf)")] = 16,
) -> Tensor:
    r"""Add each task vector by as much as makes the mix sure of its answers.

    .. math:: \theta_l = \theta_{0,l} + \sum_i w_i \lambda_{li} \tau_{li}, \qquad
        \min_{0 \le \lambda \le 1}\ \frac{1}{m} \sum_k H\bigl(p(\cdot \mid x_k; \theta)\bigr), \qquad
        H(p) = -\sum_c p_c \log p_c

    for each tensor :math:`l` and ingredient :math:`i`, by Adam from ``init`` on, over :math:`m` examples :math:`x_k`
    without their labels. Weights are not in the paper; ones are the paper's. As in the authors' code a layer is a
    tensor, and coefficients stay between 0 and 1; here one that has reached an end can come back. The paper has
    examples of each task and a head for each; here there is one head, and the examples are the recipe's. AdaMerging++,
    which trims task vectors as `ties` does before, is not built.

    Equal ingredients are returned where their coefficients sum to one, which no parameter makes them do. Where no
    answer depends on a tensor, as on the biases of keys, its coefficients stay at ``init``.

    When:
        For models of different tasks or data with one head, with examples of the inputs that the mix shall be good at.

    When not:
        Where the mix that it begins with is often wrong, or the examples are of few labels: it gets surer of what it
        says already, and may come to say one thing always; fewer ``steps`` stay nearer to the begin. For runs on one
        data set, which `linear` averages without data.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers.
        statistics: For each ingredient its coefficient :math:`\lambda_{li}`, float32 without dimensions.
        examples: How many examples are drawn from the recipe's; all of them where there are fewer.
        by: ``layer``, a coefficient for each ingredient in every tensor; or ``ingredient``, one for each.
        init: Where coefficients begin; 0.3 is the paper's.
        lr: Learning rate of Adam; 0.001 is the paper's.
        steps: How many steps; the authors' code takes 500. None brings a coefficient further than about ``lr``.
        batch_size: Examples a step; 16 is the paper's, of each task.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Yang et al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024, arXiv:2310.02575.

    >>> import torch
    >>> adamerging([torch.tensor([1.0, 2.0]), torch.tensor([4.0, -4.0])], [1.0, 1.0],
    ...            statistics=[torch.tensor(0.5), torch.tensor(0.25)])
    tensor([1.5000, 0.0000])
    """
    dtype = deltas[0].dtype
    factors = [coefficient.to(dtype) * weight for coefficient, weight in zip(statistics, weights, strict=True)]
    return weighted_sum(deltas, factors, dtype)
