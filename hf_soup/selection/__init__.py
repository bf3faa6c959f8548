"""Which ingredients go in: one function a file, seeing names, weights and a function of them, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hf_soup._util.registry import Registered, Registry, Within as Within
from hf_soup.errors import RecipeError

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

    ``shares`` are ``(tensors, n)`` float64, or ``(1, n)`` for all tensors alike; ``scale`` multiplies the logits of a
    softmax, where there is one; ``rows`` are numbers of validation rows.
    """

    #: The ingredients, and the tensors that are averaged.
    names: Sequence[str]
    tensors: Sequence[str]
    #: ``(rows,)`` int64: what each validation row is, to split them evenly.
    strata: NDArray[np.int64]

    def loss(self, shares: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, float]:
        """The mean loss over some rows at the scale where it is least, and that scale."""

    def alone(self, rows: NDArray[np.int64]) -> Sequence[float]:
        """The same loss for each ingredient alone."""

    def gradient(
        self, shares: NDArray[np.float64], scale: float, rows: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], float]:
        """That at a scale, and its derivatives with respect to ``shares``, of their shape, and ``scale``."""


class EntropyObjective(Protocol):
    """How sure soups are of their answers to calibration data, and the gradient of that.

    ``coefficients`` are ``(tensors, n)`` float64, what task vectors are multiplied with beside the ingredients'
    weights; ``rows`` are numbers of rows.
    """

    #: The tensors whose coefficients are learned, and all others, which are the mean.
    tensors: Sequence[str]
    others: Sequence[str]
    #: What the data are called in messages.
    title: str

    def drawn(self, count: int, seed: int) -> NDArray[np.int64]:
        """Numbers of so many rows, drawn at random; of all, where there are fewer."""

    def mean(self, coefficients: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
        """The mean entropy of the answers to some rows, in nats."""

    def gradient(self, coefficients: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
        """That, and its derivatives by ``coefficients``, of their shape."""

    def progress(self, steps: int) -> object:
        """Show that so many steps more are done."""


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
        averaged: Of a selection that brings a method, tensors that are the mean all the same.
        normalize: Whether the soup is the weighted mean; else it is the plain weighted sum.
        history: Of a search that learned, an entry an epoch, as plain data.
        notes: What a reader should know, a sentence each.
    """

    weights: Weights
    trace: tuple[Step, ...] = ()
    tensor_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()
    normalize: bool = True
    history: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection(Registered):
    """A registered selection.

    Args:
        name, function: ``function(weights, score, **parameters) -> Selected``. It may ask for the recipe's ``seed``.
        needs_score: Whether it looks at validation scores.
        learns: Whether it gets an objective with a gradient in the place of scores: the validation ``loss``
            (`Objective`), or the ``entropy`` of answers to calibration data (`EntropyObjective`).
        check: Refuses values of its parameters, given the weights, before anything is scored.
        picks: ``picks(count, **parameters)``: of so many ingredients in order the numbers of those that go in at all,
            so that only those are opened, and the parameters with which they are selected then. Nothing is scored yet,
            so it does not go with ``needs_score``.
        method: The method with parameters that its weights are for, as a recipe has it; by default the mean.
        reweighs: Whether it changes the ratios of the weights; else it only says who goes in.
    """

    needs_score: bool
    learns: Literal["", "loss", "entropy"] = ""
    check: Callable[..., None] = lambda weights, **parameters: None
    picks: Callable[..., tuple[Sequence[int], dict[str, Any]]] | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    reweighs: bool = False

    def __post_init__(self) -> None:
        if self.picks and (self.needs_score or self.learns):
            raise TypeError(f"{self.name}: `picks` is asked before anything can be scored; leave out `needs_score`")

    def select(self, weights: Weights, source: Any, parameters: Mapping[str, Any], seed: int) -> Selected:
        """What it selects, which is looked at.

        Args:
            weights: Of the ingredients.
            source: The function that scores, or what is learned from.
            parameters: Of the recipe.
            seed: The recipe's, for those who ask for one.

        Raises:
            RecipeError: It failed, or its answer is no soup of these ingredients.
        """
        own = {"seed": seed} if "seed" in self.given else {}
        with SELECTIONS.failures(self.name):
            selected: Selected = self.function(weights, source, **parameters, **own)
        if fault := _fault(selected, weights):
            raise RecipeError(f"The selection '{self.name}' gives no soup of these ingredients: {fault}.")
        return selected


def _fault(selected: object, weights: Weights) -> str:
    """What is wrong with what a selection gave, if anything."""
    if not isinstance(selected, Selected):
        return f"it gives {type(selected).__name__} and not Selected"
    if unknown := [name for name in selected.weights if name not in weights]:
        return f"'{unknown[0]}' is none of them"
    numbers = list(selected.weights.values())
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return f"the weights are {numbers}"
    turned = any(number < 0 <= weights[name] for name, number in selected.weights.items())
    if not any(numbers) or (selected.normalize and turned):
        return f"the weights are {numbers}, and a mean needs some above zero and none below"
    short = [tensor for tensor, own in selected.tensor_weights.items() if len(own) != len(numbers)]
    return f"the weights of the tensor '{short[0]}' are not {len(numbers)}" if short else ""


SELECTIONS: Registry[Selection] = Registry("selection")


def selection(*, needs_score: bool, **properties: Any) -> Callable[[Callable[..., Selected]], Callable[..., Selected]]:
    """Register a function as a selection under its own name, with the properties of `Selection`."""

    def register(function: Callable[..., Selected]) -> Callable[..., Selected]:
        SELECTIONS.add(Selection(function.__name__, function, needs_score, **properties))
        return function

    return register


def best_first(weights: Weights, score: ScoreFunction) -> dict[str, float]:
    """The validation score of every ingredient alone, best first, equal ones in the order of the recipe."""
    alone = {name: score({name: weight}) for name, weight in weights.items()}
    return dict(sorted(alone.items(), key=lambda entry: -entry[1]))


SELECTIONS.load_package(__name__)
