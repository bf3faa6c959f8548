"""Is a published soup what it says? Cook it again from its repo alone, and compare.

What the recipe in a repo asks for is checked before anything of it is believed (`hf_soup.ingredients.published`), the
pinned ingredients are streamed past, and every tensor is compared bit by bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_soup import hub
from hf_soup._util.logs import PrintableLogger
from hf_soup._util.parallel import in_parallel
from hf_soup._util.progress import bar
from hf_soup._util.text import some
from hf_soup.checkpoint import ADAPTER_WEIGHTS, Checkpoint, HubRepo, open_checkpoint, require_unchanged
from hf_soup.errors import (
    IncompatibleError,
    MergeError,
    RecipeError,
    ResolveError,
    ScoringError,
    SoupError,
    ValuesError,
)
from hf_soup.evaluation import (
    collect_statistics,
    load_calibration,
    looks_at_examples,
    model_template,
    recalibrate_batch_norm,
    with_statistics,
)
from hf_soup.hub import ASSETS, INDEX, SINGLE, Token, may_pass
from hf_soup.ingredients import Paths, Published, local_path, model_index, open_published, value_on_card
from hf_soup.lineage import (
    AlignedModels,
    AlignmentOptions,
    BaseReference,
    correspond,
    processing_files,
    write_assets,
)
from hf_soup.merging import (
    AdapterPlan,
    Plan,
    RunContext,
    Workspace,
    merge,
    merge_adapter,
    needs_cutoffs,
    needs_statistics,
    require_alone,
    weight_files_of,
)
from hf_soup.methods import METHODS
from hf_soup.publishing import write_adapter_files
from hf_soup.recipe import Finding, Ingredient, Recipe, needs_base, parse_part, with_allowed
from hf_soup.workflows.differences import (
    Difference,
    compare_adapters,
    compare_files,
    compare_weights,
    contradictions,
    weight_files,
)
from hf_soup.workflows.prepare import free_bytes, ingredients_to_fetch, plan_of, with_base_if_needed
from hf_soup.workflows.score import score as score_models
from hf_soup.workflows.validate import validate

IDENTICAL, EQUIVALENT, DIFFERENT, UNVERIFIABLE = "identical", "equivalent", "different", "unverifiable"

logger = PrintableLogger(__name__)
#: Codes with which the Hub says that a repo cannot be had; of a private one it says that it is gone.
_ABSENT = ("gated", "revision-gone", "gone")


@dataclass(frozen=True)
class ScoreCheck:
    """A score, measured again.

    Args:
        title: The data and the metric.
        measured: What the published weights score here.
        published: What ``soup.json`` says.
        card: What the card's ``model-index`` says, where it says something.
        n: How many rows; a difference of one of them is the other machine's.
        share: Whether it is a share of rows; of another number a ten-thousandth is the other machine's.
    """

    title: str
    measured: float
    published: float | None
    card: float | None
    n: int
    share: bool = True

    @property
    def agrees(self) -> bool:
        """Whether what was published is what was measured, but for one row; the card rounds at the sixth digit."""
        stated = [each for each in (self.published, self.card) if each is not None]
        most = 1 / self.n if self.share else 1e-4 * abs(self.measured)
        return all(abs(each - self.measured) <= most + 1e-6 for each in stated)


@dataclass(frozen=True)
class VerificationReport:
    """What came out.

    Args:
        model: The soup, as the Hub calls it, with the commit that was looked at.
        verdict: ``identical``; ``equivalent``: within the bound that its method states; ``different``; or
            ``unverifiable``.
        tensors: How many were compared.
        differences: Tensors and files that are not as they should be.
        reasons: Why something could not be verified.
        digests: Of what was ``recorded`` in soup.json, of the ``published`` weights, and of the ``cooked`` ones.
        scores: With ``score=True``.
    """

    model: str
    verdict: str
    tensors: int = 0
    differences: tuple[Difference, ...] = field(default=(), repr=False)
    reasons: tuple[Finding, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    scores: tuple[ScoreCheck, ...] = ()

    @property
    def different(self) -> list[str]:
        """Names of the tensors, files and scores that make it different."""
        return [each.name for each in self.differences] + [each.title for each in self.scores if not each.agrees]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, as ``hf-soup verify --json`` prints it."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "tensors": self.tensors,
            "different": self.different,
            "differences": [each.to_dict() for each in self.differences],
            "reasons": [{"code": r.code, "message": r.message, "ingredients": list(r.ingredients)}
                        for r in self.reasons],
            "digests": dict(self.digests),
            "scores": [{"title": each.title, "measured": each.measured, "published": each.published,
                        "card": each.card, "n": each.n, "agrees": each.agrees} for each in self.scores],
        }  # fmt: skip


def verify(
    model: str,
    *,
    score: bool = False,
    map: Paths | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    token: Token = None,
    quiet: bool = True,
) -> VerificationReport:
    """Cook a published soup again from what its repo says, and compare every tensor bit by bit.

    The ingredients are streamed into a temporary folder (``TMPDIR``), which holds one copy of the soup and what is
    being read. Config, tokenizer and processor are compared with what the ingredients give.

    Args:
        model: A Hub id, ``id@revision``, a huggingface.co address, or a folder.
        score: Measure what the published weights score on the recipe's data too; they stay in the cache then.
        map: For ingredients, data and metrics that were local: name → path here.
        allow_pickle: Read ingredients that are pickles, tensors only; the recipe's own word does not count.
        trust_remote_code: Let metrics that are code run; the recipe's own word does not count.
        token: As everywhere in huggingface_hub.
        quiet: No progress bars.

    Returns:
        The verdict, which is no error whatever it is.

    Raises:
        ResolveError: There is no such model, or the Hub cannot be reached.
        MergeError: The disk has no room.
    """
    require_alone("`verify`")
    paths = map or {}
    try:
        published = open_published(model, allow_pickle=allow_pickle, token=token)
        looks = published.with_calibration(paths)
    except RecipeError as error:
        return VerificationReport(model, UNVERIFIABLE, reasons=(Finding("recipe-refused", str(error)),))
    if published.source.from_cache:
        raise ResolveError(
            f"{published}: the Hub was not reached, and the cache may not have all that was published.",
            hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again.",
        )
    published = replace(published, recipe=looks.model_copy(update={"test": ()}))
    reasons = [*_refused(published.recipe)]
    measured = published.recipe
    if score:
        try:
            measured = published.with_data(paths, trust_remote_code=trust_remote_code)
        except RecipeError as error:
            reasons.append(Finding("data", str(error)))
    if any(reason.code != "data" for reason in reasons):
        return VerificationReport(str(published), UNVERIFIABLE, reasons=tuple(reasons))
    checkpoints, found = _ingredients(published, paths, token)
    if found:
        return VerificationReport(str(published), UNVERIFIABLE, reasons=(*reasons, *found))
    try:
        base = _base(published.recipe, checkpoints, paths, token)
        checked = _cooked_again(published, checkpoints, base, looks, token, keep=score, quiet=quiet)
    except (RecipeError, IncompatibleError, ResolveError, ScoringError, ValuesError) as error:
        # What is neither said by the Hub nor by the models is the way between: no verdict comes of it.
        if may_pass(error) or (isinstance(error, ResolveError) and error.code not in _ABSENT):
            raise
        who = tuple(each.model for each in checkpoints if any(it.startswith(f"{each.model}@") for it in error.subjects))
        code = error.code if error.code in _ABSENT else "not-cookable"
        reasons.append(Finding("data" if isinstance(error, ScoringError) else code, str(error), who))
        return VerificationReport(str(published), UNVERIFIABLE, reasons=tuple(reasons))
    scores: tuple[ScoreCheck, ...] = ()
    stated, known = len(published.scores()), len(published.validation) + len(published.test)
    if score and stated > known:
        message = f"Its soup.json states {stated:,} scores, and its recipe names data for {known:,} of them."
        reasons.append(Finding("data", message))
    elif score and not known:
        logger.info("its recipe names no data, so there is nothing to measure")
    if score and (odd := [each.name for each in checked.differences if ASSETS.fullmatch(each.name)]):
        # A model of a stranger's config may be of any size.
        logger.info(f"nothing is measured, as {some(odd)} is not what its ingredients give")
    elif measured.validation or measured.test:
        try:
            scores = _rescored(published, measured, model, token, quiet)
        except SoupError as error:
            if may_pass(error):
                raise
            reasons.append(Finding("not-measurable", str(error)))
    reasons += checked.reasons
    verdict = EQUIVALENT if checked.differences else IDENTICAL
    if reasons:
        verdict = UNVERIFIABLE
    if not all(each.within for each in checked.differences) or not all(each.agrees for each in scores):
        verdict = DIFFERENT
    return replace(checked, verdict=verdict, reasons=tuple(reasons), scores=scores)


def _refused(recipe: Recipe) -> Iterator[Finding]:
    """What is wrong with a recipe by itself."""
    named = (recipe.method.name, *(each.method.name for each in recipe.overrides))
    if unknown := next((name for name in named if name not in METHODS), None):
        message = (
            f"Its method is {unknown[:80]!r}, which is not known here. Known are: {', '.join(sorted(METHODS))}. One of "
            "another package needs that package: soup.json has its name."
        )
        yield Finding("method-unknown", message)
        return
    try:
        validate(recipe)
    except RecipeError as error:
        yield Finding("recipe-refused", str(error))


def _ingredients(published: Published, paths: Paths, token: Token) -> tuple[list[Checkpoint], list[Finding]]:
    """The pinned ingredients, opened, or every reason why not."""

    def attempt(each: Ingredient) -> Checkpoint | Finding:
        try:
            if (each.base or "").startswith("local:"):  # an adapter's
                base = _path_of(parse_part(Ingredient, each.base, "the name of a model"), paths)
                if isinstance(base, Finding):
                    return base
                each = each.model_copy(update={"base": base})
            if not each.model.startswith("local:"):
                return _from_hub(each, published.recipe.allow_pickle, token)
            return _mapped(each, paths, published.recipe.allow_pickle)
        except ResolveError as error:
            if may_pass(error):
                raise
            if error.code == "pickle":
                return Finding("pickle", f"{error.message}\n--allow-pickle reads the tensors in it.", (each.model,))
            code = error.code if error.code in _ABSENT else "ingredient-unreadable"
            return Finding(code, str(error), (each.model,))

    unique = list({str(each): each for each in published.recipe.ingredients}.values())
    found = dict(zip(map(str, unique), in_parallel(attempt, unique), strict=True))
    every = [found[str(each)] for each in published.recipe.ingredients]
    reasons = list(dict.fromkeys(each for each in every if isinstance(each, Finding)))
    return [each for each in every if isinstance(each, Checkpoint)], reasons


def _from_hub(each: Ingredient, allow_pickle: bool, token: Token) -> Checkpoint:
    # Where the cache has a part of a model, the rest would look as if it had none.
    return open_checkpoint(each, allow_pickle=allow_pickle, token=token, on_hub=True, whole=True)


def _path_of(each: Ingredient, paths: Paths) -> str | Finding:
    """Where a folder of the cook's machine is on this one."""
    path, name = local_path(each.model, each.revision, paths), each.model.removeprefix("local:")
    short = (each.revision or "").removeprefix("sha256:")[:7]
    if path is None:
        message = f"'{name}' (sha256 {short}) was a folder on the machine where the soup was cooked."
        return Finding("local", f"{message}\nWhere you have it, say so: --map {name}=PATH.", (each.model,))
    if not path.is_dir():
        return Finding("local", f"--map {name}: there is no folder '{path}'.", (each.model,))
    return str(path)


def _mapped(each: Ingredient, paths: Paths, allow_pickle: bool) -> Checkpoint | Finding:
    path, name = _path_of(each, paths), each.model.removeprefix("local:")
    if isinstance(path, Finding):
        return path
    opened = open_checkpoint(Ingredient(model=path, base=each.base), allow_pickle=allow_pickle)
    if each.revision not in (None, opened.revision):
        message = f"The weights in '{path}' are not those of '{name}' in the soup."
        shown = f"  recipe {each.revision}\n  folder {opened.revision}"
        return Finding("other-weights", f"{message}\n{shown}", (each.model,))
    return replace(opened, model=each.model)


def _base(recipe: Recipe, checkpoints: Sequence[Checkpoint], paths: Paths, token: Token) -> BaseReference | None:
    """The ancestor, where the method works on it or it may have given the tokenizer."""
    needed = needs_base(recipe)
    if recipe.base_model is None or not (needed or not any(map(processing_files, checkpoints))):
        return None
    asked = parse_part(Ingredient, recipe.base_model, "the name of a model")
    try:
        if asked.model.startswith("local:"):
            found = _mapped(asked, paths, recipe.allow_pickle)
            if isinstance(found, Finding):
                raise RecipeError(found.message)
        else:
            found = _from_hub(asked, recipe.allow_pickle, token)
    except ResolveError as error:
        if needed or may_pass(error):
            raise
        return None
    return BaseReference(found.model, "recipe", found)


def _cooked_again(
    published: Published, checkpoints: Sequence[Checkpoint], base: BaseReference | None, looks: Recipe, token: Token, *,
    keep: bool, quiet: bool,
) -> VerificationReport:  # fmt: skip
    """Cook in a temporary folder, and compare. The verdict is left open; ``looks`` has the examples."""
    recipe, ancestor = published.recipe, (base.checkpoint,) if base and base.checkpoint else ()
    models, found = correspond(AlignedModels.as_stored(checkpoints, AlignmentOptions.of(recipe)))
    refusals = [reason for reason in with_allowed(found, recipe.allow) if reason.refuses]
    if refusals:
        told = [reason.message for reason in refusals]
        who = [name for reason in refusals for name in reason.ingredients]
        raise IncompatibleError("\n".join(["Its ingredients cannot be averaged:", *told]), subjects=who)
    models = replace(models, asset_sources=ancestor)
    leaves = with_base_if_needed(recipe, ingredients_to_fetch(recipe, models), base)
    plan = plan_of(recipe, models, leaves)
    if recipe.output == "adapter":
        adapter = AdapterPlan.of(plan, leaves, recipe.rank, recipe.dtype)
        count = sum(tensor.form != "none" for tensor in adapter.tensors)
        differences, digest, cooked = _adapter_made_again(published, adapter, quiet=quiet)
    else:
        count = len(plan.layout.tensors)
        differences, digest, cooked = _model_made_again(published, plan, leaves, looks, token, keep=keep, quiet=quiet)
    processed = any(map(processing_files, [*checkpoints, *ancestor])) or recipe.output == "adapter"
    # What may have come from an ingredient that was not selected, whom the recipe does not name.
    lost = [each for each in differences if not processed and each.kind == "extra" and ASSETS.fullmatch(each.name)]
    reasons = [Finding("file-unexplained", f"Nobody in its recipe gives {each.name}.") for each in lost]
    wrong = contradictions(published, plan.mixture, digest)
    differences = [*(each for each in differences if each not in lost), *wrong]
    digests = {"recorded": published.digest, "published": digest, "cooked": cooked}
    return VerificationReport(str(published), "", count, tuple(differences), tuple(reasons), digests)


def _model_made_again(
    published: Published, plan: Plan, leaves: AlignedModels, looks: Recipe, token: Token, *, keep: bool, quiet: bool
) -> tuple[list[Difference], str, str]:
    """Cook a whole model: in what the published one differs, its digest, and that of what was cooked."""
    with (
        tempfile.TemporaryDirectory(prefix="hf-soup-verify-") as room,
        Workspace(Path(room) / "soup", kept=False) as staging,
        ExitStack() as stack,
    ):
        supply = weight_files_of(leaves.checkpoints, staging.fetched)
        theirs = [name for name in weight_files(published)[0] if name in published.source.files]
        asking = any(needs_statistics(call) for call in plan.mixture.methods)
        fetched_bytes = supply.keep() if needs_cutoffs(plan) or asking else supply.peak_bytes(plan)
        _require_room(Path(room), plan, fetched_bytes, published, theirs)
        with staging.disk_errors():
            template = stack.enter_context(model_template(leaves, plan.layout.dtype))
        context = RunContext(token, quiet=quiet)
        calibration = load_calibration(looks, template, context) if looks_at_examples(plan) else None
        if asking:
            supply.fetch_all()
            plan = with_statistics(plan, calibration)
            collect_statistics(plan, supply.paths, calibration)
        staging.open(plan.fingerprint, plan.outline())
        merged = merge(plan, supply, staging, quiet=quiet)
        require_unchanged(leaves.checkpoints)
        with staging.disk_errors():
            merged = recalibrate_batch_norm(merged, plan.layout, staging.folder, calibration)
            write_assets(staging.folder, template.config, leaves)
        source = published.source
        fetch = sum(source.files[name] for name in theirs) if source.commit else 0
        with bar("Comparing", plan.layout.size + fetch, quiet=quiet) as shown:

            @contextmanager
            def here(name: str) -> Iterator[Path]:
                if not isinstance(source, HubRepo) or keep or source.here(name):
                    yield source.fetch(name, shown.update)
                else:
                    target, done = Path(room) / "published", 0

                    def arrived(count: int) -> None:
                        nonlocal done
                        shown.update(count - done)
                        done = count

                    hub.download_beside(source.repo, name, target, arrived=arrived, stopped=lambda: False)
                    yield target
                    target.unlink()

            differences, digest = compare_weights(
                published, plan, staging.folder, merged, here, again=merged.batch_norm is not None, advance=shown.update
            )
        ours = {file.name for file in plan.layout.files}
        # An index beside a whole file of weights was not compared, and some programs would load what it names.
        beside = [] if theirs == [SINGLE] else [INDEX]
        differences += compare_files(published, staging.folder, {*ours, INDEX}, {*theirs, *beside})
    return differences, digest, merged.digest


def _adapter_made_again(
    published: Published, adapter: AdapterPlan, *, quiet: bool
) -> tuple[list[Difference], str, str]:
    """Make an adapter, and compare what the factors of each tensor come to; as `_model_made_again`."""
    with tempfile.TemporaryDirectory(prefix="hf-soup-verify-") as room:
        folder = Path(room)
        merged = merge_adapter(adapter, folder, quiet=quiet)
        write_adapter_files(folder, adapter)
        require_unchanged(adapter.models.checkpoints)
        differences, digest = list[Difference](), ""
        size, own = published.source.files.get(ADAPTER_WEIGHTS), (folder / ADAPTER_WEIGHTS).stat().st_size
        if size is None:
            differences.append(Difference(ADAPTER_WEIGHTS, "missing", "it is not there"))
        elif size > 2 * own + (1 << 20):  # a stranger's, which could fill the disk
            text = f"it has {size:,} bytes and should have {own:,}"
            differences.append(Difference(ADAPTER_WEIGHTS, "content", text))
        else:
            path = published.source.fetch(ADAPTER_WEIGHTS)
            try:
                differences, digest = compare_adapters(path, folder / ADAPTER_WEIGHTS, str(published))
            except ResolveError as error:
                differences.append(Difference(ADAPTER_WEIGHTS, "content", error.message))
        differences += compare_files(published, folder, {ADAPTER_WEIGHTS}, {ADAPTER_WEIGHTS})
    return differences, digest, merged.digest


def _require_room(room: Path, plan: Plan, beside: int, published: Published, theirs: Sequence[str]) -> None:
    """Say what the disk has to hold, and stop where it cannot.

    Raises:
        MergeError: There is no room.
    """
    largest = max((published.source.files[name] for name in theirs), default=0) if published.source.commit else 0
    size = plan.layout.size
    need, free = size + max(beside, largest), free_bytes(room)
    logger.info(f"cooking again in '{room.parent}': {need / 1e9:.2f} GB are needed, {free / 1e9:.1f} GB are free")
    if need > free:
        raise MergeError(
            f"'{room.parent}' has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed ({size / 1e9:.1f} GB "
            f"for the soup, {(need - size) / 1e9:.1f} GB for files in flight).",
            hint="Make room, or set TMPDIR to a folder on a larger disk.",
            code="disk-full",
        )


def _rescored(published: Published, recipe: Recipe, model: str, token: Token, quiet: bool) -> tuple[ScoreCheck, ...]:
    """The published weights on the recipe's data, beside what soup.json and the card say."""
    pinned = f"{published.model}@{published.source.commit}" if published.source.commit else model
    found = next(iter(score_models([pinned], recipe, token=token, quiet=quiet).values()))
    said, card = published.scores(), model_index(published)
    # Titles hold names of files, which may be others here; the order is the recipe's.
    titles = list(said) if len(said) == len(found) else list(found)
    asked = [*published.validation, *published.test]
    return tuple(
        ScoreCheck(title, each["value"], said.get(title), value_on_card(card, scoring), each["n"], each["share"])
        for title, scoring, each in zip(titles, asked, found.values(), strict=True)
    )
