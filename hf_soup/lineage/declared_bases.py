"""Which bases do models declare? Cards, the Hub and configs, followed back at most three steps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup.checkpoint import Checkpoint, FileSource, HubRepo, label_names, open_checkpoint
from hf_soup.errors import SoupError
from hf_soup.hub import MAX_TEXT, Token
from hf_soup.lineage.aligned_model import AlignedModel
from hf_soup.recipe import is_local_path, split_revision

_STEPS = 3  # how far back declared bases are followed
_PARENTS = 16  # bases that are looked at in each step, so that a card cannot ask for a thousand requests
_LISTED, _CANDIDATES = 100, 6  # models of a kind that are listed, and those that are opened, where nobody names a base


@dataclass(frozen=True)
class BaseReference:
    """A model that others are said to come from.

    Args:
        model: What the Hub calls it, whatever its name was when a card was written.
        source: Who names it: ``recipe``, ``card`` or ``weights``.
        checkpoint: None where its weights cannot be read.
        stated: Its card, where its weights cannot be read.
        parents: The bases that it declares itself.
        error: Why its weights cannot be read.
        exists: Whether there is such a model at all.
    """

    model: str
    source: str
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    stated: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    parents: Sequence[str] = field(default=(), repr=False, compare=False)
    error: SoupError | None = field(default=None, repr=False, compare=False)
    exists: bool = True

    @property
    def declared(self) -> bool:
        """Whether somebody names it, and not only the weights; what they alone say is not written down as a fact."""
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
    """The bases behind one model.

    Args:
        bases: Those that could be found, nearest first, at most three steps back.
        further: There are more, which are unknown.
        missing: Names that the model itself gives and that nobody can find.
    """

    bases: tuple[BaseReference, ...] = ()
    further: bool = False
    missing: tuple[str, ...] = ()

    @property
    def models(self) -> list[str]:
        """What the Hub calls them."""
        return [base.model for base in self.bases]

    @property
    def nearest(self) -> BaseReference | None:
        """The nearest one whose weights can be read."""
        return next((base for base in self.bases if base.checkpoint), None)


def read_declared_bases(models: Sequence[AlignedModel], token: Token) -> list[DeclaredBases]:
    """The bases behind each model, by its card, the Hub and its config. All parents are followed: a soup has several.

    A base that nobody can find does not count. Nor does what a card says that leads back to the model itself, as it
    does not say what came first.
    """
    front = named = in_parallel(_bases_of, [model.checkpoint for model in models])
    opened: dict[str, BaseReference] = {}
    behind: list[dict[str, BaseReference]] = [{} for _ in models]
    for _ in range(_STEPS):
        names = [name for name in dict.fromkeys(name for each in front for name in each) if name not in opened]
        opened |= zip(names, in_parallel(partial(open_base, token=token), names), strict=True)
        bases = [[opened[name] for name in each if opened[name].exists] for each in front]
        for found, theirs in zip(behind, bases, strict=True):
            found |= {base.model: base for base in theirs if base.model not in found}
        front = [[parent for base in theirs for parent in base.parents][:_PARENTS] for theirs in bases]
    declared = []
    for model, names, found, parents in zip(models, named, behind, front, strict=True):
        if model.checkpoint.model in found:
            found.clear()
        further = any(name not in opened or opened[name].model not in found for name in parents)
        missing = tuple(name for name in names if not opened[name].exists)
        declared.append(DeclaredBases(tuple(found.values()), further, missing))
    return declared


def shared_base(declared: Sequence[DeclaredBases], models: Sequence[str]) -> BaseReference | None:
    """The nearest base that all have in common who declare any, if possible one whose weights can be read.

    Args:
        declared: By each model.
        models: What the Hub calls these; one that is another's base counts as its own.
    """
    lines = [{*each.models, model} for each, model in zip(declared, models, strict=True) if each.bases]
    first = next((each.bases for each in declared if each.bases), ())
    shared = [base for base in first if all(base.model in line for line in lines)]
    return next((base for base in shared if base.checkpoint), shared[0] if shared else None)


def open_base(model: str, *, source: str = "card", allow_pickle: bool = False, token: Token) -> BaseReference:
    """A model that somebody names as a base. On a card it is one on the Hub; the user may also name a folder."""
    on_hub = source == "card" and not Path(model).is_absolute()
    try:
        checkpoint = open_checkpoint(model, token=token, on_hub=on_hub, allow_pickle=allow_pickle)
    except SoupError as error:
        # Gated, or without safetensors: its weights cannot be compared, but its name and its card still count.
        try:
            repo = hub.resolve(model, token=token)
        except SoupError:
            return BaseReference(model, source, error=error, exists=False)
        return BaseReference(repo.id, source, None, repo.card, _named_by(HubRepo.of(repo), repo.card, {}), error)
    return BaseReference(checkpoint.model, source, checkpoint, parents=_bases_of(checkpoint))


def _bases_of(checkpoint: Checkpoint) -> list[str]:
    if base := checkpoint.base:  # of an adapter
        return [f"{base.model}@{base.source.commit}" if base.source.commit else base.source.reference]
    return _named_by(checkpoint.source, checkpoint.card, checkpoint.config)


def _named_by(source: FileSource, card: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The bases that a model names: on its card, else as the Hub reads it, else in its config."""
    own = {source.reference, str(Path(source.reference).resolve())}
    named = _repo_ids(card.get("base_model"))
    if not named and isinstance(source, HubRepo):
        named = _repo_ids(list(hub.base_models(source.repo)))
    # The libraries write there what was given to `from_pretrained`: the base, the repo itself, or a folder.
    for path in (config.get("_name_or_path"), _adapter_base(source)):
        here = os.path.expanduser(path) if not source.commit and isinstance(path, str) else ""  # noqa: PTH111
        # Path's own way to ask raises where a name is longer than any.
        is_model = bool(here) and is_local_path(os.path.join(here, "config.json"))  # noqa: PTH118
        stated = [str(Path(here).resolve())] if is_model else _repo_ids(path)
        named = named or [name for name in stated if name not in own]
    return [name for name in named if name not in own][:_PARENTS]


def _adapter_base(source: FileSource) -> object:
    """What an adapter is for: a model may come from one that was merged into its base."""
    size = source.files.get("adapter_config.json", 0)
    if not 0 < size <= MAX_TEXT:
        return None
    try:
        stated = json.loads(source.read("adapter_config.json", 0, size))
    except (SoupError, ValueError, RecursionError):
        return None  # gated, or damaged: only a hint
    return stated.get("base_model_name_or_path") if isinstance(stated, dict) else None


def _repo_ids(stated: object) -> list[str]:
    """The repo ids in a card's field that may hold one or several, or anything at all."""
    named = stated if isinstance(stated, list) else [stated]
    # An address is no id by the Hub's rules, but people write it.
    plain = [
        split_revision(name)[0] if name.startswith("https://") else name for name in named if isinstance(name, str)
    ]
    return [name for name in plain if hub.is_repo_id(name)]


def base_candidates(checkpoints: Sequence[Checkpoint], token: Token) -> list[Checkpoint]:
    """Models on the Hub that may be the base of ingredients which name none: the most used of their kind.

    Those that come from others themselves are none, nor are those that know the ingredients' labels. Nothing on the Hub
    is needed, so nothing that fails there is an error.
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
    bases = in_parallel(partial(open_base, token=token), roots[:_CANDIDATES])
    learned = {labels for each in checkpoints if (labels := label_names(each.config))}
    return [
        base.checkpoint
        for base in bases
        if base.checkpoint and not base.parents and label_names(base.checkpoint.config) not in learned
    ]
