"""Inner products of a few tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soup.methods import Slices, shares

#: Elements of each tensor at a time, which stay in the processor's cache, and those that are added up narrow.
_PIECE, _CHUNK = 1 << 15, 1 << 10
#: Squared norms below this count as zero, as products of two of them would have too few bits left.
_NOTHING = 1e-280
#: Sums of squares below this are added up in float64, as squares that are too small for float32 may be among them.
FAINT = 1e-30


def portions(slices: Slices, weights: Sequence[float]) -> Tensor:
    """The share of each tensor, ``(n,)`` float64."""
    if len(weights) != slices.count:
        raise ValueError(f"{slices.count} tensors and {len(weights)} weights")
    return torch.tensor(shares(weights), dtype=torch.float64)


def products(slices: Slices, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """The inner products of tensors, ``(n, n)`` float64.

    Args:
        slices: Of ``n`` tensors.
        dtype: Of products and sums within a thousand elements; None for the tensors' own.

    >>> products(Slices.of([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])]))
    tensor([[25.,  3.],
            [ 3.,  1.]], dtype=torch.float64)
    """
    total = torch.zeros(slices.count, slices.count, dtype=torch.float64)
    for tensors in slices:
        for stored in torch.split(tensors, _PIECE, dim=1):
            piece = stored if dtype is None else stored.to(dtype)
            whole = piece.shape[1] // _CHUNK
            chunks = piece[:, : whole * _CHUNK].reshape(len(piece), whole, _CHUNK).transpose(0, 1)
            for parts in (chunks, piece[None, :, whole * _CHUNK :]):
                if not parts.numel():
                    continue
                inner = (parts @ parts.mT).double()
                faint = inner.diagonal(dim1=1, dim2=2) < FAINT
                if not inner.isfinite().all() or (faint.any() and parts.any(dim=2)[faint].any()):
                    inner = parts.double() @ parts.double().mT
                total = total + inner.sum(0)
    return total


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Which tensors are not zero, ``(n,)`` bool, and the cosines between those, from the inner products of all.

    >>> cosines(torch.tensor([[25.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    (tensor([ True,  True, False]), tensor([[1.0000, 0.6000],
            [0.6000, 1.0000]]))
    """
    there = gram.detach().diagonal() > _NOTHING
    inner = gram[there][:, there]
    norms = inner.diagonal().sqrt()
    return there, (inner / norms / norms[:, None]).clamp(-1, 1)
