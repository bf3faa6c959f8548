"""From a recipe to a soup's folder: check, fetch, select, average, score, write."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_soup import hub
from hf_soup.checkpoint import require_unchanged
from hf_soup.errors import RecipeError
from hf_soup.evaluation import (
    batch_norms,
    choose,
    prepare_calibration,
    recalibrate_batch_norm,
    statistics_for,
    statistics_notes,
)
from hf_soup.hub import Token
from hf_soup.ingredients import ResolvedIngredients, expand_runs, resolve_ingredients
from hf_soup.lineage import AlignedModels, about_files, soup_config, write_assets
from hf_soup.merging import (
    Plan,
    SharedMerge,
    Workspace,
    fetch_small,
    fetch_weights,
    missing_weights,
    refuse_existing,
    weight_files_of,
)
from hf_soup.publishing import MergedModels, Soup, resolve_recipe, soup_report, write_folder
from hf_soup.recipe import Models, Recipe, as_recipe, settled
from hf_soup.workflows.check import checked_lineage
from hf_soup.workflows.prepare import (
    disk_needs,
    evaluation_of_soup,
    free_bytes,
    ingredients_to_fetch,
    log_notes,
    plan_of,
    prepare_evaluation,
    require_disk,
    require_rows,
    weights_by_name,
    with_base_if_needed,
)
from hf_soup.workflows.update import Update
from hf_soup.workflows.validate import validate

if TYPE_CHECKING:
    from hf_soup.evaluation import BatchStatistics, EvalDataset, Evaluation
    from hf_soup.merging import ProcessGroup

logger = logging.getLogger(__name__)


def cook(
    recipe: Models | Update,
    out: str | Path,
    *,
    method: str | Mapping[str, Any] | None = None,
    select: str | Mapping[str, Any] | None = None,
    allow: str | Sequence[str] | None = None,
    token: Token = None,
    device: str = "cpu",
    threads: int | None = None,
    stream: bool = False,
    processes: Literal["all", "main"] = "all",
    quiet: bool = True,
) -> Soup:
    """Check, fetch, select, average, score, and write a soup folder that appears complete or not at all.

    Args:
        recipe: A recipe, the path of one, models, models with their weights, or the update of a published soup.
        out: The folder to make; nothing that exists is overwritten.
        method: How tensors are combined: a name, or a mapping with it and parameters, as in a recipe.
        select: Which ingredients go in, likewise.
        allow: Codes of findings that are accepted, as in a recipe.
        token: As everywhere in huggingface_hub.
        device: Where models run when they are scored.
        threads: For averaging; by default one a core, and a few more where files must come from the disk.
        stream: Keep no ingredient: fetch files beside the output in the order in which they are averaged, and drop
            each after its last use. Nothing can be scored then.
        processes: Who cooks, where a launcher started several: ``all`` of them, each of which calls this and is given
            the finished soup, or the error of any of them; or the ``main`` one alone, as in
            ``if accelerator.is_main_process:``, which waits for no other. The folder is on the disk of the first.
        quiet: No progress bars.

    Raises:
        SoupError: Anything that stands against it; whatever headers, configs and cards can tell is told before
            the first weight is fetched.
    """
    from hf_soup.evaluation import answer_along
    from hf_soup.merging import ProcessGroup, in_step, merge_along, require_alone

    if processes not in ("all", "main"):
        raise RecipeError(f"`processes` is '{processes}'; it is `all` or `main`.")
    out = Path(out)
    changes = {"method": method, "select": select, "allow": allow}
    lead = partial(_cook, recipe, changes, out, token, device, threads, stream, quiet)
    if processes == "main":
        return lead(ProcessGroup())
    if stream:
        require_alone("`--stream`")
    return in_step(lead, lambda here: answer_along(here, lambda: merge_along(out, here, threads)))


def _cook(
    recipe: Models | Update,
    changes: Mapping[str, Any],
    out: Path,
    token: Token,
    device: str,
    threads: int | None,
    stream: bool,
    quiet: bool,
    here: ProcessGroup,
) -> Soup:
    from hf_soup.evaluation import BatchStatistics
    from hf_soup.merging import merge

    started = time.monotonic()
    update = recipe if isinstance(recipe, Update) else None
    if update and (changes["method"] or changes["select"]):
        raise RecipeError("An update is cooked by the soup's recipe: leave `method` and `select` out.")
    recipe, runs = expand_runs(as_recipe(recipe.recipe if isinstance(recipe, Update) else recipe, **changes))
    selection = validate(recipe, stream=stream)
    refuse_existing(out)
    if update and update.from_cache:
        logger.info(f"{update.soup}: the Hub was not reached; the last version is the one in the cache")
    for note in update.left_out if update else ():
        logger.info(note)
    asked, expanded = recipe, resolve_ingredients(recipe, token=token)
    recipe, lineage = expanded.recipe, checked_lineage(expanded, runs, token)
    aligned, ancestor = lineage.models, lineage.ancestor
    with Workspace(out) as staging, tempfile.TemporaryDirectory(prefix="hf-soup-") as kitchen:
        given, everyone = weights_by_name(recipe, aligned), with_base_if_needed(recipe, aligned, ancestor)
        for note in everyone.notes[len(aligned.notes) :]:
            logger.info(note)
        whole = plan_of(recipe, everyone, given)
        config = soup_config(aligned, whole.layout.dtype)
        with staging.disk_errors():
            write_assets(Path(kitchen), config, aligned)
        benches = prepare_evaluation(
            recipe, whole, Path(kitchen), config, device, token,
            learns=selection.learns, quiet=quiet,
        )  # fmt: skip
        log_notes(benches, aligned.head_of)
        require_rows(recipe, benches, learns=selection.learns)
        inputs = prepare_calibration(recipe, Path(kitchen), config, device, token, quiet=quiet)
        for note in inputs.notes if inputs else ():
            logger.warning(note)
        statistics = None
        if inputs and batch_norms(tensor.name for tensor in whole.layout.tensors):
            statistics = BatchStatistics(whole.layout, inputs, Path(kitchen), recipe.seed, device)
        needed = ingredients_to_fetch(recipe, aligned)
        fed = everyone if needed is aligned else with_base_if_needed(recipe, needed, ancestor)
        wanted = {name: given[name] for name in needed.names}
        plan = whole if needed is aligned else plan_of(recipe, fed, wanted)
        require_disk(fed, plan, out, stream=stream, held=staging.held_bytes())
        fetch_small(fed.checkpoints)
        learn = None
        if benches and inputs:
            from hf_soup.evaluation import collect_coefficients, collect_statistics

            places = partial(fetch_weights, everyone.checkpoints, quiet=quiet)
            about: dict[str, Any] = {"paths": places, "inputs": inputs, "config_folder": Path(kitchen)}
            about |= {"seed": recipe.seed, "device": device, "quiet": quiet}
            whole = collect_statistics(whole, **about)
            learn = partial(collect_coefficients, **about)
        with _evaluation(
            expanded, everyone, benches, whole, Path(kitchen), device, quiet, here, statistics, learn
        ) as evaluation:
            weights = {name: each.weight for name, each in zip(expanded.groups, asked.ingredients, strict=True)}
            weights = {name: weight for name, weight in weights.items() if weight or recipe.layers}
            choice = choose(recipe, weights, evaluation)
            chosen = {aligned.names[number]: share for number, share in choice.leaves(expanded).items()}
            leaves = needed.only(chosen)
            mixed = {name: chosen.get(name, 0.0) for name in leaves.names}
            mix = choice.mix(expanded, [aligned.names.index(name) for name in leaves.names])
            used = fed if leaves is needed else with_base_if_needed(mix, leaves, ancestor)
            if mixed != wanted or mix != settled(recipe):
                plan = plan_of(mix, used, mixed)
            pinned = recipe.model_copy(update={"examples": inputs and inputs.examples})
            if inputs:
                places = partial(fetch_weights, used.checkpoints, quiet=quiet)
                plan = statistics_for(plan, pinned, leaves, places, device=device, token=token, quiet=quiet)
            supply = weight_files_of(used.checkpoints, staging.fetched if stream else None)
            if here.size > 1:
                supply.fetch_all()
            said = staging.open(plan.fingerprint, plan.outline())
            if said not in (None, "continued"):
                logger.info(said)
            here.broadcast(None)  # all candidates are answered
            if here.size > 1:
                follow = frozenset(file.path for file in supply.files() if file.follow and file.path)
                stamps = {file.path: file.stamp for file in supply.files() if file.stamp and file.path}
                here.broadcast(SharedMerge(plan, supply.paths(), follow, stamps))
            merged = merge(plan, supply, staging, world=here, threads=threads, quiet=quiet)
            with staging.disk_errors():
                aligned.pin()
            require_unchanged(everyone.checkpoints)
            if evaluation:
                evaluation.release()
            with staging.disk_errors():
                merged, again = recalibrate_batch_norm(
                    plan, merged, staging.folder, pinned, leaves, device=device, token=token, quiet=quiet
                )
            for name in merged.differing:
                logger.warning(f"the ingredients disagree on '{name}', which is not averaged; the first one's is kept")
            files = [*about_files(leaves), *statistics_notes(plan), *(again.notes if again else ())]
            for note in files:
                logger.info(note)
            with staging.disk_errors():
                own = evaluation_of_soup(recipe, aligned, leaves, plan, benches, Path(kitchen) / "soup", device, token)
                tried = choice.selected.weights, [point.parameters for point in choice.curve]
                last = update.last(expanded, whole) if update else None
                results = evaluation.finish(staging.folder, merged.digest, *tried, last, *own) if evaluation else None
                here.broadcast(None)  # and so are all reports
                for warning in results.warnings if results else ():
                    logger.warning(warning)
                models = MergedModels(lineage, expanded.groups, mixed, plan, used)
                resolved = resolve_recipe(mix, models, benches, inputs)
                told = update.report(list(expanded.groups), results) if update else None
                report = soup_report(resolved, models, choice, merged, results, again, told, files)
                title = os.fsencode(out.name).decode("utf-8", "replace")
                write_folder(staging.folder, report, resolved, models, title)
        seconds = time.monotonic() - started
        folder = staging.publish()
    return Soup(folder, report, merged.resumed, round(seconds, 3))


def preview(recipe: Recipe, out: Path, *, stream: bool = False, token: Token = None) -> dict[str, Any]:
    """What `cook` would do, as plain data: files, bytes to fetch, disk needed and free, seconds. Fetches no weights."""
    from hf_soup.workflows.estimate import estimated_seconds

    recipe, runs = expand_runs(recipe)
    validate(recipe, stream=stream)
    refuse_existing(out)
    expanded = resolve_ingredients(recipe, token=token)
    recipe, lineage = expanded.recipe, checked_lineage(expanded, runs, token)
    needed = ingredients_to_fetch(recipe, lineage.models)
    given, used = weights_by_name(recipe, lineage.models), with_base_if_needed(recipe, needed, lineage.ancestor)
    plan = plan_of(recipe, used, {name: given[name] for name in needed.names})
    missing = missing_weights(used.checkpoints)
    layout = plan.layout
    layers, again = batch_norms(tensor.name for tensor in layout.tensors), None
    if recipe.examples and layers and len(layout.labels) > 1:
        again = {"layers": len(layers), "examples": recipe.examples.title}
    (_, output), (_, cache) = disk_needs(used, plan, out, stream).values()
    return {
        "verdict": lineage.verdict,
        "ingredients": {model.name: str(model.checkpoint) for model in lineage.models.ingredients},
        "files": {file.name: file.size for file in layout.files},
        "tensors": len(layout.tensors),
        "alignments": list(used.notes),
        "dtype": layout.dtype,
        "fetch_bytes": sum(source.files[file] for source, file in missing),
        "output_bytes": layout.size,
        "output_disk_bytes": output,
        "output_free_bytes": free_bytes(out.absolute().parent),
        "cache_disk_bytes": cache,
        "cache_free_bytes": free_bytes(hub.cache_folder()),
        "estimated_seconds": estimated_seconds(plan, used.checkpoints, missing),
        "batch_norm": again,
    }


def _evaluation(
    expanded: ResolvedIngredients,
    everyone: AlignedModels,
    benches: Sequence[EvalDataset],
    plan: Plan,
    folder: Path,
    device: str,
    quiet: bool,
    here: ProcessGroup,
    statistics: BatchStatistics | None,
    learn: Callable[..., Plan] | None,
) -> AbstractContextManager[Evaluation | None]:
    if not benches:
        return nullcontext()
    from hf_soup.evaluation import Evaluation

    return Evaluation(
        benches,
        held_out=len(expanded.recipe.score),
        names=list(expanded.groups),
        leaves=expanded.flatten,
        plan=plan,
        paths=fetch_weights(everyone.checkpoints, quiet=quiet),
        config_folder=folder,
        device=device,
        head_of=everyone.head_of,
        quiet=quiet,
        world=here,
        statistics=statistics,
        learn=learn,
    )
