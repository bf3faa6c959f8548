"""What a soup's folder holds beside its weights: config, tokenizer or processor, recipe, results, card, picture."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_soup import architecture, parameters, plots
from hf_soup.card import license_of, plot, render
from hf_soup.checkpoint import ASSETS, CHAT, PROCESSOR, TOKENIZER, Checkpoint
from hf_soup.compatibility import some
from hf_soup.errors import RecipeError
from hf_soup.lineage import Lineage
from hf_soup.memo import remembered
from hf_soup.mixing import needs_base
from hf_soup.plan import Plan
from hf_soup.recipe import Ingredient, Named, Recipe, Scoring

if TYPE_CHECKING:
    from hf_soup.batch_statistics import CollectedAgain
    from hf_soup.choosing import Choice
    from hf_soup.evaluation import Results
    from hf_soup.merge import Merged
    from hf_soup.scoring import Bench, Inputs
    from hf_soup.updating import Update

_PACKAGES = ("hf-soup", "torch", "transformers", "safetensors", "huggingface_hub", "datasets", "evaluate")

#: Keys of JSON files that no loading depends on.
_INCIDENTAL = {
    *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "__version__", "tokenizer_file"),
    *("special_tokens_map_file", "is_local", "local_files_only"),
}
_PLACED, _PLACE = re.compile(r"\w+_(path|file)"), re.compile(r"[/~]|[A-Za-z]:[\\/]")
#: Files that hold such keys; in a vocabulary they are words.
_CONFIG = re.compile(r"config\.json$")
#: Keys that name code, which is not taken over and would be looked for, and where a config came from.
_LEFT_OUT = {"auto_map", "custom_pipelines", "_name_or_path"}


def soup_config(lineage: Lineage, dtype: str) -> dict[str, Any]:
    """The donor's config with the dtype that is written and the names of the outputs; without a head, the body's."""
    given = architecture.output_dtype_config(lineage.donor.config, dtype)
    config: dict[str, Any] = _tidied(given, local=lineage.donor.folder is not None)
    if lineage.alignment.body:
        return parameters.body_config(config, lineage.donor.model)
    if lineage.alignment.untied:
        config["tie_word_embeddings"] = False
    names = lineage.alignment.labels
    if names is not None:
        known = architecture.num_labels(config)
        if known not in (None, len(names)):
            raise RecipeError(f"The recipe gives {len(names)} `labels`; the models have {known} outputs.")
        config["id2label"] = {str(number): label for number, label in enumerate(names)}
        config["label2id"] = {label: number for number, label in enumerate(names)}
    return config


def write_assets(folder: Path, config: Mapping[str, Any], lineage: Lineage, others: Sequence[Checkpoint] = ()) -> None:
    """Write the config, and copy what loading needs beside it.

    The donor gives its files. Where it has no tokenizer or no processor, the first ingredient that has one gives that,
    else the ancestor, else one of the ``others``, which are not in the soup.
    """
    founder = lineage.ancestor.checkpoint if lineage.ancestor else None
    sources = [lineage.donor, *lineage.checkpoints, *([founder] if founder else []), *others]
    taken = dict.fromkeys((file for file in lineage.donor.files if ASSETS.fullmatch(file)), lineage.donor)
    for needed, along in ((TOKENIZER, CHAT), (PROCESSOR, PROCESSOR)):
        having = next((each for each in sources if any(map(needed.fullmatch, each.files))), lineage.donor)
        if having is not lineage.donor:
            taken |= {file: having for file in having.files if needed.fullmatch(file) or along.fullmatch(file)}
    places = {id(checkpoint): checkpoint.fetch_assets() for checkpoint in taken.values()}
    for file, checkpoint in taken.items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        data = (places[id(checkpoint)] / file).read_bytes()
        target.write_bytes(_tidied_json(data, local=checkpoint.folder is not None) if _CONFIG.search(file) else data)
    _write_json(folder / "config.json", config)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    # Half a letter, as a stranger's "\ud800" is read, has no bytes; the escape that is put in its place is JSON's.
    path.write_bytes(f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))


def _tidied(values: Any, *, local: bool) -> Any:
    """A config without what it must not name, at any depth: code, and a folder's without places on its owner's disk."""
    if isinstance(values, list):
        return [_tidied(each, local=local) for each in values]
    if not isinstance(values, dict):
        return values
    return {
        key: _tidied(each, local=local)
        for key, each in values.items()
        if key not in _LEFT_OUT and not (local and _PLACED.fullmatch(key) and _PLACE.match(str(each)))
    }


def _tidied_json(data: bytes, *, local: bool) -> bytes:
    try:
        values = json.loads(data)
        kept = _tidied(values, local=local)
    except (ValueError, RecursionError):
        return data
    return data if kept == values else (json.dumps(kept, indent=2) + "\n").encode()


def _same(ours: bytes, theirs: bytes) -> bool:
    """Whether two files say the same: equal, or JSON that is equal in all that loading depends on."""
    if ours == theirs:
        return True
    try:
        one, other = json.loads(ours), json.loads(theirs)
    except (ValueError, RecursionError):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = ({key: each[key] for key in each.keys() - _INCIDENTAL} for each in (one, other))
    return bool(one == other)


def about_files(lineage: Lineage) -> list[str]:
    """What a reader should know about the files beside the weights: those that are not the same in all ingredients.

    Tokenizers and processors were compared by what they do as well, and files that only some have are named but for
    theirs, as every version of the library saves other ones. Code is not taken over.
    """
    donor, whose = lineage.donor, lineage.names[lineage.alignment.donor]
    ours = donor.fetch_assets()
    differ: dict[str, list[str]] = {}
    lacking: dict[str, list[str]] = {}
    for name, checkpoint in zip(lineage.names, lineage.checkpoints, strict=True):
        theirs = checkpoint.fetch_assets()
        for file in (file for file in checkpoint.files if ASSETS.fullmatch(file) and file != "config.json"):
            if file not in donor.files:
                if not (TOKENIZER.fullmatch(file) or PROCESSOR.fullmatch(file)):
                    lacking.setdefault(file, []).append(name)
            elif not _same((ours / file).read_bytes(), (theirs / file).read_bytes()):
                differ.setdefault(file, []).append(name)
    notes = [f"{file} is {whose}'s, and not the same in {some(who)}." for file, who in differ.items()] + [
        f"{whose} has no {file}, so the soup has none; {some(who)} had one." for file, who in lacking.items()
    ]
    if code := [file for file in donor.files if re.fullmatch(r"[\w./-]+\.py", file)]:
        notes.append(f"Code is not taken over: {whose} brings {some(code)}.")
    return notes


def write_contents(
    folder: Path,
    recipe: Recipe,
    lineage: Lineage,
    plan: Plan,
    choice: Choice,
    weights: Mapping[str, float],
    *,
    groups: Mapping[str, Mapping[int, object]],
    alignments: Sequence[str],
    files: Sequence[str],
    merged: Merged,
    results: Results | None,
    benches: Sequence[Bench],
    inputs: Inputs | None,
    again: CollectedAgain | None,
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
    from hf_soup.evaluation import scored_with  # late, as it takes torch
    from hf_soup.scoring import notes_of
    from hf_soup.scoring.data import loader_of

    leaves = lineage.only(weights)
    config = soup_config(leaves, plan.dtype)
    write_assets(folder, config, leaves, lineage.checkpoints)
    index = plan.index()
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
        "tasks": remembered("pipeline-tasks", model_class, partial(architecture.pipeline_tasks, model_class)),
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
        + list(results.doubts if results else ())
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
            plots.curve(folder / "plots" / "curve.png", summary)
        if summary["history"]:
            plots.learned(folder / "plots" / "learned.png", summary, recipe.layers)
    _write_json(folder / "soup.json", summary)
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
    recipe: Recipe, leaves: Lineage, weights: Mapping[str, float], benches: Sequence[Bench], inputs: Inputs | None
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
    named = (architecture.label_names(leaf.config) for leaf in every)
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
