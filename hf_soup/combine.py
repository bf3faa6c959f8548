"""Elements of the output from those of the sources, by the plan's method."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hf_soup.chance import uniform
from hf_soup.errors import MergeError
from hf_soup.methods import METHODS, accumulator
from hf_soup.methods.linear import linear
from hf_soup.plan import Plan
from hf_soup.runs import Mixing, Run

#: By tensor: for every ingredient the magnitude at which its task vector is trimmed.
Cutoffs = Mapping[str, Sequence[float]]


class Statistics(Protocol):
    """What the ingredients showed on examples."""

    def read(self, mixing: Mixing, source: int, tensor: str, begin: int, count: int) -> Tensor | None:
        """Of some elements of a tensor, or of the whole, as its method wants it; None where there is nothing."""

    def turned(self, mixing: Mixing, tensor: str) -> bool:
        """Whether it is the weight of a linear layer that is stored as (in, out)."""


def combine(
    plan: Plan,
    run: Run,
    parts: Mapping[int, Tensor],
    shares: Mapping[int, float],
    *,
    mixed: Collection[int],
    begin: int = 0,
    cutoffs: Cutoffs | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Mix elements of a run by its method; where not all have them, the mean of the ingredients that do.

    Args:
        plan: With methods and parameters.
        run: Of the plan.
        parts: By source, flat.
        shares: By source too; the ancestor's does not count.
        mixed: The sources that go in.
        begin: Which element of the run is the first.
        cutoffs: Where a method asks for them.
        statistics: Where a method asks for them; a tensor that one of the sources has none of is averaged.

    Raises:
        MergeError: The method is not defined for these tensors.
    """
    name, parameters = plan.mixing(run)
    method, base = METHODS[name], len(plan.sources) - 1 if plan.with_base else None
    own = {source: part for source, part in parts.items() if source != base}
    weights = [shares[source] for source in own]
    tensors = list(own.values())
    needed = [source for source in mixed if source != base or method.needs_base]
    if not (method.elementwise or run.whole) or any(source not in parts for source in needed):
        return linear(tensors, weights if math.fsum(weights) > 0 else [1.0] * len(weights))
    given: dict[str, object] = {}
    tensor = plan.tensors[run.first]
    shape = tensor.shape if run.whole else tensors[0].shape
    if "random" in method.given:
        count = len(tensors[0])
        drawn = (uniform(plan.seed, tensor.name, position, begin, count) for position in range(len(tensors)))
        given["random"] = [each.reshape(shape) for each in drawn]
    if "cutoffs" in method.given:
        assert cutoffs is not None, "the engine finds them first"
        given["cutoffs"] = cutoffs[tensor.name]
    turned = False
    if method.statistics:
        assert statistics is not None, "the engine collects them first"
        mixing = plan.mixing(run)
        read = [statistics.read(mixing, source, tensor.name, begin, len(tensors[0])) for source in own]
        if any(each is None for each in read):
            return linear(tensors, weights if math.fsum(weights) > 0 else [1.0] * len(weights))
        given["statistics"], turned = read, statistics.turned(mixing, tensor.name)
    if base is None or not method.needs_base:
        origin = None
    else:
        wide = accumulator(list(parts.values()))
        origin = parts[base].to(wide)
        tensors = [part.to(wide, copy=True).sub_(origin) for part in tensors]
    tensors = [each.reshape(shape).mT if turned else each.reshape(shape) for each in tensors]
    try:
        mixture = method.function(tensors, weights, **given, **parameters)
        result = (mixture.mT if turned else mixture).reshape(-1)
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise MergeError(
            f"{name} cannot combine '{tensor.name}': {error}",
            hint="An `overrides` entry in the recipe combines that tensor in another way, as `method: linear` does.",
        ) from None
    return result if origin is None else result.add_(origin)


def not_finite(label: str, tensor: str, value: float, index: int, shape: tuple[int, ...]) -> MergeError:
    """The error for a number of an ingredient that cannot be averaged; ``index`` counts in the flat tensor."""
    return MergeError(
        f"'{tensor}' of {label} holds {value} at {unravel(index, shape)}.",
        hint="That model is broken, most likely by a training run that diverged; leave it out.",
    )


def unravel(index: int, shape: tuple[int, ...]) -> str:
    """The place of an element of a flat tensor, as people write it.

    >>> unravel(5, (2, 3))
    '[1, 2]'
    """
    place: list[int] = []
    for length in reversed(shape):
        place.append(index % length)
        index //= length
    return f"[{', '.join(str(number) for number in reversed(place))}]"
