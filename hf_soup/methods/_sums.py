"""Sums of tensors that a method can be made of: rounded once by operation, and the sign of zero is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_soup.methods import shares


def weighted_sum(tensors: Iterable[Tensor], factors: Iterable[float | Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of tensors, each times its factor, in order, every product and sum rounded to ``dtype``.

    Tensors may come one by one, so that one is held beside the sum. A factor that is a tensor is of ``dtype``.

    >>> weighted_sum([torch.tensor([1.0]), torch.tensor([2.0])], [1.0, -1.0], torch.float32)
    tensor([-1.])
    """
    # Starts from the first product, not from zero: 0 + −0 is +0, and a model full of −0 would not give itself back.
    pairs = zip(tensors, factors, strict=True)
    total = _product(*next(pairs), dtype)
    for tensor, factor in pairs:
        # Not `add_(tensor, alpha=factor)`: whether that fuses product and sum depends on the processor and on the
        # position in the slice, and so would the bytes.
        total.add_(tensor if _is_one(factor) else _product(tensor, factor, dtype))
    return total


def _product(tensor: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor."""
    wide = tensor.to(dtype, copy=True)
    return wide if _is_one(factor) else wide.mul_(factor)


def _is_one(factor: float | Tensor) -> bool:
    """Whether a product may be left out; where the factor is a tensor, gradients flow through it."""
    return isinstance(factor, float) and factor == 1.0


def mean(tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Their mean, weighted with numbers of zero or more, as `linear` takes it."""
    factors = shares(weights)
    return weighted_sum(tensors, factors, dtype).div_(math.fsum(factors))
