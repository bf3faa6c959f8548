"""The mean of the ingredients, each entry weighted by how much the ingredient's answers depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Within, accumulator, merge_method
from hf_soup.methods.linear import shares

#: Entries on which no answer depends count alike.
FLOOR = 1e-6


@merge_method(elementwise=True, neutral={}, statistics="fisher", bound=1e-4)
def fisher(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    statistics: Sequence[Tensor],
    examples: Annotated[int, Within("[1, inf)")] = 256,
) -> Tensor:
    r"""Average each entry by how much the answers of each ingredient depend on it.

    .. math:: \theta = \frac{\sum_i w_i F_i \theta_i}{\sum_i w_i F_i}, \qquad
        F_i = \max\Bigl(\frac{1}{m} \sum_k \bigl(\nabla \log p_i(y_k \mid x_k)\bigr)^2, 10^{-6}\Bigr)

    entry by entry, with :math:`F_i` the diagonal of the Fisher information of ingredient :math:`i`: over :math:`m`
    examples :math:`x_k`, each by itself, the squares of the gradients of the log-probability of a label :math:`y_k`,
    drawn from what the model itself answers. Labels of the data are not looked at. The paper takes the mean over all
    labels where there are few; one drawn label has the same expectation. It looks at each model on its own data; here
    all have the same examples, those of the recipe.

    The floor keeps entries on which nothing depends from being decided by rounding. Where no answer depends much on
    any single entry, as in large models, many are below it, and those are the plain mean.

    Entries that are equal in all ingredients stay as they are. What has no gradient, as running statistics of norms, is
    averaged.

    When:
        For fine-tunes on different tasks or data, with examples of the inputs that the mix shall be good at.

    When not:
        Where the examples are few or of other inputs. For runs on one data set it is seldom told from the plain mean,
        which needs no data.

    Args:
        tensors: ``n`` tensors of one shape, as stored.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        statistics: For each ingredient the mean of squared gradients, float32, of the same shape.
        examples: How many examples are drawn from the recipe's; all of them where there are fewer.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Reference:
        Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv:2111.09832.

    >>> import torch
    >>> fisher([torch.tensor([1.0, 1.0]), torch.tensor([5.0, 5.0])], [1.0, 1.0],
    ...        statistics=[torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])])
    tensor([2., 3.], dtype=torch.float64)
    """
    dtype, factors = accumulator(tensors), shares(weights)
    if len(factors) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors and {len(factors)} weights")

    def importance(place: int) -> Tensor:
        return statistics[place].to(dtype, copy=True).clamp_(min=FLOOR).mul_(factors[place])

    total = importance(0)
    for place in range(1, len(tensors)):
        total.add_(importance(place))
    first = tensors[0].to(dtype)
    mixed, equal = torch.zeros_like(first), torch.ones_like(first, dtype=torch.bool)
    for place, tensor in enumerate(tensors):
        mixed.add_(tensor.to(dtype) * importance(place).div_(total))
        equal &= tensor == tensors[0]
    return torch.where(equal, first, mixed)
