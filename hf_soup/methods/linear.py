"""The weighted mean: the model soup."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_soup.methods import accumulator, merge_method
from hf_soup.methods._sums import mean, weighted_sum


@merge_method(elementwise=True, neutral={}, combination=True, bound=0.0)
def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    r"""Average the weights of the ingredients.

    .. math:: \theta = \frac{\sum_i w_i \theta_i}{\sum_i w_i}

    **Equal weights** are the uniform soup. Where the sum is exact in the accumulator, the result is the exact mean
    rounded once, and it stays the correctly rounded mean when it is rounded again to a narrower type, for up to 4,096
    ingredients. For that second rounding to err, the first would have to move the mean :math:`S/n` onto a tie
    :math:`m` of the narrow type. Such an :math:`m` has at most 12 bits (25 under a float64 accumulator), so
    :math:`nm` fits into the accumulator's mantissa, and :math:`S \ne nm` differ by a unit in its last place or more;
    but then :math:`S/n` and :math:`m` differ by more than half a unit, and the first rounding keeps them apart.

    **Other weights**, and sums that are not exact: shares, products, sums and quotient are rounded to the accumulator,
    so before the last rounding the error is at most
    :math:`(n+4)\,u\,\frac{\sum_i|w_i\theta_i|}{\sum_i w_i} + \bigl(n+1+\sum_i|\theta_i|\bigr)\,s` with
    :math:`u = 2^{-24}`, :math:`s = 2^{-149}` in float32 and :math:`u = 2^{-53}`, :math:`s = 2^{-1074}` in float64; the
    second term counts where shares or products are subnormal. The result is then within half a unit in the last place,
    plus that.

    A mean of zero is −0 where every product is −0 (or a negative mean is too small for the type), else +0.

    When:
        For fine-tunes of one ancestor on one task, and as what any other method is compared with.

    When not:
        For models of different tasks: it waters down what each of them has learned. Where one of them may be poor,
        unless a selection leaves it out.

    Args:
        tensors: ``n`` tensors of one shape, as stored.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        normalize: Divide by the sum of the weights; without it the result is the plain weighted sum, and weights may
            be negative.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482.

    >>> import torch
    >>> linear([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 6.0])], [3.0, 1.0])
    tensor([1.2500, 3.0000], dtype=torch.float64)
    """
    dtype = accumulator(tensors)
    return mean(tensors, weights, dtype) if normalize else weighted_sum(tensors, weights, dtype)
