"""TIES along the singular directions that the task vectors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Within, merge_method, shares
from hf_soup.methods._ranks import cutoff
from hf_soup.methods._spectral import is_matrix, joint_directions
from hf_soup.methods.ties import ties

#: Entries along a direction that are smaller than this part of their column are zero.
_ZERO = 1e-10


@merge_method(elementwise=False, neutral={"density": 1.0, "scale": 1.0}, needs_base=True, bound=1e-4)
def knots(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: Annotated[float, Within("(0, 1]")] = 0.2,
    scale: Annotated[float, Within("(-inf, inf)")] = 1.0,
) -> Tensor:
    r"""Trim and vote as TIES does, along the directions that task vectors share.

    The task vectors of a matrix, side by side, have one singular value decomposition, and so one basis :math:`U`:

    .. math:: [\tau_1 \dots \tau_n] = U\,\Sigma\,[V_1^\top \dots V_n^\top], \qquad
        \tau = \lambda\, U \operatorname{TIES}(\Sigma V_1^\top, \dots, \Sigma V_n^\top)

    where TIES keeps of each :math:`\Sigma V_i^\top = U^\top\tau_i` the ``density`` largest magnitudes, elects a sign
    for each entry by their sum, and takes the mean over those that have it, as `ties` does. Singular values up to 1e-10
    of the largest, or up to what rounding to the task vectors' dtype makes, are zero: their directions are left out, so
    that ``density`` is a share of what :math:`r` directions hold, where :math:`r` is the rank.

    The paper writes of merging the :math:`V_i`; the authors' configurations (``s_on_V``) multiply :math:`\Sigma` to
    them before, and so it is here. Votes and means are the same either way, trimming is not: among the :math:`V_i`
    faint directions, down to noise, are as large as the strongest. Their code trims over all layers at once; here every
    tensor is by itself. Where the vote is a draw the result is zero; their code gives it the sign of the majority of
    all entries, which depends on the signs of singular vectors, which are arbitrary.

    **Weights** are not in the paper. Here they count in the decomposition, which is that of
    :math:`[\sqrt{w_1}\tau_1 \dots \sqrt{w_n}\tau_n]`, in the vote and in the mean, so that an ingredient of weight 2 is
    as good as two of it, one of weight zero is absent, and equal weights are the paper's.

    Tensors that are no matrices, or have a single row or column, go through TIES entry by entry, trimmed by the same
    ``density``: a single row has no other directions. The authors' code leaves what has no LoRA as it was, or sends it
    through TIES; it also unrolls convolutions to matrices, and a bias is one more column of its matrix.

    The bound is for matrices such as training leaves. Where singular values coincide, their vectors are arbitrary, and
    so is what is elected along them; and a vote that all but is a draw may go the other way on another machine.

    When:
        For LoRAs on different tasks, each merged into its copy of one base: their entries hardly line up, so that votes
        on these mean little. Tune ``scale`` on validation data, as the authors do, whose values are 0.5 and 0.6.

    When not:
        For full fine-tunes, whose entries line up better, so that `ties` is enough. Where time counts: it takes an
        eigendecomposition as large as the matrix has rows, or all ingredients together columns where these are fewer;
        minutes for a large one. Where LoRAs were rounded as they were merged, mind ``density``: rounding fills all
        directions, so that of 3 LoRAs of rank 8 in 512 rows, 0.2 of what they learned is 0.2 · 24/512 of all.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        density: Share of the entries along the directions that is kept of each task vector; 0.2 is the authors' for
            CLIP, 1 for Llama 3.
        scale: :math:`\lambda`; 1 is for where nothing can be tuned.

    Returns:
        The task vector of the mix, in their dtype.

    Reference:
        Stoica et al., Model merging with SVD to tie the KnOTS, ICLR 2025, arXiv:2410.19735.

    >>> import torch
    >>> learned = [torch.tensor([[4.0, 2.0], [4.0, 2.0]]), torch.tensor([[1.0, -3.0], [1.0, -3.0]])]
    >>> knots(learned, [1.0, 1.0], density=1.0)  # along (1, 1): 4 and 1 agree, -3 beats 2
    tensor([[ 2.5000, -3.0000],
            [ 2.5000, -3.0000]])
    """
    if not is_matrix(deltas[0]):
        return _ties(deltas, weights, density, scale)
    # Of an untouched matrix, as LoRAs leave most, nothing counts, and its columns need no directions.
    present = [
        (delta, share) for delta, share in zip(deltas, shares(weights), strict=True) if share and delta.detach().any()
    ]
    if not present:
        return torch.zeros_like(deltas[0])
    changed, factors = [delta for delta, _ in present], [share for _, share in present]
    left = joint_directions(changed, factors)
    mixed: Tensor = left @ _ties([_along(left, delta) for delta in changed], factors, density, scale)
    return mixed.to(deltas[0].dtype)


def _along(directions: Tensor, delta: Tensor) -> Tensor:
    """Entries along directions, ``(k, columns)``. Those that are zero but for rounding are zero, and have no vote."""
    found = directions.mT @ delta.double()
    least = max(torch.finfo(delta.dtype).eps, _ZERO) * torch.linalg.vector_norm(delta.detach().double(), dim=0)
    kept: Tensor = found * (found.detach().abs() > least)
    return kept


def _ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float, scale: float) -> Tensor:
    cutoffs = [cutoff(delta, density) for delta in deltas]
    return ties(deltas, weights, cutoffs=cutoffs, density=density, scale=scale)
