"""Elements of the output from those of the sources, by the plan's method."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from hf_soup.errors import ValuesError
from hf_soup.methods import METHODS, accumulator
from hf_soup.methods.linear import linear
from hf_soup.plan import Plan


def combine(plan: Plan, parts: Mapping[int, Tensor], shares: Mapping[int, float], *, whole: bool) -> Tensor:
    """Mix elements by a plan's method; where not all have them (not ``whole``), the mean of the ingredients that do.

    Args:
        plan: With the method and its parameters.
        parts: By source.
        shares: By source too; the ancestor's does not count.
        whole: Whether all sources that go in are there.
    """
    method, base = METHODS[plan.method], len(plan.sources) - 1 if plan.with_base else None
    own = {source: part for source, part in parts.items() if source != base}
    weights = [shares[source] for source in own]
    if not whole:
        return linear(list(own.values()), weights if math.fsum(weights) > 0 else [1.0] * len(weights))
    if base is None:
        return method.function(list(own.values()), weights, **plan.parameters)
    wide = accumulator(list(parts.values()))
    origin = parts[base].to(wide)
    deltas = [part.to(wide, copy=True).sub_(origin) for part in own.values()]
    return method.function(deltas, weights, **plan.parameters).add_(origin)


def not_finite(label: str, tensor: str, value: float, index: int, shape: tuple[int, ...]) -> ValuesError:
    """The error for a number of an ingredient that cannot be averaged; ``index`` counts in the flat tensor."""
    return ValuesError(
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
