"""Find the fine-tunes of a base on the Hub, and those among them that can be averaged with one another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup._util.progress import bar
from hf_soup.checkpoint import Checkpoint, open_checkpoint
from hf_soup.errors import IncompatibleError, RecipeError, ResolveError, SoupError, without_credentials
from hf_soup.hub import Token, may_pass
from hf_soup.lineage import LineageReport, check_lineage
from hf_soup.recipe import MAX_INGREDIENTS, Finding, Recipe, ingredients_set_apart, is_local_path, split_revision

#: Comparisons of one architecture's models before those that are left are given up: each reads samples of weights.
_ROUNDS = 8
_ALONE = "No other fine-tune that was looked at is like it."
#: Classes whose outputs are labels; others have some too in their config, which the class before left there.
_LABELLED = re.compile(r"Classification|Detection|Segmentation")


@dataclass(frozen=True)
class FineTune:
    """A fine-tune of the base.

    Args:
        id: As the Hub lists it.
        revision: The full commit that was looked at; None where it could not be opened.
        architecture: The class that its config names.
        task: Its ``pipeline_tag``.
        labels: The names of its outputs, ``LABEL_0``, … where it has none; empty for models without classes.
        license: What its card states, which is shown and not judged.
        downloads: In the last 30 days.
        verdict: That of its group (``proven`` or ``likely``), or ``alone``: no other is like it; ``refused``: it is
            like others, but may not be averaged with them; ``unusable``: it cannot be read, or is a copy.
        why: Why it is in no group.
        group: The number of its group, from 1.
    """

    id: str
    revision: str | None
    architecture: str | None
    task: str | None
    labels: tuple[str, ...]
    license: str | None
    downloads: int
    verdict: str
    why: str = ""
    group: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**self.__dict__, "labels": list(self.labels)}


@dataclass(frozen=True)
class MergeableGroup:
    """Siblings that can be averaged with one another.

    Args:
        members: Their ids, the most downloaded first.
        verdict: ``proven`` or ``likely``, as in a `LineageReport`.
        reasons: What is to know about them.
        from_base: Whether they were compared with the base and come from it; only then does their recipe name it.
    """

    members: tuple[str, ...]
    verdict: str
    reasons: tuple[Finding, ...] = ()
    from_base: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        reasons = [reason.to_dict() for reason in self.reasons]
        return {**self.__dict__, "members": list(self.members), "reasons": reasons}


@dataclass(frozen=True)
class SearchResult:
    """What was found.

    Args:
        base: The model whose fine-tunes these are, as the Hub calls it, with ``@revision`` where one was asked for.
        revision: Its full commit.
        parents: What the base itself was made from, as its card says.
        siblings: Its fine-tunes, the most downloaded first.
        groups: The largest first, and among equals the most downloaded.
        not_compared: Why the base's weights could not be read, and what to do; empty where they were.
        unread: Siblings of which a failure that may pass kept something from being read, so that the answer is
            incomplete.
    """

    base: str
    revision: str
    parents: tuple[str, ...] = ()
    siblings: tuple[FineTune, ...] = field(default=(), repr=False)
    groups: tuple[MergeableGroup, ...] = field(default=(), repr=False)
    not_compared: str = ""
    unread: tuple[str, ...] = ()

    def recipe(self, group: int = 1) -> Recipe:
        """A recipe of one group, pinned to the commits that were looked at, as the verdict is about those.

        Raises:
            IncompatibleError: There is no such group.

        >>> two = [FineTune(f"acme/{x}", x * 40, "ViTModel", None, (), None, 0, "proven", group=1) for x in "ab"]
        >>> group = MergeableGroup(("acme/a", "acme/b"), "proven")
        >>> found = SearchResult("acme/base", "c" * 40, (), tuple(two), (group,))
        >>> [str(each)[:12] for each in found.recipe().ingredients]
        ['acme/a@aaaaa', 'acme/b@bbbbb']
        """
        if not 1 <= group <= len(self.groups):
            raise IncompatibleError(
                f"There is no group {group} of fine-tunes of {self.base} that can be averaged; "
                f"there are {len(self.groups)}."
            )
        chosen = [each for each in self.siblings if each.group == group]
        base = self.base if self.groups[group - 1].from_base else None
        return Recipe(base_model=base, ingredients=[{"model": each.id, "revision": each.revision} for each in chosen])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``hf-soup search --json`` prints it."""
        return {
            "base": {
                "model": self.base,
                "revision": self.revision,
                "parents": list(self.parents),
                "not_compared": self.not_compared,
            },
            "siblings": [sibling.to_dict() for sibling in self.siblings],
            "groups": [group.to_dict() for group in self.groups],
            "unread": list(self.unread),
        }


def search(
    base: str, *, task: str | None = None, limit: int = 20, token: Token = None, quiet: bool = True
) -> SearchResult:
    """The fine-tunes of a base on the Hub, each with what it is, and the groups that can be averaged.

    Those are taken that name the base in their card, the most downloaded first. Each is pinned, and its config and
    headers are read; whatever cannot be used is listed with the reason. Of one group are those that have the same
    architecture and labels, and of which `check` says that they can be averaged. Labels without names are a group of
    their own: they fit any others of the same number, which is no reason to believe that they mean the same. Where the
    base's own weights cannot be read, the siblings are compared with one another alone.

    Args:
        base: A Hub id, ``id@revision`` or a huggingface.co address.
        task: Only those with this ``pipeline_tag``, such as ``image-classification``.
        limit: How many are looked at.
        token: As everywhere in huggingface_hub.
        quiet: No progress bars.

    Raises:
        ResolveError: The base does not exist, or the Hub cannot be reached, or fails where it is about no one sibling.
        RecipeError: The base is no Hub id, no fine-tune of it has the task, or the limit makes no sense.
    """
    if not 1 <= limit <= MAX_INGREDIENTS:
        raise RecipeError(f"`limit` is {limit}; it is 1 to {MAX_INGREDIENTS}.")
    if is_local_path(base):
        raise RecipeError(
            f"'{base}' is a folder or file here, and fine-tunes are looked for on the Hub.",
            hint="Name the base by its Hub id, in a folder that has nothing of that name.",
        )
    model, revision = _asked(base)
    base_repo = hub.resolve(model, revision, token=token)
    if base_repo.from_cache:
        raise ResolveError(
            f"The Hub was not reached, and it alone knows who was fine-tuned from {base_repo.id}.",
            hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again.",
        )
    named = f"{base_repo.id}@{revision}" if revision else base_repo.id
    listed = _listed(base_repo.id, task, limit, token)
    opened, why, unread = _opened(listed, named, token, quiet)
    verdicts = dict.fromkeys(why, "unusable")
    groups: list[MergeableGroup] = []
    not_compared = _unreadable(named, token) if opened else ""
    with bar("Comparing", len(opened), quiet=quiet, unit="model") as progress:
        for alike in _alike(opened):
            found, refused, broken = _averageable(alike, None if not_compared else named, token)
            groups += found
            unread += broken
            verdicts |= {name: "refused" if said else "alone" for name, said in refused.items()}
            verdicts |= dict.fromkeys(broken, "unusable")
            why |= {name: said or _ALONE for name, said in refused.items()}
            progress.update(len(alike))
    downloads = {each.id: each.downloads for each in listed}
    groups.sort(key=lambda group: (-len(group.members), -sum(downloads[member] for member in group.members)))
    numbers = {member: number for number, group in enumerate(groups, 1) for member in group.members}
    verdicts |= {member: group.verdict for group in groups for member in group.members}
    siblings = []
    for each in listed:
        checkpoint = opened.get(each.id)
        siblings.append(
            FineTune(
                id=each.id,
                revision=checkpoint.revision if checkpoint else None,
                architecture=_architecture(checkpoint.config) if checkpoint else None,
                task=each.task,
                labels=_labels(checkpoint.config) if checkpoint else (),
                license=each.license,
                downloads=each.downloads,
                verdict=verdicts[each.id],
                why=why.get(each.id, ""),
                group=numbers.get(each.id),
            )
        )
    parents = hub.base_models(base_repo)
    return SearchResult(named, base_repo.revision, parents, tuple(siblings), tuple(groups), not_compared, tuple(unread))


def _asked(base: str) -> tuple[str, str | None]:
    """The id and the revision that somebody typed."""
    model, at, revision = split_revision(base.strip())
    base = without_credentials(base)
    shown = base if len(base) <= 100 else f"{base[:99]}…"
    if not model or len(model) > 96:
        raise ResolveError(f"'{shown}' is neither a folder nor a Hub id.", hint="A Hub id is `owner/name`.")
    if at and not revision:
        raise ResolveError(f"'{shown}' names no revision after '@'.", hint=f"Leave it out: '{model}'.")
    return model, revision or None


def _unreadable(base: str, token: Token) -> str:
    """Why the weights of the base cannot be compared; empty where they can.

    Raises:
        ResolveError: The Hub failed, which says nothing of the base.
    """
    try:
        open_checkpoint(base, token=token, on_hub=True)
    except SoupError as error:
        if may_pass(error):
            raise
        return f"{error.message} {error.hint}".strip()
    return ""


def _listed(base: str, task: str | None, limit: int, token: Token) -> list[hub.Listed]:
    """The fine-tunes and adapters that name the base; quantised copies and merges of it are other relations."""

    def found(most: int, task: str | None) -> list[hub.Listed]:
        every = [
            each
            for relation in ("finetune", "adapter")
            for each in hub.search_models([f"base_model:{relation}:{base}"], most, task=task, token=token)
        ]
        return sorted(every, key=lambda each: -each.downloads)[:most]

    listed = found(limit, task)
    if not listed and task is not None:
        every = found(1000, None)
        tasks = Counter(each.task or "none stated" for each in every)
        if tasks:
            counted = ", ".join(f"{name} ({count})" for name, count in tasks.most_common(12))
            named = (
                f"The one fine-tune of {base} has not"
                if len(every) == 1
                else f"None of {len(every)} fine-tunes of {base} has"
            )
            raise RecipeError(f"{named} the task '{task}'.", hint=f"They have: {counted}. Leave --task out to see all.")
    return listed


def _opened(
    listed: Sequence[hub.Listed], base: str, token: Token, quiet: bool
) -> tuple[dict[str, Checkpoint], dict[str, str], list[str]]:
    """Those that can be used, why the others cannot, and of whom a failure that may pass is the reason."""
    with bar("Reading", len(listed), quiet=quiet, unit="model") as progress:

        def attempt(each: hub.Listed) -> Checkpoint | SoupError:
            try:
                return open_checkpoint(each.id, token=token, on_hub=True, base=base)
            except SoupError as error:
                return error
            finally:
                progress.update()

        found = dict(zip((each.id for each in listed), in_parallel(attempt, listed), strict=True))
    why: dict[str, str] = {}
    same: dict[object, dict[str, Checkpoint]] = {}
    for name, each in found.items():
        if isinstance(each, SoupError):
            why[name] = each.message
            continue
        codes = each.config.get("quantization_config")
        if isinstance(codes, Mapping) and codes:
            # Alone of its kind it would not be compared with anything, and this not be said.
            why[name] = f"{name} is quantised ({str(codes.get('quant_method', 'no method stated'))[:40]})."
            continue
        contents = tuple(map(each.source.content_id, each.weights.files))
        same.setdefault(contents if all(contents) else name, {})[name] = each  # a Hub may not state them
    # Of copies the one that says what its labels mean, and among equals the most downloaded.
    chosen = [min(copies, key=lambda name: _unnamed(_labels(copies[name].config))) for copies in same.values()]
    for original, copies in zip(chosen, same.values(), strict=True):
        why |= {name: f"{name} has the same weight files as {original}." for name in copies if name != original}
    opened = {name: each for name, each in found.items() if isinstance(each, Checkpoint) and name not in why}
    return opened, why, [name for name, each in found.items() if isinstance(each, SoupError) and may_pass(each)]


def _alike(opened: Mapping[str, Checkpoint]) -> list[dict[str, Checkpoint]]:
    """Models by the class and the labels that their configs name, in the order in which they were listed."""
    sorts: dict[tuple[object, ...], dict[str, Checkpoint]] = {}
    for name, checkpoint in opened.items():
        # In any order, as rows of heads are moved where labels stand in another.
        labels = tuple(sorted(label.strip().casefold() for label in _labels(checkpoint.config)))
        kind = (str(checkpoint.config.get("model_type")), _architecture(checkpoint.config), labels)
        sorts.setdefault(kind, {})[name] = checkpoint
    return list(sorts.values())


def _averageable(
    alike: Mapping[str, Checkpoint], base: str | None, token: Token
) -> tuple[list[MergeableGroup], dict[str, str], list[str]]:
    """The sets of models that can be averaged, why each of the others cannot (nothing where there is nobody
    to average it with), and who could not be read just now.

    Where a set is refused it is parted in two: those whom the reasons name, and those who agree with the first.
    """
    groups: list[MergeableGroup] = []
    why: dict[str, str] = {}
    unread: list[str] = []
    waiting = [dict(alike)]
    for _ in range(_ROUNDS):
        # The largest first, so that those are left over, if any, who would be few.
        waiting.sort(key=lambda each: -len(each))
        if not waiting or len(waiting[0]) < 2:
            break
        members = waiting.pop(0)
        try:
            lineage, stray = _examined(list(members.values()), base, token)
        except SoupError as error:
            # Of one whose files broke off, perhaps: an error names whom it is about, and the others go on without.
            about = [name for name in members if name in {subject.partition("@")[0] for subject in error.subjects}]
            if not about:
                if base is not None or may_pass(error):
                    raise
                about = list(members)
            why |= dict.fromkeys(about, error.message)
            unread += about if may_pass(error) else []
            waiting.append({name: each for name, each in members.items() if name not in about})
            continue
        ids = dict(zip(lineage.models.names, members, strict=True))
        if lineage.verdict != "refused":
            reasons = (*([replace(stray, refuses=False)] if stray else []), *lineage.reasons)
            groups.append(MergeableGroup(tuple(members), lineage.verdict, reasons, base is not None and stray is None))
            why = {name: said for name, said in why.items() if name not in members}
            continue
        refusals = [reason for reason in lineage.reasons if reason.refuses]
        # Whom the base does not know is set apart first: of those who differ from one another it tells who is right.
        outside = [reason for reason in refusals if reason.code == "not-from-base"]
        parting = outside or refusals
        named = {ids[name]: reason.message for reason in reversed(parting) for name in reason.ingredients}
        if parting is refusals:
            why |= dict.fromkeys(members, refusals[0].message)
        why |= named
        apart = set().union(*(ingredients_set_apart(reason, lineage.models.names) for reason in parting))
        apart_ids = [ids[name] for name in lineage.models.names if name in apart]
        if 0 < len(apart_ids) < len(members):
            for out in (False, True):
                waiting.append({name: each for name, each in members.items() if (name in apart_ids) is out})
    grouped = {member for group in groups for member in group.members}
    return groups, {name: why.get(name, "") for name in alike if name not in grouped}, unread


def _examined(members: Sequence[Checkpoint], base: str | None, token: Token) -> tuple[LineageReport, Finding | None]:
    """What `check` says, and where that is only that all come from elsewhere: what it says of them without the base."""
    lineage = check_lineage(members, base=base, token=token)
    refusals = [reason for reason in lineage.reasons if reason.refuses]
    if base is None or [reason.code for reason in refusals] != ["base-wrong"]:
        return lineage, None
    return check_lineage(members, token=token), refusals[0]


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, else the type of the model."""
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else config.get("model_type")
    return found[:80] if isinstance(found, str) else None


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's outputs in their order, with the library's own names where there are none."""
    named, count = config.get("id2label"), config.get("num_labels")
    # A config without a class may be anyone's.
    if config.get("architectures") and not _LABELLED.search(_architecture(config) or ""):
        return ()
    if isinstance(named, Mapping) and named:
        numbered = sorted(named.items(), key=lambda item: (len(str(item[0])), str(item[0])))
        return tuple(str(name)[:80] for _, name in numbered)
    if not (_architecture(config) or "").endswith("Classification"):
        return ()
    # Two is what the library assumes, and what it therefore leaves out.
    return tuple(f"LABEL_{number}" for number in range(count if isinstance(count, int) and 0 < count < 10_000 else 2))


def _unnamed(labels: Sequence[str]) -> bool:
    """Whether labels are only the library's own names; yes where there are none."""
    return all(re.fullmatch(r"label_\d+", label.strip().casefold()) for label in labels)
