"""The ways of mixing: one pure function a file, registered by its decorator. Imports torch and nothing else.

A method gets slices (or whole tensors, where it is not elementwise) of the same tensor of every ingredient, as
stored, and their weights; it returns the mix in the accumulator's dtype, and the engine rounds once. One that needs
the ancestor gets task vectors, in the accumulator's dtype, and returns one, to which the engine adds the ancestor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        name: As recipes spell it.
        function: ``function(tensors, weights, **parameters) -> Tensor``.
        elementwise: Whether slices give what whole tensors give.
        neutral: Parameters with which equal ingredients return themselves; a function where one depends on the sum of
            their shares.
        needs_base: Whether it works on task vectors.
        sums: Whether shares are not divided by their sum, so that they may be negative; where it has a parameter
            ``normalize``, that decides.
        bound: How far the result may be from that of another machine, in parts of the largest magnitude in the
            tensor, as where it takes a decomposition; 0 where it is the same everywhere.
    """

    name: str
    function: Function
    elementwise: bool
    neutral: Mapping[str, Any]
    needs_base: bool = False
    sums: bool = False
    bound: float = 0.0

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        signature = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def neutral_for(self, total: float) -> dict[str, Any]:
        """The neutral parameters for ingredients whose shares have this sum."""
        return {name: value(total) if callable(value) else value for name, value in self.neutral.items()}


METHODS: dict[str, Method] = {}


def merge_method(
    *, elementwise: bool, neutral: Mapping[str, Any], needs_base: bool = False, sums: bool = False, bound: float = 0.0
) -> Callable[[Function], Function]:
    """Register a function as a method under its own name."""

    def register(function: Function) -> Function:
        name = function.__name__
        METHODS[name] = Method(name, function, elementwise, neutral, needs_base, sums, bound)
        return function

    return register


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
        # To float32 with the last bit set where anything was lost ("rounding to odd"), so that nothing that was not
        # a tie becomes one.
        near = mixed.float()
        back = near.double()
        bits = near.view(torch.int32)
        bits.sub_((back.abs() > mixed.abs()).int()).bitwise_or_((back != mixed).int())
        mixed = near
    out.copy_(mixed)


for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    import_module(f"{__name__}.{_file.stem}")
