"""What goes in, with which shares and parameters: the selection of a recipe, and the values of its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_soup.ingredients import ResolvedIngredients
from hf_soup.recipe import (
    MethodCall,
    Mixture,
    Named,
    Override,
    Recipe,
    SelectionStability,
    grid,
    is_average,
    methods_of,
    searched,
    settled,
)
from hf_soup.selection import SELECTIONS, Selected, Selection, TensorWeights, Weights

if TYPE_CHECKING:
    from hf_soup.evaluation.candidates import Candidates, RowSubset


@dataclass(frozen=True)
class Point:
    """Values of a method's parameters, and the validation score of the soup with them."""

    parameters: Mapping[str, Any]
    score: float
    mixture: Mixture


@dataclass(frozen=True)
class Choice:
    """What was chosen on validation data, or given, and how.

    Args:
        weights: The share of every source that goes in, in the order of the recipe; 0 of one that only gives its head.
        recipe: As it was asked for, with one value for each parameter.
        final: That of the mixture: of a run's checkpoints all that are left go in, and tensors have the shares chosen.
        selected: What the selection found, by ingredient.
        curve: All values that were tried, in the order of the recipe; empty where none were to be chosen.
        stability: Where the recipe asks for repeats.
    """

    weights: Mapping[str, float]
    recipe: Recipe
    final: Recipe
    selected: Selected
    curve: tuple[Point, ...] = ()
    stability: SelectionStability | None = None


@dataclass(frozen=True)
class MixtureSpace:
    """All mixtures that a selection may ask for: ingredients may be means of sources themselves.

    Args:
        usual: What the recipe makes of all sources.
        ingredients: What those sources are to the recipe.
        names: Of what the ingredients stand for, by their numbers.
    """

    usual: Mixture
    ingredients: ResolvedIngredients
    names: Sequence[str]

    def of(
        self, weights: Weights, tensor_weights: TensorWeights | None = None, parameters: Mapping[str, Any] | None = None
    ) -> Mixture:
        """The mixture of some ingredients, with shares of single tensors, and parameters of the method, of its own."""
        flatten = self.ingredients.flatten
        shares = flatten(weights)
        own: dict[str, tuple[float, ...]] = {}
        if tensor_weights is None and len(shares) == len(self.usual.weights):
            own |= self.usual.tensor_weights
        for tensor, mine in (tensor_weights or {}).items():
            each = flatten(dict(zip(weights, mine, strict=True)), mean=False)
            own[tensor] = tuple([each[number] for number in shares])
        call = self.usual.method if parameters is None else MethodCall(self.usual.method.method, parameters)
        named = {self.names[number]: share for number, share in shares.items()}
        return replace(self.usual, weights=named, tensor_weights=own, method=call)

    def alone(self) -> dict[str, Mixture]:
        """Every ingredient by itself."""
        return {name: Mixture(self.of({name: 1.0}).weights) for name in self.ingredients.groups}


def choose(
    recipe: Recipe, weights: Weights, space: MixtureSpace, candidates: Candidates | None, head_of: str | None = None
) -> Choice:
    """Run the selection of a recipe, then try the values of its method's parameters on what it chose.

    While ingredients are selected, parameters that are to be chosen have the values with which the method is a plain
    average, so that the soup is chosen as a soup.

    Args:
        recipe: Valid.
        weights: Share of each ingredient.
        space: Of the sources that the ingredients stand for.
        candidates: Where something is scored.
        head_of: The source whose head is kept, whether it is chosen or not.
    """
    if SELECTIONS[recipe.select.name].needs_score and candidates is not None:
        candidates.require_better_than_chance(list(weights))
    search = _Search(recipe, weights, space, candidates)
    selected, one, curve = search.run()
    stability = search.stability() if recipe.stability_repeats and candidates is not None else None
    chosen = space.ingredients.flatten(selected.weights, mean=selected.normalize)
    numbers, final = sorted(chosen), one
    if head_of is not None:
        numbers = sorted({*numbers, space.names.index(head_of)})
    if selected.tensor_weights:
        tensor_weights = {}
        for tensor, given in selected.tensor_weights.items():
            own = space.ingredients.flatten(dict(zip(selected.weights, given, strict=True)), mean=False)
            tensor_weights[tensor] = tuple(own.get(number, 0.0) for number in numbers)
        patterns = _patterns(selected.averaged, list(selected.tensor_weights))
        overrides = tuple(Override(tensors=pattern, method=Named(name="linear")) for pattern in patterns)
        final = final.model_copy(update={"tensor_weights": tensor_weights, "overrides": overrides})
    shares = {space.names[number]: chosen.get(number, 0.0) for number in numbers}
    if candidates is not None and candidates.guarded:
        notes = search.require_guards(selected, one)
        selected = replace(selected, notes=(*selected.notes, *notes))
    return Choice(shares, one, final, selected, curve, stability)


def _patterns(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Patterns of names and of none of the others, few where many end alike, as a recipe has no room for thousands.

    >>> _patterns(["a.norm.mean", "b.norm.mean", "a.bias"], ["b.bias"])
    ['*.mean', 'a.bias']
    """
    endings = [f".{name.rpartition('.')[2]}" for name in names]
    return list(
        dict.fromkeys(
            name if any(other.endswith(ending) for other in others) or ending == f".{name}" else f"*{ending}"
            for name, ending in zip(names, endings, strict=True)
        )
    )


@dataclass(frozen=True)
class _Search:
    """The arguments of `choose`."""

    recipe: Recipe
    weights: Weights
    space: MixtureSpace
    candidates: Candidates | None

    def run(self, rows: RowSubset | None = None) -> tuple[Selected, Recipe, tuple[Point, ...]]:
        """What is selected, the recipe with one value for each parameter, and what was tried for them."""
        from hf_soup.methods import METHODS  # late, as torch takes a second to import and a check needs none

        recipe, candidates = self.recipe, self.candidates
        selection, method = SELECTIONS[recipe.select.name], METHODS[recipe.method.name]
        open_parameters = searched(recipe.method)
        least = 1 if is_average(recipe) else max(each.least for each in methods_of(recipe))

        plain: dict[frozenset[str], float] = {}

        def score(asked: Weights) -> float:
            own: dict[str, Any] | None = None
            # Of fewer than its methods are defined for, the candidate is their mean: one alone is itself.
            if not is_average(recipe) and len(asked) >= least:
                neutral = method.neutral_for(math.fsum(asked.values()))
                chosen = {name: neutral.get(name, method.parameters[name]) for name in open_parameters}
                own = {**method.parameters, **recipe.method.parameters, **chosen}
            if candidates is not None and candidates.guarded:
                plain[frozenset(asked)] = self.score(asked, parameters=own, rows=rows, guarded=False)
            return self.score(asked, parameters=own, rows=rows)

        curve: tuple[Point, ...] = ()
        if selection.learns:
            selected = self._learned(selection, rows)
        elif searched(recipe.select):
            every = [(at, selection.select(self.weights, score, at, recipe.seed)) for at in grid(recipe.select)]
            ranks = [score(each.weights) for _, each in every]
            curve = tuple(
                Point(at, plain.get(frozenset(each.weights), rank), self.space.of(each.weights))
                for (at, each), rank in zip(every, ranks, strict=True)
            )
            place = ranks.index(max(ranks))
            selected = every[place][1]
            recipe = recipe.model_copy(update={"select": Named(name=selection.name, **curve[place].parameters)})
        elif selection.picks:
            selected = Selected(self.weights)  # it chose and weighed them before anything was opened
        else:
            selected = selection.select(self.weights, score, recipe.select.parameters, recipe.seed)
        # A trace has scores, and not the ranks of what breaks a guard.
        trace = tuple(
            replace(step, score=plain.get(frozenset(step.ingredients), step.score)) for step in selected.trace
        )
        selected = replace(selected, trace=trace)
        # In the recipe's order, whatever the order in which they were chosen: sums are rounded in order.
        if not selected.tensor_weights:  # else they stand in the order of the weights
            kept = selected.weights
            selected = replace(selected, weights={name: kept[name] for name in self.weights if name in kept})
        if len(selected.weights) < least:
            return selected, recipe.model_copy(update={"method": Named(name="linear"), "overrides": ()}), ()
        if not selected.normalize:
            return selected, settled(recipe, {**settled(recipe).method.parameters, "normalize": False}), ()
        if not open_parameters or candidates is None:
            return selected, settled(recipe), curve
        points = [(at, self.space.of(selected.weights, parameters=at)) for at in grid(recipe.method)]
        ranks = [candidates.score(mixture, rows) for _, mixture in points]
        curve = tuple(Point(at, candidates.score(mixture, rows, guarded=False), mixture) for at, mixture in points)
        best = curve[ranks.index(max(ranks))]
        return selected, settled(recipe, best.parameters), curve

    def _learned(self, selection: Selection, rows: RowSubset | None) -> Selected:
        parameters, seed = {**selection.parameters, **self.recipe.select.parameters}, self.recipe.seed
        assert self.candidates is not None, "the recipe was checked: who learns has data"
        if selection.learns == "entropy":
            with self.candidates.entropy(self.weights, parameters["steps"]) as entropy:
                return selection.select(self.weights, entropy, parameters, seed)
        with self.candidates.descent(list(self.weights), rows) as descent:
            return selection.select(self.weights, descent, parameters, seed)

    def stability(self) -> SelectionStability:
        """The same choice on halves of the rows, again and again."""
        recipe, candidates = self.recipe, self.candidates
        assert candidates is not None, "the recipe was checked: who repeats has validation data"
        counts, gains = dict.fromkeys(self.weights, 0), []
        for number in range(recipe.stability_repeats):
            chosen_on, judged_on = candidates.random_halves(recipe.seed + number)
            selected, one, _ = self.run(chosen_on)
            best = max(self.weights, key=lambda name: candidates.score_alone(name, chosen_on, guarded=False))
            soup = self.score(
                selected.weights, selected.tensor_weights, _parameters(selected, one), judged_on, guarded=False
            )
            gains.append(soup - candidates.score_alone(best, judged_on, guarded=False))
            for name in selected.weights:
                counts[name] += 1
        low, high = (float(bound) for bound in np.quantile(gains, [0.025, 0.975]))
        repeats, mean, won = len(gains), sum(gains) / len(gains), sum(gain > 0 for gain in gains)
        tied = sum(gain == 0 for gain in gains)
        first, *bounds = (f"{100 * each:+.1f}" if candidates.share else f"{each:+.3g}" for each in (mean, low, high))
        sentence = (
            f"chosen again on {repeats} random halves of the validation rows and scored on the other halves, the "
            f"soup is {first}{' points' if candidates.share else ''} from the best ingredient in the mean "
            f"({' to '.join(bounds)}); better in {won}, equal in {tied}, worse in {repeats - won - tied}"
        )
        return SelectionStability(
            repeats=repeats, chosen=counts, gains=tuple(gains), mean=mean, low=low, high=high, sentence=sentence
        )

    def score(
        self,
        weights: Weights,
        tensor_weights: TensorWeights | None = None,
        parameters: Mapping[str, Any] | None = None,
        rows: RowSubset | None = None,
        *,
        guarded: bool = True,
    ) -> float:
        """The validation score of some ingredients; one alone is itself."""
        assert self.candidates is not None, "the recipe was checked: who looks at scores has validation data"
        if len(weights) == 1 and not tensor_weights and parameters is None:
            return self.candidates.score_alone(next(iter(weights)), rows, guarded=guarded)
        return self.candidates.score(self.space.of(weights, tensor_weights, parameters), rows, guarded=guarded)

    def require_guards(self, selected: Selected, one: Recipe) -> list[str]:
        """Refuse a choice that breaks a guard; what is to be said of one that does not, and of what it cost.

        Raises:
            ScoringError: It breaks one.
        """
        candidates, parameters = self.candidates, _parameters(selected, one)
        assert candidates is not None, "there is a guard"
        if len(selected.weights) == 1 and not selected.tensor_weights and parameters is None:
            outputs = candidates.outputs_alone(next(iter(selected.weights)))
        else:
            outputs = candidates.outputs(self.space.of(selected.weights, selected.tensor_weights, parameters))
        candidates.require_guards(outputs, self.recipe.select.name)
        return candidates.refused(candidates.objective(outputs))


def _parameters(selected: Selected, recipe: Recipe) -> Mapping[str, Any] | None:
    """The method's, where a soup is more than a plain mean."""
    plain = is_average(recipe) and selected.normalize and recipe.method.parameters == {}
    return None if plain else recipe.method.parameters
