"""What stands before the first download: the plan, the data, and room on the disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_soup import hub
from hf_soup.errors import MergeError, ScoringError
from hf_soup.hub import Token
from hf_soup.lineage import AlignedModels, BaseReference, soup_config, with_base, write_assets
from hf_soup.merging import Layout, Plan, missing_weights, weight_files_of
from hf_soup.publishing import strings
from hf_soup.recipe import Finding, Mixture, Recipe, Scoring, is_local_path, methods_of, needs_base
from hf_soup.selection import require_enough

if TYPE_CHECKING:
    from hf_soup.evaluation import EvalDataset

logger = logging.getLogger(__name__)


def trained_on(recipe: Recipe, models: AlignedModels, token: Token = None) -> list[Finding]:
    """Scores on the train split of a data set that an ingredient's card names: the model has seen those rows."""
    reasons = []
    for scoring in [*recipe.score, *recipe.report]:
        # Where none is named there is one, and that is called train.
        splits = [part.partition("[")[0].strip() for part in (scoring.split or "train").split("+")]
        if not any(split.casefold().startswith("train") for split in splits):
            continue
        asked = {scoring.dataset}
        if hub.is_repo_id(scoring.dataset) and not is_local_path(scoring.dataset):
            asked.add(hub.resolve_dataset(scoring.dataset, scoring.revision, token=token)[0])
        # Old cards leave the owner out: `beans` is AI-Lab-Makerere/beans.
        known = {each for name in asked for each in (name.casefold(), name.casefold().rpartition("/")[2])}
        who = tuple(
            model.name
            for model in models.ingredients
            if known & {dataset.casefold() for dataset in strings(model.checkpoint.card.get("datasets"))}
        )
        if who:
            message = f"'{scoring.title}' is data on which {', '.join(who)} were trained, as their cards say."
            reasons.append(Finding("scored-on-train", message, who))
    return reasons


def selected_on(recipe: Recipe, seen: Sequence[tuple[str, Scoring]]) -> list[Finding]:
    """Reports of data that an ingredient, a soup, was selected on: what has been looked at cannot test it."""

    def named(scoring: Scoring) -> tuple[str, str | None]:
        path = scoring.dataset.removeprefix("local:")
        return Path(path).name if is_local_path(path) or path != scoring.dataset else path.casefold(), scoring.split

    reasons = []
    for report in recipe.report:
        who = tuple(name for name, scoring in seen if named(scoring) == named(report))
        if who:
            message = (
                f"'{report.title}' is data that {', '.join(who)} {'was' if len(who) == 1 else 'were'} selected on."
            )
            reasons.append(Finding("selected-on-report", message, who))
    return reasons


def weights_by_name(recipe: Recipe, models: AlignedModels) -> dict[str, float]:
    """The share of every ingredient, by its name."""
    return {name: each.weight for name, each in zip(models.names, recipe.ingredients, strict=True)}


def plan_of(recipe: Recipe, models: AlignedModels, weights: Mapping[str, float]) -> Plan:
    """The plan of a soup of all sources.

    Args:
        recipe: With method, parameters and type.
        models: The sources.
        weights: Of the ingredients; the base has none.
    """
    layout = Layout.of(models.ingredients, models.base, patched=models.patched, dtype=recipe.dtype)
    return Plan(layout, Mixture.of(recipe, weights, (tensor.name for tensor in layout.tensors)))


def with_base_if_needed(recipe: Recipe, models: AlignedModels, ancestor: BaseReference | None) -> AlignedModels:
    """The ingredients, and their ancestor as the base where a method needs one."""
    if not needs_base(recipe):
        return models
    return with_base(models, ancestor, next(method.name for method in methods_of(recipe) if method.needs_base))


def prepare_evaluation(
    recipe: Recipe,
    plan: Plan,
    folder: Path,
    config: Mapping[str, Any],
    device: str,
    token: Token,
    *,
    learns: bool = False,
    quiet: bool = True,
) -> list[EvalDataset]:
    """The held-out and report data, prepared once for all models, before any weight is fetched.

    Args:
        recipe: With `score` and `report`.
        plan: Of all ingredients.
        folder: With the soup's config, and tokenizer or processor.
        config: That config.
        device: Where models will run.
        token: As everywhere in huggingface_hub.
        learns: Whether shares are learned, which takes memory for gradients.
        quiet: No progress bar.
    """
    scorings = [("score", scoring) for scoring in recipe.score]
    scorings += [("report", scoring) for scoring in recipe.report]
    if not scorings:
        return []
    from hf_soup.evaluation import prepare_datasets, require_device, require_memory

    require_device(device)
    require_memory(plan.layout, learns=learns)
    return prepare_datasets(scorings, folder=folder, config=config, token=token, quiet=quiet)


def log_notes(benches: Sequence[EvalDataset], head_of: str | None) -> None:
    """Say what is to be known of the data.

    Args:
        benches: The data; none where nothing is scored.
        head_of: The ingredient whose head all are scored with, where only bodies are averaged.
    """
    if not benches:
        return
    from hf_soup.evaluation import notes_of, scored_with

    for note in notes_of(benches):
        logger.warning(note)
    for note in scored_with(head_of):
        logger.info(note)


def require_rows(recipe: Recipe, benches: Sequence[EvalDataset], *, learns: bool) -> None:
    """Refuse `repeats` where halves would say nothing, and learning from rows that are too few or have two labels.

    Args:
        recipe: With `score` and `repeats`.
        benches: The held-out data first.
        learns: Whether shares are learned.

    Raises:
        ScoringError: It is so.
    """
    held_out = benches[: len(recipe.score)]
    for bench in held_out if recipe.repeats else ():
        if bench.n < 20:
            raise ScoringError(
                f"`repeats` chooses on halves of the held-out rows, and '{bench.title}' has {bench.n}.",
                hint="Use twenty rows or more, or leave `repeats` out.",
            )
    different: dict[str, EvalDataset] = {}
    for bench in held_out if learns else ():
        first = different.setdefault(bench.fingerprint, bench)
        if first.references.tolist() != bench.references.tolist():
            raise ScoringError(
                f"'{first.title}' and '{bench.title}' have other labels for the same rows, and shares are learned "
                "from one label a row.",
                hint="Leave one of them out, or use another `select`.",
            )
    if learns:
        require_enough(sum(bench.n for bench in different.values()))


def evaluation_of_soup(
    recipe: Recipe,
    models: AlignedModels,
    leaves: AlignedModels,
    plan: Plan,
    benches: Sequence[EvalDataset],
    folder: Path,
    device: str,
    token: Token,
) -> tuple[list[EvalDataset], Path] | tuple[()]:
    """What the written soup is scored with, where its table of tokens is not that of the candidates.

    Candidates have the rows of all ingredients' tokens. Where those that a selection left have others, the soup has
    the tokenizer and the config of one of them. The rows of data are the same, so scores are compared row by row.

    Args:
        recipe: As it was asked for.
        models: All ingredients.
        leaves: Those in the soup.
        plan: What was averaged.
        benches: The data as it was prepared for the candidates.
        folder: To be made, for config and tokenizer.
        device, token: As in `prepare_evaluation`.

    Returns:
        The benches and the folder; nothing where the candidates' will do.
    """
    if not benches or leaves.vocabulary == models.vocabulary:
        return ()
    config = soup_config(leaves, plan.layout.dtype)
    folder.mkdir()
    write_assets(folder, config, leaves)
    pinned = [bench.scoring for bench in benches]  # the same rows, though a data set may have moved on
    count = len(recipe.score)
    recipe = recipe.model_copy(update={"score": tuple(pinned[:count]), "report": tuple(pinned[count:])})
    return prepare_evaluation(recipe, plan, folder, config, device, token), folder


def ingredients_to_fetch(recipe: Recipe, models: AlignedModels) -> AlignedModels:
    """Those that are fetched: where nothing is scored, an ingredient of weight 0 is not."""
    if recipe.score or recipe.report or recipe.layers:
        return models
    return models.only({name for name, weight in weights_by_name(recipe, models).items() if weight})


def disk_needs(models: AlignedModels, plan: Plan, out: Path, stream: bool) -> dict[str, tuple[Path, int]]:
    """What a cook of these models writes: title of a place → a folder on its disk, and bytes."""
    beside = 0
    if stream:
        beside, fetch = weight_files_of(models.checkpoints, out).peak_bytes(plan), 0
    else:
        fetch = sum(source.files[file] for source, file in missing_weights(models.checkpoints))
    return {"output": (out.absolute().parent, plan.layout.size + beside), "cache": (hub.cache_folder(), fetch)}


def require_disk(models: AlignedModels, plan: Plan, out: Path, *, stream: bool, held: int) -> None:
    """Refuse before the download what would fill the disk; ``held`` bytes of it are there from an interrupted run."""
    places = disk_needs(models, plan, out, stream)
    fetch, beside = places["cache"][1], places["output"][1] - plan.layout.size
    devices = {title: _existing(folder).stat().st_dev for title, (folder, _) in places.items()}
    if devices["output"] == devices["cache"]:
        places = {"output and cache": (out.absolute().parent, places["output"][1] + fetch)}
    hint = "Make room, choose another output with -o, or another cache with HF_HOME"
    if not stream and fetch:
        hint += "; `--stream` keeps no more of the ingredients than it is reading"
    for title, (folder, need) in places.items():
        free = free_bytes(folder) + (held if title.startswith("output") else 0)
        if need > free:
            raise MergeError(
                f"The disk of the {title} has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed "
                f"({fetch / 1e9:.1f} GB to fetch, {plan.layout.size / 1e9:.1f} GB to write"
                + (f", {beside / 1e9:.1f} GB of files in flight)." if stream else ")."),
                hint=f"{hint}.",
                code="disk-full",
            )


def _existing(folder: Path) -> Path:
    while not is_local_path(str(folder)):
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """What the disk of a folder, which need not exist yet, has free."""
    return shutil.disk_usage(_existing(folder)).free
