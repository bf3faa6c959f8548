"""Elements of an adapter's matrices: those of the base, the products of the adapter's factors, and lengths of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soup._util.io import read_all
from hf_soup.checkpoint import ITEM_BYTES, TORCH, Factor, LowRankUpdate, bytes_of
from hf_soup.merging.layout import Extent

#: How far sums with products may be from those of another machine before they are rounded, in parts of the largest
#: magnitude in the tensor.
PRODUCT_BOUND = 1e-5
#: Elements of a product that is made at once. Which rows these are goes by the matrix alone, so no slice shows.
_BLOCK_ELEMENTS = 1 << 18


@dataclass
class _Held:
    """Of one file: the matrix that is worked on, one of its factors, and the last block of its product."""

    update: LowRankUpdate
    right: Tensor
    number: int = -1
    block: Tensor | None = None


class LowRankProducts:
    """Makes them, and holds the last block of each adapter, as slices of a matrix may end within it. Of one thread."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}

    def added(self, values: Tensor, at: Extent, base: int, factors: int) -> Tensor:
        r"""Elements of :math:`W + s\,LR`, flat, in float32 where :math:`W` has 16 bits, else in float64.

        Of a DoRA with lengths :math:`m` row :math:`i` is that times :math:`m_i / \lVert (W + s\,LR)_i \rVert`.

        Args:
            values: Of :math:`W`, flat, as stored.
            at: Where they lie.
            base: The descriptor of their file.
            factors: That of the factors' file.

        Raises:
            ShortReadError: It is shorter than its header says.
        """
        assert at.update is not None, "only an adapter's are asked for"
        made = values.to(TORCH[at.read_as], copy=True)
        columns = at.update.right.shape[0 if at.update.turned else 1]
        rows, done = max(1, _BLOCK_ELEMENTS // columns), 0
        while done < len(made):
            block, within = divmod(at.element + done, rows * columns)
            part = self._block(at, base, factors, block, rows)[within : within + len(made) - done]
            if at.update.lengths:
                made[done : done + len(part)] = part
            else:
                made[done : done + len(part)] += part
            done += len(part)
        return made

    def _block(self, at: Extent, base: int, factors: int, number: int, rows: int) -> Tensor:
        """Some rows, flat: of the product; of a DoRA of all."""
        update, dtype = at.update, TORCH[at.read_as]
        assert update is not None, "only an adapter's are asked for"
        held = self._held.get(factors)
        if held is None or held.update != update or held.right.dtype != dtype:
            right = _read(update.right, factors, dtype)
            held = self._held[factors] = _Held(update, right.mT if update.turned else right)
        if held.number != number or held.block is None:
            if update.turned:
                left = _read(update.left, factors, dtype).mT[number * rows : (number + 1) * rows]
            else:
                left = _read(_rows_of(update.left, number * rows, rows), factors, dtype)
            product = _product(left, held.right, update.scale)
            if update.lengths:
                item, columns = ITEM_BYTES[at.dtype], product.shape[1]
                begin = at.offset + (number * rows * columns - at.element) * item
                product += _read(Factor(begin, at.dtype, tuple(product.shape)), base, dtype)
                lengths = _read(_rows_of(update.lengths, number * rows, rows), factors, dtype)
                product *= lengths / torch.linalg.vector_norm(product, dim=1, keepdim=True)
            held.number, held.block = number, product.reshape(-1)
        return held.block


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """By one thread, as torch's own division of the work shows in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.mm(left, right).mul_(scale)
    finally:
        torch.set_num_threads(threads)


def _rows_of(factor: Factor, first: int, count: int) -> Factor:
    rows, rank = factor.shape
    return Factor(
        factor.offset + first * rank * ITEM_BYTES[factor.dtype], factor.dtype, (min(count, rows - first), rank)
    )


def _read(factor: Factor, descriptor: int, dtype: torch.dtype) -> Tensor:
    stored = torch.empty(math.prod(factor.shape) * ITEM_BYTES[factor.dtype], dtype=torch.uint8)
    read_all(descriptor, bytes_of(stored), factor.offset)
    return stored.view(TORCH[factor.dtype]).reshape(factor.shape).to(dtype)
