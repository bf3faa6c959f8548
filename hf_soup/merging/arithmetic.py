"""Elements of the output from those of the sources, by the plan's methods; random numbers."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_soup._util.text import listed
from hf_soup.checkpoint import ITEM_BYTES
from hf_soup.errors import ValuesError
from hf_soup.merging.layout import Layout, OutputTensor, Run
from hf_soup.merging.plan import Plan
from hf_soup.merging.statistics_store import StatisticsStore
from hf_soup.methods import BLOCK, METHODS, Slices, accumulator

#: Numbers that one step of the generator's counter gives: four of 64 bits, halved.
_BLOCK = 8


def uniform(seed: int, tensor: str, position: int, begin: int, count: int) -> Tensor:
    """Numbers in [0, 1), uniform among the multiples of 2⁻²⁴, for some elements of a tensor of an ingredient.

    The generator is Philox4x64 (Salmon et al., 2011), which counts: whoever asks for any elements, in any order, gets
    the same ones.

    Args:
        seed: The recipe's.
        tensor: Its name.
        position: Of the ingredient among those that are mixed.
        begin: The first element.
        count: How many.

    >>> whole = uniform(0, "w", 1, 0, 100)
    >>> torch.equal(uniform(0, "w", 1, 37, 20), whole[37:57])
    True
    """
    named = hashlib.sha256(f"{seed}\0{position}\0{tensor}".encode()).digest()
    first = begin // _BLOCK
    last = -(-(begin + count) // _BLOCK)
    generator = np.random.Philox(key=int.from_bytes(named[:16], "little"), counter=first)
    raw = generator.random_raw(_BLOCK // 2 * (last - first)).astype("<u8", copy=False).view("<u4")
    bits = raw[begin - first * _BLOCK :][:count] >> 8
    return torch.from_numpy(bits.astype(np.float32)).mul_(2.0**-24)


#: By tensor: for every ingredient that goes in the magnitude at which its task vector is trimmed.
Cutoffs = Mapping[str, Sequence[float]]


class Aids(NamedTuple):
    """What methods may ask for beside tensors and shares; made once for a plan."""

    cutoffs: Cutoffs
    statistics: StatisticsStore


def combine(
    plan: Plan,
    run: Run,
    parts: dict[int, Tensor],
    aids: Aids,
    *,
    begin: int = 0,
    known: Mapping[str, object] | None = None,
    release: bool = False,
) -> Tensor:
    """Mix elements of a run by its method; where not all have them, the mean of the ingredients that do.

    Args:
        plan: With methods, parameters and shares.
        run: Of the plan.
        parts: By source, flat: those of `Plan.sources_of`.
        aids: Of the plan; a tensor that one of the sources has no statistics of is averaged.
        begin: Which element of the run is the first.
        known: What was `measured`; without it, parts are whole tensors, and it is done here.
        release: Take out of ``parts`` what is not needed any more, to save the memory.

    Raises:
        ValuesError: The method is not defined for these tensors.
    """
    call, base, shares = plan.method_of(run), plan.layout.base, plan.weights_of(run)
    method = METHODS[call.method]
    own = [source for source in parts if source != base]
    weights = [shares.get(source, 1.0) for source in own]
    needed = [*plan.weights, *([base] if method.needs_base else [])]
    if (method.whole and not plan.is_whole(run)) or any(source not in parts for source in needed):
        # A share below zero takes away what was learned since the base, and here that is not known.
        return _mean([parts[source] for source in own], [max(0.0, weight) for weight in weights])
    hand = dict(known or {})
    tensor = plan.layout.tensors[run.first]
    count = len(parts[own[0]])
    shape = (count,) if method.elementwise else tensor.shape
    transposed = False
    if method.statistics:
        read = [aids.statistics.read(call, source, tensor.name, begin, count) for source in own]
        if any(each is None for each in read):
            return _mean([parts[source] for source in own], weights)
        hand["statistics"], transposed = read, aids.statistics.transposed(call, tensor.name)
    if "random" in method.given:
        drawn = (uniform(plan.mixture.seed, tensor.name, position, begin, count) for position in range(len(own)))
        hand["random"] = [each.reshape(shape) for each in drawn]
    if "cutoffs" in method.given:
        hand["cutoffs"] = aids.cutoffs[tensor.name]
    flat, origin = vectors(plan, run, parts, release=release)
    tensors = [each.reshape(shape) for each in flat]
    tensors = [each.mT for each in tensors] if transposed else tensors
    if known is None:
        hand |= measured(plan, run, Slices.of(tensors), weights)
    with _told(call.method, tensor.name):
        mixture = method.combine(tensors, weights, **hand, **call.parameters)
        result = (mixture.mT if transposed else mixture).reshape(-1)
    if origin is not None:
        for piece, start in zip(torch.split(result, BLOCK), torch.split(origin, BLOCK), strict=True):
            piece.add_(start)
    return result


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted one; the plain one, where all shares are zero."""
    return METHODS["linear"].function(tensors, weights if any(weights) else [1.0] * len(weights))


def vectors(
    plan: Plan, run: Run, parts: dict[int, Tensor], *, release: bool = False
) -> tuple[Sequence[Tensor] | Tensor, Tensor | None]:
    """What the method of a run is handed of each ingredient, a tensor as it is stored, or its task vector; and where
    it is these, which are rows of one tensor, the base's tensor. All flat.
    """
    base = plan.layout.base
    own = [source for source in parts if source != base]
    take = parts.pop if release else parts.__getitem__
    if base is None or not METHODS[plan.method_of(run).method].needs_base:
        return [take(source) for source in own], None
    wide = accumulator(list(parts.values()))
    origin = take(base).to(wide)
    rows = origin.new_empty(len(own), len(origin))
    for row, source in zip(rows, own, strict=True):
        task_vector(take(source), origin, row)
    return rows, origin


def measured(plan: Plan, run: Run, slices: Slices, weights: Sequence[float]) -> dict[str, object]:
    """What the method of a run wants to know of whole tensors before it gets slices of them, under the name by which
    it is handed in; nothing for most.

    Args:
        plan: With methods and parameters.
        run: Of the plan, of one tensor.
        slices: Of `vectors`.
        weights: The ingredients' shares.

    Raises:
        ValuesError: The method is not defined for these tensors.
    """
    name, parameters = plan.method_of(run)
    method = METHODS[name]
    if method.measure is None:
        return {}
    with _told(name, plan.layout.tensors[run.first].name):
        return {"measured": method.measure(slices, weights, **{**method.parameters, **parameters})}


@contextmanager
def _told(method: str, tensor: str) -> Iterator[None]:
    """What a method says against tensors, as an error of this package."""
    try:
        with METHODS.failures(method):
            yield
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise ValuesError(
            f"{method} cannot combine '{tensor}': {error}",
            hint="An `overrides` entry in the recipe combines that tensor in another way, as `method: linear` does.",
        ) from None


def task_vector(tensor: Tensor, origin: Tensor, out: Tensor) -> None:
    """A tensor minus the base's, in the latter's dtype, block by block, as a wide copy would not stay in the
    processor's cache.
    """
    for block, piece, start in zip(*(torch.split(each, BLOCK) for each in (out, tensor, origin)), strict=True):
        block.copy_(piece).sub_(start)  # a difference of two types takes three times as long


def shared_infinity(layout: Layout, run: Run, parts: Mapping[int, Tensor], begin: int) -> Tensor:
    """Where all sources have the same infinity, as of a mask: it is copied, whatever the method.

    Args:
        layout: Names and shapes.
        run: Of the layout.
        parts: By source, flat.
        begin: Which element of the run is the first.

    Raises:
        ValuesError: Some source has NaN, or an infinity that not all have.
    """
    first, *others = parts.values()
    shared = first.isinf()
    for part in others:
        shared &= part.isinf() & (part.to(first.dtype) == first)
    for part in parts.values():
        bad = ~(part.isfinite() | shared)
        if bad.any():
            place = int(bad.nonzero()[0])
            value = part[place].item()
            having = [source for source, each in parts.items() if str(each[place].item()) == str(value)]
            raise not_finite(layout, run, having, begin + place, value)
    return shared


def not_finite(layout: Layout, run: Run, sources: Sequence[int], element: int, value: float) -> ValuesError:
    """The error for a number of some sources that cannot be averaged."""
    labels = [layout.labels[source] for source in sources]
    tensor, place = tensor_at(layout, run, element)
    one = len(labels) == 1
    broken = "That model is broken" if one else "Those models are broken"
    hint = f"{broken}, most likely by a training run that diverged; leave {'it' if one else 'them'} out."
    if not math.isnan(value):
        hint += " Only an infinity that all ingredients, and the base where it counts, have at one place is copied."
    return ValuesError(
        f"'{tensor.name}' of {listed(labels)} {'holds' if one else 'hold'} {value} at {unravel(place, tensor.shape)}.",
        hint=hint,
        code="not-finite",
        subjects=labels,
    )


def tensor_at(layout: Layout, run: Run, element: int) -> tuple[OutputTensor, int]:
    """The tensor of an element of a run, and which of its elements that is."""
    tensors = layout.tensors
    offset = run.offset + element * ITEM_BYTES[run.dtype]
    number = bisect_right(tensors, offset, run.first, run.stop, key=lambda tensor: tensor.offset) - 1
    return tensors[number], (offset - tensors[number].offset) // ITEM_BYTES[run.dtype]


def all_finite(parts: Mapping[int, Tensor]) -> bool:
    """Whether every number is finite."""
    return all(fits(part, torch.float64) for part in parts.values())


def fits(values: Tensor, dtype: torch.dtype, of: float = 1.0) -> bool:
    """Whether every number is finite and stays so in ``dtype``, or is in a share of its range; one pass, as NaN passes
    through min and max.
    """
    low, high = values.aminmax()
    # As Python's numbers: in a float32 tensor's comparison the largest float64 would be infinity, which Inf equals.
    most = torch.finfo(dtype).max * of
    return -most <= low.item() and high.item() <= most


def unravel(index: int, shape: tuple[int, ...]) -> str:
    """The place of an element of a flat tensor, as people write it.

    >>> unravel(5, (2, 3))
    '[1, 2]'
    """
    return str([int(place) for place in np.unravel_index(index, shape)])
