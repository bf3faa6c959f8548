"""What stands before the first download: the plan, the data, and room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hf_soup import hub
from hf_soup._util.logs import PrintableLogger
from hf_soup._util.text import strings
from hf_soup.errors import MergeError
from hf_soup.evaluation import MixtureSpace, scored_with
from hf_soup.hub import Token
from hf_soup.ingredients import ResolvedIngredients
from hf_soup.lineage import AlignedModels, BaseReference, LineageReport, with_base
from hf_soup.merging import AdapterPlan, Layout, Plan, missing_weights, weight_files_of
from hf_soup.recipe import Finding, Mixture, Recipe, Scoring, is_local_path, methods_of, needs_base, with_dataset
from hf_soup.selection import SELECTIONS

if TYPE_CHECKING:
    from hf_soup.checkpoint import FileSource

    # Which take torch, and the report's fields; a check needs none.
    from hf_soup.evaluation import EvaluationData
    from hf_soup.workflows.update import Update

logger = PrintableLogger(__name__)


def trained_on(recipe: Recipe, models: AlignedModels, token: Token = None) -> Iterator[Finding]:
    """Scores on the train split of a data set that an ingredient's card names: the model has seen those rows."""
    for scoring in with_dataset([*recipe.validation, *recipe.test]):
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
            yield Finding("evaluated-on-train", message, who)


def selected_on(recipe: Recipe, seen: Sequence[tuple[str, Scoring]]) -> Iterator[Finding]:
    """Test data that an ingredient, a soup, was selected on: what has been looked at cannot test it."""

    def named(scoring: Scoring) -> tuple[str, str | None]:
        path = scoring.dataset.removeprefix("local:")
        return Path(path).name if is_local_path(path) or path != scoring.dataset else path.casefold(), scoring.split

    for test in with_dataset(recipe.test):
        who = tuple(name for name, scoring in seen if named(scoring) == named(test))
        if who:
            message = f"'{test.title}' is data that {', '.join(who)} {'was' if len(who) == 1 else 'were'} selected on."
            yield Finding("selected-on-test", message, who)


@dataclass(frozen=True)
class CheckedModels:
    """What a recipe stands for, after the check.

    Args:
        asked: The recipe as it was asked for.
        ingredients: What its ingredients stand for.
        lineage: Of all of that.
        fetched: Those that are fetched, and the base where a method needs it; where nothing is scored, an ingredient of
            weight 0 is not fetched.
        update: Of a published soup, where they are its next version.
    """

    asked: Recipe
    ingredients: ResolvedIngredients
    lineage: LineageReport
    fetched: AlignedModels
    update: Update | None = None

    @property
    def recipe(self) -> Recipe:
        """With soups replaced by what they are made of."""
        return self.ingredients.recipe

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the ingredients as they were asked for; one of weight 0 is left out."""
        pairs = zip(self.ingredients.groups, self.asked.ingredients, strict=True)
        return {name: each.weight for name, each in pairs if each.weight or self.recipe.tensor_weights}

    def plan(self) -> Plan:
        """Of all that is fetched."""
        return plan_of(self.recipe, self.lineage.models, self.fetched)

    @cached_property
    def adapter(self) -> AdapterPlan | None:
        """What is made of them, where that is an adapter."""
        recipe = self.recipe
        return (
            AdapterPlan.of(self.plan(), self.fetched, recipe.rank, recipe.dtype) if recipe.output == "adapter" else None
        )

    @property
    def missing(self) -> list[tuple[FileSource, str]]:
        """Weight files that have to be fetched; to make an adapter of others, that of the base only to score it."""
        looks = self.recipe.validation or self.recipe.test or SELECTIONS[self.recipe.select.name].learns
        files = self.adapter.files if self.adapter and not looks else None
        return missing_weights(self.fetched.checkpoints, files)

    def space(self, plan: Plan) -> MixtureSpace:
        """All that may be made of them, by a plan of all that is fetched."""
        return MixtureSpace(plan.mixture, self.ingredients, self.lineage.models.names)


def weights_by_name(recipe: Recipe, models: AlignedModels) -> dict[str, float]:
    """The share of every ingredient, by its name."""
    return {name: each.weight for name, each in zip(models.names, recipe.ingredients, strict=True)}


def ingredients_to_fetch(recipe: Recipe, models: AlignedModels) -> AlignedModels:
    """Those that are fetched: where nothing is scored, an ingredient of weight 0 is not."""
    if recipe.validation or recipe.test or recipe.tensor_weights:
        return models
    return models.only({name for name, weight in weights_by_name(recipe, models).items() if weight})


def layout_of(models: AlignedModels, dtype: str | None) -> Layout:
    """Where everything lies of sources."""
    return Layout.of(models.ingredients, models.base, patched=models.patched, dtype=dtype)


def plan_of(recipe: Recipe, models: AlignedModels, fetched: AlignedModels) -> Plan:
    """The plan of a soup of all sources that are fetched.

    Args:
        recipe: Of all ingredients.
        models: All of them.
        fetched: Those that are fetched, and the base where a method needs it.
    """
    layout, weights = layout_of(fetched, recipe.model_dtype), weights_by_name(recipe, models)
    own = {name: weights[name] for name in fetched.names}
    return Plan(layout, Mixture.of(recipe, own, (tensor.name for tensor in layout.tensors)))


def with_base_if_needed(recipe: Recipe, models: AlignedModels, ancestor: BaseReference | None) -> AlignedModels:
    """The ingredients, and their ancestor as the base where a method needs one."""
    if not needs_base(recipe):
        return models
    method = next((method.name for method in methods_of(recipe) if method.needs_base), None)
    if method is None:  # what the base does not have is no worse for that: an adapter has it whole
        return replace(with_base(models, ancestor, "output: adapter"), notes=models.notes)
    return with_base(models, ancestor, method)


def disk_needs(models: CheckedModels, plan: Plan, out: Path, stream: bool) -> dict[str, tuple[Path, int]]:
    """What a cook of models writes: title of a place → a folder on its disk, and bytes."""
    beside, size = 0, models.adapter.size if models.adapter else plan.layout.size
    if stream:
        beside, fetch = weight_files_of(models.fetched.checkpoints, out).peak_bytes(plan), 0
    else:
        fetch = sum(source.files[file] for source, file in models.missing)
    return {"output": (out.absolute().parent, size + beside), "cache": (hub.cache_folder(), fetch)}


def require_disk(models: CheckedModels, plan: Plan, out: Path, *, stream: bool, held: int) -> None:
    """Refuse before the download what would fill the disk; ``held`` bytes of it are there from an interrupted run."""
    places, size = disk_needs(models, plan, out, stream), models.adapter.size if models.adapter else plan.layout.size
    fetch, beside = places["cache"][1], places["output"][1] - size
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
                f"({fetch / 1e9:.1f} GB to fetch, {size / 1e9:.1f} GB to write"
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


def log_notes(data: EvaluationData) -> None:
    """Say what is to be known of data."""
    for note in data.notes:
        logger.warning(note)
    for note in scored_with(data.template.head_of) if data.scored else ():
        logger.info(note)
    for note in data.calibration.inputs.notes if data.calibration else ():
        logger.warning(note)
