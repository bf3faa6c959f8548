"""From a recipe to a soup's folder: check, fetch, select, average, score, write."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hf_soup import hub
from hf_soup._util.logs import PrintableLogger
from hf_soup.checkpoint import ADAPTER_WEIGHTS, open_checkpoint, require_unchanged
from hf_soup.errors import RecipeError
from hf_soup.evaluation import (
    Candidates,
    Choice,
    EvaluationData,
    EvaluationReport,
    SavedModel,
    answer_along,
    batch_norms,
    choose,
    collect_statistics,
    data_of_soup,
    load_data,
    model_template,
    recalibrate_batch_norm,
    require_memory,
    require_rows,
    require_variance,
    statistics_notes,
    with_statistics,
)
from hf_soup.hub import Token
from hf_soup.ingredients import expand_runs, with_base_apart
from hf_soup.lineage import AlignedModel, AlignedModels, about_files, soup_config
from hf_soup.merging import (
    AdapterPlan,
    MergeResult,
    Plan,
    ProcessGroup,
    RunContext,
    Workspace,
    fetch_small,
    fetch_weights,
    in_step,
    merge,
    merge_adapter,
    merge_along,
    refuse_existing,
    require_alone,
    weight_files_of,
)
from hf_soup.publishing import (
    MergedModels,
    Soup,
    resolve_recipe,
    soup_report,
    write_adapter_files,
    write_folder,
)
from hf_soup.recipe import Ingredient, Mixture, Models, Recipe, as_recipe, with_method_of_selection
from hf_soup.selection import SELECTIONS
from hf_soup.workflows.check import checked_models
from hf_soup.workflows.prepare import (
    CheckedModels,
    disk_needs,
    free_bytes,
    layout_of,
    log_notes,
    require_disk,
    with_base_if_needed,
)
from hf_soup.workflows.update import Update
from hf_soup.workflows.validate import validate

logger = PrintableLogger(__name__)


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
    if processes not in ("all", "main"):
        raise RecipeError(f"`processes` is '{processes}'; it is `all` or `main`.")
    context = RunContext(token, device, threads, quiet)
    changes = {"method": method, "select": select, "allow": allow}

    def lead(here: ProcessGroup) -> Soup:
        return _cook(recipe, changes, Path(out), stream, replace(context, processes=here))

    if processes == "main":
        return lead(ProcessGroup())
    if stream:
        require_alone("`--stream`")
    return in_step(lead, lambda here: answer_along(here, lambda: merge_along(Path(out), here, threads)))


def _cook(recipe: Models | Update, changes: Mapping[str, Any], out: Path, stream: bool, context: RunContext) -> Soup:
    started = time.monotonic()
    models = _checked(recipe, changes, out, stream, context)
    with Workspace(out) as workspace, ExitStack() as stack:
        plan = models.plan()
        data = stack.enter_context(_data(models, plan, workspace, context))
        require_disk(models, plan, out, stream=stream, held=workspace.held_bytes())
        fetch_small(models.fetched.checkpoints)
        candidates = _candidates(models, plan, data, context, stack)
        choice = choose(models.recipe, models.weights, models.space(plan), candidates, models.lineage.models.head_of)
        used = _chosen(models, plan, choice)
        if candidates:
            candidates.release()
        with workspace.disk_errors():
            own = stack.enter_context(
                data_of_soup(models.recipe, data, used.leaves, models.lineage.models, used.plan, context)
            )
        used = _with_statistics(used, own, context)
        merged = _adapter(used, workspace, context) if used.adapter else _merged(used, workspace, stream, context)
        with workspace.disk_errors():
            models.lineage.models.pin()
        require_unchanged(models.fetched.checkpoints)
        with workspace.disk_errors():
            if not used.adapter:
                merged = recalibrate_batch_norm(merged, used.plan.layout, workspace.folder, own.calibration)
            used = _with_notes(used, choice, merged)
            results = (
                _evaluated(models, plan, choice, candidates, own, _saved(used, workspace.folder, merged, own))
                if candidates and data.scored
                else None
            )
            context.processes.broadcast(None)  # and so are all reports
            told = models.update.report(list(models.ingredients.groups), results) if models.update else None
            resolved = resolve_recipe(choice.final, used, data)
            report = soup_report(resolved, used, choice, merged, results, told)
            write_folder(workspace.folder, report, resolved, used, os.fsencode(out.name).decode("utf-8", "replace"))
        return Soup(workspace.publish(), report, merged.resumed, round(time.monotonic() - started, 3))


def _checked(
    recipe: Models | Update, changes: Mapping[str, Any], out: Path, stream: bool, context: RunContext
) -> CheckedModels:
    """The models, after all that can be wrong with the recipe, with them, and with the output."""
    update = recipe if isinstance(recipe, Update) else None
    if update and (changes["method"] or changes["select"]):
        raise RecipeError("An update is cooked by the soup's recipe: leave `method` and `select` out.")
    named = as_recipe(recipe.recipe if isinstance(recipe, Update) else recipe, **changes)
    asked, runs = expand_runs(with_base_apart(named, token=context.token))
    validate(asked, stream=stream)
    refuse_existing(out)
    if update and update.from_cache:
        logger.info(f"{update.soup}: the Hub was not reached; the last version is the one in the cache")
    for note in update.left_out if update else ():
        logger.info(note)
    return replace(checked_models(with_method_of_selection(asked), runs, context.token), update=update)


@contextmanager
def _data(models: CheckedModels, plan: Plan, workspace: Workspace, context: RunContext) -> Iterator[EvaluationData]:
    """The recipe's data, as a model of all that is fetched reads them."""
    learns = SELECTIONS[models.recipe.select.name].learns
    with ExitStack() as stack:
        with workspace.disk_errors():
            template = stack.enter_context(model_template(models.lineage.models, plan.layout.dtype))
        if models.recipe.validation or models.recipe.test or learns:
            require_memory(plan.layout, learns=bool(learns), device=context.device)
        data = load_data(models.recipe, template, context)
        log_notes(data)
        require_rows(models.recipe, data, learns=learns == "loss")
        require_variance(plan.layout, data.calibration)
        yield data


def _candidates(
    models: CheckedModels, plan: Plan, data: EvaluationData, context: RunContext, stack: ExitStack
) -> Candidates | None:
    """Scores of candidates, as long as a stack lasts; None where nothing is scored, and nothing learned."""
    if not data.scored and not SELECTIONS[models.recipe.select.name].learns:
        return None
    paths = fetch_weights(models.fetched.checkpoints, quiet=context.quiet)
    if data.calibration:  # what each ingredient shows by itself, at once
        collect_statistics(with_statistics(plan, data.calibration), lambda: paths, data.calibration)
    ingredients = models.space(plan).alone()
    return stack.enter_context(Candidates(plan.layout, paths, data, context, ingredients))


def _chosen(models: CheckedModels, plan: Plan, choice: Choice) -> MergedModels:
    """What a selection left, and its plan: what cooking those models alone would give."""
    leaves, layout = models.fetched.only(choice.weights), plan.layout
    if leaves is not models.fetched:
        leaves = with_base_if_needed(choice.final, leaves, models.lineage.ancestor)
        layout = layout_of(leaves, choice.final.model_dtype)
    made = Plan(layout, Mixture.of(choice.final, choice.weights, (tensor.name for tensor in layout.tensors)))
    adapter = AdapterPlan.of(made, leaves, choice.final.rank, choice.final.dtype) if models.adapter else None
    return MergedModels(models.lineage, models.ingredients.groups, leaves, made, adapter=adapter)


def _with_statistics(used: MergedModels, own: EvaluationData, context: RunContext) -> MergedModels:
    """With what its methods look at, collected on the examples as the soup itself reads them."""
    if own.calibration is None:
        return used
    plan = with_statistics(used.plan, own.calibration)
    collect_statistics(plan, partial(fetch_weights, used.leaves.checkpoints, quiet=context.quiet), own.calibration)
    return replace(used, plan=plan)


def _merged(used: MergedModels, workspace: Workspace, stream: bool, context: RunContext) -> MergeResult:
    """The soup's weights, in the workspace, made by all processes."""
    processes = context.processes
    supply = weight_files_of(used.leaves.checkpoints, workspace.fetched if stream else None)
    if processes.size > 1:
        supply.fetch_all()
    begun = workspace.open(used.plan.fingerprint, used.plan.outline())
    if begun not in (None, "continued"):
        logger.info(begun)
    processes.broadcast(None)  # all candidates are answered
    if processes.size > 1:
        processes.broadcast((used.plan, supply))
    return merge(used.plan, supply, workspace, world=processes, threads=context.threads, quiet=context.quiet)


def _adapter(used: MergedModels, workspace: Workspace, context: RunContext) -> MergeResult:
    """The soup's factors and settings, in the workspace, made by the first process."""
    adapter = used.adapter
    assert adapter is not None, "it is one"
    workspace.open(adapter.fingerprint, adapter.outline())
    context.processes.broadcast(None)  # all candidates are answered
    if context.processes.size > 1:
        context.processes.broadcast(None)
    with workspace.disk_errors():
        merged = merge_adapter(adapter, workspace.folder, threads=context.threads, quiet=context.quiet)
        write_adapter_files(workspace.folder, adapter)
    return merged


def _saved(used: MergedModels, folder: Path, merged: MergeResult, own: EvaluationData) -> SavedModel:
    """The soup as it was written; an adapter over its base."""
    base = used.leaves.base
    if not used.adapter or base is None:
        return SavedModel(folder, merged.digest)
    of = base.checkpoint.source
    named = Ingredient(model=str(folder), base=f"{of.reference}@{of.commit}" if of.commit else of.reference)
    checkpoint = open_checkpoint(named)
    alone = AlignedModels((AlignedModel("soup", checkpoint, checkpoint.tensors),), labels=used.leaves.labels)
    layout = layout_of(alone, None)
    template = replace(own.template, config=soup_config(alone, layout.dtype), dtype=layout.dtype)
    (paths,) = fetch_weights([checkpoint], quiet=True)
    return SavedModel(folder, merged.digest, template, (layout, paths))


def _with_notes(used: MergedModels, choice: Choice, merged: MergeResult) -> MergedModels:
    """With what a reader should know of the files, which is logged."""
    for name in merged.differing:
        logger.warning(f"the ingredients disagree on '{name}', which is not averaged; the first one's is kept")
    collected = merged.batch_norm.notes if merged.batch_norm else ()
    about = () if merged.adapter else about_files(used.leaves)
    notes = (*about, *choice.selected.notes, *statistics_notes(used.plan), *collected)
    for note in notes:
        logger.info(note)
    return replace(used, notes=notes)


def _evaluated(
    models: CheckedModels,
    plan: Plan,
    choice: Choice,
    candidates: Candidates,
    own: EvaluationData,
    written: SavedModel,
) -> EvaluationReport:
    """The scores of the soup that was written, and of all others."""
    last = models.update.last(models.weights, models.ingredients, plan) if models.update else None
    results = candidates.evaluate(written, own, [point.mixture for point in choice.curve], last)
    for warning in results.warnings:
        logger.warning(warning)
    return results


def preview(recipe: Recipe, out: Path, *, stream: bool = False, token: Token = None) -> dict[str, Any]:
    """What `cook` would do, as plain data: files, bytes to fetch, disk needed and free. Fetches no weights."""
    models = _checked(recipe, {"method": None, "select": None}, out, stream, RunContext(token))
    lineage, sources, plan = models.lineage, models.fetched, models.plan()
    layout, adapter = plan.layout, models.adapter
    layers, again = batch_norms(tensor.name for tensor in layout.tensors if not adapter), None
    if models.recipe.calibration and layers and len(layout.labels) > 1:
        again = {"layers": len(layers), "data": models.recipe.calibration.title}
    (_, output), (_, cache) = disk_needs(models, plan, out, stream).values()
    return {
        "verdict": lineage.verdict,
        "ingredients": {model.name: str(model.checkpoint) for model in lineage.models.ingredients},
        "files": {ADAPTER_WEIGHTS: adapter.size} if adapter else {file.name: file.size for file in layout.files},
        "tensors": sum(len(each.stored) for each in adapter.tensors) if adapter else len(layout.tensors),
        "alignments": list(sources.notes),
        "dtype": adapter.dtype if adapter else layout.dtype,
        "fetch_bytes": sum(source.files[file] for source, file in models.missing),
        "output_bytes": adapter.size if adapter else layout.size,
        "output_disk_bytes": output,
        "output_free_bytes": free_bytes(out.absolute().parent),
        "cache_disk_bytes": cache,
        "cache_free_bytes": free_bytes(hub.cache_folder()),
        "batch_norm": again,
    }
