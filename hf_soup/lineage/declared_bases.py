"""Where do models say that they come from? Cards, the Hub and configs, followed to ancestors of ancestors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup.checkpoint import Checkpoint, FileSource, HubRepo, label_names, open_checkpoint
from hf_soup.errors import ResolveError, SoupError
from hf_soup.hub import MAX_TEXT, Token
from hf_soup.lineage.aligned_model import AlignedModel
from hf_soup.recipe import Finding, is_local_path, split_revision

_CHAIN = 12  # how far back ancestors of ancestors are followed
_LINE = 64  # and how many of them there may be, so that a card cannot ask for a thousand requests
_LISTED, _CANDIDATES = 100, 6  # models of a kind that are listed, and those that are opened, to find an ancestor
_PARENTS = 16  # how many of one generation


class Bases(NamedTuple):
    """Models that a model says it comes from; ``stated`` on its card or by the Hub, not only in its config."""

    names: list[str]
    stated: bool = True


NOBODY = Bases([])


@dataclass(frozen=True)
class BaseReference:
    """The pretrained model that the ingredients come from, and who says so: ``recipe``, ``card`` or ``weights``.

    Where its weights cannot be read, ``stated`` is its card.
    """

    model: str
    source: str
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    stated: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def declared(self) -> bool:
        """Whether somebody says so, and not only the weights; what they alone say is not written down as a fact."""
        return self.source != "weights"

    @property
    def revision(self) -> str | None:
        """Its revision, where it could be read and is known."""
        return self.checkpoint.known_revision if self.checkpoint else None

    @property
    def card(self) -> Mapping[str, Any]:
        """The front matter of its ``README.md``."""
        return self.checkpoint.card if self.checkpoint else self.stated


@dataclass(frozen=True)
class DeclaredBases:
    """Where models say that they come from.

    Args:
        chains: For each ingredient its ancestors, nearest first, as the Hub calls them.
        shared: Those that all who say anything name, the nearest of the first one first.
        silent: Numbers of those that name nobody who can be found.
        lost: Those of them that name somebody, who is not there.
        loops: Those whose chain leads back to themselves.
        base: The one that the user named.
        offline: Whether some answers are from the cache, where renamed models have their old names.
        look: What can be read of a model that somebody names.
    """

    chains: tuple[tuple[str, ...], ...]
    shared: tuple[str, ...]
    silent: tuple[int, ...]
    lost: tuple[int, ...]
    loops: tuple[int, ...]
    base: Checkpoint | None
    offline: bool
    look: Callable[[str], Seen] = field(repr=False)

    def nearest(self, ingredient: int) -> Seen | None:
        """The nearest ancestor of an ingredient's chain whose weights can be read."""
        return next((seen for name in self.chains[ingredient] if (seen := self.look(name)).checkpoint), None)

    def without(self, liars: Collection[int], models: Sequence[str]) -> DeclaredBases:
        """The same, where what some say does not count."""
        chains = tuple(() if number in liars else chain for number, chain in enumerate(self.chains))
        shared, silent = _shared(chains, models)
        return replace(self, chains=chains, shared=shared, silent=silent)


def read_declared_bases(
    models: Sequence[AlignedModel], base: str | None, *, allow_pickle: bool, token: Token
) -> tuple[DeclaredBases, list[Finding]]:
    """What cards, the Hub and configs say, followed to ancestors of ancestors.

    Raises:
        ResolveError: The base that the user named cannot be read.
    """
    reasons: list[Finding] = []
    known: dict[str, Seen] = {}
    turns: dict[str, Lock] = {}

    def look(model: str) -> Seen:
        with turns.setdefault(model, Lock()):  # of several who ask for one at once, the first looks
            if model not in known:
                known[model] = seen = _look(model, token)
                known.setdefault(seen.name, seen)  # by which chains name it
            return known[model]

    chains = in_parallel(lambda model: _chain(model.checkpoint, look), models)
    # A name that nobody can find contradicts nobody: where others can be found, that model's weights decide.
    lost = [index for index, chain in enumerate(chains) if chain and not any(look(each).found for each in chain)]
    if lost and any(chain for index, chain in enumerate(chains) if index not in lost):
        for index in lost:
            name = models[index].name
            message = f"{name} says that it comes from {chains[index][0]}, which is not there; its weights decide."
            reasons.append(Finding("base-unreadable", message, (name,)))
            chains[index] = []
    offline = any(model.checkpoint.source.from_cache for model in models)
    opened = None
    if base is not None:
        seen = _look(base, token, on_hub=False, allow_pickle=allow_pickle)
        opened = seen.checkpoint
        if seen.error is not None:
            if not offline:
                raise ResolveError.of(seen.error, f"The base cannot be used: {seen.error.message}")
            # Without a network only what was fetched is here, and of an ancestor only samples were read.
            message = f"The ancestor {base} cannot be compared: {seen.error.message}"
            reasons.append(Finding("base-unreadable", message, ()))
    every = tuple(tuple(chain) for chain in chains)
    shared, silent = _shared(every, [model.checkpoint.model for model in models])
    loops = []
    for index, model in enumerate(models):
        named = {
            name: {look(each).name for each in look(name).bases.names[:_PARENTS] if each in known}
            for name in every[index]
        }
        try:
            TopologicalSorter({model.checkpoint.model: set(every[index][:1]), **named}).prepare()
        except CycleError as error:
            loops.append(index)
            circle = " to ".join(error.args[1])
            message = f"The cards behind {model.name} lead in a circle ({circle}), so they do not say what came first."
            reasons.append(Finding("base-undeclared", message, (model.name,)))
    return DeclaredBases(every, shared, silent, tuple(lost), tuple(loops), opened, offline, look), reasons


def _shared(chains: Sequence[tuple[str, ...]], models: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Ancestors that all who speak have in common, and those who do not speak."""
    # An ingredient may be another's ancestor, and has itself as one then.
    lines = [{*chain, model} for chain, model in zip(chains, models, strict=True) if chain]
    first = next((chain for chain in chains if chain), ())
    shared = tuple(each for each in first if all(each in line for line in lines))
    speaks = [bool(chain) or model in shared[:1] for chain, model in zip(chains, models, strict=True)]
    return shared, tuple(number for number, each in enumerate(speaks) if not each)


def _chain(checkpoint: Checkpoint, look: Callable[[str], Seen]) -> list[str]:
    """The ancestors of a model, nearest first, by the names that the Hub answers with, as bases are renamed.

    All parents are followed, as a soup has several.
    """
    chain: list[str] = []
    front = [declared_bases(checkpoint)]
    for _ in range(_CHAIN):
        parents: dict[str, Seen] = {}
        for bases in front:
            for name in bases.names[:_PARENTS]:
                if len(chain) + len(parents) == _LINE:
                    break
                seen = look(name)
                if seen.name not in (*chain, checkpoint.model) and (bases.stated or seen.found):
                    parents[seen.name] = seen
        chain += parents
        front = [seen.bases for seen in list(parents.values())[:_PARENTS]]
    return chain


@dataclass(frozen=True)
class Seen:
    """An ancestor that somebody names: what the Hub calls it, whether there is one, and what can be read of it."""

    name: str
    bases: Bases
    found: bool = True
    checkpoint: Checkpoint | None = None
    error: SoupError | None = None
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)


def _look(model: str, token: Token, *, on_hub: bool = True, allow_pickle: bool = False) -> Seen:
    on_hub = on_hub and not Path(model).is_absolute()
    try:
        checkpoint = open_checkpoint(model, token=token, on_hub=on_hub, allow_pickle=allow_pickle)
    except SoupError as error:
        # Gated, or without safetensors: its weights cannot be compared, but its name and its card still count.
        try:
            repo = hub.resolve(model, token=token)
        except SoupError:
            return Seen(model, NOBODY, found=False, error=error)
        names = _models(repo.card.get("base_model")) or _models(list(hub.base_models(repo)))
        return Seen(repo.id, Bases(names or _models(_adapted(HubRepo.of(repo)))), error=error, card=repo.card)
    return Seen(checkpoint.model, declared_bases(checkpoint), checkpoint=checkpoint)


def candidates(checkpoints: Sequence[Checkpoint], token: Token) -> list[Checkpoint]:
    """Models on the Hub that may be the ancestor of ingredients which name none: the most used of their kind.

    Those that say themselves that they come from others are none, nor are those that know the ingredients' labels.
    Nothing on the Hub is needed, so nothing that fails there is an error.
    """
    kind = checkpoints[0].config.get("model_type")
    if not isinstance(kind, str) or not hub.is_reachable():
        return []
    try:
        listed = hub.search_models([kind], limit=_LISTED, token=token)
    except SoupError:
        return []
    own = {checkpoint.model for checkpoint in checkpoints}
    roots = [
        each.id for each in listed if each.id not in own and not any(tag.startswith("base_model:") for tag in each.tags)
    ]
    seen = in_parallel(partial(_look, token=token), roots[:_CANDIDATES])
    learned = {named for each in checkpoints if (named := label_names(each.config))}
    found = [each.checkpoint for each in seen if each.checkpoint is not None and not each.bases.names]
    return [each for each in found if label_names(each.config) not in learned]


def _adapted(source: FileSource) -> object:
    """What an adapter is for: a model may come from one that was merged into its base."""
    size = source.files.get("adapter_config.json", 0)
    if not 0 < size <= MAX_TEXT:
        return None
    try:
        stated = json.loads(source.read("adapter_config.json", 0, size))
    except (SoupError, ValueError, RecursionError):
        return None  # gated, or damaged: only a hint
    return stated.get("base_model_name_or_path") if isinstance(stated, dict) else None


def declared_bases(checkpoint: Checkpoint) -> Bases:
    """The models that a checkpoint says it comes from: its card, the Hub's own reading, its config."""
    found = _models(checkpoint.card.get("base_model"))
    source = checkpoint.source
    if not found and isinstance(source, HubRepo):
        found = _models(list(hub.base_models(source.repo)))
    if found:
        return Bases(found)
    # The libraries write there what was given to `from_pretrained`: the base, the repo itself, or a folder, whose name
    # may look like a repo's. So only what is on the Hub counts, and of a folder's own what is a folder here.
    for stated in (checkpoint.config.get("_name_or_path"), _adapted(source)):
        here = os.path.expanduser(stated) if not source.commit and isinstance(stated, str) else ""  # noqa: PTH111
        # Path's own way to ask raises where a name is longer than any.
        if here and is_local_path(os.path.join(here, "config.json")) and Path(here).resolve() != Path(source.reference):  # noqa: PTH118
            return Bases([str(Path(here).resolve())], False)
        if found := [name for name in _models(stated) if name != checkpoint.model]:
            return Bases(found, False)
    return NOBODY


def _models(stated: object) -> list[str]:
    """The repo ids in a card's field that may hold one or several, or anything at all."""
    named = stated if isinstance(stated, list) else [stated]
    # An address is no id by the Hub's rules, but people write it.
    plain = [
        split_revision(name)[0] if name.startswith("https://") else name for name in named if isinstance(name, str)
    ]
    return [name for name in plain if hub.is_repo_id(name)]
