"""Elements of the output from those of the sources, by the plan's methods; random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_soup.errors import ValuesError
from hf_soup.merging.layout import Run
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
        mixture = method.function(tensors, weights, **hand, **call.parameters)
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


def same_infinity(parts: Collection[Tensor]) -> Tensor:
    """Where all have the same infinity, which is what they make, whatever the method."""
    first, *others = parts
    shared = first.isinf()
    if shared.any():
        for part in others:
            shared &= part.isinf() & (part.to(first.dtype) == first)
    return shared


def unravel(index: int, shape: tuple[int, ...]) -> str:
    """The place of an element of a flat tensor, as people write it.

    >>> unravel(5, (2, 3))
    '[1, 2]'
    """
    return str([int(place) for place in np.unravel_index(index, shape)])
