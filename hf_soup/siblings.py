"""What weights say about models among themselves: strangers, neurons in another order, heads apart, copies."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from hf_soup import kinship
from hf_soup.compatibility import Reason, some
from hf_soup.kinship import Flags, Kinship, Matrix, families

#: What everyone begins anew who makes a classifier of a model that predicts words.
_POOLER = re.compile(r"pooler")
#: Tables that are looked up: a few tokens or places that moved far are most of what their cosine says, and nobody puts
#: them in another order, as the tokenizer would be another.
_TABLE = re.compile(r"embed|wte|wpe|shared\.weight")


def copies(same: Flags, names: Sequence[str], pins: Sequence[object]) -> list[Reason]:
    """Models that are equal: they are said, as they count each.

    Args:
        same: ``(models, models)``, whether every number of two that was read is equal, heads included.
        names: The ingredients.
        pins: What identifies their bytes; the same one twice is said elsewhere.
    """
    reasons = []
    for group in families(same[: len(names), : len(names)]):
        if len({pins[number] for number in group}) > 1:
            who = [names[number] for number in group]
            message = f"{some(who)} are equal in every number that was read: copies of one model, which all count."
            reasons.append(Reason("identical", message, tuple(who)))
    return reasons


def strangers(bodies: Kinship, names: Sequence[str], founder: int | None = None) -> list[Reason]:
    """Those who are not kin to the others; where there are none, those that drifted far apart.

    The family is whoever is kin to the founder, else the largest group; where several are as large, nobody is singled
    out.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
        founder: The place of the ancestor that all name.
    """
    count = len(names)
    cosines, related = bodies.cosines[:count, :count], bodies.related[:count, :count]
    known = np.isfinite(cosines) & ~np.eye(count, dtype=bool)
    groups = [group for group in families(related & known) if known[group].any()]
    if not groups:
        return []
    if founder is not None:
        own = [group for group in groups if bodies.related[group, founder].any()]
        if own:
            groups = [sorted(number for group in own for number in group), *(g for g in groups if g not in own)]
    family, *rest = groups
    if rest:
        fair = founder is None and len(family) == len(rest[0])
        outside = [number for group in (groups if fair else rest) for number in group]
        who = [names[number] for number in outside]
        inside = np.isin(np.arange(count), family)
        apart = known & ~related
        across = apart & (inside[:, None] != inside)
        a, b = _extreme(cosines, apart if fair or not across.any() else across, -1)
        numbers = f"cosine {bodies.cosines[a, b]:.3f} at most; kin have {kinship.STRANGERS} or more"
        if bodies.cosines[a, b] >= kinship.STRANGERS:
            numbers = f"their rows do not find themselves: {bodies.rows[a, b]:.0%} beyond chance; of kin, nearly all do"
        if fair:
            listed = "; ".join(some([names[number] for number in group]) for group in groups[:6])
            message = f"The weights have nothing in common: {listed} ({numbers})."
            remedy = "Leave all but one group out; an ancestor that is named with --base tells who is not from it."
        else:
            theirs = some([names[number] for number in family])
            message = f"{some(who)}: the weights have nothing in common with those of {theirs} ({numbers})."
            remedy = f"Leave {_them(who)} out."
        message += " They were not fine-tuned from the same model, or their neurons stand in another order, and the "
        return [Reason("strangers", f"{message}average would be noise. {remedy}", tuple(who), refuses=True)]
    with np.errstate(invalid="ignore"):
        drifted = (known & (cosines < kinship.DRIFTED)).any(axis=1)
    if not drifted.any():
        return []
    far = sorted(np.flatnonzero(drifted).tolist(), key=np.where(known, cosines, 0.0).sum(axis=1).__getitem__)
    a, b = _extreme(cosines, known, 1)
    farthest = f"; {names[far[0]]} is the farthest from the others" if len(names) > 2 else ""
    message = (
        f"{names[a]} and {names[b]} are kin but far apart (cosine {cosines[a, b]:.2f}), as after training with a high "
        f"learning rate{farthest}. `--select greedy` finds out who helps."
    )
    return [Reason("drifted", message, tuple(names[number] for number in far))]


def parts_apart(bodies: Kinship, names: Sequence[str], founder: int | None, *, named: bool) -> list[Reason]:
    """Tensors that have nothing in common where the others do: initialised anew, or neurons in another order.

    Two models between whom a tensor is apart are refused, unless others that have it link them: a link passes from one
    to the next, and the ancestor is one of them. So more models, or an ancestor, link more and never less.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
        founder: The place of the ancestor, where it could be compared.
        named: Whether there is an ancestor that somebody names.
    """
    count = len(names)
    places = [*range(count), *([] if founder is None else [founder])]
    poolers, tables = (
        np.array([bool(kind.search(tensor)) for tensor in bodies.tensors], dtype=bool)[:, None, None]
        for kind in (_POOLER, _TABLE)
    )
    apart = (bodies.apart & ~poolers & ~tables)[:, places][:, :, places]
    reasons = []
    if fresh := _where(bodies, bodies.apart[:, :count, :count] & poolers):
        message = f"{some(fresh)}: initialised apart, each by itself. `--select greedy` finds out who helps."
        reasons.append(Reason("parts-apart", message, tuple(names)))
    if founder is not None and (shared := _where(bodies, apart[:, :count, count:].all(axis=1, keepdims=True))):
        message = (
            f"{len(shared)} of {len(bodies.tensors)} tensors that were read are not the ancestor's: {some(shared)}. "
            "The models agree about them, as after a common step between."
        )
        reasons.append(Reason("ancestor-apart", message, tuple(names)))
    split = np.zeros(apart.shape[1:], dtype=bool)
    for tensor in np.flatnonzero(apart.any(axis=(1, 2))).tolist():
        having = np.isfinite(bodies.products[tensor, places, places])
        group = np.zeros(len(places), dtype=int)
        for number, members in enumerate(families(~apart[tensor] & having[:, None] & having), 1):
            group[members] = number
        split |= (group[:, None] != group) & having[:, None] & having
    family, *others = groups = families(~split[:count, :count])
    if not others:
        return reasons + _far_below(bodies, names, bodies.low[:, :count, :count] & ~poolers)
    # Whose neurons were moved, the ancestor tells.
    own = [group for group in groups if founder is not None and not split[group, count].all()]
    if len(own) == 1:
        family, others = own[0], [group for group in groups if group is not own[0]]
    fair = len(own) != 1 and len(others[0]) == len(family)
    outside = sorted(number for group in ([family] if fair else []) + others for number in group)
    among = apart[:, outside]
    who, tensors = [names[number] for number in outside], _where(bodies, among)
    lowest = bodies.by_tensor[:, places][:, :, places][:, outside][among].min()
    hint = "" if named else " An ancestor that is named with --base tells whose."
    message = (
        f"{some(who)}: kin{'' if fair else ' to the others'}, but {len(tensors)} of {len(bodies.tensors)} tensors that "
        f"were read have nothing in common: {some(tensors)} (lowest cosine {lowest:.2f}, where half of the tensors "
        f"have {kinship.SURE} or more). Their neurons or attention heads stand in another order, or were initialised "
        f"anew; averaged, they would be noise. {'Leave all but one out.' if fair else f'Leave {_them(who)} out.'}{hint}"
    )
    return [*reasons, Reason("parts-apart", message, tuple(who), refuses=True)]


def _far_below(bodies: Kinship, names: Sequence[str], low: Flags) -> list[Reason]:
    """Tensors that are far less alike than the others of two models: to know, as hard training may have done it."""
    if not (tensors := _where(bodies, low)):
        return []
    who = [names[number] for number in np.flatnonzero(low.any(axis=(0, 1))).tolist()]
    cosines = np.where(low, bodies.by_tensor[:, : len(names), : len(names)], np.inf)
    tensor, a, b = np.unravel_index(int(cosines.argmin()), cosines.shape)
    message = (
        f"{some(who)}: {len(tensors)} of {len(bodies.tensors)} tensors that were read have far less in common than the "
        f"others, as after hard training, or where neurons stand in another order: the cosine is "
        f"{cosines[tensor, a, b]:.2f} in {bodies.tensors[tensor]}, and {bodies.cosines[a, b]:.2f} or more in half of "
        "all. `--select greedy` finds out who helps."
    )
    return [Reason("parts-drifted", message, tuple(who))]


def _extreme(cosines: Matrix, among: Flags, sign: int) -> tuple[int, int]:
    """The pair with the lowest cosine, or, with a ``sign`` of -1, the highest."""
    a, b = np.unravel_index(int(np.where(among, sign * cosines, np.inf).argmin()), cosines.shape)
    return int(a), int(b)


def _where(bodies: Kinship, found: Flags) -> list[str]:
    """The tensors of which anything was found."""
    return [bodies.tensors[number] for number in np.flatnonzero(found.any(axis=(1, 2))).tolist()]


def heads_apart(heads: Kinship, names: Sequence[str]) -> list[Reason]:
    """Heads that were not initialised together."""
    cosines = np.where(np.eye(len(names), dtype=bool), np.nan, heads.cosines)
    with np.errstate(invalid="ignore"):
        groups = families(cosines >= kinship.HEADS_APART)
    if len(groups) < 2 or np.isnan(cosines).all():
        return []
    shown = "; ".join(some([names[number] for number in group]) for group in groups[:6])
    more = f"; and {len(groups) - 6} more" if len(groups) > 6 else ""
    message = (
        f"The heads were not initialised together (lowest cosine {np.nanmin(cosines):.2f}; groups: {shown}{more}), "
        "the commonest reason for a soup that is worse than its ingredients. Use `--select greedy`, which keeps only "
        "what helps."
    )
    return [Reason("heads-apart", message, tuple(names[n] for group in groups[1:] for n in group))]


def _them(who: Sequence[str]) -> str:
    return "it" if len(who) == 1 else "them"
