"""Singular values and vectors of task vectors that are matrices, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Down to this part of the largest, singular values come from the Gram matrix. Squaring loses half the digits, so a
#: direction is off by about 2e-16 over the square of this.
_FAINT = 1e-5
#: Values below this part of the largest are zero: their directions would be good to few digits.
_NULL = 1e-10
#: Directions of several task vectors whose span is this thin (the square of a sine) are one direction.
_THIN = 1e-10


def is_matrix(tensor: Tensor) -> bool:
    """Whether it has singular vectors: a matrix of more than one row and column."""
    return tensor.dim() == 2 and min(tensor.shape) > 1


def singular(matrix: Tensor, most: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and their vectors, without the null space.

    Through the eigenvectors of the Gram matrix of the smaller side, which takes half the time of a decomposition of
    the matrix, unless a value is too small beside the largest for that.

    Args:
        matrix: ``(rows, columns)`` float64.
        most: How many values at most.
        noise: Values up to this are not told from zero.

    Returns:
        Left vectors ``(rows, k)``, values ``(k,)`` in descending order, right vectors ``(columns, k)``.

    >>> left, values, right = singular(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]).double(), 1, 0.0)
    >>> values
    tensor([2.], dtype=torch.float64)
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = singular(matrix.mT, most, noise)
        return left, values, right
    _, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    right = vectors[:, -most:].flip(1)
    # Their lengths are good to the last bits also where eigenvalues, which are the squares, are not.
    images = matrix @ right
    values = torch.linalg.vector_norm(images.detach(), dim=0)
    largest = float(values.max())
    null = max(noise, _NULL * largest)
    if ((values > null) & (values < _FAINT * largest)).any():
        left, values, rows = torch.linalg.svd(matrix, full_matrices=False)
        kept = values[:most] > null
        return left[:, :most][:, kept], values[:most][kept], rows[:most][kept].mT
    images = images[:, values > null]
    lengths = torch.linalg.vector_norm(images, dim=0)
    return images / lengths, lengths, right[:, values > null]


def joint_directions(matrices: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    r"""The left singular vectors of :math:`[\sqrt{w_1}\tau_1 \dots \sqrt{w_n}\tau_n]`, without the null space.

    From the Gram matrix of the rows or of all columns, whichever are fewer. Faint directions, which would be good to
    few digits, come from a Gram matrix of their own.

    Args:
        matrices: ``n`` of one shape ``(rows, columns)``, not all zero.
        shares: ``n`` numbers above zero.

    Returns:
        ``(rows, k)`` float64, orthonormal.

    >>> joint_directions([torch.tensor([[3.0], [0.0]]), torch.tensor([[-1.0], [0.0]])], [1.0, 1.0]).abs()
    tensor([[1.],
            [0.]], dtype=torch.float64)
    """
    rows, columns = matrices[0].shape
    noise = torch.finfo(matrices[0].dtype).eps
    wide = [matrix.double() * math.sqrt(share) for matrix, share in zip(matrices, shares, strict=True)]
    if rows <= len(matrices) * columns:
        return _right_vectors([matrix.mT for matrix in wide], noise)
    joint = torch.cat(wide, dim=1)
    images = joint @ _right_vectors([joint], noise)
    left: Tensor = images / torch.linalg.vector_norm(images, dim=0)
    return left


def _right_vectors(parts: Sequence[Tensor], noise: float) -> Tensor:
    """Of the matrix of these parts, one on the other, without those up to a share ``noise`` of its length."""

    def own(span: Tensor | None) -> tuple[Tensor, Tensor]:
        """The singular vectors in a span, by default everything, and their values."""
        gram = parts[0].new_zeros(())
        for part in parts:
            image = part if span is None else part @ span
            gram = gram + image.mT @ image
        vectors = torch.linalg.eigh(gram)[1]
        vectors = vectors if span is None else span @ vectors
        lengths = [torch.linalg.vector_norm((part @ vectors).detach(), dim=0) for part in parts]
        return vectors, torch.linalg.vector_norm(torch.stack(lengths), dim=0)

    vectors, values = own(None)
    largest = float(values.max())
    null = max(noise * float(torch.linalg.vector_norm(values)), _NULL * largest)
    faint = values < _FAINT * largest
    if (faint & (values > null)).any():
        others, other_values = own(vectors[:, faint])
        vectors, values = torch.cat([others, vectors[:, ~faint]], dim=1), torch.cat([other_values, values[~faint]])
    kept: Tensor = vectors[:, values > null]
    return kept


def inverse_root(gram: Tensor) -> Tensor:
    r"""The symmetric :math:`G^{-1/2}` where there is one, and zero on the null space.

    >>> inverse_root(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]])
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _THIN
    vectors = vectors[:, kept]
    root: Tensor = (vectors / values[kept].sqrt()) @ vectors.mT
    return root
