"""Folders that a Trainer or a sweep wrote, as ingredients: a run's checkpoints, or one of each of several runs.

A run is a folder that has ``checkpoint-N`` folders and no model at its top. Alone it stands for its checkpoints in the
order of their steps, and with a selection that picks from them so does every folder that has them; beside other
ingredients it stands for its best checkpoint. A folder of runs or models stands for these. Of a checkpoint only the
model is looked at; optimizer and random states are not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_soup._util.text import some
from hf_soup.checkpoint import Checkpoint, LocalFolder, open_checkpoint
from hf_soup.errors import RecipeError, ResolveError
from hf_soup.hub import CHECKPOINT
from hf_soup.recipe import MAX_INGREDIENTS, Finding, Ingredient, Named, Recipe, is_local_path, require_named
from hf_soup.selection import SELECTIONS, Selection

#: What the Trainer writes into a checkpoint after everything else.
_STATE = "trainer_state.json"
_DIGITS = re.compile(r"([0-9]+)")
#: Files of which a model's folder has one, and the weights in one.
_OF_A_MODEL = ("config.json", "adapter_config.json", "modules.json", "model_index.json", "open_clip_config.json")
_WEIGHTS = re.compile(r".*\.safetensors|(pytorch_|adapter_)?model.*\.bin")


@dataclass(frozen=True)
class _Run:
    """A Trainer's folder: its name, its whole checkpoints by their steps, and a note where the last one is left out."""

    name: str
    checkpoints: tuple[Path, ...]
    half: Finding | None = None

    @property
    def chosen(self) -> tuple[Path, str]:
        """The checkpoint that stands for the run, and which one that is: the best by the Trainer's own word."""
        last = self.checkpoints[-1]
        for state in (last / _STATE, last.parent / _STATE):
            try:
                best = json.loads(state.read_bytes())["best_model_checkpoint"]
            except (OSError, ValueError, RecursionError, LookupError, TypeError):
                continue
            named = re.split(r"[/\\]", best)[-1] if isinstance(best, str) else ""
            if found := next((path for path in self.checkpoints if path.name == named), None):
                return found, "its best"
            if named:
                return last, f"its last, as its best, {named[:80]}, is not there"
        return last, "its last, as it names no best one"


def within_a_run(reasons: Sequence[Finding], checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """What a check found, where all are checkpoints in one Trainer's folder.

    They have one ancestor, whichever it is, and nobody moves neurons between two steps: parts that have nothing in
    common were trained that far, which is no reason to refuse. Strangers are, as a folder may have been used twice.
    """
    folders = [
        each.source.path
        for each in checkpoints
        if isinstance(each.source, LocalFolder) and CHECKPOINT.fullmatch(each.source.path.name)
    ]
    if len(folders) < len(checkpoints) or len({folder.parent for folder in folders}) > 1:
        return list(reasons)
    found = [reason for reason in reasons if reason.code != "base-unknown"]
    return [_moved(reason) if reason.code == "tensors-unrelated" else reason for reason in found]


def _moved(reason: Finding) -> Finding:
    message = (
        f"{some(reason.ingredients)}: parts have nothing in common with the other checkpoints', as after a beginning "
        "from random numbers or a high learning rate. With `--select run_average --set last=N` the first ones are left "
        "out; `--select greedy` finds out who helps."
    )
    return replace(reason, message=message, refuses=False)


def expand_runs(recipe: Recipe, *, checks: bool = False, beside: bool = False) -> tuple[Recipe, tuple[Finding, ...]]:
    """Put runs in the place of folders of runs, and checkpoints in the place of runs, and say so.

    Where there is another ingredient a run stands for its best checkpoint, or the last where it names no best one.
    Alone it stands for all. With a selection that picks from ingredients in order only those are ingredients that it
    picks: of each run, or, where there is none, of the ingredients as they stand. Their weights are those that it
    computes, and of its parameters those are left whose values are still to be tried.

    Args:
        recipe: As it was asked for.
        beside: There are other ingredients, which the recipe does not name.
        checks: It is only checked. A run alone stands for its checkpoints then, as one model is no soup.

    Raises:
        RecipeError: The selection cannot have these parameters, or what is left is no soup.
        ResolveError: The selection asks for a run, and the folder is none.
    """
    recipe, sweeps = _without_sweeps(recipe)
    require_named("select", recipe.select, SELECTIONS, lists=True)
    selection = SELECTIONS[recipe.select.name]
    alone = len(recipe.ingredients) == 1 and not beside
    picks = selection.picks is not None
    runs = [_run(each, picks or (checks and alone), recipe.allow_pickle) for each in recipe.ingredients]
    if not picks and not any(runs):
        return recipe, (*sweeps, *(_beside(recipe) if alone else ()))
    if picks and alone and not runs[0] and not recipe.resolved:
        lacks = "has no `checkpoint-…` folders" if _is_folder(recipe.ingredients[0]) else "is no folder here"
        raise ResolveError(
            f"'{recipe.ingredients[0]}' {lacks}, and {selection.name} averages the checkpoints in one.",
            hint="Name the folder that the Trainer wrote them to, or models in the order of their steps.",
        )
    notes = [*sweeps, *(run.half for run in runs if run and run.half)]
    if not (picks or alone):
        return _one_each(recipe, runs, notes)
    if recipe.tensor_weights and picks:
        raise RecipeError(f"`select: {selection.name}` chooses weights, and the recipe has `tensor_weights` already.")
    if recipe.tensor_weights:
        raise RecipeError(
            "`tensor_weights` gives each ingredient its weights, and a run is as many as it has checkpoints.",
            hint="Name the checkpoints in the run's place.",
        )
    if any(runs):
        groups = [
            [each.model_copy(update={"model": str(path)}) for path in run.checkpoints] if run else [each]
            for each, run in zip(recipe.ingredients, runs, strict=True)
        ]
    else:
        groups, runs = [_by_step(recipe.ingredients)], [_Run("the recipe", ())]
    kept, left = groups, recipe.select
    if picks:
        kept, left = _picked(recipe, selection, groups, runs)
    for run, group, taken in zip(runs, groups, kept, strict=True):
        if run and run.checkpoints:
            notes.append(_said(run, len(group), taken, recipe.select if picks else None))
        elif run and len(taken) < len(group):
            models = [Path(each.model).name if _is_folder(each) else each.model for each in taken]
            which = f"{len(taken)} of the {len(group)} models go in, {some(models, 12)}"
            notes.append(_note(f"{which}{_by(recipe.select)}."))
    ingredients = tuple(each for group in kept for each in group)
    changes: dict[str, object] = {"ingredients": ingredients, "select": left}
    if isinstance(recipe.head, int):
        changes["heads"] = _head(recipe.ingredients[recipe.head], recipe.head, runs, kept)
    if picks and len(ingredients) == 1 and not recipe.resolved:
        left_out = " ".join(note.message for note in notes if note.code == "half-written")
        raise RecipeError(
            f"{selection.name} averages checkpoints, and one goes in: {ingredients[0]}. {left_out}".strip(),
            hint="An average needs two: let the run save more of them, or set a larger `last` or a smaller `stride`.",
        )
    if len(ingredients) > MAX_INGREDIENTS:
        raise RecipeError(
            f"With their checkpoints there are {len(ingredients):,} ingredients; a recipe has {MAX_INGREDIENTS:,} at "
            "most.",
            hint="`--select run_average --set last=10` takes the last ten, `--set stride=10` every tenth.",
        )
    return recipe.model_copy(update=changes), tuple(notes)


def _picked(
    recipe: Recipe, selection: Selection, groups: Sequence[Sequence[Ingredient]], runs: Sequence[_Run | None]
) -> tuple[list[list[Ingredient]], Named]:
    """What a selection picks from each run, with its weights; of values that are to be tried, with any of them."""
    assert selection.picks is not None, "who picks was asked"
    parameters = recipe.select.parameters
    tried = [name for name, value in parameters.items() if isinstance(value, list)]
    if tried and len(groups) > 1:
        raise RecipeError(
            f"`{tried[0]}` has values to choose from, for one run; there are {len(groups)} ingredients.",
            hint="Name one run, or give one value.",
        )
    kept: list[list[Ingredient]] = []
    left = parameters
    for group, run in zip(groups, runs, strict=True):
        if not run:
            kept.append(list(group))
            continue
        counted = [each for each in group if each.weight]
        if not counted:  # the weight of a run is that of each of its checkpoints
            kept.append([])
            continue
        with SELECTIONS.failures(selection.name):
            numbers, left = selection.picks(len(counted), **parameters)
            taken = [counted[number] for number in numbers]
        if not tried:
            weights = {str(place): each.weight for place, each in enumerate(taken)}
            weighed = selection.select(weights, None, left, recipe.seed).weights
            taken = [taken[int(place)].model_copy(update={"weight": weight}) for place, weight in weighed.items()]
        kept.append(taken)
    return kept, Named(name=selection.name, **(left if tried else {}))


def _by_step(ingredients: Sequence[Ingredient]) -> list[Ingredient]:
    """Checkpoints in the order of their steps, as a shell puts 1000 before 200; others as they stand."""
    steps = [CHECKPOINT.fullmatch(Path(each.model).name) for each in ingredients]
    if not all(steps):
        return list(ingredients)
    order = sorted(range(len(steps)), key=lambda number: int(steps[number][1]))  # type: ignore[index]
    return [ingredients[number] for number in order]


def _one_each(
    recipe: Recipe, runs: Sequence[_Run | None], notes: Sequence[Finding]
) -> tuple[Recipe, tuple[Finding, ...]]:
    """A checkpoint in the place of each run."""
    ingredients, chosen = list(recipe.ingredients), []
    for number, run in enumerate(runs):
        if run and run.checkpoints:
            path, why = run.chosen
            ingredients[number] = ingredients[number].model_copy(update={"model": str(path)})
            chosen.append(f"{run.name}/{path.name} ({why})")
    changes: dict[str, object] = {"ingredients": tuple(ingredients)}
    if isinstance(recipe.head, int):
        changes["heads"] = str(ingredients[recipe.head])
    message = f"Each run stands for one of its checkpoints: {some(chosen, 12)}. Others go in where they are named."
    who = [run.name for run in runs if run and run.checkpoints]
    return recipe.model_copy(update=changes), (*notes, *([_note(message, *who)] if who else []))


def _without_sweeps(recipe: Recipe) -> tuple[Recipe, list[Finding]]:
    """Put the runs and models that folders of them hold in the place of these."""
    ingredients: list[Ingredient] = []
    notes = []
    for each in recipe.ingredients:
        members = _members(each)
        ingredients += [each.model_copy(update={"model": str(path)}) for path in members] or [each]
        if members:
            name = _folder(each).resolve().name
            notes.append(_note(f"{name} is a folder of {len(members)}: {some([m.name for m in members], 12)}.", name))
    if not notes:
        return recipe, notes
    if recipe.tensor_weights:
        raise RecipeError(
            "`tensor_weights` gives each ingredient its shares; name the runs in the place of their folder."
        )
    return recipe.model_copy(update={"ingredients": tuple(ingredients)}), notes


def _members(each: Ingredient) -> list[Path]:
    """The runs and models in a folder that is none itself, by name, with the numbers in them as numbers.

    Raises:
        ResolveError: Weights lie in a folder that is neither, which must not be left out in silence.
    """
    if not _is_folder(each) or _is_model(_folder(each)) or _checkpoints(each):
        return []
    folders = [path for path in _folder(each).iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = [path for path in folders if (_is_model(path) and _holds_weights(path, "*")) or _steps(path)]
    others = [path.name for path in folders if path not in found and _holds_weights(path, "*", "*/*", "*/*/*")]
    if found and others:
        raise ResolveError(
            f"'{each}' holds runs ({some([path.name for path in found])}) and folders with weights that are no runs: "
            f"{some(sorted(others))}.",
            hint="Name the runs, or move the others away.",
        )
    return sorted(found, key=lambda path: [(not part.isdigit(), part.zfill(18)) for part in _DIGITS.split(path.name)])


def _is_model(folder: Path) -> bool:
    """Whether a folder is one model, of whichever library."""
    return any((folder / file).is_file() for file in _OF_A_MODEL)


def _holds_weights(folder: Path, *patterns: str) -> bool:
    return any(_WEIGHTS.fullmatch(path.name) for pattern in patterns for path in folder.glob(pattern))


def _folder(each: Ingredient) -> Path:
    return Path(os.path.expanduser(each.model))  # noqa: PTH111 -- the other raises for an unknown user


def _is_folder(each: Ingredient) -> bool:
    return each.revision is None and is_local_path(str(_folder(each))) and _folder(each).is_dir()


def _checkpoints(each: Ingredient) -> list[Path]:
    """The checkpoints in a folder, by their steps as numbers; none where the folder is pinned, as a model is."""
    return _steps(_folder(each)) if _is_folder(each) else []


def _steps(folder: Path) -> list[Path]:
    steps = {
        path: int(found[1])
        for path in folder.glob("checkpoint-*")
        if (found := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(steps, key=lambda path: (steps[path], path.name))


def _run(each: Ingredient, meant: bool, allow_pickle: bool) -> _Run | None:
    """The run that an ingredient stands for; ``meant``: also where the folder has a model at its top."""
    found = _checkpoints(each)
    if not found or (not meant and (_folder(each) / "config.json").is_file()):
        return None
    why = _unfinished(found, allow_pickle)
    name = _folder(each).resolve().name
    if why is None:
        return _Run(name, tuple(found))
    half = Finding("half-written", f"Left out as half-written: {name}/{found[-1].name}: {why}", (name,))
    return _Run(name, tuple(found[:-1]), half)


def _unfinished(found: Sequence[Path], allow_pickle: bool) -> str | None:
    """Why the last checkpoint is only half there; what is wrong with the one before it too is no sign of that."""
    if len(found) < 2:
        return None
    last, before = found[-1], found[-2]
    if error := _fault(last, allow_pickle):
        return None if _fault(before, allow_pickle) else error
    if (before / _STATE).is_file() and not (last / _STATE).is_file():
        return f"it has no {_STATE}, which is written last."
    return None


def _fault(folder: Path, allow_pickle: bool) -> str | None:
    try:
        open_checkpoint(Ingredient.model_construct(model=str(folder)), allow_pickle=allow_pickle)
    except ResolveError as error:
        # Notes are published, and paths are not.
        shown = error.message
        for path in (folder.resolve(), folder):
            shown = shown.replace(f"'{path}'", "it").replace(str(path), folder.name)
        return shown.removeprefix("it: ")
    return None


def _head(named: Ingredient, number: int, runs: Sequence[_Run | None], kept: Sequence[Sequence[Ingredient]]) -> str:
    """Whose head is kept where that was a run's: its last checkpoint's."""
    if len(kept) > number and runs[number] and (run := runs[number]) and run.checkpoints:
        return kept[number][-1].model
    if all(named not in group for group in kept):
        raise RecipeError(f"`heads` is '{named}', which does not go in, as the selection says.")
    return str(named)


# ---- what is said -----------------------------------------------------------------------------------------------


def _note(message: str, *who: str) -> Finding:
    return Finding("training-run", message, who)


def _said(run: _Run, count: int, kept: Sequence[Ingredient], select: Named | None) -> Finding:
    """Which of so many checkpoints go in, and who picked them."""
    names = [f"{run.name}/{Path(each.model).name}" for each in kept]
    which = "its checkpoints go" if len(names) == count else f"{len(names)} of its {count} checkpoints go"
    how = _by(select) if select else ""
    return _note(f"{run.name} is a run: {which} in, {some(names, 12)}{how}.", run.name)


def _by(select: Named) -> str:
    parameters = "".join(f", {name} {value}" for name, value in select.parameters.items())
    return f" ({select.name}{parameters})"


def _beside(recipe: Recipe) -> tuple[Finding, ...]:
    """That a model has checkpoints beside it, which may be what is meant."""
    (each,) = recipe.ingredients
    count, name = len(_checkpoints(each)), _folder(each).resolve().name
    message = f"{name} has a model and {count} checkpoints of a run; `--select run_average` averages those."
    return (_note(message, name),) if count else ()
