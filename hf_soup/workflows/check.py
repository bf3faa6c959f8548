"""May these models be averaged? From references to a verdict, without a whole weight file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_soup import hub
from hf_soup._util.logs import ALLOWED, PrintableLogger
from hf_soup._util.text import first_sentences, some
from hf_soup.evaluation import looks_at_calibration, running_statistics
from hf_soup.hub import Token
from hf_soup.ingredients import ResolvedIngredients, expand_runs, resolve_ingredients, with_base_apart, within_a_run
from hf_soup.lineage import AlignmentOptions, LineageReport, check_lineage
from hf_soup.recipe import (
    Finding,
    Models,
    Recipe,
    as_recipe,
    ingredients_set_apart,
    needs_base,
    with_allowed,
    with_method_of_selection,
)
from hf_soup.workflows.prepare import (
    CheckedModels,
    ingredients_to_fetch,
    selected_on,
    trained_on,
    with_base_if_needed,
)

logger = PrintableLogger(__name__)


def check(
    models: Models,
    *,
    base: str | Path | None = None,
    allow: str | Sequence[str] | None = None,
    allow_pickle: bool = False,
    token: Token = None,
) -> LineageReport:
    """May these models be averaged? Reads configs, cards, headers and samples of rows; no whole weight file.

    Args:
        models: Hub ids or folders, also as a mapping to their weights; a recipe, or the path of one.
        base: The pretrained ancestor; by default what the recipe, the cards or the configs name.
        allow: Codes of findings that are accepted, as in a recipe.
        allow_pickle: As in a recipe.
        token: As everywhere in huggingface_hub.

    Returns:
        The verdict with all reasons; ``refused`` is a verdict too, not an error.

    Raises:
        ResolveError: A model cannot be found, reached or read.
    """
    before = hub.traffic()
    named = as_recipe(models, base_model=base, allow=allow, allow_pickle=allow_pickle or None)
    recipe, runs = expand_runs(with_base_apart(named, token=token), checks=True)
    lineage = _examine(resolve_ingredients(with_method_of_selection(recipe), token=token), runs, token)
    # With the headers, indexes and cards of the ingredients.
    return replace(lineage, transferred_bytes=hub.traffic() - before)


def propose(recipe: Recipe, lineage: LineageReport, *, token: Token = None) -> tuple[Recipe, str] | None:
    """A recipe near a refused one that is not refused, and what it changes; None where none was found.

    Args:
        recipe: That was checked, with checkpoints in the place of runs.
        lineage: What the check said.
        token: As everywhere in huggingface_hub.
    """
    refusals = [reason for reason in lineage.reasons if reason.refuses]
    apart = set().union(*(ingredients_set_apart(reason, lineage.models.names) for reason in refusals))
    found = [(recipe.model_copy(update={"heads": "body"}), "with `heads: body`")] if recipe.heads is None else []
    if len(lineage.models.names) == len(recipe.ingredients) and apart and len(lineage.models.names) - len(apart) > 1:
        pairs = zip(lineage.models.names, recipe.ingredients, strict=True)
        kept = tuple(each for name, each in pairs if name not in apart)
        found.append((recipe.model_copy(update={"ingredients": kept}), f"without {some(sorted(apart))}"))
    only_heads = all(reason.code in ("architecture", "labels") for reason in refusals)
    for changed, how in found if only_heads else found[::-1]:
        if changed.heads == "body" and (not only_heads or recipe.validation or recipe.test or recipe.calibration):
            continue
        if check(changed, token=token).verdict != "refused":
            return changed, how
    return None


def _examine(expanded: ResolvedIngredients, runs: Sequence[Finding], token: Token) -> LineageReport:
    recipe, adapters = expanded.recipe, any(each.base for each in expanded.checkpoints)
    lineage = check_lineage(
        expanded.checkpoints,
        base=recipe.base_model,
        options=AlignmentOptions.of(recipe),
        # An adapter alone gives what is not there yet: its base with it.
        alone=recipe.resolved or needs_base(recipe) or adapters,
        allow_pickle=recipe.allow_pickle,
        token=token,
    )
    soups = [Finding("soup-expanded", note) for note in expanded.notes]
    seen = selected_on(recipe, expanded.seen)
    made = adapters or recipe.output == "adapter"  # of one is not what there is already
    reasons = [reason for reason in lineage.reasons if reason.code != "single" or reason.refuses or not made]
    found = within_a_run(reasons, expanded.checkpoints)
    found += [*running_statistics(recipe, lineage.models), *runs, *soups, *seen]
    return lineage.with_reasons(with_allowed([*found, *trained_on(recipe, lineage.models, token)], recipe.allow))


def checked_models(asked: Recipe, runs: Sequence[Finding], token: Token) -> CheckedModels:
    """What a recipe stands for, with the warnings of its check told; models that are refused are an error.

    Args:
        asked: With checkpoints in the place of runs.
        runs: What there is to say of those.
        token: As everywhere in huggingface_hub.

    Raises:
        SoupError: A model cannot be had, or they cannot be averaged.
    """
    ingredients = resolve_ingredients(asked, token=token)
    for reason in runs:
        logger.info(f"[{reason.code}] {reason.message}")
    lineage = _examine(ingredients, runs, token)
    lineage.raise_if_refused()
    looks = looks_at_calibration(ingredients.recipe, lineage.models)
    # `tensor_weights` may have been learned from it, by `entropy`, of which a soup keeps both.
    if ingredients.recipe.calibration and not looks and not ingredients.recipe.tensor_weights:
        logger.warning("nothing looks at `calibration`: the method needs none, and no batch normalisation is there")
    for reason in lineage.reasons:
        if reason not in runs:
            noted = logging.INFO if reason.code == "soup-expanded" else ALLOWED if reason.allowed else logging.WARNING
            logger.log(noted, f"[{reason.code}] {first_sentences(reason.message)} docs/lineage.md#{reason.code}")
    for note in lineage.models.notes:
        logger.info(note)
    for model in lineage.models.ingredients:
        for note in model.checkpoint.notes:
            logger.info(f"{model.name}: {note}")
    without_base = ingredients_to_fetch(ingredients.recipe, lineage.models)
    fetched = with_base_if_needed(ingredients.recipe, without_base, lineage.ancestor)
    for note in fetched.notes[len(without_base.notes) :]:
        logger.info(note)
    return CheckedModels(asked, ingredients, lineage, fetched)
