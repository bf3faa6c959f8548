"""What the arguments of a command stand for: recipes, data, and files that are written."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hf_soup.errors import RecipeError

if TYPE_CHECKING:
    from hf_soup.recipe import Recipe


def recipe_of(
    models: Sequence[str],
    source: str | None = None,
    *,
    method: str | None = None,
    select: str | None = None,
    parameters: Sequence[str] = (),
    weights: str | None = None,
    allow: Sequence[str] = (),
    **changes: Any,
) -> Recipe:
    """The recipe that the arguments name or spell out, with what the options change; the rest is that of ``source``."""
    from hf_soup.recipe import Recipe

    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        values = Recipe.load(models[0]).to_dict()
    else:
        values = {"ingredients": list(models)}
    if source is not None:
        values = Recipe.load(source).to_dict() | ({"ingredients": values["ingredients"]} if models else {})
    values |= {key: value for key, value in changes.items() if value is not None}
    values["method"] = _named(values.get("method", "linear") if method is None else method)
    values["select"] = _named(values.get("select", "uniform") if select is None else select)
    for parameter in parameters:
        _set(values, parameter)
    if weights is not None:
        values["ingredients"] = _weighted(values["ingredients"], weights)
    if allow:
        values["allow"] = [*values.get("allow", []), *codes_of(allow)]
    return Recipe(**values)


def _named(value: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": value} if isinstance(value, str) else dict(value)


def _set(values: dict[str, Any], parameter: str) -> None:
    """Give the selection, where it has a parameter of that name, or else the method, the value of ``KEY=VALUE``."""
    import yaml

    from hf_soup._util.yaml import parse_yaml
    from hf_soup.selection import SELECTIONS

    key, equals, value = parameter.partition("=")
    if not equals or not key:
        raise click.UsageError(f"--set takes KEY=VALUE, not '{parameter}'")
    if key == "name":
        raise click.UsageError("--set gives parameters their values; --method and --select have the names.")
    selection = SELECTIONS.get(values["select"]["name"])
    owner = "select" if selection and key in selection.parameters else "method"
    words = selection.allowed.get(key) if selection else None
    try:
        # A word such as `>` is none in YAML.
        values[owner][key] = value if isinstance(words, tuple) and value in words else parse_yaml(value)
    except yaml.YAMLError:
        raise click.UsageError(f"--set {key}: '{value}' is not valid YAML") from None


def _weighted(ingredients: Sequence[str | dict[str, Any]], weights: str) -> list[dict[str, Any]]:
    """Ingredients of a recipe with the weights of ``--weights``, in their order."""
    try:
        numbers = [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise click.UsageError(f"--weights takes numbers with commas between them, not '{weights}'") from None
    if len(numbers) != len(ingredients):
        raise click.UsageError(f"--weights has {len(numbers)} numbers, and there are {len(ingredients)} models.")
    every = [{"model": each} if isinstance(each, str) else each for each in ingredients]
    return [{**each, "weight": number} for each, number in zip(every, numbers, strict=True)]


def codes_of(allow: Sequence[str]) -> list[str]:
    """The findings that ``--allow`` accepts."""
    return [code.strip() for each in allow for code in each.split(",")]


def data_of(
    data: Sequence[str], test: Sequence[str], task: str | None, metric: str | None, functions: Sequence[str] = ()
) -> dict[str, Any]:
    """The keys of a recipe that ``--data``, ``--test``, ``--task``, ``--metric`` and ``--validation`` stand for."""
    if (data or test) and not task:
        raise click.UsageError("--data and --test need --task: text-classification, causal-lm or another.")
    if (task or metric) and not (data or test):
        raise click.UsageError("--task and --metric say how to look at data: name them with --data or --test.")
    named, measured = {"validation": data, "test": test}, {"metric": metric} if metric else {}
    kind = "name" if task == "lm-eval" else "dataset"
    looked_at: dict[str, list[dict[str, Any]]] = {
        key: [{**_dataset(each, kind), "task": task, **measured} for each in every]
        for key, every in named.items()
        if every
    }
    if functions:
        looked_at["validation"] = [*looked_at.get("validation", []), *({"function": each} for each in functions)]
    return looked_at


def _dataset(named: str, key: str) -> dict[str, Any]:
    """A data set and its split; the split may have a colon of its own: ``owner/data:validation[:500]``."""
    from hf_soup.recipe import is_local_path

    match = re.fullmatch(r"(.+?):(\w[^:\[\]]*(?:\[[^\]]*\][^:\[\]]*)*)", named)
    if match is None or is_local_path(named):
        return {key: named}
    return {key: match[1], "split": match[2]}


def refuse_existing(path: Path) -> None:
    """Before anything is done whose result could not be written."""
    folder = path.absolute().parent
    if os.path.lexists(path):
        raise RecipeError(f"'{path}' exists already, and nothing is overwritten.", hint="Name another file.")
    if not folder.is_dir():
        raise RecipeError(f"'{path}' cannot be written: there is no folder '{folder}'.", hint="Make the folder first.")
    if not os.access(folder, os.W_OK):
        raise RecipeError(f"'{path}' cannot be written to the folder '{folder}'.", hint="Name another folder.")
