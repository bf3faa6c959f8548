"""Which ingredients go in: one function a file, seeing names, weights and a function of them, and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


#: Shares by ingredient: what a selection gets, asks about, and gives back.
Weights = Mapping[str, float]
#: Shares of single tensors: name → one for each ingredient that goes in, in their order.
TensorWeights = Mapping[str, Sequence[float]]
#: The validation score of the soup with these weights; larger is better.
ScoreFunction = Callable[[Weights], float]


class Objective(Protocol):
    """The validation loss of soups, and its gradient: what a selection that learns looks at.

    ``shares`` are ``(tensors, n)`` float64, or ``(1, n)`` for all tensors alike; ``scale`` multiplies the logits;
    ``rows`` are numbers of validation rows.
    """

    #: The ingredients, and the tensors that are averaged.
    names: Sequence[str]
    tensors: Sequence[str]
    #: ``(rows,)`` int64: what each validation row is, to split them evenly.
    labels: NDArray[np.int64]

    def loss(self, shares: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, float]:
        """The mean cross-entropy over some rows at the scale where it is least, and that scale."""

    def alone(self, rows: NDArray[np.int64]) -> Sequence[float]:
        """The same loss for each ingredient alone."""

    def gradient(
        self, shares: NDArray[np.float64], scale: float, rows: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], float]:
        """That at a scale, and its derivatives with respect to ``shares``, of their shape, and ``scale``."""


@dataclass(frozen=True)
class Step:
    """One thing that a selection tried: the soup, its validation score, and whether it was kept."""

    ingredients: tuple[str, ...]
    score: float
    kept: bool


@dataclass(frozen=True)
class Selected:
    """What a selection found.

    Args:
        weights: The shares of those that go in; where they differ from tensor to tensor, the mean over tensors.
        trace: Every step on the way.
        tensor_weights: Tensor → its own shares, in the order of ``weights``.
        normalize: Whether the soup is the weighted mean; else it is the plain weighted sum.
        history: Of a search that learned, an entry an epoch, as plain data.
    """

    weights: Weights
    trace: tuple[Step, ...] = ()
    tensor_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    normalize: bool = True
    history: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Selection:
    """A registered selection.

    Args:
        name: Its name.
        function: The selection.
        needs_score: Whether it looks at validation data.
        learns: If so, whether at its `Objective` instead of scores.
        check: Refuses values of its parameters, given the weights, before anything is scored.
    """

    name: str
    function: Callable[..., Selected]
    needs_score: bool
    learns: bool = False
    check: Callable[..., None] = lambda weights, **parameters: None

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        signature = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in signature if p.kind is inspect.Parameter.KEYWORD_ONLY}


SELECTIONS: dict[str, Selection] = {}


def selection(*, needs_score: bool, **properties: Any) -> Callable[[Callable[..., Selected]], Callable[..., Selected]]:
    """Register a function as a selection under its own name."""

    def register(function: Callable[..., Selected]) -> Callable[..., Selected]:
        SELECTIONS[function.__name__] = Selection(function.__name__, function, needs_score, **properties)
        return function

    return register


def best_first(weights: Weights, score: ScoreFunction) -> dict[str, float]:
    """The validation score of every ingredient alone, best first, equal ones in the order of the recipe."""
    alone = {name: score({name: weight}) for name, weight in weights.items()}
    return dict(sorted(alone.items(), key=lambda entry: -entry[1]))


for _name in ("best", "greedy", "learned", "pruned", "uniform"):
    import_module(f"{__name__}.{_name}")
