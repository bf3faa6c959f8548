"""The weights of linear layers that come nearest to what the ingredients' layers make of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Within, accumulator, merge_method, shares
from hf_soup.methods.linear import linear

#: Eigenvalues below this part of the largest are zero: their directions would be good to few of float32's digits.
_NULL = 1e-4


@merge_method(elementwise=False, neutral={}, statistics="gram", bound=1e-4)
def regmean(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    statistics: Sequence[Tensor],
    examples: Annotated[int, Within("[1, inf)")] = 256,
    offdiagonal: Annotated[float, Within("[0, 1]")] = 0.9,
) -> Tensor:
    r"""Combine linear layers so that they do to their inputs what the ingredients' do.

    .. math:: W = \Bigl(\sum_i w_i W_i \hat G_i\Bigr) \Bigl(\sum_i w_i \hat G_i\Bigr)^{-1}, \qquad
        G_i = \frac{1}{m} \sum_k x_{ik} x_{ik}^\top

    for weights :math:`W_i` of shape (out, in), with :math:`x_{ik}` the :math:`m` inputs of the layer in ingredient
    :math:`i`, one for every token or patch of the examples, and :math:`\hat G_i` the matrix :math:`G_i` with what is
    not on its diagonal times ``offdiagonal``. For ``offdiagonal`` 1 that is the least squares of
    :math:`\sum_i w_i \lVert (W - W_i) X_i \rVert^2`. Weights are not in the paper; equal ones are the paper's. It looks
    at each model on its own data; here all have the same examples, those of the recipe.

    It is solved for the distance from the weighted mean. So directions in which no ingredient has any input, where the
    sum of the :math:`\hat G_i` is singular, get the mean.

    What is no weight of a linear layer (biases, norms, embeddings, convolutions) is averaged, as in the paper; so is
    a weight that several layers share, as a head tied to the embeddings, and one that the model stores in other
    pieces than it computes with.

    When:
        For fine-tunes on different tasks or data, with examples of the inputs that the mix shall be good at.

    When not:
        Where the examples are of other inputs. For runs on one data set it is seldom told from the plain mean, which
        needs no data.

    Args:
        tensors: ``n`` weights of one shape, (out, in).
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        statistics: For each ingredient its :math:`G_i`, (in, in) float32.
        examples: How many examples are drawn from the recipe's; all of them where there are fewer.
        offdiagonal: What is not on the diagonal is multiplied with this; 0.9 is the paper's for most models. With 0
            each input counts by its mean square alone. With 1 also directions with hardly any input get the mean.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Reference:
        Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023, arXiv:2212.09849.

    >>> import torch
    >>> one, other = torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, 5.0]])
    >>> regmean([one, other], [1.0, 1.0], offdiagonal=0.0,
    ...         statistics=[torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 1.0]))])
    tensor([[2., 3.]], dtype=torch.float64)
    """
    mean = linear(tensors, weights)
    if mean.ndim != 2 or not mean.numel():
        return mean
    middle, factors = mean.double(), shares(weights)
    total = torch.zeros_like(statistics[0], dtype=torch.float64)
    moved = torch.zeros_like(middle)
    for tensor, factor, gram in zip(tensors, factors, statistics, strict=True):
        scaled = gram.double() * (factor * offdiagonal)
        scaled.diagonal().copy_(gram.diagonal().double() * factor)
        total += scaled
        moved = moved + (tensor.double() - middle) @ scaled
    # Scaled to a diagonal of ones, it has no eigenvalue below 1 − offdiagonal.
    size = total.diagonal().sqrt()
    size = torch.where(size > 0, size, 1.0)
    total /= size[:, None] * size
    total.diagonal()[total.diagonal() == 0] = 1.0  # what is never an input; the distance is zero there
    if offdiagonal < 1:
        solved = torch.cholesky_solve((moved / size).mT, torch.linalg.cholesky(total)).mT
    else:
        values, vectors = torch.linalg.eigh(total)
        kept = values > _NULL * values[-1]
        solved = (moved / size) @ (vectors[:, kept] / values[kept]) @ vectors[:, kept].mT
    return (middle + solved / size).to(accumulator(tensors))
