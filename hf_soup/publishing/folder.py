"""What a soup's folder holds beside its weights: config, tokenizer or processor, recipe, report, card, pictures."""

from __future__ import annotations

import json
import platform
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_soup._util.io import write_json
from hf_soup._util.registry import offered_by_packages
from hf_soup._util.version import version
from hf_soup.checkpoint import label_names, pipeline_tasks, remembered
from hf_soup.lineage import write_assets
from hf_soup.publishing import plots
from hf_soup.publishing.card import license_of, render
from hf_soup.publishing.merged_models import MergedModels
from hf_soup.recipe import (
    TASKS,
    AnyScoring,
    CurvePoint,
    FunctionScoring,
    HarnessScoring,
    Ingredient,
    LearningEpoch,
    Named,
    Recipe,
    ReportedData,
    ReportedLineage,
    ReportedOverride,
    Scoring,
    SoupReport,
    UpdateReport,
    methods_of,
    needs_base,
    with_dataset,
)
from hf_soup.selection import SELECTIONS

if TYPE_CHECKING:
    from hf_soup.evaluation import Choice, EvaluationData, EvaluationReport
    from hf_soup.merging import MergeResult


_PACKAGES = ("hf-soup", "torch", "transformers", "safetensors", "huggingface_hub", "datasets", "evaluate")


def soup_report(
    recipe: Recipe,
    models: MergedModels,
    choice: Choice,
    merged: MergeResult,
    results: EvaluationReport | None,
    update: UpdateReport | None,
) -> SoupReport:
    """What is told of a soup.

    Args:
        recipe: From `resolve_recipe`.
        models: What it is of.
        choice: How it was chosen.
        merged: From the engine.
        results: The scores, where the recipe names data.
        update: Where the soup is the next version of another.
    """
    from hf_soup.evaluation import SOUP, EvaluationReport, loader_of  # late, as it takes torch

    asked, donor, measured = choice.recipe, models.leaves.donor.checkpoint, results or EvaluationReport()
    architecture = str((models.config.get("architectures") or ["AutoModel"])[0])
    titles = list(measured.scores.get(SOUP, ()))
    differing = [f"The ingredients disagree on '{name}', which is not averaged." for name in merged.differing]
    return SoupReport(
        digest=merged.digest,
        weights=models.weights,
        selected=tuple(
            name for name in choice.selected.weights if not models.weights.keys().isdisjoint(models.made_of[name])
        ),
        made_of={name: leaves for name, leaves in models.made_of.items() if leaves != (name,)},
        method=asked.method.name,
        parameters=asked.method.parameters,  # of those of a run the resolved recipe has what takes all
        overrides=tuple(map(ReportedOverride.model_validate, asked.overrides)),
        select=asked.select.name,
        architecture=architecture,
        tasks=tuple(remembered("pipeline-tasks", architecture, partial(pipeline_tasks, architecture))),
        library=_library(models),
        encoder=_encoder(donor.source.fetch_assets()),
        head_of=models.leaves.head_of,
        validation=tuple(scoring.title for scoring in asked.validation),
        scores=measured.scores,
        best=measured.best,
        comparisons={
            title: each.model_copy(update={"against": measured.best[title]})
            for title, each in measured.comparisons.items()
        },
        calibration_errors=measured.calibration,
        diversity=measured.diversity,
        greedy_ensemble=measured.in_ensemble,
        curve=tuple(
            CurvePoint(parameters=point.parameters, score=point.score, scores=scores)
            for point, scores in zip(choice.curve, measured.curve, strict=True)
        ),
        trace=choice.selected.trace,
        history=tuple(map(LearningEpoch.model_validate, choice.selected.history)),
        stability=choice.stability,
        test=tuple(
            ReportedData.model_validate({
                **scoring.model_dump(), "title": title, "name": scoring.name or scoring.dataset,
                "loader": loader_of(scoring),
            })
            for scoring, title in zip(recipe.test, titles[len(recipe.validation) :], strict=True)
            if isinstance(scoring, Scoring)  # of a function there is a score alone
        ),
        batch_norm=merged.batch_norm,
        adapter=merged.adapter,
        update=update,
        license_agreed=license_of(models).agreed,
        notes=(*measured.notes, *measured.warnings, *differing, *models.notes),
        alignments=models.leaves.notes,
        lineage=ReportedLineage.model_validate(models.lineage.to_dict()),
        harness={
            title: str(scoring.revision)
            for title, scoring in zip(titles, (*recipe.validation, *recipe.test), strict=False)
            if isinstance(scoring, HarnessScoring)
        },
        versions={
            **{name: version(name) for name in _PACKAGES}, **_extensions(asked), "python": platform.python_version()
        },
        system=f"{platform.system()} {platform.machine()}",
    )  # fmt: skip


def write_folder(folder: Path, report: SoupReport, recipe: Recipe, models: MergedModels, title: str) -> None:
    """Everything beside the weight files, which are in the folder already.

    Args:
        folder: The soup's.
        report: From `soup_report`.
        recipe: From `resolve_recipe`.
        models: What the soup is of.
        title: Its name.
    """
    if models.adapter is None:
        write_assets(folder, models.config, models.leaves)
    index = None if models.adapter else models.plan.layout.index
    if index is not None:
        with (folder / "model.safetensors.index.json").open("w") as file:
            json.dump(index, file, indent=2)
            file.write("\n")
    (folder / "soup.yaml").write_text(recipe.to_yaml())
    if report.scores:
        (folder / "plots").mkdir(exist_ok=True)
        plots.draw_scores(folder / "plots", report)
        if report.curve:
            plots.draw_curve(folder / "plots" / "curve.png", report)
        if report.history:
            plots.draw_learned(folder / "plots" / "learned.png", report, recipe.tensor_weights)
    write_json(folder / "soup.json", report.to_dict())
    scorings = [*recipe.validation, *recipe.test]
    named = [each for scoring in with_dataset(scorings) for each in (scoring.dataset, scoring.metric)]
    functions = [each.function.removeprefix("local:") for each in scorings if isinstance(each, FunctionScoring)]
    named += [recipe.calibration.dataset] if recipe.calibration else []
    files = list(dict.fromkeys(each for each in named if each.startswith("local:")))
    card = render(title, models, report, recipe=recipe.to_yaml(), files=files, functions=functions)
    (folder / "README.md").write_text(card)


def _extensions(recipe: Recipe) -> dict[str, str]:
    """Other packages that methods, selection and tasks of a recipe come from, and their versions."""
    from hf_soup.methods import METHODS

    asked = [METHODS.distribution(method.name) for method in methods_of(recipe)]
    tasks = {each.task for each in with_dataset([*recipe.validation, *recipe.test])} - {*TASKS}
    offered = [offered_by_packages("task")[task].dist for task in tasks]
    asked += [(each.name, each.version) for each in offered if each]
    return dict(filter(None, [*asked, SELECTIONS.distribution(recipe.select.name)]))


def _library(models: MergedModels) -> str:
    """What loads the soup."""
    if models.adapter:
        return "peft"
    return "sentence-transformers" if "modules.json" in models.leaves.donor.checkpoint.source.files else "transformers"


def _encoder(folder: Path) -> str:
    """The class with which sentence-transformers loads a folder of its own."""
    try:
        kind = json.loads((folder / "config_sentence_transformers.json").read_bytes())["model_type"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        kind = None  # from before there were others
    return kind if kind in ("CrossEncoder", "SparseEncoder") else "SentenceTransformer"


def resolve_recipe(recipe: Recipe, models: MergedModels, data: EvaluationData) -> Recipe:
    """The recipe with every choice made: the leaves that went in, by commit, with their shares; no local paths.

    Args:
        recipe: With everything that was chosen but the ingredients.
        models: What the soup is of.
        data: The recipe's, pinned.
    """
    leaves = models.leaves
    ancestor, base = models.lineage.ancestor, None
    # One that cannot be read would stop the next cook, for which it is only a hint where no method works on it.
    if ancestor and ancestor.declared and ancestor.revision:
        if not ancestor.model.startswith("local:"):
            base = f"{ancestor.model}@{ancestor.revision}"
        elif needs_base(recipe):
            base = ancestor.model
    ingredients = tuple(
        Ingredient(
            model=leaf.checkpoint.model,
            revision=leaf.checkpoint.revision,
            weight=models.weights[leaf.name],
            base=None if (of := leaf.checkpoint.base) is None else f"{of.model}@{of.revision}",
        )
        for leaf in leaves.ingredients
    )
    heads = recipe.heads
    if leaves.head_of is not None:
        one = ingredients[leaves.donor_number]
        # A model may stand there in several revisions.
        several = [each.model for each in ingredients].count(one.model) > 1
        heads = f"{one.model}@{one.revision}" if several else one.model
    # The order of the outputs, where it is not what the leaves say by themselves.
    every = leaves.ingredients if leaves.head_of is None else [leaves.donor]
    named = (label_names(leaf.checkpoint.config) for leaf in every)
    said = next((each for each in named if each is not None), None)
    labels = leaves.labels
    return recipe.model_copy(
        update={
            "base_model": base,
            "ingredients": ingredients,
            "heads": heads,
            "labels": None if labels == said else labels,
            # The choice is made; a weight that came out of data is not derived again.
            "select": Named(name="uniform"),
            "stability_repeats": 0,
            "validation": tuple(_public(bench.scoring) for bench in data.validation),
            "test": tuple(_public(bench.scoring) for bench in data.test),
            "calibration": data.calibration and _public(data.calibration.inputs.data),
        }
    )


def _public(scoring: AnyScoring) -> AnyScoring:
    """A scoring without the paths of local files, which are nobody's business, and with no function to be called."""
    if isinstance(scoring, FunctionScoring):
        return scoring.model_copy(update={"function": f"local:{scoring.function.removeprefix('local:')}"})
    if isinstance(scoring, HarnessScoring):
        folder = scoring.include_path and f"local:{Path(scoring.include_path).name}"
        return scoring.model_copy(update={"include_path": folder})
    changes = {}
    if (scoring.revision or "").startswith("sha256:"):
        changes["dataset"] = f"local:{Path(scoring.dataset).name}"
    if scoring.measure != scoring.metric:
        changes["metric"] = f"local:{scoring.measure}"
    return scoring.model_copy(update=changes)
