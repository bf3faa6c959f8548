"""Find the fine-tunes of a base on the Hub, and those among them that can be averaged with one another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_soup import hub
from hf_soup.checkpoint import Checkpoint, open_checkpoint
from hf_soup.client import Token
from hf_soup.compatibility import Reason
from hf_soup.errors import IncompatibleError, RecipeError, ResolveError, SoupError
from hf_soup.lineage import examine
from hf_soup.progress import bar
from hf_soup.recipe import MAX_INGREDIENTS, Ingredient, Recipe, is_here

#: Comparisons of one architecture's models before those that are left are given up: each reads samples of weights.
_ROUNDS = 8
_ALONE = "No other fine-tune that was looked at has its architecture and labels."


@dataclass(frozen=True)
class Sibling:
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
class Group:
    """Siblings that can be averaged with one another.

    Args:
        members: Their ids, the most downloaded first.
        verdict: ``proven`` or ``likely``, as in a `Lineage`.
        reasons: What is to know about them.
    """

    members: tuple[str, ...]
    verdict: str
    reasons: tuple[Reason, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        reasons = [reason.to_dict() for reason in self.reasons]
        return {"members": list(self.members), "verdict": self.verdict, "reasons": reasons}


@dataclass(frozen=True)
class Foraged:
    """What was found.

    Args:
        base: The model whose fine-tunes these are, as the Hub calls it, with ``@revision`` where one was asked for.
        revision: Its full commit.
        parents: What the base itself was made from, as its card says.
        siblings: Its fine-tunes, the most downloaded first.
        groups: The largest first, and among equals the most downloaded.
    """

    base: str
    revision: str
    parents: tuple[str, ...] = ()
    siblings: tuple[Sibling, ...] = field(default=(), repr=False)
    groups: tuple[Group, ...] = field(default=(), repr=False)

    def recipe(self, group: int = 1) -> Recipe:
        """A recipe of one group, pinned to the commits that were looked at, as the verdict is about those.

        Raises:
            IncompatibleError: There is no such group.

        >>> two = [Sibling(f"acme/{x}", x * 40, "ViTModel", None, (), None, 0, "proven", group=1) for x in "ab"]
        >>> found = Foraged("acme/base", "c" * 40, (), tuple(two), (Group(("acme/a", "acme/b"), "proven"),))
        >>> [str(each)[:12] for each in found.recipe().ingredients]
        ['acme/a@aaaaa', 'acme/b@bbbbb']
        """
        if not 1 <= group <= len(self.groups):
            raise IncompatibleError(
                f"There is no group {group} of fine-tunes of {self.base} that can be averaged; "
                f"there are {len(self.groups)}."
            )
        chosen = [each for each in self.siblings if each.group == group]
        return Recipe(base=self.base, ingredients=[{"model": each.id, "revision": each.revision} for each in chosen])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``hf-soup forage --json`` prints it."""
        return {
            "base": {"model": self.base, "revision": self.revision, "parents": list(self.parents)},
            "siblings": [sibling.to_dict() for sibling in self.siblings],
            "groups": [group.to_dict() for group in self.groups],
        }


def forage(base: str, *, task: str | None = None, limit: int = 20, token: Token = None, quiet: bool = True) -> Foraged:
    """The fine-tunes of a base on the Hub, each with what it is, and the groups that can be averaged.

    Those are taken that name the base in their card, the most downloaded first. Each is pinned, and its config and
    headers are read; whatever cannot be used is listed with the reason. Of one group are those that have the same
    architecture and labels, and of which `check` says that they can be averaged. Labels without names are a group of
    their own: they fit any others of the same number, which is no reason to believe that they mean the same.

    Args:
        base: A Hub id, ``id@revision`` or a huggingface.co address.
        task: Only those with this ``pipeline_tag``, such as ``image-classification``.
        limit: How many are looked at.
        token: As everywhere in huggingface_hub.
        quiet: No progress bars.

    Raises:
        ResolveError: The base does not exist, or the Hub cannot be reached.
        RecipeError: The base is no Hub id, no fine-tune of it has the task, or the limit makes no sense.
    """
    if not 1 <= limit <= MAX_INGREDIENTS:
        raise RecipeError(f"`limit` is {limit}; it is 1 to {MAX_INGREDIENTS}.")
    if is_here(base):
        raise RecipeError(
            f"'{base}' is a folder or file here, and fine-tunes are looked for on the Hub.",
            hint="Name the base by its Hub id, in a folder that has nothing of that name.",
        )
    asked = Ingredient.model_validate(base)
    founder = hub.resolve(asked.model, asked.revision, token=token)
    if founder.from_cache:
        raise ResolveError(
            f"The Hub was not reached, and it alone knows who was fine-tuned from {founder.id}.",
            hint="Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try again.",
        )
    named = f"{founder.id}@{asked.revision}" if asked.revision else founder.id
    listed = _listed(founder.id, task, limit, token)
    opened, why = _opened(listed, token, quiet)
    verdicts = dict.fromkeys(why, "unusable")
    groups: list[Group] = []
    with bar("Comparing", len(opened), quiet=quiet, unit="model") as progress:
        for alike in _alike(opened):
            found, refused = _averageable(alike, named, token)
            groups += found
            verdicts |= dict.fromkeys(refused, "refused" if len(alike) > 1 else "alone")
            why |= refused
            progress.update(len(alike))
    downloads = {each.id: each.downloads for each in listed}
    groups.sort(key=lambda group: (-len(group.members), -sum(downloads[member] for member in group.members)))
    numbers = {member: number for number, group in enumerate(groups, 1) for member in group.members}
    verdicts |= {member: group.verdict for group in groups for member in group.members}
    siblings = []
    for each in listed:
        checkpoint = opened.get(each.id)
        siblings.append(
            Sibling(
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
    return Foraged(named, founder.revision, hub.base_models(founder), tuple(siblings), tuple(groups))


def _listed(base: str, task: str | None, limit: int, token: Token) -> list[hub.Listed]:
    """The fine-tunes that name the base; adapters, quantised copies and merges of it are other relations."""
    tags = [f"base_model:finetune:{base}"]
    listed = hub.search(tags, limit, task=task, token=token)
    if not listed and task is not None:
        tasks = Counter(each.task for each in hub.search(tags, 1000, token=token) if each.task)
        if tasks:
            counted = ", ".join(f"{name} ({count})" for name, count in tasks.most_common(12))
            raise RecipeError(f"No fine-tune of {base} has the task '{task}'.", hint=f"They have: {counted}.")
    return listed


def _opened(listed: Sequence[hub.Listed], token: Token, quiet: bool) -> tuple[dict[str, Checkpoint], dict[str, str]]:
    """Those that can be used, and why the others cannot."""
    with bar("Reading", len(listed), quiet=quiet, unit="model") as progress:

        def attempt(each: hub.Listed) -> Checkpoint | str:
            try:
                return open_checkpoint(each.id, token=token, on_hub=True)
            except SoupError as error:
                return error.message
            finally:
                progress.update()

        found = dict(zip((each.id for each in listed), hub.in_parallel(attempt, listed), strict=True))
    opened: dict[str, Checkpoint] = {}
    why: dict[str, str] = {}
    first: dict[tuple[str | None, ...], str] = {}
    for name, each in found.items():
        if isinstance(each, str):
            why[name] = each
            continue
        assert each.repo is not None
        codes = each.config.get("quantization_config")
        if isinstance(codes, Mapping) and codes:
            # Alone of its kind it would not be compared with anything, and this not be said.
            why[name] = f"{name} is quantised ({str(codes.get('quant_method', 'no method stated'))[:40]})."
            continue
        weights = tuple(each.repo.files[file].sha256 for file in each.weight_files)
        original = first.setdefault(weights, name) if all(weights) else name
        if original == name:
            opened[name] = each
        else:
            why[name] = f"{name} has the same weight files as {original}."
    return opened, why


def _alike(opened: Mapping[str, Checkpoint]) -> list[dict[str, Checkpoint]]:
    """Models by the class and the labels that their configs name, in the order in which they were listed."""
    sorts: dict[tuple[object, ...], dict[str, Checkpoint]] = {}
    for name, checkpoint in opened.items():
        # In any order, as rows of heads are moved where labels stand in another.
        labels = tuple(sorted(label.strip().casefold() for label in _labels(checkpoint.config)))
        kind = (str(checkpoint.config.get("model_type")), _architecture(checkpoint.config), labels)
        sorts.setdefault(kind, {})[name] = checkpoint
    return list(sorts.values())


def _averageable(alike: Mapping[str, Checkpoint], base: str, token: Token) -> tuple[list[Group], dict[str, str]]:
    """The sets of models that can be averaged, and why each of the others cannot.

    Where a set is refused it is parted in two: those whom the reasons name, and those who agree with the first.
    """
    groups: list[Group] = []
    why: dict[str, str] = {}
    waiting = [dict(alike)]
    for _ in range(_ROUNDS):
        # The largest first, so that those are left over, if any, who would be few.
        waiting.sort(key=lambda each: -len(each))
        if not waiting or len(waiting[0]) < 2:
            break
        members = waiting.pop(0)
        try:
            lineage = examine(list(members.values()), base=base, token=token)
        except SoupError as error:
            # Of one whose files broke off, perhaps: an error names whom it is about, and the others go on without.
            about = [name for name in members if _names(error.message, name)] or list(members)
            why |= dict.fromkeys(about, error.message)
            waiting.append({name: each for name, each in members.items() if name not in about})
            continue
        ids = dict(zip(lineage.names, members, strict=True))
        if lineage.verdict != "refused":
            groups.append(Group(tuple(members), lineage.verdict, lineage.reasons))
            continue
        refusals = [reason for reason in lineage.reasons if reason.refuses]
        named = {ids[name]: reason.message for reason in reversed(refusals) for name in reason.ingredients}
        why |= dict.fromkeys(members, refusals[0].message) | named
        apart = set().union(*(_named_apart(reason, lineage.names) for reason in refusals))
        apart_ids = [ids[name] for name in lineage.names if name in apart]
        if 0 < len(apart_ids) < len(members):
            for out in (False, True):
                waiting.append({name: each for name, each in members.items() if (name in apart_ids) is out})
    grouped = {member for group in groups for member in group.members}
    return groups, {name: why.get(name, _ALONE) for name in alike if name not in grouped}


def _named_apart(reason: Reason, names: Sequence[str]) -> set[str]:
    """Whom a reason sets apart from the rest: of a pair with the first model the other; nobody where it names all."""
    who = set(reason.ingredients)
    if who >= set(names):
        return set()
    return who - {names[0]} or who


def _names(message: str, model: str) -> bool:
    return re.search(rf"(?<![\w./-]){re.escape(model)}(?!-|\w|\.\w)", message) is not None


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, else the type of the model."""
    named = config.get("architectures")
    found = named[0] if isinstance(named, list) and named else config.get("model_type")
    return found[:80] if isinstance(found, str) else None


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's outputs in their order, with the library's own names where there are none."""
    named, count = config.get("id2label"), config.get("num_labels")
    if isinstance(named, Mapping) and named:
        numbered = sorted(named.items(), key=lambda item: (len(str(item[0])), str(item[0])))
        return tuple(str(name)[:80] for _, name in numbered)
    if not (_architecture(config) or "").endswith("Classification"):
        return ()
    # Two is what the library assumes, and what it therefore leaves out.
    return tuple(f"LABEL_{number}" for number in range(count if isinstance(count, int) and 0 < count < 10_000 else 2))
