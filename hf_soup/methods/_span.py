"""What lies in the span of a few tensors: their inner products, and their combinations, in one pass each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_soup.methods import accumulator

#: Elements of each tensor at a time: as float64, those of a few tensors fit into a processor's cache.
_PIECE = 1 << 15
#: Squared norms below this count as zero, as products of two of them would have too few bits left.
_NOTHING = 1e-280


def _pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Where each piece starts, and that piece of all, ``(n, elements)`` float64."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PIECE):
        parts = [each[start : start + _PIECE] for each in flat]
        piece = parts[0].new_empty(len(parts), parts[0].numel(), dtype=torch.float64)
        for row, part in enumerate(parts):
            piece[row] = part
        yield start, piece


def products(tensors: Sequence[Tensor]) -> Tensor:
    """The inner products of tensors of one shape, ``(n, n)`` float64.

    >>> products([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])])
    tensor([[25.,  3.],
            [ 3.,  1.]], dtype=torch.float64)
    """
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for _, piece in _pieces(tensors):
        total = total + piece @ piece.mT
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


def combination(tensors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The sum of tensors, each times its coefficient, in the accumulator's dtype; added up in float64.

    >>> combination([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])], torch.tensor([2.0, 3.0]))
    tensor([2., 7.], dtype=torch.float64)
    """
    out = torch.empty(tensors[0].numel(), dtype=accumulator(tensors))
    for start, piece in _pieces(tensors):
        out[start : start + _PIECE] = coefficients.double() @ piece
    return out.reshape(tensors[0].shape)
