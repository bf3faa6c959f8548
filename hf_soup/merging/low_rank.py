"""Elements of adapters' matrices: those of the base, the products of the adapters' factors, and lengths of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_soup._util.io import read_all
from hf_soup.checkpoint import ITEM_BYTES, TORCH, Factor, LowRankUpdate, bytes_of
from hf_soup.merging.layout import Extent, Run, Segment
from hf_soup.merging.plan import Plan

#: How far sums with products may be from those of another machine before they are rounded, in parts of the largest
#: magnitude in the tensor.
PRODUCT_BOUND = 1e-5
#: Elements of a product that is made at once. Which rows these are goes by the matrix alone, so no slice shows.
_BLOCK_ELEMENTS = 1 << 18


class ProductError(Exception):
    """What an adapter adds is not finite."""


class _Part(NamedTuple):
    """An update, the descriptor of its factors' file, and what its product is multiplied with beside its scale."""

    update: LowRankUpdate
    factors: int
    share: float


@dataclass
class _Held:
    """Of updates of one matrix: their right factors one below the other, and the last block of the sum of products; of
    a DoRA with the base's, where it begins in which file, and where columns are scaled, by what.
    """

    parts: Sequence[_Part]
    right: Tensor
    of_base: tuple[int, int]
    number: int = -1
    block: Tensor | None = None
    columns: Tensor | None = None


class LowRankProducts:
    """Makes them, and holds the last blocks, as slices of a matrix may end within one. Of one thread."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}

    def added(self, values: Tensor, at: Extent, written: str, base: int, factors: int) -> Tensor:
        r"""Elements of :math:`W + s\,LR`, flat, in float32 where :math:`W` and what is written have 16 bits, else in
        float64.

        Of a DoRA with lengths :math:`m` row :math:`i` is that times :math:`m_i / \lVert (W + s\,LR)_i \rVert`; column
        :math:`i`, where it is stored as (in, out).

        Args:
            values: Of :math:`W`, flat, as stored.
            at: Where they lie.
            written: The type of the output.
            base: The descriptor of their file.
            factors: That of the factors' file.

        Raises:
            ShortReadError: It is shorter than its header says.
            ProductError: What is added is not finite.
        """
        assert at.update is not None, "only an adapter's are asked for"
        narrow = ITEM_BYTES[at.dtype] == ITEM_BYTES[written] == 2
        made = values.to(torch.float32 if narrow else torch.float64, copy=True)
        self._add(made, at, [_Part(at.update, factors, 1.0)], base)
        return made

    def mean(
        self,
        plan: Plan,
        run: Run,
        pieces: Sequence[Segment],
        groups: Sequence[Sequence[int]],
        stored: Callable[[int, Segment], Tensor],
        opened: Callable[[int, str], int],
    ) -> Tensor:
        r"""The mean, or sum, of sources of which some add to the same base, which is then read once.

        .. math:: \sum_i w_i (W + s_i L_i R_i) = \Bigl(\sum_i w_i\Bigr) W + [w_1 s_1 L_1 \dots][R_1; \dots]

        Args:
            plan, run: What is made; its method is `linear`.
            pieces: Of the run, one after the other.
            groups: From `Plan.groups`.
            stored: Reads a piece of a source as it is stored, without what an adapter adds.
            opened: The descriptor of a file of a source.

        Returns:
            Flat, in float32 where all is stored and written in 16 bits, else in float64.

        Raises:
            ShortReadError, ProductError: As `added`.
        """
        weights = plan.weights_of(run)
        extents = [at for piece in pieces for at in piece.extents if at]
        narrow = ITEM_BYTES[run.dtype] == 2 and all(ITEM_BYTES[at.dtype] == 2 for at in extents)
        dtype = torch.float32 if narrow else torch.float64
        normalize = plan.method_of(run).parameters.get("normalize", True)
        total: Tensor | None = None
        for group in groups:
            weight, made = math.fsum(weights[source] for source in group), []
            for piece in pieces:
                values = stored(group[0], piece).to(dtype, copy=True)
                own = [(source, at) for source in group if (at := piece.extents[source]) and at.update]
                if own:
                    first = own[0][1]
                    parts = [
                        _Part(at.update, opened(source, at.update.file), weights[source] / weight)
                        for source, at in own
                        if at.update
                    ]
                    self._add(values, first, parts, opened(own[0][0], first.file))
                made.append(values)
            mixed = made[0] if len(made) == 1 else torch.cat(made)
            if len(groups) > 1 or not normalize:
                mixed.mul_(weight)
            total = mixed if total is None else total.add_(mixed)
        assert total is not None, "there is a group"
        if normalize and len(groups) > 1:
            total.div_(math.fsum(weights[source] for group in groups for source in group))
        return total

    def _add(self, made: Tensor, at: Extent, parts: Sequence[_Part], base: int) -> None:
        update = parts[0].update
        columns = update.right.shape[0 if update.turned else 1]
        rows, done = max(1, _BLOCK_ELEMENTS // columns), 0
        while done < len(made):
            block, within = divmod(at.element + done, rows * columns)
            part = self._block(at, parts, base, block, rows, made.dtype)[within : within + len(made) - done]
            if update.lengths:
                made[done : done + len(part)] = part
            else:
                made[done : done + len(part)] += part
            done += len(part)

    def _block(
        self, at: Extent, parts: Sequence[_Part], base: int, number: int, rows: int, dtype: torch.dtype
    ) -> Tensor:
        """Some rows, flat: of the sum of products; of a DoRA of all."""
        held = self._held.get(parts[0].factors)
        of_base = base, at.offset - at.element * ITEM_BYTES[at.dtype]
        if held is None or held.parts != parts or held.right.dtype != dtype or held.of_base != of_base:
            right = [_turned(read_factor(update.right, file, dtype), update) for update, file, _ in parts]
            held = self._held[parts[0].factors] = _Held(parts, torch.cat(right), of_base)
        if held.number != number or held.block is None:
            product = _sum(parts, held, at, number, rows)
            if (lengths := parts[0].update.lengths) and parts[0].update.turned:
                if held.columns is None:
                    height = parts[0].update.left.shape[1]
                    blocks = (_sum(parts, held, at, each, rows) for each in range(-(-height // rows)))
                    norms = torch.stack([torch.linalg.vector_norm(block, dim=0) for block in blocks])
                    wanted = read_factor(lengths, parts[0].factors, dtype)
                    held.columns = wanted.mT / torch.linalg.vector_norm(norms, dim=0)
                product *= held.columns
            elif lengths:
                wanted = read_factor(_rows_of(lengths, number * rows, rows), parts[0].factors, dtype)
                product *= wanted / torch.linalg.vector_norm(product, dim=1, keepdim=True)
            low, high = product.aminmax()  # one pass, and NaN passes through it
            if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                raise ProductError
            held.number, held.block = number, product.reshape(-1)
        return held.block


def _sum(parts: Sequence[_Part], held: _Held, at: Extent, number: int, rows: int) -> Tensor:
    """Some rows of the sum of products; of a DoRA with those of the base."""
    dtype = held.right.dtype
    left = torch.cat([_left(part, number * rows, rows, dtype) for part in parts], dim=1)
    product = _product(left, held.right)
    if parts[0].update.lengths:
        base, offset = held.of_base
        begin = offset + number * rows * product.shape[1] * ITEM_BYTES[at.dtype]
        product += read_factor(Factor(begin, at.dtype, tuple(product.shape)), base, dtype)
    return product


def _left(part: _Part, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Some rows of the left factor, times the scale."""
    update = part.update
    if update.turned:
        rows = _columns(update.left, first, count, part.factors, dtype).mT
    else:
        rows = read_factor(_rows_of(update.left, first, count), part.factors, dtype)
    return rows * (update.scale * part.share)


def _turned(factor: Tensor, update: LowRankUpdate) -> Tensor:
    return factor.mT if update.turned else factor


def _product(left: Tensor, right: Tensor) -> Tensor:
    """By one thread, as torch's own division of the work shows in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.mm(left, right)
    finally:
        torch.set_num_threads(threads)


def _columns(factor: Factor, first: int, count: int, descriptor: int, dtype: torch.dtype) -> Tensor:
    """Some columns of a factor that is stored the other way round, row by row: a table of tokens has many."""
    rank, columns = factor.shape
    item, count = ITEM_BYTES[factor.dtype], min(count, columns - first)
    starts = (factor.offset + (row * (factor.width or columns) + first) * item for row in range(rank))
    return torch.cat([read_factor(Factor(start, factor.dtype, (1, count)), descriptor, dtype) for start in starts])


def _rows_of(factor: Factor, first: int, count: int) -> Factor:
    rows, rank = factor.shape
    offset = factor.offset + first * rank * factor.step * ITEM_BYTES[factor.dtype]
    return factor._replace(offset=offset, shape=(min(count, rows - first), rank))


def read_factor(factor: Factor, descriptor: int, dtype: torch.dtype) -> Tensor:
    """A factor from its open file, in a type to count in."""
    span = math.prod(factor.shape) * factor.step - (factor.step - 1)
    stored = torch.empty(span * ITEM_BYTES[factor.dtype], dtype=torch.uint8)
    read_all(descriptor, bytes_of(stored), factor.offset)
    values = stored.view(TORCH[factor.dtype])[:: factor.step]
    return values.reshape(factor.shape).to(dtype)
