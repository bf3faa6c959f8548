"""The story in one page: check, cook, and what comes out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_soup import architecture, transfer
from hf_soup.alignment import Alignment, Wishes
from hf_soup.card import with_fields
from hf_soup.checkpoint import open_all, require_unchanged
from hf_soup.client import Token
from hf_soup.contents import soup_config, write_assets, write_contents
from hf_soup.errors import MergeError, PublishError, RecipeError, ResolveError
from hf_soup.lineage import Lineage, examine
from hf_soup.plan import Plan
from hf_soup.preparation import (
    Say,
    disk_needs,
    fetched,
    free_bytes,
    own_benches,
    plan_of,
    prepare_benches,
    require_disk,
    shares,
    trained_on,
    validate,
)
from hf_soup.publish import Pushed, commit_folder, require_token
from hf_soup.recipe import Recipe, as_recipe
from hf_soup.selection import Selected
from hf_soup.staging import Staging, refuse_existing
from hf_soup.weights import fetch_small, fetch_weights, missing_weights, supply_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_soup.evaluation import Evaluation
    from hf_soup.scoring import Bench
    from hf_soup.world import World


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201 -- the default way to tell a person at a terminal


@dataclass(frozen=True)
class Soup:
    """A soup in a folder.

    Args:
        folder: Where it is.
        summary: What ``soup.json`` holds: weights, scores, evidence, digest, versions.
        resumed: Bytes that an interrupted run had written already.
        seconds: How long it took to cook.
    """

    folder: Path
    summary: Mapping[str, Any] = field(repr=False)
    resumed: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, folder: str | Path) -> Soup:
        """A soup that was cooked earlier.

        Raises:
            ResolveError: There is none in the folder.
        """
        folder = Path(folder)
        try:
            summary = json.loads((folder / "soup.json").read_text())
            if not isinstance(summary, dict) or not {"weights", "scores", "digest", "license_agreed"} <= summary.keys():
                raise ValueError("it is another program's")
        except (OSError, ValueError):
            raise ResolveError(
                f"'{folder}' is not a soup: it has no readable soup.json.",
                hint="Name a folder that `hf-soup cook` made.",
            ) from None
        return cls(folder, summary)

    @property
    def weights(self) -> dict[str, float]:
        """The share of every ingredient that went in."""
        return dict(self.summary["weights"])

    @property
    def scores(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Model → data → ``{metric, value, low, high, n}``, for the soup, its ingredients and their ensemble."""
        return dict(self.summary["scores"])

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe; cooking it again gives the same bytes."""
        return Recipe.load(self.folder / "soup.yaml")

    @property
    def digest(self) -> str:
        """The digest over all tensors."""
        return str(self.summary["digest"])

    def load(self) -> PreTrainedModel:
        """The soup as a transformers model."""
        model = architecture.model_class(
            architecture.read_config(json.loads((self.folder / "config.json").read_text()), str(self.folder))
        )
        return model.from_pretrained(self.folder)

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        replace: bool = False,
        commit_message: str | None = None,
        token: Token = None,
        say: Say = _to_stderr,
    ) -> Pushed:
        """Publish the soup as one commit to a model repo.

        Args:
            repo_id: ``owner/name``.
            private: Create the repo as private.
            license: The card's licence, in place of what the ingredients' licences give.
            replace: Delete what the repo holds beside the soup.
            commit_message: The commit's title.
            token: As everywhere in huggingface_hub.
            say: Gets warnings.

        Raises:
            PublishError: No token, no right, or a repo that holds something else.
        """
        require_token(token)
        paths = {path.relative_to(self.folder): path for path in sorted(self.folder.rglob("*"))}
        # What is hidden was put there by others: caches, a desktop's notes.
        files = {
            name.as_posix(): path
            for name, path in paths.items()
            if path.is_file() and not any(part.startswith(".") for part in name.parts)
        }
        if "README.md" not in files:
            raise PublishError(f"'{self.folder}' has no README.md.", hint="Cook the soup again, or write a card.")
        fields: dict[str, Any] = {}
        if license is not None:
            fields = {"license": license, "license_name": None, "license_link": None}
        elif not self.summary["license_agreed"]:
            say(
                "warning: the ingredients' licences are not all the same or not all stated, so the card says "
                "`license: other` and lists them. Set the right one with --license."
            )
            fields = {"license_link": f"https://huggingface.co/{repo_id}#licenses"}
        card = with_fields((self.folder / "README.md").read_text(), fields).replace("THIS_REPO", repo_id)
        with tempfile.TemporaryDirectory(prefix="hf-soup-card-") as folder:
            files["README.md"] = Path(folder) / "README.md"
            files["README.md"].write_text(card)
            return commit_folder(
                repo_id,
                files,
                message=commit_message or f"Model soup of {len(self.weights)} models",
                private=private,
                replace=replace,
                token=token,
            )


def check(
    models: Recipe | str | Path | Sequence[str],
    *,
    base: str | None = None,
    allow_pickle: bool = False,
    token: Token = None,
) -> Lineage:
    """May these models be averaged? Reads configs, cards, headers and samples of rows; no whole weight file.

    Args:
        models: Hub ids or folders, a recipe, or the path of one.
        base: The pretrained ancestor; by default what the recipe, the cards or the configs name.
        allow_pickle: As in a recipe.
        token: As everywhere in huggingface_hub.

    Returns:
        The verdict with all reasons; ``refused`` is a verdict too, not an error.

    Raises:
        ResolveError: A model cannot be found, reached or read.
    """
    before = transfer.traffic()
    recipe = as_recipe(models)
    allow_pickle = allow_pickle or recipe.allow_pickle
    checkpoints = open_all(recipe.ingredients, allow_pickle=allow_pickle, token=token)
    lineage = examine(
        checkpoints,
        base=base or recipe.base,
        wishes=Wishes.of(recipe),
        alone=recipe.resolved,
        allow_pickle=allow_pickle,
        token=token,
    )
    return replace(
        lineage,
        reasons=(*lineage.reasons, *trained_on(recipe, lineage, token)),
        transferred_bytes=transfer.traffic() - before,  # with the headers, indexes and cards of the ingredients
    )


def cook(
    recipe: Recipe | str | Path | Sequence[str],
    out: str | Path,
    *,
    token: Token = None,
    device: str = "cpu",
    threads: int | None = None,
    stream: bool = False,
    quiet: bool = True,
    say: Say = _to_stderr,
) -> Soup:
    """Check, fetch, select, average, score, and write a soup folder that appears complete or not at all.

    Args:
        recipe: A recipe, the path of one, or a list of models.
        out: The folder to make; nothing that exists is overwritten.
        token: As everywhere in huggingface_hub.
        device: Where models run when they are scored.
        threads: For averaging; by default one a core, and a few more where files must come from the disk.
        stream: Keep no ingredient: fetch files beside the output in the order in which they are averaged, and drop
            each after its last use. Nothing can be scored then.
        quiet: No progress bars.
        say: Gets warnings.

    Raises:
        SoupError: Anything that stands against it; whatever headers, configs and cards can tell is told before
            the first weight is fetched.
    """
    from hf_soup.answering import answer_along
    from hf_soup.merge import merge, merge_along
    from hf_soup.world import world

    started = time.monotonic()
    recipe, out = as_recipe(recipe), Path(out)
    selection = validate(recipe, stream=stream)
    refuse_existing(out)
    here = world()
    if stream and here.size > 1:
        raise MergeError(
            f"`--stream` fetches for one process, and there are {here.size}.",
            hint="Start one process, which uses all cores by itself; or leave --stream out.",
        )
    if here.rank > 0:
        answer_along(here, lambda: merge_along(out, here, threads))
        return Soup(out, {"weights": {}, "scores": {}, "digest": ""})
    lineage = _checked(recipe, token, say)
    with Staging(out) as staging, tempfile.TemporaryDirectory(prefix="hf-soup-") as kitchen:
        given = shares(recipe, lineage)
        everyone = plan_of(recipe, lineage, given)
        config = soup_config(lineage, everyone.dtype)
        with staging.disk_errors():
            write_assets(Path(kitchen), config, lineage)
        benches = prepare_benches(recipe, everyone, Path(kitchen), config, device, token, say, lineage.head_of)
        needed = fetched(recipe, lineage)
        wanted = {name: given[name] for name in needed.names}
        plan = everyone if needed is lineage else plan_of(recipe, needed, wanted)
        require_disk(needed, plan, out, stream=stream, held=staging.held_bytes())
        fetch_small(lineage.checkpoints)
        with _evaluation(recipe, lineage, benches, everyone, Path(kitchen), device, quiet, here) as evaluation:
            weights = {name: weight for name, weight in given.items() if weight > 0}
            found = selection.function(weights, evaluation and evaluation.held_out, **recipe.select.parameters)
            # In the recipe's order, whatever the order in which they were chosen: sums are rounded in order.
            chosen = {name: found.weights[name] for name in lineage.names if name in found.weights}
            found = Selected(chosen, found.trace)
            leaves = needed.only(chosen)
            mixed = {name: chosen.get(name, 0.0) for name in leaves.names}
            plan = plan if mixed == wanted else plan_of(recipe, leaves, mixed)
            supply = supply_of(leaves.checkpoints, staging.fetched if stream else None)
            if here.size > 1:
                supply.fetch_all()
            follow = [file.path for file in supply.files() if file.follow and file.path]
            stamps = {path: stamp for leaf in leaves.checkpoints for path, stamp in leaf.stamps.items()}
            said = (
                staging.begin(plan.fingerprint, plan.outline())
                if here.size == 1
                else staging.begin(plan.fingerprint, plan.to_dict(), supply.paths(), follow, stamps)
            )
            if said not in (None, "continued"):
                say(f"note: {said}")
            here.share(None)  # all candidates are answered
            merged = merge(plan, supply, staging, world=here, threads=threads, quiet=quiet)
            lineage.pin()
            require_unchanged(lineage.checkpoints)
            for name in merged.differing:
                say(f"warning: the ingredients disagree on '{name}', which is not averaged; the first one's is kept")
            with staging.disk_errors():
                own = own_benches(recipe, lineage, leaves, plan, benches, Path(kitchen) / "soup", device, token)
                results = evaluation.finish(staging.folder, merged.digest, *own) if evaluation else None
                here.share(None)  # and so are all reports
                write_contents(
                    staging.folder,
                    recipe,
                    lineage,
                    plan,
                    found,
                    merged=merged,
                    results=results,
                    benches=benches,
                    title=os.fsencode(out.name).decode("utf-8", "replace"),
                )
        seconds = time.monotonic() - started
        folder = staging.publish()
    return Soup(folder, json.loads((folder / "soup.json").read_text()), merged.resumed, round(seconds, 3))


def preview(
    recipe: Recipe, out: Path, *, stream: bool = False, token: Token = None, say: Say = _to_stderr
) -> dict[str, Any]:
    """What `cook` would do, as plain data: files, bytes to fetch, disk needed and free, seconds. Fetches no weights."""
    from hf_soup.estimate import estimated_seconds

    validate(recipe, stream=stream)
    refuse_existing(out)
    lineage = _checked(recipe, token, say)
    needed = fetched(recipe, lineage)
    given = shares(recipe, lineage)
    plan = plan_of(recipe, needed, {name: given[name] for name in needed.names})
    missing = missing_weights(needed.checkpoints)
    (_, output), (_, cache) = disk_needs(needed, plan, out, stream).values()
    return {
        "verdict": lineage.verdict,
        "ingredients": dict(zip(lineage.names, [str(each) for each in lineage.checkpoints], strict=True)),
        "files": {file.name: file.size for file in plan.files},
        "tensors": len(plan.tensors),
        "alignments": list(needed.alignments),
        "dtype": plan.dtype,
        "fetch_bytes": sum(repo.files[file].size for repo, file in missing),
        "output_bytes": plan.size,
        "output_disk_bytes": output,
        "output_free_bytes": free_bytes(out.absolute().parent),
        "cache_disk_bytes": cache,
        "cache_free_bytes": free_bytes(transfer.cache_folder()),
        "estimated_seconds": estimated_seconds(plan, needed.checkpoints, missing),
    }


def score(
    models: Sequence[str],
    recipe: Recipe,
    *,
    token: Token = None,
    device: str = "cpu",
    quiet: bool = True,
    say: Say = _to_stderr,
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
    checkpoints = open_all(models, allow_pickle=recipe.allow_pickle, token=token)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for checkpoint in checkpoints:
        alignment = Alignment((checkpoint.tensors,), labels=architecture.label_names(checkpoint.config))
        alone = Lineage("likely", None, (checkpoint,), (checkpoint.model,), (), alignment)
        plan = plan_of(Recipe(ingredients=[checkpoint.model]), alone, {checkpoint.model: 1.0})
        with tempfile.TemporaryDirectory(prefix="hf-soup-") as folder:
            config = soup_config(alone, plan.dtype)
            write_assets(Path(folder), config, alone)
            benches = prepare_benches(recipe, plan, Path(folder), config, device, token, say)
            with Evaluation(
                benches, held_out=0, units={checkpoint.model: {0: 1.0}}, plan=plan,
                paths=fetch_weights([checkpoint], quiet=quiet), config_folder=Path(folder), device=device, quiet=quiet,
            ) as evaluation:  # fmt: skip
                scores[str(checkpoint)] = {at: each.to_dict() for at, each in evaluation.alone().items()}
    return scores


def _checked(recipe: Recipe, token: Token, say: Say) -> Lineage:
    lineage = check(recipe, token=token)
    lineage.raise_if_refused()
    for reason in lineage.reasons:
        say(f"warning: [{reason.code}] {reason.message}")
    for alignment in lineage.alignments:
        say(f"note: {alignment}")
    for name, checkpoint in zip(lineage.names, lineage.checkpoints, strict=True):
        for note in checkpoint.notes:
            say(f"note: {name}: {note}")
    return lineage


def _evaluation(
    recipe: Recipe,
    lineage: Lineage,
    benches: Sequence[Bench],
    plan: Plan,
    folder: Path,
    device: str,
    quiet: bool,
    here: World,
) -> AbstractContextManager[Evaluation | None]:
    if not benches:
        return nullcontext()
    from hf_soup.evaluation import Evaluation, each_alone

    return Evaluation(
        benches,
        held_out=len(recipe.score),
        units=each_alone(lineage.names),
        plan=plan,
        paths=fetch_weights(lineage.checkpoints, quiet=quiet),
        config_folder=folder,
        device=device,
        head_of=lineage.head_of,
        quiet=quiet,
        world=here,
    )
