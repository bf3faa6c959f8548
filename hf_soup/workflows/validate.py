"""Everything that can be wrong with a recipe by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from hf_soup.errors import RecipeError
from hf_soup.recipe import (
    MAX_POINTS,
    AnyScoring,
    FunctionScoring,
    HarnessScoring,
    Recipe,
    Scoring,
    grid,
    is_average,
    methods_of,
    require_methods,
    require_named,
    searched,
)
from hf_soup.selection import SELECTIONS, Selection


def validate(recipe: Recipe, *, stream: bool = False) -> None:
    """Everything that can be wrong with a recipe by itself."""
    if stream and (recipe.validation or recipe.test):
        raise RecipeError(
            "`--stream` drops every file after its last use, and scoring reads the ingredients again and again.",
            hint="Cook without --stream, or leave `validation` and `test` out and score the soup afterwards.",
        )
    require_methods(recipe)
    require_named("select", recipe.select, SELECTIONS, lists=True)
    if stream and any("cutoffs" in method.given for method in methods_of(recipe)):
        raise RecipeError(
            f"`--stream` reads every file once, and {recipe.method.name} first looks at all task vectors to trim them.",
            hint="Cook without --stream.",
        )
    if recipe.output == "adapter":
        _require_differences(recipe, stream=stream)
    selection = SELECTIONS[recipe.select.name]
    require_examples(recipe, stream=stream, selection=selection)
    _require_fitting(recipe, selection)
    if selection.needs_score and not recipe.validation:
        raise RecipeError(
            f"`select: {selection.name}` looks at validation scores, and the recipe has no `validation`.",
            hint="Add `validation: {task: …, dataset: …, split: validation, metric: accuracy}`, or on the command line "
            "--data, --task and --metric.",
        )
    scorings = [*recipe.validation, *recipe.test]
    for test in recipe.test:
        if any(_same_rows(test, validation) for validation in recipe.validation):
            raise RecipeError(
                f"'{test.title}' is validation data and test data; what chose a soup cannot test it.",
                hint="Use another split, or slices that do not meet.",
            )
    titles = [scoring.title for scoring in scorings]
    for title in titles:
        if titles.count(title) > 1:
            raise RecipeError(f"Two scores are called '{title}'.", hint="Give one of them a `name`.")
    for scoring in [*scorings, *([recipe.calibration] if recipe.calibration else [])]:
        for named in _named_by(scoring):
            if named.startswith("local:"):
                raise RecipeError(
                    f"'{named}' was on the machine where the recipe was resolved.",
                    hint="Put your own in its place, or leave the data out.",
                )


def _require_differences(recipe: Recipe, *, stream: bool) -> None:
    """Refuse methods that make an adapter of more than of what was learned, and streams, which it is not made of."""
    if stream:
        raise RecipeError(
            "`--stream` drops files while a whole model is merged, and the recipe has `output: adapter`.",
            hint="Leave --stream out. Of adapters their own files are fetched alone, and not the base.",
        )
    every = [recipe.method, *(each.method for each in recipe.overrides)]
    for named, method in zip(every, methods_of(recipe), strict=True):
        hint = "Use `linear`, or a method that works on task vectors."
        if method.combination and not method.needs_base and named.parameters.get("normalize", True) is not True:
            said = f"{method.name} without a division adds up the base too"
            hint = "Use `method: {name: task_arithmetic, scale: 1.0}`."
        elif not method.combination and not method.needs_base:
            said = f"{method.name} works on whole weights, and not on what was learned"
        else:
            continue
        raise RecipeError(f"`output: adapter` holds what is added to the base; {said}.", hint=hint)


def _same_rows(one: AnyScoring, other: AnyScoring) -> bool:
    """Whether two read the same rows, as far as names tell; of a function one knows no more than its name."""
    if isinstance(one, FunctionScoring) or isinstance(one, HarnessScoring) is not isinstance(other, HarnessScoring):
        return one == other
    keys = (
        ("name", "config", "include_path", "split")
        if isinstance(one, HarnessScoring)
        else ("dataset", "config", "split")
    )
    return all(getattr(one, key) == getattr(other, key, None) for key in keys)


def _named_by(scoring: AnyScoring) -> Iterator[str]:
    """What lies on a machine, where it is a path."""
    if isinstance(scoring, Scoring):
        yield from (scoring.dataset, scoring.metric)
    else:
        yield (scoring.function if isinstance(scoring, FunctionScoring) else scoring.include_path) or ""


def _require_fitting(recipe: Recipe, selection: Selection) -> None:
    """Refuse what contradicts itself: shares, methods and selections."""
    first, *others = methods_of(recipe)
    divides = [] if first.sums or recipe.method.parameters.get("normalize", True) is False else [first]
    divides += [
        method for method, override in zip(others, recipe.overrides, strict=True)
        if not method.sums and override.method.parameters.get("normalize", True)
    ]  # fmt: skip
    if selection.learns == "entropy" and (below := min(each.weight for each in recipe.ingredients)) < 0:
        raise RecipeError(
            f"`select: {selection.name}` learns what task vectors are multiplied with, from weights of zero or more; "
            f"one is {below:g}."
        )
    shares: list[tuple[str, Sequence[float]]] = [("weight", [each.weight for each in recipe.ingredients])]
    if first in divides and not recipe.overrides:  # with these it is known when tensors are
        shares += recipe.tensor_weights.items()
    for title, weights in shares if divides else ():
        if min(weights) < 0:
            raise RecipeError(
                f"'{title}' is {min(weights):g}, and {divides[0].name} divides by the sum of the weights.",
                hint="A weight may be below zero with `method: {name: linear, normalize: false}` or "
                "`method: task_arithmetic`.",
            )
        if not any(weights):
            raise RecipeError(
                f"`tensor_weights` gives '{title}' no weight but zero, and {divides[0].name} divides by their sum."
            )
    if selection.needs_score and any(each.weight < 0 for each in recipe.ingredients):
        raise RecipeError(f"`select: {selection.name}` tries ingredients alone, and one has a weight below zero.")
    if selection.learns and not is_average(recipe):
        plain = recipe.method.parameters.get("normalize", True) is not True
        named = f"`method` is {'a plain sum' if plain else first.name}"
        if recipe.overrides:
            named = "there are `overrides`"
        brings = "task vectors, and names their method itself" if selection.method else "an average"
        raise RecipeError(
            f"`select: {selection.name}` learns the weights of {brings}; here {named}.",
            hint="Leave `method` and `overrides` out."
            + ("" if selection.method else " `select: {name: learned, constrain: none}` learns those of a plain sum."),
        )
    own = next((each for each in recipe.validation if not isinstance(each, Scoring)), None)
    if selection.learns == "loss" and own:
        raise RecipeError(
            f"`select: {selection.name}` learns from the gradient of a loss, and '{own.title}' has none.",
            hint="Use `select: greedy` or another that looks at scores, or `validation` with data and their `task`.",
        )
    if recipe.tensor_weights and (selection.needs_score or selection.learns):
        raise RecipeError(f"`select: {selection.name}` chooses weights, and the recipe has `tensor_weights` already.")
    if recipe.stability_repeats and (not recipe.validation or recipe.tensor_weights or selection.learns == "entropy"):
        lacking = "has no `validation`"
        if recipe.tensor_weights:
            lacking = "has `tensor_weights`, which nobody chooses"
        elif recipe.validation:
            lacking = "chooses by examples without labels"
        raise RecipeError(
            f"`stability_repeats` chooses again on halves of the validation rows, and the recipe {lacking}."
        )
    _require_lists(recipe, selection)
    used = dict.fromkeys((str(number) for number, each in enumerate(recipe.ingredients) if each.weight), 1.0)
    for point in grid(recipe.select):
        selection.check(used, **point)


def _require_lists(recipe: Recipe, selection: Selection) -> None:
    """Refuse lists of values that nobody could choose from."""
    lists = {key: named for key in ("select", "method") if searched(named := getattr(recipe, key))}
    if len(lists) > 1:
        raise RecipeError("`select` and `method` both have values to choose from; one of the two may.")
    for key, named in lists.items():
        several = searched(named)
        points = math.prod(len(named.parameters[name]) for name in several)
        if points > MAX_POINTS:
            raise RecipeError(
                f"`{key}` asks to try {points:,} combinations of values; at most {MAX_POINTS:,} are tried."
            )
        if key == "select" and selection.learns:
            raise RecipeError(f"{selection.name} learns once, so '{several[0]}' takes one value.")
        if not recipe.validation:
            raise RecipeError(
                f"`{key}` gives '{several[0]}' several values, and the recipe has no `validation` to choose by.",
                hint="Add `validation`, or give one value.",
            )


def require_examples(recipe: Recipe, *, stream: bool, selection: Selection) -> None:
    """Refuse a method that looks at examples without any, and examples that are test data.

    Whether anything looks at them is known when the models are: `hf_soup.evaluation.looks_at_calibration`.
    """
    name = next((method.name for method in methods_of(recipe) if method.statistics), "")
    if selection.learns == "entropy":
        name = selection.name
    if name and stream:
        raise RecipeError(
            f"`--stream` drops every file after its last use, and {name} first runs all ingredients on examples.",
            hint="Cook without --stream.",
        )
    if not recipe.calibration:
        if not name:
            return
        raise RecipeError(
            f"{name} looks at what the ingredients do with examples, and the recipe has no `calibration`.",
            hint="Add `calibration: {task: …, dataset: …, split: train}` to a recipe file; their labels are not read.",
        )
    for test in recipe.test:
        if _same_rows(test, recipe.calibration):
            raise RecipeError(
                f"`calibration` are the rows of the test data '{test.title}'; what a method saw cannot test it.",
                hint="Use another split, or slices that do not meet.",
            )
    if name and isinstance(recipe.method.parameters.get("examples"), list):
        raise RecipeError(
            f"{name}: 'examples' takes one number; more examples tell more, so there is nothing to choose."
        )
