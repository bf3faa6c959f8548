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
    allow: Sequence[str] = (),
    **changes: Any,
) -> Recipe:
    """The recipe that the arguments name or spell out, with what the options change; the rest is that of ``source``."""
    import yaml

    from hf_soup._util.yaml import parse_yaml
    from hf_soup.recipe import Recipe

    if len(models) == 1 and models[0].endswith((".yaml", ".yml")):
        values = Recipe.load(models[0]).to_dict()
    else:
        values = {"ingredients": list(models)}
    if source is not None:
        values = Recipe.load(source).to_dict() | ({"ingredients": values["ingredients"]} if models else {})
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    if method or parameters:
        named = {} if method else values.get("method", {})
        named = {"name": named} if isinstance(named, str) else dict(named)
        named.setdefault("name", method or "linear")
        for parameter in parameters:
            key, equals, value = parameter.partition("=")
            if not equals or not key:
                raise click.UsageError(f"--set takes KEY=VALUE, not '{parameter}'")
            try:
                named[key] = parse_yaml(value)
            except yaml.YAMLError:
                raise click.UsageError(f"--set {key}: '{value}' is not valid YAML") from None
        given["method"] = named
    if select:
        given["select"] = select
    if allow:
        given["allow"] = [*values.get("allow", []), *codes_of(allow)]
    return Recipe(**{**values, **given})


def codes_of(allow: Sequence[str]) -> list[str]:
    """The findings that ``--allow`` accepts."""
    return [code.strip() for each in allow for code in each.split(",")]


def scoring_of(data: str | None, task: str | None, metric: str | None) -> dict[str, Any]:
    """What ``--data``, ``--task`` and ``--metric`` say together."""
    if not data or not task:
        raise click.UsageError("--data and --task go together")
    from hf_soup.recipe import is_local_path

    # A split may have a colon of its own: `owner/data:validation[:500]`.
    found = re.fullmatch(r"(.+?):(\w[^:\[\]]*(?:\[[^\]]*\][^:\[\]]*)*)", data)
    dataset, split = (data, "") if found is None or is_local_path(data) else found.groups()
    return {"task": task, "dataset": dataset, "split": split or None, "metric": metric or "accuracy"}


def refuse_existing(path: Path) -> None:
    """Before anything is done whose result could not be written."""
    folder = path.absolute().parent
    if os.path.lexists(path):
        raise RecipeError(f"'{path}' exists already, and nothing is overwritten.", hint="Name another file.")
    if not folder.is_dir():
        raise RecipeError(f"'{path}' cannot be written: there is no folder '{folder}'.", hint="Make the folder first.")
    if not os.access(folder, os.W_OK):
        raise RecipeError(f"'{path}' cannot be written to the folder '{folder}'.", hint="Name another folder.")
