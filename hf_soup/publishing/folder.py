"""What a soup's folder holds beside its weights: config, tokenizer or processor, recipe, results, card, picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_soup._util.io import write_json
from hf_soup.checkpoint import label_names, pipeline_tasks, remembered
from hf_soup.lineage import LineageReport, soup_config, write_assets
from hf_soup.merging import Plan
from hf_soup.publishing import plots
from hf_soup.publishing.card import license_of, plot, render
from hf_soup.recipe import Ingredient, Named, Recipe, Scoring, needs_base

if TYPE_CHECKING:
    from hf_soup.evaluation import BatchNormUpdate, CalibrationDataset, Choice, EvalDataset, EvaluationReport
    from hf_soup.merging import MergeResult
    from hf_soup.workflows.update import Update


_PACKAGES = ("hf-soup", "torch", "transformers", "safetensors", "huggingface_hub", "datasets", "evaluate")


def write_contents(
    folder: Path,
    recipe: Recipe,
    lineage: LineageReport,
    plan: Plan,
    choice: Choice,
    weights: Mapping[str, float],
    *,
    groups: Mapping[str, Mapping[int, object]],
    alignments: Sequence[str],
    files: Sequence[str],
    merged: MergeResult,
    results: EvaluationReport | None,
    benches: Sequence[EvalDataset],
    inputs: CalibrationDataset | None,
    again: BatchNormUpdate | None,
    update: Update | None,
    title: str,
) -> None:
    """Everything beside the weight files, which are in the folder already.

    Args:
        folder: The soup's.
        recipe: With everything that was chosen but the ingredients.
        lineage: All leaves.
        plan: What was averaged.
        choice: How it was chosen.
        weights: Shares of the leaves that went in.
        groups: For each ingredient, numbers of the leaves that it is made of.
        alignments: What was done so that tensors correspond.
        files: From `about_files`.
        merged: From the engine.
        results: The scores, where the recipe names data.
        benches: That data, pinned.
        inputs: The examples, pinned, where the recipe has any.
        again: Where statistics of batch normalisation were collected again, with what.
        update: Where the soup is the next version of another.
        title: The soup's name.
    """
    from hf_soup.evaluation import (
        loader_of,
        notes_of,
        scored_with,  # late, as it takes torch
    )

    leaves = lineage.only(weights)
    config = soup_config(leaves, plan.layout.dtype)
    write_assets(folder, config, leaves, lineage.checkpoints)
    index = plan.layout.index
    if index is not None:
        with (folder / "model.safetensors.index.json").open("w") as file:
            json.dump(index, file, indent=2)
            file.write("\n")
    resolved = resolve_recipe(recipe, leaves, weights, benches, inputs)
    (folder / "soup.yaml").write_text(resolved.to_yaml())
    used = list(weights)
    eaten = [c for n, c in zip(lineage.names, lineage.checkpoints, strict=True) if n in used]
    license = license_of(eaten, lineage.ancestor)
    model_class = str((config.get("architectures") or ["AutoModel"])[0])
    summary: dict[str, Any] = {
        "digest": merged.digest,
        "weights": weights,
        "selected": [
            name for name in choice.selected.weights if any(lineage.names[number] in weights for number in groups[name])
        ],
        "made_of": {
            name: [lineage.names[number] for number in numbers]
            for name, numbers in groups.items()
            if [lineage.names[number] for number in numbers] != [name]
        },
        "method": recipe.method.name,
        "parameters": choice.recipe.method.parameters,  # of those of a run the resolved recipe has what takes all
        "overrides": [each.model_dump(mode="json") for each in recipe.overrides],
        "select": recipe.select.name,
        "architecture": model_class,
        "tasks": remembered("pipeline-tasks", model_class, partial(pipeline_tasks, model_class)),
        "library": "sentence-transformers" if (folder / "modules.json").exists() else "transformers",
        "encoder": _encoder(folder),
        "head_of": leaves.head_of,
        "held_out": [scoring.title for scoring in recipe.score],
        "scores": {},
        "best": {},
        "comparisons": {},
        "calibration": {},
        "diversity": {},
        "greedy_ensemble": [],
        "curve": [],
        "trace": [
            {"ingredients": list(step.ingredients), "score": step.score, "kept": step.kept}
            for step in choice.selected.trace
        ],
        "history": list(choice.selected.history),
        "stability": choice.stability and choice.stability.to_dict(),
        "report": [
            {
                **scoring.model_dump(mode="json"),
                "title": bench.title,
                "name": scoring.name or scoring.dataset,
                "loader": loader_of(scoring),
            }
            for scoring, bench in zip(resolved.report, benches[len(recipe.score) :], strict=True)
        ],
        "batch_norm": again and again.to_dict(),
        "update": update and update.told(list(groups), results),
        "license_agreed": license.agreed,
        "notes": notes_of(benches)
        + (scored_with(leaves.head_of) if benches else [])
        + list(results.warnings if results else ())
        + [f"The ingredients disagree on '{name}', which is not averaged." for name in merged.differing]
        + list(files),
        "alignments": list(alignments),
        "lineage": lineage.to_dict(),
        "versions": {**{name: version(name) for name in _PACKAGES}, "python": platform.python_version()},
        "system": f"{platform.system()} {platform.machine()}",
    }
    if results is not None:
        summary["scores"] = {
            name: {at: score.to_dict() for at, score in scores.items()} for name, scores in results.scores.items()
        }
        summary["best"] = dict(results.best)
        summary["comparisons"] = {
            at: {**each.to_dict(), "against": results.best[at], "significant": each.significant}
            for at, each in results.comparisons.items()
        }
        summary["calibration"], summary["diversity"] = results.calibration, results.diversity
        summary["greedy_ensemble"] = list(results.in_ensemble)
        summary["curve"] = [
            {**asdict(point), "scores": {at: score.to_dict() for at, score in each.items()}}
            for point, each in zip(choice.curve, results.curve, strict=True)
        ]
        plot(folder / "plots" / "scores.png", summary)
        if summary["curve"]:
            plots.draw_curve(folder / "plots" / "curve.png", summary)
        if summary["history"]:
            plots.draw_learned(folder / "plots" / "learned.png", summary, recipe.layers)
    write_json(folder / "soup.json", summary)
    named = [each for scoring in (*resolved.score, *resolved.report) for each in (scoring.dataset, scoring.metric)]
    named += [resolved.examples.dataset] if resolved.examples else []
    card = render(
        title=title, lineage=lineage, used=used, license=license, summary=summary, recipe=resolved.to_yaml(),
        files=list(dict.fromkeys(each for each in named if each.startswith("local:"))),
    )  # fmt: skip
    (folder / "README.md").write_text(card)


def _encoder(folder: Path) -> str:
    """The class with which sentence-transformers loads a folder of its own."""
    try:
        kind = json.loads((folder / "config_sentence_transformers.json").read_bytes())["model_type"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        kind = None  # from before there were others
    return kind if kind in ("CrossEncoder", "SparseEncoder") else "SentenceTransformer"


def resolve_recipe(
    recipe: Recipe,
    leaves: LineageReport,
    weights: Mapping[str, float],
    benches: Sequence[EvalDataset],
    inputs: CalibrationDataset | None,
) -> Recipe:
    """The recipe with every choice made: the leaves that went in, by commit, with their shares; no local paths."""
    scorings = [_public(bench.scoring) for bench in benches]
    ancestor, base = leaves.ancestor, None
    # One that cannot be read would stop the next cook, for which it is only a hint where no method works on it.
    if ancestor and ancestor.declared and ancestor.revision:
        if not ancestor.model.startswith("local:"):
            base = f"{ancestor.model}@{ancestor.revision}"
        elif needs_base(recipe):
            base = ancestor.model
    ingredients = tuple(
        Ingredient(model=leaf.model, revision=leaf.revision, weight=weight)
        for leaf, weight in zip(leaves.checkpoints, weights.values(), strict=True)
    )
    heads = recipe.heads
    if leaves.head_of is not None:
        one = ingredients[leaves.alignment.donor]
        # A model may stand there in several revisions.
        several = [each.model for each in ingredients].count(one.model) > 1
        heads = f"{one.model}@{one.revision}" if several else one.model
    # The order of the outputs, where it is not what the leaves say by themselves.
    every = leaves.checkpoints if leaves.head_of is None else [leaves.donor]
    named = (label_names(leaf.config) for leaf in every)
    said = next((each for each in named if each is not None), None)
    labels = leaves.alignment.labels
    return recipe.model_copy(
        update={
            "base": base,
            "ingredients": ingredients,
            "heads": heads,
            "labels": None if labels == said else labels,
            # The choice is made; a weight that came out of data is not derived again.
            "select": Named(name="uniform"),
            "repeats": 0,
            "score": tuple(scorings[: len(recipe.score)]),
            "report": tuple(scorings[len(recipe.score) :]),
            "examples": inputs and _public(inputs.examples),
        }
    )


def _public(scoring: Scoring) -> Scoring:
    """A scoring without the paths of local files, which are nobody's business."""
    changes = {}
    if (scoring.revision or "").startswith("sha256:"):
        changes["dataset"] = f"local:{Path(scoring.dataset).name}"
    if scoring.measure != scoring.metric:
        changes["metric"] = f"local:{scoring.measure}"
    return scoring.model_copy(update=changes)
