"""The mean of the ingredients, each entry weighted by how much the ingredient's answers depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Within, accumulator, merge_method, shares
from hf_soup.methods._sums import weighted_sum

#: Entries on which no answer depends count alike; in parts of the root mean square over the model. What rounding leaves
#: of a gradient that is zero, as that of the bias of keys, is below 1e-12.
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

    .. math:: \theta = \frac{\sum_i w_i \hat F_i \theta_i}{\sum_i w_i \hat F_i}, \qquad
        \hat F_i = \max\Bigl(\frac{F_i}{\operatorname{rms} F_i}, 10^{-6}\Bigr), \qquad
        F_i = \frac{1}{m} \sum_k \bigl(\nabla \log p_i(y_k \mid x_k)\bigr)^2

    entry by entry, with :math:`F_i` the diagonal of the Fisher information of ingredient :math:`i`: over :math:`m`
    examples :math:`x_k`, each by itself, the squares of the gradients of the log-probability of a label :math:`y_k`,
    drawn from what the model itself answers. Labels of the data are not looked at. A language model answers after each
    token of a text: there a token is drawn for each, and their log-probabilities are summed. The paper takes the mean
    over all labels where there are few; one drawn label has the same expectation. It looks at each model on its own
    data; here all have the same examples, those of the recipe.

    How large :math:`F_i` is says how many entries a model has and how sure it is of its answers: from 1e-2 in a small
    model to 1e-12 in a large one that has learned its data by heart. So it is divided by its root mean square over the
    model, as the authors' code divides by its norm, and ingredients of equal weight count alike. The floor keeps
    entries on which nothing depends from being decided by rounding: those are the plain mean. In the authors' code it
    is 1e-6 before that division, and of one model alone, the target, whose such entries are kept; here nobody is that.

    Entries that are equal in all ingredients stay as they are. What has no gradient, as running statistics of norms, is
    averaged.

    When:
        For fine-tunes on different tasks or data, with examples of the inputs that the mix shall be good at.

    When not:
        Where the examples are few or of other inputs. For language models with few texts: the root mean square is
        mostly that of the token which begins every text, so it depends on the tokens that are drawn. For runs on one
        data set it is seldom told from the plain mean, which needs no data.

    Args:
        tensors: ``n`` tensors of one shape, as stored.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        statistics: For each ingredient the mean of squared gradients over its root mean square in the model, float32,
            of the same shape.
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
    dtype, pairs = accumulator(tensors), zip(statistics, shares(weights), strict=True)
    importances = [shown.to(dtype, copy=True).clamp_(min=FLOOR).mul_(share) for shown, share in pairs]
    total = weighted_sum(importances, [1.0] * len(tensors), dtype)
    first = tensors[0].to(dtype)
    mixed, equal = torch.zeros_like(first), torch.ones_like(first, dtype=torch.bool)
    for tensor, importance in zip(tensors, importances, strict=True):
        mixed.add_(tensor.to(dtype) * importance.div_(total))
        equal &= tensor == tensors[0]
    return torch.where(equal, first, mixed)
