"""The weighted mean: the model soup."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hf_soup.methods import accumulator, merge_method


@merge_method(elementwise=True, neutral={})
def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    r"""Average the weights of the ingredients.

    .. math:: \theta = \frac{\sum_i w_i \theta_i}{\sum_i w_i}

    With equal weights this is the uniform soup, and the result is the exact mean rounded once to the accumulator
    whenever the sum is exact in it. With other weights every product and every sum is rounded to the accumulator,
    so the error is at most :math:`n\,2^{-24}\sum_i|w_i\theta_i|/\sum_i w_i` in float32 and :math:`2^{-53}` in
    place of :math:`2^{-24}` in float64.

    Args:
        tensors: ``n`` tensors of one shape, as stored.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        normalize: Divide by the sum of the weights; without it the result is the plain weighted sum.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482.

    >>> import torch
    >>> linear([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 6.0])], [3.0, 1.0])
    tensor([1.2500, 3.0000], dtype=torch.float64)
    """
    shares = list(weights)
    if normalize and len(set(weights)) == 1:
        shares = [1.0] * len(weights)
    elif normalize:
        # Scaled by a power of two, which rounds nothing, so that no product or sum under- or overflows.
        exponent = math.frexp(max(weights))[1]
        shares = [math.ldexp(weight, -exponent) for weight in weights]
    total = tensors[0].new_zeros(tensors[0].shape, dtype=accumulator(tensors))
    for tensor, share in zip(tensors, shares, strict=True):
        # Not `add_(tensor, alpha=share)`: whether that fuses product and sum depends on the processor and on the
        # position in the slice, and so would the bytes.
        total.add_(tensor if share == 1.0 else tensor.to(total.dtype).mul_(share))
    return total.div_(math.fsum(shares)) if normalize else total
