"""The story in one page: check, cook, and what comes out."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_soup import architecture, transfer
from hf_soup.alignment import Alignment, Wishes
from hf_soup.batch_norm import batch_norms, require_looked_at, running_statistics
from hf_soup.checkpoint import open_all, require_unchanged
from hf_soup.choosing import choose, settled
from hf_soup.client import Token
from hf_soup.compatibility import Reason, permitted, set_apart, some
from hf_soup.contents import about_files, soup_config, write_assets, write_contents
from hf_soup.cooked import Say, Soup, to_stderr
from hf_soup.errors import RecipeError
from hf_soup.examples import collected_again, collected_for, prepare_inputs, shown
from hf_soup.lineage import Lineage, examine
from hf_soup.mixing import needs_base
from hf_soup.plan import Plan
from hf_soup.preparation import (
    disk_needs,
    fetched,
    free_bytes,
    own_benches,
    plan_of,
    prepare_benches,
    require_disk,
    require_rows,
    selected_on,
    shares,
    sources,
    trained_on,
    validate,
)
from hf_soup.recipe import Models, Recipe, as_recipe
from hf_soup.second_order import Expanded, expand
from hf_soup.staging import Staging, refuse_existing
from hf_soup.training_run import unroll, within_a_run
from hf_soup.updating import Update
from hf_soup.weights import fetch_small, fetch_weights, missing_weights, supply_of

if TYPE_CHECKING:
    from hf_soup.answering import Mixture
    from hf_soup.batch_statistics import BatchStatistics
    from hf_soup.evaluation import Evaluation
    from hf_soup.scoring import Bench
    from hf_soup.world import World


def check(
    models: Models,
    *,
    base: str | Path | None = None,
    allow: str | Sequence[str] | None = None,
    allow_pickle: bool = False,
    token: Token = None,
) -> Lineage:
    """May these models be averaged? Reads configs, cards, headers and samples of rows; no whole weight file.

    Args:
        models: Hub ids or folders, also as a mapping to their weights; a recipe, or the path of one.
        base: The pretrained ancestor; by default what the recipe, the cards or the configs name.
        allow: Codes of findings that are accepted, as in a recipe.
        allow_pickle: As in a recipe.
        token: As everywhere in huggingface_hub.

    Returns:
        The verdict with all reasons; ``refused`` is a verdict too, not an error.

    Raises:
        ResolveError: A model cannot be found, reached or read.
    """
    before = transfer.traffic()
    recipe, runs = unroll(as_recipe(models, base=base, allow=allow, allow_pickle=allow_pickle or None), checks=True)
    lineage = _examined(expand(recipe, token=token), runs, token)
    # With the headers, indexes and cards of the ingredients.
    return replace(lineage, transferred_bytes=transfer.traffic() - before)


def propose(recipe: Recipe, lineage: Lineage, *, token: Token = None) -> tuple[Recipe, str] | None:
    """A recipe near a refused one that is not refused, and what it changes; None where none was found.

    Args:
        recipe: That was checked, with checkpoints in the place of runs.
        lineage: What the check said.
        token: As everywhere in huggingface_hub.
    """
    refusals = [reason for reason in lineage.reasons if reason.refuses]
    apart = set().union(*(set_apart(reason, lineage.names) for reason in refusals))
    found = [(recipe.model_copy(update={"heads": "body"}), "with `heads: body`")] if recipe.heads is None else []
    if len(lineage.names) == len(recipe.ingredients) and apart and len(lineage.names) - len(apart) > 1:
        pairs = zip(lineage.names, recipe.ingredients, strict=True)
        kept = tuple(each for name, each in pairs if name not in apart)
        found.append((recipe.model_copy(update={"ingredients": kept}), f"without {some(sorted(apart))}"))
    only_heads = all(reason.code in ("architecture", "labels") for reason in refusals)
    for changed, how in found if only_heads else found[::-1]:
        if changed.heads == "body" and (not only_heads or recipe.score or recipe.report or recipe.examples):
            continue
        if check(changed, token=token).verdict != "refused":
            return changed, how
    return None


def _examined(expanded: Expanded, runs: Sequence[Reason], token: Token) -> Lineage:
    recipe = expanded.recipe
    lineage = examine(
        expanded.checkpoints,
        base=recipe.base,
        wishes=Wishes.of(recipe),
        alone=recipe.resolved or needs_base(recipe),
        allow_pickle=recipe.allow_pickle,
        token=token,
    )
    soups = [Reason("second-order", note) for note in expanded.notes]
    seen = selected_on(recipe, expanded.seen)
    found = within_a_run(lineage.reasons, expanded.checkpoints)
    found += [*running_statistics(recipe, lineage), *runs, *soups, *seen]
    return lineage.with_reasons(permitted([*found, *trained_on(recipe, lineage, token)], recipe.allow))


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
    say: Say = to_stderr,
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
        say: Gets warnings.

    Raises:
        SoupError: Anything that stands against it; whatever headers, configs and cards can tell is told before
            the first weight is fetched.
    """
    from hf_soup.answering import answer_along
    from hf_soup.merge import merge_along
    from hf_soup.world import World, in_step, require_alone

    if processes not in ("all", "main"):
        raise RecipeError(f"`processes` is '{processes}'; it is `all` or `main`.")
    out = Path(out)
    changes = {"method": method, "select": select, "allow": allow}
    lead = partial(_cook, recipe, changes, out, token, device, threads, stream, quiet, say)
    if processes == "main":
        return lead(World())
    if stream:
        require_alone("`--stream`")
    return in_step(lead, lambda here: answer_along(here, lambda: merge_along(out, here, threads)), say)


def _cook(
    recipe: Models | Update,
    changes: Mapping[str, Any],
    out: Path,
    token: Token,
    device: str,
    threads: int | None,
    stream: bool,
    quiet: bool,
    say: Say,
    here: World,
) -> Soup:
    from hf_soup.batch_statistics import BatchStatistics
    from hf_soup.merge import merge

    started = time.monotonic()
    update = recipe if isinstance(recipe, Update) else None
    if update and (changes["method"] or changes["select"]):
        raise RecipeError("An update is cooked by the soup's recipe: leave `method` and `select` out.")
    recipe, runs = unroll(as_recipe(recipe.recipe if isinstance(recipe, Update) else recipe, **changes))
    selection = validate(recipe, stream=stream)
    refuse_existing(out)
    if update and update.from_cache:
        say(f"note: {update.soup}: the Hub was not reached; the last version is the one in the cache")
    for note in update.left_out if update else ():
        say(f"note: {note}")
    asked, expanded = recipe, expand(recipe, token=token)
    recipe, lineage = expanded.recipe, _checked(expanded, runs, token, say)
    with Staging(out) as staging, tempfile.TemporaryDirectory(prefix="hf-soup-") as kitchen:
        given, everyone = shares(recipe, lineage), sources(recipe, lineage)
        for note in everyone.alignments[len(lineage.alignments) :]:
            say(f"note: {note}")
        whole = plan_of(recipe, everyone, given)
        config = soup_config(lineage, whole.dtype)
        with staging.disk_errors():
            write_assets(Path(kitchen), config, lineage)
        benches = prepare_benches(
            recipe, whole, Path(kitchen), config, device, token, say, lineage.head_of,
            learns=selection.learns, quiet=quiet,
        )  # fmt: skip
        require_rows(recipe, benches, learns=selection.learns)
        inputs = prepare_inputs(recipe, Path(kitchen), config, device, token, say, quiet=quiet)
        statistics = None
        if inputs and batch_norms(tensor.name for tensor in whole.tensors):
            statistics = BatchStatistics(whole, inputs, Path(kitchen), recipe.seed, device)
        needed = fetched(recipe, lineage)
        fed = everyone if needed is lineage else sources(recipe, needed)
        wanted = {name: given[name] for name in needed.names}
        plan = whole if needed is lineage else plan_of(recipe, fed, wanted)
        require_disk(fed, plan, out, stream=stream, held=staging.held_bytes())
        fetch_small(fed.checkpoints)
        learn = None
        if benches and inputs:
            from hf_soup.collecting import with_coefficients, with_statistics

            places = partial(fetch_weights, everyone.checkpoints, quiet=quiet)
            about: dict[str, Any] = {"paths": places, "inputs": inputs, "config_folder": Path(kitchen)}
            about |= {"seed": recipe.seed, "device": device, "quiet": quiet}
            whole = with_statistics(whole, **about)
            learn = partial(with_coefficients, whole, **about)
        with _evaluation(
            expanded, lineage, everyone, benches, whole, Path(kitchen), device, quiet, here, statistics, learn
        ) as evaluation:
            weights = {name: each.weight for name, each in zip(expanded.groups, asked.ingredients, strict=True)}
            weights = {name: weight for name, weight in weights.items() if weight or recipe.layers}
            choice = choose(recipe, weights, evaluation)
            chosen = {lineage.names[number]: share for number, share in choice.leaves(expanded).items()}
            leaves = needed.only(chosen)
            mixed = {name: chosen.get(name, 0.0) for name in leaves.names}
            mix = choice.mix(expanded, [lineage.names.index(name) for name in leaves.names])
            used = fed if leaves is needed else sources(mix, leaves)
            if mixed != wanted or mix != settled(recipe):
                plan = plan_of(mix, used, mixed)
            pinned = recipe.model_copy(update={"examples": inputs and inputs.examples})
            if inputs:
                places = partial(fetch_weights, used.checkpoints, quiet=quiet)
                plan = collected_for(plan, pinned, leaves, lineage, places, device=device, token=token, quiet=quiet)
            supply = supply_of(used.checkpoints, staging.fetched if stream else None)
            if here.size > 1:
                supply.fetch_all()
            follow = [file.path for file in supply.files() if file.follow and file.path]
            stamps = {path: stamp for leaf in used.checkpoints for path, stamp in leaf.stamps.items()}
            said = (
                staging.begin(plan.fingerprint, plan.outline())
                if here.size == 1
                else staging.begin(plan.fingerprint, plan.to_dict(), supply.paths(), follow, stamps)
            )
            if said not in (None, "continued"):
                say(f"note: {said}")
            here.share(None)  # all candidates are answered
            merged = merge(plan, supply, staging, world=here, threads=threads, quiet=quiet)
            with staging.disk_errors():
                lineage.pin()
            require_unchanged(everyone.checkpoints)
            if evaluation:
                evaluation.rest()
            with staging.disk_errors():
                merged, again = collected_again(
                    plan, merged, staging.folder, pinned, leaves, lineage, device=device, token=token, quiet=quiet
                )
            for name in merged.differing:
                say(f"warning: the ingredients disagree on '{name}', which is not averaged; the first one's is kept")
            files = [*about_files(leaves), *shown(plan), *(again.notes if again else ())]
            for note in files:
                say(f"note: {note}")
            with staging.disk_errors():
                own = own_benches(recipe, lineage, leaves, plan, benches, Path(kitchen) / "soup", device, token)
                tried = choice.selected.weights, [point.parameters for point in choice.curve]
                last = update.last(expanded, whole) if update else None
                results = evaluation.finish(staging.folder, merged.digest, *tried, last, *own) if evaluation else None
                here.share(None)  # and so are all reports
                for doubt in results.doubts if results else ():
                    say(f"warning: {doubt}")
                write_contents(
                    staging.folder,
                    mix,
                    lineage,
                    plan,
                    choice,
                    mixed,
                    groups=expanded.groups,
                    alignments=used.alignments,
                    files=files,
                    merged=merged,
                    results=results,
                    benches=benches,
                    inputs=inputs,
                    again=again,
                    update=update,
                    title=os.fsencode(out.name).decode("utf-8", "replace"),
                )
        seconds = time.monotonic() - started
        folder = staging.publish()
    return Soup(folder, json.loads((folder / "soup.json").read_text()), merged.resumed, round(seconds, 3))


def preview(
    recipe: Recipe, out: Path, *, stream: bool = False, token: Token = None, say: Say = to_stderr
) -> dict[str, Any]:
    """What `cook` would do, as plain data: files, bytes to fetch, disk needed and free, seconds. Fetches no weights."""
    from hf_soup.estimate import estimated_seconds

    recipe, runs = unroll(recipe)
    validate(recipe, stream=stream)
    refuse_existing(out)
    expanded = expand(recipe, token=token)
    recipe, lineage = expanded.recipe, _checked(expanded, runs, token, say)
    needed = fetched(recipe, lineage)
    given, used = shares(recipe, lineage), sources(recipe, needed)
    plan = plan_of(recipe, used, {name: given[name] for name in needed.names})
    missing = missing_weights(used.checkpoints)
    layers, again = batch_norms(tensor.name for tensor in plan.tensors), None
    if recipe.examples and layers and len(plan.sources) > 1:
        again = {"layers": len(layers), "examples": recipe.examples.title}
    (_, output), (_, cache) = disk_needs(used, plan, out, stream).values()
    return {
        "verdict": lineage.verdict,
        "ingredients": dict(zip(lineage.names, [str(each) for each in lineage.checkpoints], strict=True)),
        "files": {file.name: file.size for file in plan.files},
        "tensors": len(plan.tensors),
        "alignments": list(used.alignments),
        "dtype": plan.dtype,
        "fetch_bytes": sum(repo.files[file].size for repo, file in missing),
        "output_bytes": plan.size,
        "output_disk_bytes": output,
        "output_free_bytes": free_bytes(out.absolute().parent),
        "cache_disk_bytes": cache,
        "cache_free_bytes": free_bytes(transfer.cache_folder()),
        "estimated_seconds": estimated_seconds(plan, used.checkpoints, missing),
        "batch_norm": again,
    }


def score(
    models: str | Path | Sequence[str | Path],
    recipe: Recipe,
    *,
    token: Token = None,
    device: str = "cpu",
    quiet: bool = True,
    say: Say = to_stderr,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The recipe's held-out and report data on any models: model → data → score as plain data.

    Raises:
        SoupError: A model or the data cannot be used.
    """
    from hf_soup.evaluation import Evaluation
    from hf_soup.world import require_alone

    require_alone("`score`")
    if not recipe.score and not recipe.report:
        raise RecipeError("The recipe names no data: it has neither `score` nor `report`.")
    named = [models] if isinstance(models, str | Path) else models
    checkpoints = open_all([str(each) for each in named], allow_pickle=recipe.allow_pickle, token=token)
    told: dict[str, None] = {}

    def once(message: str) -> None:
        if message not in told:
            told[message] = None
            say(message)

    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for checkpoint in checkpoints:
        architecture.read_config(checkpoint.config, checkpoint.model)  # refuses what nobody could make a model of
        alignment = Alignment((checkpoint.tensors,), labels=architecture.label_names(checkpoint.config))
        alone = Lineage("likely", None, (checkpoint,), (checkpoint.model,), (), alignment)
        plan = plan_of(Recipe(ingredients=[checkpoint.model]), alone, {checkpoint.model: 1.0})
        with tempfile.TemporaryDirectory(prefix="hf-soup-") as folder:
            config = soup_config(alone, plan.dtype)
            write_assets(Path(folder), config, alone)
            benches = prepare_benches(recipe, plan, Path(folder), config, device, token, once, quiet=quiet)
            with Evaluation(
                benches, held_out=0, names=[checkpoint.model], plan=plan,
                paths=fetch_weights([checkpoint], quiet=quiet), config_folder=Path(folder), device=device, quiet=quiet,
            ) as evaluation:  # fmt: skip
                scores[str(checkpoint)] = {at: each.to_dict() for at, each in evaluation.alone().items()}
    return scores


def _checked(expanded: Expanded, runs: Sequence[Reason], token: Token, say: Say) -> Lineage:
    for reason in runs:
        say(f"note: [{reason.code}] {reason.message}")
    lineage = _examined(expanded, runs, token)
    require_looked_at(expanded.recipe, lineage)
    lineage.raise_if_refused()
    for reason in lineage.reasons:
        if reason not in runs:
            kind = "note" if reason.code == "second-order" else "allowed" if reason.allowed else "warning"
            say(f"{kind}: [{reason.code}] {reason.message}")
    for alignment in lineage.alignments:
        say(f"note: {alignment}")
    for name, checkpoint in zip(lineage.names, lineage.checkpoints, strict=True):
        for note in checkpoint.notes:
            say(f"note: {name}: {note}")
    return lineage


def _evaluation(
    expanded: Expanded,
    lineage: Lineage,
    everyone: Lineage,
    benches: Sequence[Bench],
    plan: Plan,
    folder: Path,
    device: str,
    quiet: bool,
    here: World,
    statistics: BatchStatistics | None,
    learn: Callable[..., Mixture] | None,
) -> AbstractContextManager[Evaluation | None]:
    if not benches:
        return nullcontext()
    from hf_soup.evaluation import Evaluation

    return Evaluation(
        benches,
        held_out=len(expanded.recipe.score),
        names=list(expanded.groups),
        leaves=expanded.leaf_weights,
        plan=plan,
        paths=fetch_weights(everyone.checkpoints, quiet=quiet),
        config_folder=folder,
        device=device,
        head_of=lineage.head_of,
        quiet=quiet,
        world=here,
        statistics=statistics,
        learn=learn,
    )
