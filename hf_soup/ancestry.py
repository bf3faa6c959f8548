"""Where do these models come from? What their cards say, and what samples of their weights say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hf_soup import hub, kinship, parameters
from hf_soup.checkpoint import Checkpoint, open_checkpoint
from hf_soup.client import Token
from hf_soup.compatibility import Reason
from hf_soup.errors import IncompatibleError, ResolveError, SoupError
from hf_soup.headers import TensorInfo
from hf_soup.kinship import Kinship
from hf_soup.memo import remembered

_CHAIN = 5  # how far back ancestors of ancestors are followed
_PARENTS = 16  # how many of one generation, so that a card cannot ask for a thousand requests


class Bases(NamedTuple):
    """Models that a model says it comes from; ``stated`` on its card or by the Hub, not only in its config."""

    names: list[str]
    stated: bool = True


NOBODY = Bases([])


@dataclass(frozen=True)
class Ancestor:
    """The pretrained model that the ingredients come from, and who says so (``recipe`` or ``card``)."""

    model: str
    source: str
    checkpoint: Checkpoint | None = field(default=None, repr=False)

    @property
    def revision(self) -> str | None:
        """Its revision, where it could be read and is known."""
        return self.checkpoint.known_revision if self.checkpoint else None


def find_ancestor(
    checkpoints: Sequence[Checkpoint], names: Sequence[str], base: str | None, *, allow_pickle: bool, token: Token
) -> tuple[Ancestor | None, bool, list[Reason]]:
    """The ancestor that the recipe or all ingredients name; whether every ingredient says so; what contradicts."""
    reasons: list[Reason] = []
    known: dict[str, _Seen] = {}

    def look(model: str) -> _Seen:
        if model not in known:
            known[model] = _look(model, token)
        return known[model]

    chains = [_chain(checkpoint, look) for checkpoint in checkpoints]
    # A name that nobody can find contradicts nobody: where others can be found, that model's weights decide.
    lost = [index for index, chain in enumerate(chains) if chain and not any(look(each).found for each in chain)]
    if lost and any(chain for index, chain in enumerate(chains) if index not in lost):
        for index in lost:
            message = (
                f"{names[index]} says that it comes from {chains[index][0]}, which is not there; its weights decide."
            )
            reasons.append(Reason("ancestor-unreadable", message, (names[index],)))
            chains[index] = []
    speaking = [(name, chain) for name, chain in zip(names, chains, strict=True) if chain]
    # An ingredient may be another's ancestor, and has itself as one then.
    lines_of = [{*chain, checkpoint.model} for checkpoint, chain in zip(checkpoints, chains, strict=True) if chain]
    shared = [each for each in speaking[0][1] if all(each in line for line in lines_of)] if speaking else []
    silent = [
        name
        for name, chain, checkpoint in zip(names, chains, checkpoints, strict=True)
        if not chain and checkpoint.model not in shared[:1]
    ]
    declared = bool(shared) and not silent
    offline = any(checkpoint.repo and checkpoint.repo.from_cache for checkpoint in checkpoints)
    if base is not None:
        seen = _look(base, token, on_hub=False, allow_pickle=allow_pickle)
        if seen.error is not None:
            if offline:
                # Without a network only what was fetched is here, and of an ancestor only samples were read.
                message = f"The ancestor {base} cannot be compared: {seen.error.message}"
                reasons.append(Reason("ancestor-unreadable", message, ()))
                return Ancestor(base, "recipe"), False, reasons
            raise ResolveError(f"The base cannot be used: {seen.error.message}", hint=seen.error.hint)
        found = seen.checkpoint
        assert found is not None
        others = [
            (name, chain[0]) for (name, chain), line in zip(speaking, lines_of, strict=True) if found.model not in line
        ]
        for name, other in others:
            message = f"{name} says that it comes from {other}, not from {found.model}; its weights decide."
            reasons.append(Reason("base-contradicted", message, (name,)))
        return Ancestor(found.model, "recipe", found), not others, reasons
    if speaking and not shared:
        lines = "; ".join(f"{name} from {chain[0]}" for name, chain in speaking)
        if offline and not all(look(chain[0]).found for _, chain in speaking):
            # One ancestor may have two names, and only the Hub knows.
            message = f"The Hub was not reached, so it is not known whether these are one ancestor: {lines}."
            reasons.append(Reason("ancestor-unreadable", message, tuple(name for name, _ in speaking)))
            return None, False, reasons
        reasons.append(
            Reason(
                "ancestors-differ",
                f"The models say that they come from different ancestors: {lines}. If that is wrong, name the "
                "right one with --base.",
                tuple(name for name, _ in speaking),
                refuses=True,
            )
        )
        return None, False, reasons
    if not shared:
        reasons.append(
            Reason(
                "ancestor-unknown",
                "No card or config names an ancestor, so only the weights speak; two ancestors that began from the "
                "same random numbers would not be told apart. Name it with --base.",
                tuple(names),
            )
        )
        return None, False, reasons
    if silent:
        message = f"{', '.join(silent)} {'names' if len(silent) == 1 else 'name'} no ancestor; the weights decide."
        reasons.append(Reason("ancestor-undeclared", message, tuple(silent)))
    seen = look(shared[0])
    if seen.checkpoint is None:
        message = f"The ancestor {shared[0]} cannot be compared: {seen.error.message if seen.error else 'unknown'}"
        reasons.append(Reason("ancestor-unreadable", message, ()))
        return Ancestor(shared[0], "card"), declared, reasons
    return Ancestor(seen.checkpoint.model, "card", seen.checkpoint), declared, reasons


def _chain(checkpoint: Checkpoint, look: Callable[[str], _Seen]) -> list[str]:
    """The ancestors of a model, nearest first, by the names that the Hub answers with, as bases are renamed.

    All parents are followed, as a soup has several.
    """
    chain: list[str] = []
    front = [declared_bases(checkpoint)]
    for _ in range(_CHAIN):
        parents = {
            seen.name: seen
            for bases in front
            for seen in map(look, bases.names[:_PARENTS])
            if seen.name not in (*chain, checkpoint.model) and (bases.stated or seen.found)
        }
        chain += parents
        front = [seen.bases for seen in list(parents.values())[:_PARENTS]]
    return chain


@dataclass(frozen=True)
class _Seen:
    """An ancestor that somebody names: what the Hub calls it, whether there is one, and what can be read of it."""

    name: str
    bases: Bases
    found: bool = True
    checkpoint: Checkpoint | None = None
    error: SoupError | None = None


def _look(model: str, token: Token, *, on_hub: bool = True, allow_pickle: bool = False) -> _Seen:
    try:
        checkpoint = open_checkpoint(model, token=token, on_hub=on_hub, allow_pickle=allow_pickle)
    except SoupError as error:
        # Gated, or without safetensors: its weights cannot be compared, but its name and its card still count.
        try:
            repo = hub.resolve(model, token=token)
        except SoupError:
            return _Seen(model, NOBODY, found=False, error=error)
        names = _models(repo.card.get("base_model")) or _models(list(hub.base_models(repo)))
        return _Seen(repo.id, Bases(names), error=error)
    return _Seen(checkpoint.model, declared_bases(checkpoint), checkpoint=checkpoint)


def declared_bases(checkpoint: Checkpoint) -> Bases:
    """The models that a checkpoint says it comes from: its card, the Hub's own reading, its config."""
    found = _models(checkpoint.card.get("base_model"))
    if not found and checkpoint.repo is not None:
        found = _models(list(hub.base_models(checkpoint.repo)))
    if found:
        return Bases(found)
    # The library writes there what was given to `from_pretrained`: the base, the repo itself, or a folder, whose
    # name may look like a repo's. So only what is on the Hub counts.
    return Bases([name for name in _models(checkpoint.config.get("_name_or_path")) if name != checkpoint.model], False)


def _models(stated: object) -> list[str]:
    """The repo ids in a card's field that may hold one or several, or anything at all."""
    named = stated if isinstance(stated, list) else [stated]
    return [name for name in named if isinstance(name, str) and hub.is_repo_id(name)]


def weigh(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    tensors: Sequence[Mapping[str, TensorInfo]],
    ancestor: Ancestor | None,
    *,
    heads_correspond: bool = True,
) -> tuple[list[Kinship], bool, list[Reason]]:
    """Compare rows: the ingredients with each other and with the ancestor, body and head apart.

    Heads are left out where their labels or shapes were found to differ: what they were initialised with is then
    beside the point.
    """
    reasons: list[Reason] = []
    evidence: list[Kinship] = []
    others = [set(each) for each in tensors[1:] if each is not tensors[0]]
    common = set(tensors[0]).intersection(*others)
    shapes = {name: info.shape for name, info in tensors[0].items() if name in common}
    config, stored = checkpoints[0].config, list(checkpoints[0].tensors)
    in_head = set(remembered("head", [config, stored], lambda: sorted(parameters.head_names(config, stored, names[0]))))
    body = kinship.choose({name: shape for name, shape in shapes.items() if tensors[0][name].name not in in_head})
    head = kinship.choose({name: shape for name, shape in shapes.items() if tensors[0][name].name in in_head}, 2)
    wanted = list(zip(checkpoints, tensors, strict=True))
    founder = ancestor.checkpoint if ancestor else None
    if founder is not None:
        try:
            wanted.append((founder, _as_named(checkpoints[0], founder, tensors[0])))
        except IncompatibleError as error:
            message = f"The ancestor {founder.model} cannot be compared: {error.message}"
            reasons.append(Reason("ancestor-unreadable", message))
            founder = None
    samples = kinship.sample(wanted, body)
    count = len(checkpoints)
    cosines: dict[tuple[int, int], float] = {}
    for a in range(count):
        for b in range(a + 1, count):
            found = kinship.compare(samples[a], samples[b], names=(names[a], names[b]), part="body")
            if found is not None:
                evidence.append(found)
                cosines[a, b] = found.cosine
    reasons += _strangers(cosines, names)
    if head and heads_correspond:
        reasons += _heads(kinship.sample(wanted[:count], head), names, evidence)
    if founder is None or ancestor is None:
        return evidence, False, reasons
    to_base = [
        kinship.compare(sample, samples[count], names=(name, founder.model), part="body")
        for sample, name in zip(samples[:count], names, strict=True)
    ]
    evidence += [found for found in to_base if found is not None]
    strangers = [found.a for found in to_base if found is not None and found.cosine < kinship.STRANGERS]
    if len(strangers) == count and count > 1 and not any(reason.refuses for reason in reasons):
        reasons.append(
            Reason(
                "base-wrong",
                f"The models are siblings, but {founder.model} is not their ancestor: their weights have nothing in "
                f"common with it. The {ancestor.source} is wrong; name the right base with --base.",
                tuple(names),
                refuses=True,
            )
        )
    elif strangers:
        reasons.append(
            Reason(
                "not-from-base",
                f"{', '.join(strangers)}: the weights have nothing in common with {founder.model}'s.",
                tuple(strangers),
                refuses=True,
            )
        )
    cosine = kinship.task_vector_cosine(samples[:count], samples[count])
    if cosine is not None and cosine > kinship.WRONG_BASE and not strangers:
        reasons.append(
            Reason(
                "base-doubtful",
                f"Measured from {founder.model} the models all moved the same way (cosine {cosine:.2f}): they share a "
                "later ancestor, or this is not theirs.",
                tuple(names),
            )
        )
    return evidence, all(found is not None for found in to_base), reasons


def _as_named(donor: Checkpoint, founder: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The ancestor's tensors under the soup's names, where they correspond and have the same shape."""
    if not set(tensors) <= set(founder.tensors):
        ours = parameters.correspondence(donor.config, {n: i.shape for n, i in donor.tensors.items()}, donor.model)
        shapes = {name: info.shape for name, info in founder.tensors.items()}
        theirs = parameters.correspondence(donor.config, shapes, founder.model)
        by_key = {key: founder.tensors[disk] for disk, key in theirs.parameters.items()}
        found = {disk: by_key[key] for disk, key in ours.parameters.items() if key in by_key}
    else:
        found = dict(founder.tensors)
    return {name: found[name] for name, info in tensors.items() if name in found and found[name].shape == info.shape}


def _strangers(cosines: Mapping[tuple[int, int], float], names: Sequence[str]) -> list[Reason]:
    groups = kinship.families(cosines, len(names))
    if len(groups) > 1 and cosines:
        family, *rest = groups
        outside = [names[index] for group in rest for index in group]
        highest = max(
            (cosine for (a, b), cosine in cosines.items() if (a in family) != (b in family)), default=float("nan")
        )
        kin = ", ".join(names[index] for index in family)
        return [
            Reason(
                "strangers",
                f"{', '.join(outside)}: the weights have nothing in common with those of {kin} (cosine {highest:.3f} "
                f"at most; siblings have {kinship.STRANGERS} or more). They were not fine-tuned from the same "
                "model, and their average would be noise. Leave them out.",
                tuple(outside),
                refuses=True,
            )
        ]
    drifted = sorted(
        {index for pair, cosine in cosines.items() if cosine < kinship.DRIFTED for index in pair},
        key=lambda index: sum(cosine for pair, cosine in cosines.items() if index in pair),
    )
    if drifted:
        pair, cosine = min(cosines.items(), key=lambda item: item[1])
        return [
            Reason(
                "drifted",
                f"{names[pair[0]]} and {names[pair[1]]} are kin but far apart (cosine {cosine:.2f}), as after training "
                f"with a high learning rate; {names[drifted[0]]} is the farthest from the others. `--select greedy` "
                "finds out who helps.",
                tuple(names[index] for index in drifted),
            )
        ]
    return []


def _heads(
    samples: Sequence[Mapping[str, kinship.Array]], names: Sequence[str], evidence: list[Kinship]
) -> list[Reason]:
    cosines: dict[tuple[int, int], float] = {}
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            found = kinship.compare(samples[a], samples[b], names=(names[a], names[b]), part="head")
            if found is not None:
                evidence.append(found)
                cosines[a, b] = found.cosine
    groups = kinship.families(cosines, len(names), kinship.HEADS_APART)
    if len(groups) < 2 or not cosines:
        return []
    shown = "; ".join(", ".join(names[index] for index in group) for group in groups[:6])
    return [
        Reason(
            "heads-apart",
            f"The heads were not initialised together (lowest cosine {min(cosines.values()):.2f}; groups: {shown}), "
            "the commonest reason for a soup that is worse than its ingredients. Use `--select greedy`, which keeps "
            "only what helps.",
            tuple(names[index] for group in groups[1:] for index in group),
        )
    ]
