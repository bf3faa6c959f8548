"""Task Singular Vectors, merged without interference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Within, merge_method, shares
from hf_soup.methods._spectral import inverse_root, is_matrix, singular
from hf_soup.methods._sums import mean


@merge_method(elementwise=False, neutral=None, needs_base=True, bound=1e-4)
def tsv_m(
    deltas: Sequence[Tensor], weights: Sequence[float], *, scale: Annotated[float, Within("(-inf, inf)")] = 1.0
) -> Tensor:
    r"""Add the main directions of all task vectors, turned until at right angles.

    A matrix with :math:`r` singular values keeps the :math:`\lfloor r/n\rfloor` largest (at least one) of each task
    vector, :math:`\tau_i \approx U_i\Sigma_iV_i^\top`. Side by side they are :math:`U = [U_1 \dots U_n]` and
    :math:`V`, and :math:`\Sigma` has all the values:

    .. math:: \tau = \lambda\; U(U^\top U)^{-1/2}\;\Sigma\;(V^\top V)^{-1/2}V^\top

    with the orthonormal vectors nearest to those of :math:`U` and of :math:`V` (the Procrustes problem). So what one
    task does to inputs in its own directions, another does not disturb.

    Without neutral parameters, as equal ingredients do not give themselves back but their :math:`\lfloor r/n\rfloor`
    main directions. What holds is that one ingredient is itself, and that task vectors at right angles, which have no
    more directions than are kept, are added up.

    **Weights** are not in the paper. Here :math:`\Sigma_i` is multiplied by :math:`n w_i / \sum w`, so only their
    proportion counts and equal ones are the paper's. An ingredient of weight zero counts as absent.

    Tensors that are no matrices, as convolutions, or have a single row or column, get :math:`\lambda` times the
    weighted mean, as in the authors' code. That leaves CLIP's ``text_projection`` out also, as their task does not use
    it; here it is a matrix like others, embeddings too. Where directions coincide (a sine below 1e-5), :math:`U` has
    no inverse root, and they are taken as one; the authors' code adds arbitrary ones in their place. Their code drops
    a matrix with fewer singular values than there are tasks; here each task keeps one.

    When:
        For models of different tasks, without anything to tune.

    When not:
        For fine-tunes on one task: their directions are shared, and all but :math:`1/n` of what each has learned is
        dropped to keep apart what belongs together. Where time counts: it takes :math:`n + 2` eigendecompositions as
        large as the smaller side, so tens of seconds for a large matrix.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        scale: :math:`\lambda`, 1 in the paper.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Gargiulo et al., Task Singular Vectors: Reducing task interference in model merging, CVPR 2025,
        arXiv:2412.00081.

    >>> import torch
    >>> tsv_m([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))], [1.0, 1.0])
    tensor([[3., 0.],
            [0., 2.]])
    """
    present = [(delta, share) for delta, share in zip(deltas, shares(weights), strict=True) if share]
    count, total = len(present), math.fsum(share for _, share in present)
    if count == 1 or not is_matrix(deltas[0]):
        return mean(deltas, weights, deltas[0].dtype).mul_(scale)
    most = max(1, min(deltas[0].shape) // count)
    lefts, values, rights = [], [], []
    for delta, share in present:
        noise = torch.finfo(delta.dtype).eps * float(torch.linalg.vector_norm(delta.detach(), dtype=torch.float64))
        left, value, right = singular(delta.double(), most, noise)
        lefts.append(left)
        values.append(value * (count * share / total))
        rights.append(right)
    left, right = torch.cat(lefts, dim=1), torch.cat(rights, dim=1)
    core = inverse_root(left.mT @ left) * torch.cat(values) @ inverse_root(right.mT @ right)
    return (left @ (core * scale) @ right.mT).to(deltas[0].dtype)
