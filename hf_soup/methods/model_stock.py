"""As far from the ancestor as the ingredients agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soup.methods import Slices, merge_method
from hf_soup.methods._span import cosines, portions, products
from hf_soup.methods._sums import weighted_sum


def _coefficients(slices: Slices, weights: Sequence[float]) -> Tensor:
    """What each task vector is multiplied with, ``(n,)`` float64."""
    parts = portions(slices, weights)
    pairs = torch.outer(parts, parts).fill_diagonal_(0.0)
    ratio: Tensor | float = 1.0
    if pairs.any():
        there, between = cosines(products(slices, dtype=None))
        cosine = (pairs[there][:, there] * between).sum() / pairs.sum()
        count = parts.sum() ** 2 / (parts**2).sum()
        ratio = (count * cosine / (1 + (count - 1) * cosine)).clamp(max=1) if cosine > 0 else 0.0
    return parts * (ratio / parts.sum())


@merge_method(elementwise=True, neutral={}, needs_base=True, bound=1e-6, least=2, measure=_coefficients)
def model_stock(deltas: Sequence[Tensor], weights: Sequence[float], *, measured: Tensor) -> Tensor:
    r"""Go from the ancestor towards the mean as far as the task vectors' angle says.

    With :math:`\cos\phi` the mean cosine between two task vectors, tensor by tensor,

    .. math:: \theta = t\,\bar\theta + (1-t)\,\theta_0 = \theta_0 + t\,\bar\tau,
        \qquad t = \frac{n\cos\phi}{1 + (n-1)\cos\phi}

    which is the point nearest to the centre around which fine-tunes of one kind lie, if they are equally far from it in
    directions at right angles. Where their mean cosine is not positive, :math:`t = 0`: the ancestor.

    **Weights** are not in the paper. Here :math:`\bar\tau` is the weighted mean, a pair counts by the product of its
    weights, and :math:`n` becomes :math:`(\sum w)^2/\sum w^2`, which makes :math:`t` the nearest point again. Where
    only one ingredient has a weight there is no angle, and it is the result.

    A task vector of zero (its norm, below 1e-140) has a cosine of 0 with each other. mergekit does not clamp
    :math:`t`; the paper sees no cosines below zero. It may take angles by rows (``filter_wise``), the paper by layer.

    When:
        For fine-tunes on one task that differ by their seed or their hyperparameters: what they have in common is taken
        for the signal.

    When not:
        For models of different tasks: their task vectors have little in common, and little would be left of them.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        measured: What each is multiplied with, :math:`t` times its share, float64.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024, arXiv:2403.19522.

    >>> import torch
    >>> deltas, weights = [torch.tensor([5.0, 0.0]), torch.tensor([3.0, 4.0])], [1.0, 1.0]
    >>> model_stock(deltas, weights, measured=_coefficients(Slices.of(deltas), weights))  # 3/4 of the mean
    tensor([3.0000, 1.5000])
    """
    return weighted_sum(deltas, measured.to(deltas[0].dtype), deltas[0].dtype)
