"""What goes in, with which shares and parameters: the selection of a recipe, and the values of its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_soup.ingredients import averages_run
from hf_soup.recipe import Named, Recipe, SelectionStability, grid, is_average, methods_of, searched, settled
from hf_soup.selection import SELECTIONS, Selected, Weights

if TYPE_CHECKING:
    from hf_soup.evaluation.report import Evaluation, RowSubset
    from hf_soup.ingredients import ResolvedIngredients


@dataclass(frozen=True)
class Point:
    """Values of a method's parameters, and the held-out score of the soup with them."""

    parameters: Mapping[str, Any]
    score: float


@dataclass(frozen=True)
class Choice:
    """What was chosen on held-out data, or given.

    Args:
        selected: Ingredients and shares.
        recipe: With the parameters that were chosen, each one value.
        curve: All values that were tried, in the order of the recipe; empty where none were to be chosen.
        stability: Where the recipe asks for repeats.
    """

    selected: Selected
    recipe: Recipe
    curve: tuple[Point, ...] = ()
    stability: SelectionStability | None = None

    def leaves(self, expanded: ResolvedIngredients) -> dict[int, float]:
        """Numbers of the leaves that go in, in their order, and their shares."""
        found = sorted(expanded.flatten(self.selected.weights, mean=self.selected.normalize).items())
        if averages_run(self.recipe):
            from hf_soup.methods import METHODS
            from hf_soup.methods._recent import recent

            settings = METHODS[self.recipe.method.name].parameters | self.recipe.method.parameters
            found = [found[place] for place in recent(len(found), settings["last"], settings["stride"])]
        return dict(found)

    def mix(self, expanded: ResolvedIngredients, numbers: Sequence[int]) -> Recipe:
        """The recipe for those leaves, all of which go in, with the shares of single tensors that were chosen."""
        if averages_run(self.recipe):
            named = Named(name=self.recipe.method.name, **{**self.recipe.method.parameters, "last": 0, "stride": 1})
            return self.recipe.model_copy(update={"method": named})
        if not self.selected.layers:
            return self.recipe
        layers = {}
        for tensor, shares in self.selected.layers.items():
            given = dict(zip(self.selected.weights, shares, strict=True))
            found = expanded.flatten(given, mean=False)
            layers[tensor] = tuple(found.get(number, 0.0) for number in numbers)
        return self.recipe.model_copy(update={"layers": layers})


def choose(recipe: Recipe, weights: Weights, evaluation: Evaluation | None) -> Choice:
    """Run the selection of a recipe, then try the values of its method's parameters on what it chose.

    While ingredients are selected, parameters that are to be chosen have the values with which the method is a plain
    average, so that the soup is chosen as a soup.

    Args:
        recipe: Valid.
        weights: Share of each ingredient.
        evaluation: Where something is scored.
    """
    if SELECTIONS[recipe.select.name].needs_score and evaluation is not None:
        evaluation.require_better_than_chance(list(weights))
    choice = _choose(recipe, weights, evaluation)
    if not recipe.repeats or evaluation is None:
        return choice
    chosen, gains = dict.fromkeys(weights, 0), []
    for number in range(recipe.repeats):
        first, second = evaluation.random_halves(recipe.seed + number)
        again = _choose(recipe, weights, evaluation, first)
        best = max(weights, key=lambda name: evaluation.held_out({name: 1.0}, rows=first))
        selected = again.selected
        plain = is_average(again.recipe) and selected.normalize and again.recipe.method.parameters == {}
        parameters = None if plain else again.recipe.method.parameters
        soup = evaluation.held_out(selected.weights, layers=selected.layers, parameters=parameters, rows=second)
        gains.append(soup - evaluation.held_out({best: 1.0}, rows=second))
        for name in selected.weights:
            chosen[name] += 1
    return replace(choice, stability=_stability(recipe.repeats, chosen, gains))


def _stability(repeats: int, chosen: Mapping[str, int], gains: Sequence[float]) -> SelectionStability:
    low, high = (float(bound) for bound in np.quantile(gains, [0.025, 0.975]))
    mean, won = sum(gains) / len(gains), sum(gain > 0 for gain in gains)
    tied = sum(gain == 0 for gain in gains)
    sentence = (
        f"chosen again on {repeats} random halves of the held-out rows and scored on the other halves, the "
        f"soup is {100 * mean:+.1f} points from the best ingredient in the mean ({100 * low:+.1f} to "
        f"{100 * high:+.1f}); better in {won}, equal in {tied}, worse in {repeats - won - tied}"
    )
    return SelectionStability(
        repeats=repeats, chosen=chosen, gains=tuple(gains), mean=mean, low=low, high=high, sentence=sentence
    )


def _choose(recipe: Recipe, weights: Weights, evaluation: Evaluation | None, rows: RowSubset | None = None) -> Choice:
    from hf_soup.methods import METHODS  # late, as torch takes a second to import and a check needs none

    selection, method = SELECTIONS[recipe.select.name], METHODS[recipe.method.name]
    open_parameters = searched(recipe)
    least = 1 if is_average(recipe) else max(each.least for each in methods_of(recipe))

    def score(asked: Weights) -> float:
        assert evaluation is not None, "the recipe was checked: who looks at scores has held-out data"
        own = {**method.parameters, **recipe.method.parameters}
        # Of fewer than its methods are defined for, the candidate is their mean: one alone is itself.
        if is_average(recipe) or len(asked) < least:
            return evaluation.held_out(asked, rows=rows)
        neutral = method.neutral_for(math.fsum(asked.values()))
        own |= {name: neutral.get(name, method.parameters[name]) for name in open_parameters}
        return evaluation.held_out(asked, parameters=own, rows=rows)

    if selection.learns:
        assert evaluation is not None, "the recipe was checked: who learns has held-out data"
        with evaluation.descent(list(weights), rows) as descent:
            selected = selection.function(weights, descent, **recipe.select.parameters)
    else:
        selected = selection.function(weights, score, **recipe.select.parameters)
    # In the recipe's order, whatever the order in which they were chosen: sums are rounded in order.
    if not selected.layers:  # else they stand in the order of the weights
        kept = selected.weights
        selected = replace(selected, weights={name: kept[name] for name in weights if name in kept})
    if len(selected.weights) < least:
        return Choice(selected, recipe.model_copy(update={"method": Named(name="linear"), "overrides": ()}))
    if not selected.normalize:
        return Choice(selected, settled(recipe, {**settled(recipe).method.parameters, "normalize": False}))
    if not open_parameters or evaluation is None:
        return Choice(selected, settled(recipe))
    curve = [Point(at, evaluation.held_out(selected.weights, parameters=at, rows=rows)) for at in grid(recipe)]
    best = max(curve, key=lambda point: point.score)
    return Choice(selected, settled(recipe, best.parameters), tuple(curve))
