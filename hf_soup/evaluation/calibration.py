"""A recipe's examples: what may be said of them, and what the ingredients show on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_soup._util.text import some
from hf_soup.evaluation.batch_norm import batch_norms
from hf_soup.hub import Token
from hf_soup.lineage import AlignedModels, soup_config, write_assets
from hf_soup.merging import Plan
from hf_soup.recipe import BatchNormUpdate, Recipe

if TYPE_CHECKING:
    from hf_soup.evaluation.calibration_data import CalibrationDataset
    from hf_soup.merging import MergeResult


def prepare_calibration(
    recipe: Recipe, folder: Path, config: Mapping[str, Any], device: str, token: Token, *, quiet: bool = True
) -> CalibrationDataset | None:
    """The examples, prepared before any weight is fetched; None where the recipe has none.

    Args:
        recipe: With `examples` and `report`.
        folder: With the soup's config, and tokenizer or processor.
        config: That config.
        device: Where models will run.
        token: As everywhere in huggingface_hub.
        quiet: No progress bar.
    """
    if recipe.examples is None:
        return None
    from hf_soup.evaluation.calibration_data import prepare_calibration_dataset
    from hf_soup.evaluation.model import require_device

    require_device(device)
    return prepare_calibration_dataset(
        recipe.examples, recipe.report, folder=folder, config=config, token=token, quiet=quiet
    )


def statistics_for(
    plan: Plan,
    recipe: Recipe,
    leaves: AlignedModels,
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
        paths: For every source, its weight files.
        device: Where models run.
        token: As everywhere in huggingface_hub.
        quiet: No progress bar.

    Raises:
        ScoringError: The examples cannot be used, or a model fails on them.
    """
    from hf_soup.evaluation.collection import collect_coefficients, collect_statistics
    from hf_soup.merging import needs_statistics

    if not any(needs_statistics(call) for call in plan.mixture.methods):
        return plan

    with _as_the_soup(plan, recipe, leaves, device, token, quiet=quiet) as (inputs, folder):
        about: dict[str, Any] = {"seed": recipe.seed, "device": device, "quiet": quiet}
        plan = collect_statistics(plan, paths, inputs, folder, **about)
        return collect_coefficients(plan, paths, inputs, folder, **about)


def recalibrate_batch_norm(
    plan: Plan,
    merged: MergeResult,
    folder: Path,
    recipe: Recipe,
    leaves: AlignedModels,
    *,
    device: str = "cpu",
    token: Token = None,
    quiet: bool = True,
) -> tuple[MergeResult, BatchNormUpdate | None]:
    """A merged soup with statistics of batch normalisation of its own, where it has any and there are examples.

    A soup of one model is that model, and keeps its own.

    Args:
        plan: What was merged.
        merged: From the engine.
        folder: The staged files.
        recipe, leaves: As in `statistics_for`.
        device, token, quiet: As there.

    Raises:
        ScoringError: The examples cannot be used, or the soup fails on them.
        ValuesError: The output's type cannot hold what was collected.
    """
    layout = plan.layout
    if not recipe.examples or len(layout.labels) == 1 or not batch_norms(tensor.name for tensor in layout.tensors):
        return merged, None
    from hf_soup.evaluation.batch_statistics import BatchStatistics, write_again

    with _as_the_soup(plan, recipe, leaves, device, token, quiet=quiet) as (inputs, config_folder):
        statistics = BatchStatistics(layout, inputs, config_folder, recipe.seed, device)
        return write_again(layout, merged, folder, statistics, quiet=quiet)


@contextmanager
def _as_the_soup(
    plan: Plan,
    recipe: Recipe,
    leaves: AlignedModels,
    device: str,
    token: Token,
    *,
    quiet: bool,
) -> Iterator[tuple[CalibrationDataset, Path]]:
    """The examples as the soup itself reads them, and a folder with its config."""
    with tempfile.TemporaryDirectory(prefix="hf-soup-") as room:
        config = soup_config(leaves, plan.layout.dtype)
        write_assets(Path(room), config, leaves)
        inputs = prepare_calibration(recipe, Path(room), config, device, token, quiet=quiet)
        assert inputs is not None, "the recipe has examples"
        yield inputs, Path(room)


def statistics_notes(plan: Plan) -> list[str]:
    """Sentences about what was learned, and which tensors are averaged, as some ingredient shows nothing of them."""
    if not plan.statistics:
        return []
    from hf_soup.merging import StatisticsStore, needs_statistics

    with closing(StatisticsStore(plan)) as collected:
        names, learned = list(collected.lacking(plan)), collected.learned()
    asked = " and ".join(dict.fromkeys(call.method for call in plan.mixture.methods if needs_statistics(call)))
    every = sum(tensor.averaged for tensor in plan.layout.tensors)
    said = f"{len(names)} of {every} tensors have nothing that {asked} goes by, and are averaged: {some(names)}."
    notes = [said] if names else []
    if learned:
        means, (before, after) = learned
        told = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(plan.layout.labels, means, strict=False))
        notes.append(
            f"The coefficients of the task vectors, in the mean over tensors: {told}. The entropy of the answers to "
            f"the examples was {before:.3f} where they began, and is {after:.3f}."
        )
    return notes
