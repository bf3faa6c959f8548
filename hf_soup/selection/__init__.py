"""Which ingredients go in: one function a file, seeing names, weights and a score function, and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

#: Shares by ingredient: what a selection gets, asks about, and gives back.
Weights = Mapping[str, float]
#: Shares of single tensors: name → one for each ingredient that goes in, in their order.
Layers = Mapping[str, Sequence[float]]
#: The held-out score of the soup with these weights; larger is better.
ScoreFunction = Callable[[Weights], float]


@dataclass(frozen=True)
class Step:
    """One thing that a selection tried: the soup, its held-out score, and whether it was kept."""

    ingredients: tuple[str, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class Selected:
    """What a selection found: the shares of those that go in, and every step on the way."""

    weights: Weights
    trace: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Selection:
    """A registered selection, and whether it looks at held-out scores."""

    name: str
    function: Callable[..., Selected]
    needs_score: bool

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        signature = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}


SELECTIONS: dict[str, Selection] = {}


def selection(*, needs_score: bool) -> Callable[[Callable[..., Selected]], Callable[..., Selected]]:
    """Register a function as a selection under its own name."""

    def register(function: Callable[..., Selected]) -> Callable[..., Selected]:
        SELECTIONS[function.__name__] = Selection(function.__name__, function, needs_score)
        return function

    return register


for _file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    import_module(f"{__name__}.{_file.stem}")
