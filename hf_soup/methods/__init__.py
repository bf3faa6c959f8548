"""The ways of mixing: one pure function a file, registered by its decorator. Imports torch and nothing else.

A method gets the same tensor of every ingredient, as stored, and their weights; it returns the mix in the accumulator's
dtype, and the engine rounds once. One that needs the ancestor gets task vectors, in the accumulator's dtype, and
returns one, to which the engine adds the ancestor. Where a method is elementwise it gets slices, flat; else whole
tensors in their shape. It changes none of them.

What else a method needs it asks for by the name of a parameter without a default, and the engine hands it in:

- ``random``: for every ingredient a float32 tensor of its shape, uniform in [0, 1), the same in any slicing.
- ``cutoffs``: for every ingredient the magnitude that ``density`` of all entries of its task vector reach or exceed,
  compared as float32 (see `cutoff`).
- ``statistics``: for every ingredient what it showed on the recipe's examples; of which kind, `Method` says. Where one
  has none for a tensor, the method is not asked, and the tensor is averaged.
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

Function = Callable[..., Tensor]

#: No float32 has higher bits without its sign, NaN included.
_HIGHEST = (1 << 31) - 1
#: Numbers that `nth_largest` holds at most; of more it counts how many are in each of so many bins, as a power of two.
_HELD, _BINS = 1 << 19, 20
#: How far from the rank wanted the first bounds are, as a share of all: samples of real weights are a percent off.
_AWAY = 0.015
#: Elements that are worked on at a time, so that the few tensors in between stay in the processor's cache.
BLOCK = 1 << 15


@dataclass(frozen=True)
class Within:
    """The numbers that a parameter may have, as an interval in brackets: ``Annotated[float, Within("(0, 1]")]``.

    >>> 0 in Within("(0, 1]"), 1 in Within("(0, 1]"), 7 in Within("[0, inf)")
    (False, True, True)
    """

    interval: str

    def __contains__(self, value: float) -> bool:
        found = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", self.interval)
        assert found, f"{self.interval} is no interval"
        low, high = float(found[2]), float(found[3])
        return (low <= value if found[1] == "[" else low < value) and (
            value <= high if found[4] == "]" else value < high
        )

    def __str__(self) -> str:
        return self.interval


@dataclass(frozen=True)
class Method:
    r"""A registered method.

    Args:
        name: As recipes spell it.
        function: ``function(tensors, weights, **parameters) -> Tensor``.
        elementwise: Whether slices give what whole tensors give.
        neutral: Parameters with which equal ingredients return themselves; a function where one depends on the sum of
            their shares. None where there are no such, which its docstring explains.
        needs_base: Whether it works on task vectors.
        sums: Whether shares are not divided by their sum, so that they may be negative; where it has a parameter
            ``normalize``, that decides.
        bound: How far the result may be from that of another machine before it is rounded, in parts of the largest
            magnitude in the tensor, as where it takes a decomposition; 0 where it is the same everywhere.
        least, most: How many ingredients it is defined for.
        ordered: Whether the order of the ingredients counts.
        statistics: What is collected of the ingredients, for the parameter ``statistics``: ``fisher``, a float32 tensor
            of the tensor's shape with the mean squared gradient of the log-probability of a label that the model draws,
            example by example, over the root mean square of these in the whole model; or ``gram``, for the weight of a
            linear layer, given as (out, in), the float32 (in, in) mean of :math:`xx^\top` over the layer's inputs; or
            ``coefficients``, a float32 without dimensions, learned for all ingredients together. The parameter
            ``examples`` says how many are looked at.
    """

    name: str
    function: Function
    elementwise: bool
    neutral: Mapping[str, Any] | None
    needs_base: bool = False
    sums: bool = False
    bound: float = 0.0
    least: int = 1
    most: int | None = None
    ordered: bool = False
    statistics: Literal["", "fisher", "gram", "coefficients"] = ""

    @cached_property
    def _signature(self) -> Mapping[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters
        return {name: each for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        return {name: each.default for name, each in self._signature.items() if each.default is not each.empty}

    @property
    def given(self) -> tuple[str, ...]:
        """What the engine hands in: parameters without a default."""
        return tuple(name for name, each in self._signature.items() if each.default is each.empty)

    @cached_property
    def allowed(self) -> dict[str, Within | tuple[str, ...]]:
        """The interval or the words that a parameter may have, where it may not have any value of its type."""
        found: dict[str, Within | tuple[str, ...]] = {}
        for name, hint in get_type_hints(self.function, include_extras=True).items():
            if typing.get_origin(hint) is typing.Literal:
                found[name] = typing.get_args(hint)
            for each in getattr(hint, "__metadata__", ()):
                if isinstance(each, Within):
                    found[name] = each
        return found

    @property
    def takes(self) -> str:
        """How many ingredients, in words."""
        if self.most is None:
            return f"{self.least} or more"
        return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"

    def neutral_for(self, total: float) -> dict[str, Any]:
        """The neutral parameters for ingredients whose shares have this sum."""
        return {name: value(total) if callable(value) else value for name, value in (self.neutral or {}).items()}


METHODS: dict[str, Method] = {}


def merge_method(
    *, elementwise: bool, neutral: Mapping[str, Any] | None, **properties: Any
) -> Callable[[Function], Function]:
    """Register a function as a method under its own name, with the properties of `Method`."""

    def register(function: Function) -> Function:
        name = function.__name__
        METHODS[name] = Method(name, function, elementwise, neutral, **properties)
        return function

    return register


def cutoff(values: Tensor, density: float) -> float:
    """The magnitude that the `count_kept` largest entries reach or exceed, as a float32; found without a sort.

    Entries that are equal to it as float32 are kept with it, so there may be more of them.

    >>> cutoff(torch.tensor([0.5, -3.0, 2.0, 1.0]), 0.5)
    2.0
    """
    return magnitudes_at(values, [count_kept(values.numel(), density)])[0] if values.numel() else 0.0


def magnitudes_at(values: Tensor, ranks: Sequence[int]) -> list[float]:
    """The magnitudes with these ranks, the largest is 1, as float32s; all of them mostly in one pass.

    >>> magnitudes_at(torch.tensor([0.5, -3.0, 2.0, 1.0]), [1, 3])
    [3.0, 1.0]
    """
    flat = values.detach().reshape(-1)
    blocks = torch.split(flat, 1 << 18)  # which stay in the processor's cache
    # An odd step does not stay in a few columns of a matrix.
    sample = magnitude_bits(flat[:: (len(flat) >> 13) | 1])
    return nth_largest(lambda: map(magnitude_bits, blocks), ranks, sample, len(flat))


def magnitude_bits(values: Tensor) -> Tensor:
    """Magnitudes as float32, and these as int32: bits of floats that are not negative sort as the floats do."""
    return values.abs().float().view(torch.int32)


def nth_largest(parts: Callable[[], Iterable[Tensor]], wanted: Sequence[int], sample: Tensor, size: int) -> list[float]:
    """Those of many numbers that have the ranks ``wanted``, exactly, mostly in one pass over them.

    For each rank those between two bounds are kept, or counted where they are many; the bounds are narrowed until one
    number is left. The first ones are guessed from a sample, which decides how long it takes, but not what is found.

    Args:
        parts: Gives all numbers, in parts, each time it is called: flat, as `magnitude_bits` makes them.
        wanted: From 1, the largest, to ``size``.
        sample: Some of the numbers.
        size: How many there are.

    >>> bits = magnitude_bits(torch.tensor([0.5, -3.0, 2.0, 1.0]))
    >>> nth_largest(lambda: [bits[:2], bits[2:]], [2, 4], bits[:1], 4)
    [2.0, 0.5]
    """
    ranked = (sample if size > 2 * len(sample) else sample[:0]).cpu().numpy().copy()
    ranked.sort()  # ten times as fast as torch's
    searches = [_Search(rank, ranked, size) for rank in wanted]
    while left := [search for search in searches if search.found is None]:
        for part in parts():
            array = part.cpu().numpy()  # which compares and selects three times as fast
            for search in left:
                search.look(array)
        for search in left:
            search.narrow()
    return [float(torch.tensor(search.found, dtype=torch.int32).view(torch.float32)) for search in searches]


class _Search:
    """For the number of one rank: bounds, and what of a pass lies between them."""

    def __init__(self, rank: int, ranked: Any, size: int) -> None:
        self.rank = rank
        self.found: int | None = None
        low, high = 0, _HIGHEST
        if len(ranked):
            share = rank / size
            # What chance does to a sample is less towards the ends.
            away = min(_AWAY, 0.04 * math.sqrt(share * (1 - share)))
            first, last = (round((1 - share + each) * len(ranked)) for each in (-away, away))
            low = int(ranked[min(first, len(ranked) - 1)]) if first > 0 else 0
            high = int(ranked[max(last, 0)]) if last < len(ranked) else _HIGHEST
        self._within(low, high)

    def _within(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.shift = max(0, (high - low).bit_length() - _BINS)
        self.near: list[Tensor] = []
        self.counts: Tensor | None = None
        self.above = self.held = 0

    def look(self, array: Any) -> None:
        """Keep or count what of an array lies between the bounds."""
        between = reached = array >= self.low
        if self.high < _HIGHEST:
            between = reached & (array <= self.high)
        near = torch.from_numpy(array.take(between.nonzero()[0]))  # faster than by the Booleans
        if self.high < _HIGHEST:
            self.above += int(torch.from_numpy(reached).view(torch.int8).sum(dtype=torch.int32)) - len(near)
        self.near.append(near)
        self.held += len(near)
        if sum(map(len, self.near)) > _HELD:
            self._count()

    def _count(self) -> None:
        """How many numbers are in each bin, with those counted before."""
        places = torch.cat(self.near).sub_(self.low).bitwise_right_shift_(self.shift)
        counts = torch.bincount(places, minlength=1 << _BINS)
        self.counts = counts if self.counts is None else self.counts.add_(counts)
        self.near = []

    def narrow(self) -> None:
        """Find the number, or bounds for the next pass."""
        place = self.rank - self.above  # from 1, among those between the bounds
        if place < 1:
            self._within(self.high + 1, _HIGHEST)
        elif place > self.held:
            self._within(0, self.low - 1)
        elif self.counts is None:
            found = torch.cat(self.near).numpy()
            found.partition(self.held - place)
            self.found, self.near = int(found[self.held - place]), []
        else:
            if self.near:
                self._count()
            bin_ = len(self.counts) - 1 - int(torch.searchsorted(self.counts.flip(0).cumsum(0), place))
            low = self.low + (bin_ << self.shift)
            high = min(self.high, low + (1 << self.shift) - 1)
            if low == high:
                self.found, self.counts = low, None
            else:
                self._within(low, high)


def count_kept(size: int, density: float) -> int:
    """How many of ``size`` entries a density keeps: :math:`\\max(1, \\lfloor density \\cdot size \\rfloor)`.

    A product that misses a whole number by a rounding is that number.

    >>> count_kept(10, 0.2), count_kept(10, 0.29), count_kept(10, 0.0), count_kept(100, 0.29)
    (2, 2, 1, 29)
    """
    exact = density * size
    near = round(exact)
    return max(1, near if math.isclose(exact, near, rel_tol=1e-12) else math.floor(exact))


def accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to add up in: float32 where everything is stored in 16 bits, else float64.

    >>> accumulator([torch.zeros(1, dtype=torch.bfloat16)])
    torch.float32
    """
    return torch.float32 if all(tensor.element_size() == 2 for tensor in tensors) else torch.float64


def round_into(mixed: Tensor, out: Tensor) -> None:
    """Round the accumulator's values to the output's dtype, to nearest, ties to even.

    >>> out = torch.empty(1, dtype=torch.bfloat16)
    >>> round_into(torch.tensor([1 + 2**-8 + 2**-30], dtype=torch.float64), out)
    >>> out.item()  # torch's own cast gives 1.0, because it goes through float32, which falls on the tie
    1.0078125
    """
    if mixed.dtype == torch.float64 and out.element_size() == 2:
        for wide, narrow in zip(torch.split(mixed.reshape(-1), BLOCK), torch.split(out.view(-1), BLOCK), strict=True):
            near = wide.float()
            if out.dtype == torch.bfloat16:
                # The second rounding errs only where the first one made a tie of what was none.
                lower = near.view(torch.int32).numpy() << 16  # numpy, which finds them faster
                ties = torch.from_numpy((lower == -(1 << 31)).nonzero()[0])
                near[ties] = _to_odd(near[ties], wide[ties])
            else:
                near = _to_odd(near, wide)
            narrow.copy_(near)
        return
    out.copy_(mixed)


def _to_odd(near: Tensor, wide: Tensor) -> Tensor:
    """Float32s rounded from float64, with the last bit set where anything was lost, so that no tie was not one."""
    back, bits = near.double(), near.view(torch.int32)
    bits.sub_((back.abs() > wide.abs()).int()).bitwise_or_((back != wide).int())
    return near


for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    import_module(f"{__name__}.{_file.stem}")
for _name in sorted(METHODS):  # not as they import each other
    METHODS[_name] = METHODS.pop(_name)
