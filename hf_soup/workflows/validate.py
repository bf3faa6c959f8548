"""Everything that can be wrong with a recipe by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_soup.errors import RecipeError
from hf_soup.recipe import MAX_POINTS, Recipe, is_average, methods_of, require_methods, require_named, searched
from hf_soup.selection import SELECTIONS, Selection


def validate(recipe: Recipe, *, stream: bool = False) -> None:
    """Everything that can be wrong with a recipe by itself."""
    if stream and (recipe.validation or recipe.test):
        raise RecipeError(
            "`--stream` drops every file after its last use, and scoring reads the ingredients again and again.",
            hint="Cook without --stream, or leave `validation` and `test` out and score the soup afterwards.",
        )
    require_methods(recipe)
    require_named("select", recipe.select, SELECTIONS)
    if stream and any("cutoffs" in method.given for method in methods_of(recipe)):
        raise RecipeError(
            f"`--stream` reads every file once, and {recipe.method.name} first looks at all task vectors to trim them.",
            hint="Cook without --stream.",
        )
    require_examples(recipe, stream=stream)
    selection = SELECTIONS[recipe.select.name]
    _require_fitting(recipe, selection)
    if selection.needs_score and not recipe.validation:
        raise RecipeError(
            f"`select: {selection.name}` looks at validation scores, and the recipe has no `validation`.",
            hint="Add `validation: {task: …, dataset: …, split: validation, metric: accuracy}`, or on the command line "
            "--data, --task and --metric.",
        )
    scorings = [*recipe.validation, *recipe.test]
    titles = [scoring.title for scoring in scorings]
    for title in titles:
        if titles.count(title) > 1:
            raise RecipeError(f"Two scores are called '{title}'.", hint="Give one of them a `name`.")
    for scoring in [*scorings, *([recipe.calibration] if recipe.calibration else [])]:
        for named in (scoring.dataset, scoring.metric):
            if named.startswith("local:"):
                raise RecipeError(
                    f"'{named}' was a file on the machine where the recipe was resolved.",
                    hint="Put that file's path in its place, or leave the data out.",
                )


def _require_fitting(recipe: Recipe, selection: Selection) -> None:
    """Refuse what contradicts itself: shares, methods and selections."""
    first, *others = methods_of(recipe)
    divides = [] if first.sums or recipe.method.parameters.get("normalize", True) is False else [first]
    divides += [
        method for method, override in zip(others, recipe.overrides, strict=True)
        if not method.sums and override.method.parameters.get("normalize", True)
    ]  # fmt: skip
    shares = [("weight", [each.weight for each in recipe.ingredients]), *recipe.tensor_weights.items()]
    for title, weights in shares if divides else ():
        if min(weights) < 0:
            raise RecipeError(
                f"'{title}' is {min(weights):g}, and {divides[0].name} divides by the sum of the weights.",
                hint="A weight may be below zero with `method: {name: linear, normalize: false}` or "
                "`method: task_arithmetic`.",
            )
    if selection.needs_score and any(each.weight < 0 for each in recipe.ingredients):
        raise RecipeError(f"`select: {selection.name}` tries ingredients alone, and one has a weight below zero.")
    if selection.learns and not is_average(recipe):
        given = "a plain sum" if first.name == "linear" else first.name
        raise RecipeError(
            f"`select: {selection.name}` learns the shares of an average, and "
            + ("there are `overrides`." if recipe.overrides else f"`method` is {given}."),
            hint="Leave them out. `select: {name: learned, constrain: none}` learns the shares of a plain sum.",
        )
    if recipe.tensor_weights and (selection.needs_score or first.name != "linear" or recipe.overrides):
        raise RecipeError(
            f"`tensor_weights` goes with `select: uniform` and `method: linear`, not with "
            f"{selection.name} and {'`overrides`' if recipe.overrides else first.name}.",
        )
    if recipe.stability_repeats and (not recipe.validation or recipe.tensor_weights):
        lacking = "has `tensor_weights`, which nobody chooses" if recipe.validation else "has no `validation`"
        raise RecipeError(
            f"`stability_repeats` chooses again on halves of the validation rows, and the recipe {lacking}."
        )
    used = [str(number) for number, each in enumerate(recipe.ingredients) if each.weight]
    selection.check(dict.fromkeys(used, 1.0), **recipe.select.parameters)
    several = searched(recipe)
    points = math.prod(len(recipe.method.parameters[name]) for name in several)
    if points > MAX_POINTS:
        raise RecipeError(f"`method` asks to try {points:,} combinations of values; at most {MAX_POINTS:,} are tried.")
    if several and not recipe.validation:
        raise RecipeError(
            f"`method` gives '{several[0]}' several values, and the recipe has no `validation` to choose by.",
            hint="Add `validation`, or give one value.",
        )


def require_examples(recipe: Recipe, *, stream: bool) -> None:
    """Refuse a method that looks at examples without any, and examples that are test data.

    Whether anything looks at them is known when the models are: `hf_soup.evaluation.require_looked_at`.
    """
    every = methods_of(recipe)
    name = next((method.name for method in every if method.statistics), "")
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
            hint="Add `calibration: {task: …, dataset: …, split: train}`; their labels are not read.",
        )
    for test in recipe.test:
        if all(getattr(test, key) == getattr(recipe.calibration, key) for key in ("dataset", "config", "split")):
            raise RecipeError(
                f"`calibration` are the rows of the test data '{test.title}'; what a method saw cannot test it.",
                hint="Use another split, or slices that do not meet.",
            )
    if name and isinstance(recipe.method.parameters.get("examples"), list):
        raise RecipeError(
            f"{name}: 'examples' takes one number; more examples tell more, so there is nothing to choose."
        )
    learning: dict[str, dict[str, Any]] = {}
    for named, method in zip((recipe.method, *(each.method for each in recipe.overrides)), every, strict=True):
        if method.statistics == "coefficients":
            for key, value in named.parameters.items():
                if isinstance(value, list | Mapping):
                    raise RecipeError(f"{method.name}: '{key}' takes one number, as all tensors are learned together.")
            parameters = method.parameters | dict(named.parameters)
            other = learning.setdefault(method.name, parameters)
            if other != parameters:
                key = next(key for key in parameters if parameters[key] != other[key])
                raise RecipeError(
                    f"{method.name} learns all its tensors together, and '{key}' is {other[key]!r} and "
                    f"{parameters[key]!r}.",
                    hint="Give it the same parameters everywhere.",
                )
