"""A recipe's examples: what may be said of them, and what the ingredients show on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_soup.batch_norm import batch_norms
from hf_soup.client import Token
from hf_soup.contents import soup_config, write_assets
from hf_soup.cooked import Say
from hf_soup.errors import RecipeError
from hf_soup.headers import some
from hf_soup.lineage import Lineage
from hf_soup.mixing import methods_of
from hf_soup.plan import Plan
from hf_soup.recipe import Recipe

if TYPE_CHECKING:
    from hf_soup.batch_statistics import CollectedAgain
    from hf_soup.merge import Merged
    from hf_soup.scoring import Inputs


def require_examples(recipe: Recipe, *, stream: bool) -> None:
    """Refuse a method that looks at examples without any, and examples that a report looks at.

    Whether anything looks at them is known when the models are: `batch_norm.require_looked_at`.
    """
    every = methods_of(recipe)
    name = next((method.name for method in every if method.statistics), "")
    if name and stream:
        raise RecipeError(
            f"`--stream` drops every file after its last use, and {name} first runs all ingredients on examples.",
            hint="Cook without --stream.",
        )
    if not recipe.examples:
        if not name:
            return
        raise RecipeError(
            f"{name} looks at what the ingredients do with examples, and the recipe has no `examples`.",
            hint="Add `examples: {task: …, dataset: …, split: train}`; their labels are not read.",
        )
    for report in recipe.report:
        same = [getattr(report, key) == getattr(recipe.examples, key) for key in ("dataset", "config", "split")]
        if all(same):
            raise RecipeError(
                f"`examples` are the rows of the report '{report.title}'; what a method has looked at cannot test it.",
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


def prepare_inputs(
    recipe: Recipe, folder: Path, config: Mapping[str, Any], device: str, token: Token, say: Say, *, quiet: bool = True
) -> Inputs | None:
    """The examples, prepared before any weight is fetched; None where the recipe has none.

    Args:
        recipe: With `examples` and `report`.
        folder: With the soup's config, and tokenizer or processor.
        config: That config.
        device: Where models will run.
        token: As everywhere in huggingface_hub.
        say: Gets warnings.
        quiet: No progress bar.
    """
    if recipe.examples is None:
        return None
    from hf_soup.scoring import prepare_examples, require_device

    require_device(device)
    found = prepare_examples(recipe.examples, recipe.report, folder=folder, config=config, token=token, quiet=quiet)
    for note in found.notes:
        say(f"warning: {note}")
    return found


def collected_for(
    plan: Plan,
    recipe: Recipe,
    leaves: Lineage,
    everyone: Lineage,
    paths: Callable[[], Sequence[Mapping[str, Path]]],
    *,
    device: str = "cpu",
    token: Token = None,
    quiet: bool = True,
) -> Plan:
    """The plan of a soup's leaves with what they show on the examples, as the soup itself reads these.

    Args:
        plan: Of the leaves.
        recipe: With `examples`, `report` and `seed`.
        leaves: Those in the soup.
        everyone: All ingredients, any of which may give the tokenizer.
        paths: For every source, its weight files.
        device: Where models run.
        token: As everywhere in huggingface_hub.
        quiet: No progress bar.

    Raises:
        ScoringError: The examples cannot be used, or a model fails on them.
    """
    from hf_soup.answering import Mixture
    from hf_soup.collected import asks
    from hf_soup.collecting import with_coefficients, with_statistics

    if not any(asks(mixing) for mixing in plan.mixings):
        return plan

    with _as_the_soup(plan, recipe, leaves, everyone, device, token, quiet=quiet) as (inputs, folder):
        about: dict[str, Any] = {"seed": recipe.seed, "device": device, "quiet": quiet}
        plan = with_statistics(plan, paths, inputs, folder, **about)
        count = len(plan.sources) - plan.with_base
        layers = {name: dict(enumerate(shares[:count])) for name, shares in plan.layers.items()}
        mixture = Mixture(dict(enumerate(plan.weights[:count])), layers)
        learned = with_coefficients(plan, mixture, paths, inputs, folder, **about).statistics
        return replace(plan, statistics={**plan.statistics, **(learned or {})})


def collected_again(
    plan: Plan,
    merged: Merged,
    folder: Path,
    recipe: Recipe,
    leaves: Lineage,
    everyone: Lineage,
    *,
    device: str = "cpu",
    token: Token = None,
    quiet: bool = True,
) -> tuple[Merged, CollectedAgain | None]:
    """A merged soup with statistics of batch normalisation of its own, where it has any and there are examples.

    A soup of one model is that model, and keeps its own.

    Args:
        plan: What was merged.
        merged: From the engine.
        folder: The staged files.
        recipe, leaves, everyone: As in `collected_for`.
        device, token, quiet: As there.

    Raises:
        ScoringError: The examples cannot be used, or the soup fails on them.
        ValuesError: The output's type cannot hold what was collected.
    """
    if not recipe.examples or len(plan.sources) == 1 or not batch_norms(tensor.name for tensor in plan.tensors):
        return merged, None
    from hf_soup.batch_statistics import BatchStatistics, write_again

    with _as_the_soup(plan, recipe, leaves, everyone, device, token, quiet=quiet) as (inputs, config_folder):
        statistics = BatchStatistics(plan, inputs, config_folder, recipe.seed, device)
        return write_again(plan, merged, folder, statistics, quiet=quiet)


@contextmanager
def _as_the_soup(
    plan: Plan, recipe: Recipe, leaves: Lineage, everyone: Lineage, device: str, token: Token, *, quiet: bool
) -> Iterator[tuple[Inputs, Path]]:
    """The examples as the soup itself reads them, and a folder with its config."""
    with tempfile.TemporaryDirectory(prefix="hf-soup-") as room:
        config = soup_config(leaves, plan.dtype)
        write_assets(Path(room), config, leaves, everyone.checkpoints)
        inputs = prepare_inputs(recipe, Path(room), config, device, token, lambda _: None, quiet=quiet)
        assert inputs is not None, "the recipe has examples"
        yield inputs, Path(room)


def shown(plan: Plan) -> list[str]:
    """Sentences about what was learned, and which tensors are averaged, as some ingredient shows nothing of them."""
    if not plan.statistics:
        return []
    from hf_soup.collected import Collected, asks

    with closing(Collected(plan)) as collected:
        names, learned = list(collected.lacking(plan)), collected.learned()
    asked = " and ".join(dict.fromkeys(mixing.method for mixing in plan.mixings if asks(mixing)))
    every = sum(tensor.averaged for tensor in plan.tensors)
    said = f"{len(names)} of {every} tensors have nothing that {asked} goes by, and are averaged: {some(names)}."
    notes = [said] if names else []
    if learned:
        means, (before, after) = learned
        told = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(plan.sources, means, strict=False))
        notes.append(
            f"The coefficients of the task vectors, in the mean over tensors: {told}. The entropy of the answers to "
            f"the examples was {before:.3f} where they began, and is {after:.3f}."
        )
    return notes
