"""The sum of the task vectors, with all its directions equally strong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Within, merge_method, shares
from hf_soup.methods._spectral import is_matrix, singular
from hf_soup.methods._sums import mean


@merge_method(elementwise=False, neutral=None, needs_base=True, bound=1e-5)
def iso_c(
    deltas: Sequence[Tensor], weights: Sequence[float], *, scale: Annotated[float, Within("(-inf, inf)")] = 1.0
) -> Tensor:
    r"""Add up the task vectors, and give all singular values of the sum their mean.

    .. math:: \sum_i \tau_i = U \operatorname{diag}(\sigma_1, \dots, \sigma_r)\, V^\top, \qquad
        \tau = \lambda\, \bar\sigma\, U V^\top, \qquad \bar\sigma = \frac1r \sum_{j\le r} \sigma_j

    over the :math:`r` singular values that are not zero: above 1e-10 of the largest, and above what rounding to the
    task vectors' dtype makes. Directions that several tasks share dominate a sum, and those of single tasks are faint
    beside them; here they are equals.

    Without neutral parameters, as equal ingredients do not give themselves back. What holds is that all singular values
    are equal, that the rows and the columns span what those of the sum do, and that the singular values have the sum
    that they had.

    **Weights** are not in the paper. Here the sum is :math:`\frac{n}{\sum w}\sum w_i\tau_i`, so only their proportion
    counts and equal ones are the paper's. An ingredient of weight zero counts as absent.

    Tensors that are no matrices, as convolutions, or have a single row or column, get :math:`\lambda` times the
    weighted mean, as in the authors' code. That leaves CLIP's ``text_projection`` out also, as their task does not use
    it; here it is a matrix like others, embeddings too. The authors' code divides by the smaller side and fills
    directions of zero, which are arbitrary, up to the mean also; here they stay zero.

    When:
        For many models of different tasks, with ``scale`` tuned on validation data, as in the paper. It costs an
        eigendecomposition of the smaller side of every matrix.

    When not:
        For changes of low rank that were rounded into a model's weights, such as a LoRA merged into it: the rounding
        fills all other directions, and they are made as strong as the rest.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        scale: :math:`\lambda`; the paper tunes it on validation data, which a list of values does here.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Marczak et al., No Task Left Behind: Isotropic model merging with common and task-specific subspaces, ICML 2025,
        arXiv:2502.04959.

    >>> import torch
    >>> iso_c([torch.diag(torch.tensor([5.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))], [1.0, 1.0])
    tensor([[3., 0.],
            [0., 3.]])
    """
    present = [(delta, share) for delta, share in zip(deltas, shares(weights), strict=True) if share]
    if not is_matrix(deltas[0]):
        return mean(deltas, weights, deltas[0].dtype).mul_(scale)
    factor = len(present) / math.fsum(share for _, share in present)
    total, noise = torch.zeros(deltas[0].shape, dtype=torch.float64), 0.0
    for delta, share in present:
        total += delta.double() * (factor * share)
        norm = float(torch.linalg.vector_norm(delta.detach(), dtype=torch.float64))
        noise += torch.finfo(delta.dtype).eps * factor * share * norm
    left, values, right = singular(total, min(total.shape), noise)
    if not len(values):
        return torch.zeros_like(deltas[0])
    return ((left * (scale * values.mean())) @ right.mT).to(deltas[0].dtype)
