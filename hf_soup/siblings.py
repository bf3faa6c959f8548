"""What weights say about models among themselves: strangers, neurons in another order, heads apart, copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_soup import kinship
from hf_soup.compatibility import Reason, some
from hf_soup.kinship import Kinship, families


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(count) for b in range(a + 1, count)]


def copies(same: np.ndarray[Any, np.dtype[np.bool_]], names: Sequence[str], pins: Sequence[object]) -> list[Reason]:
    """Models that are equal: they are said, as they count each.

    Args:
        same: ``(models, models)``, whether every number of two that was read is equal, heads included.
        names: The ingredients.
        pins: What identifies their bytes; the same one twice is said elsewhere.
    """
    links = {pair: bool(same[pair]) for pair in _pairs(len(names))}
    reasons = []
    for group in families(links, len(names)):
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
    kin = {pair: bodies.kin(*pair) for pair in _pairs(len(names))}
    known = {pair: link for pair, link in kin.items() if link is not None}
    compared = {number for pair in known for number in pair}
    groups = [group for group in families(known, len(names)) if compared.intersection(group)]
    if not groups:
        return []
    if founder is not None:
        own = [group for group in groups if any(bodies.kin(number, founder) for number in group)]
        if own:
            groups = [sorted(number for group in own for number in group), *(g for g in groups if g not in own)]
    family, *rest = groups
    if rest and known:
        fair = founder is None and len(family) == len(rest[0])
        outside = [number for group in (groups if fair else rest) for number in group]
        who = [names[number] for number in outside]
        apart = [pair for pair, link in known.items() if link is False]
        across = apart if fair else [(a, b) for a, b in apart if (a in family) != (b in family)]
        a, b = max(across or apart, key=lambda pair: bodies.cosines[pair])
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
    cosines = {pair: float(bodies.cosines[pair]) for pair in known}
    drifted = {number for pair, cosine in cosines.items() if cosine < kinship.DRIFTED for number in pair}
    if not drifted:
        return []
    far = sorted(drifted, key=lambda n: sum(cosine for pair, cosine in cosines.items() if n in pair))
    (a, b), cosine = min(cosines.items(), key=lambda entry: entry[1])
    farthest = f"; {names[far[0]]} is the farthest from the others" if len(names) > 2 else ""
    message = (
        f"{names[a]} and {names[b]} are kin but far apart (cosine {cosine:.2f}), as after training with a high "
        f"learning rate{farthest}. `--select greedy` finds out who helps."
    )
    return [Reason("drifted", message, tuple(names[number] for number in far))]


def parts_apart(bodies: Kinship, names: Sequence[str], founder: int | None, *, named: bool) -> list[Reason]:
    """Tensors that have nothing in common where the others do: initialised anew, or neurons in another order.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
        founder: The place of the ancestor, where it could be compared.
        named: Whether there is an ancestor that somebody names.
    """
    count = len(names)
    # Of very many models only some are compared row by row with all.
    looked = [pair for pair in _pairs(count) if bodies.by_rows(*pair)] or _pairs(count)
    apart = {pair: set(bodies.apart(*pair)) for pair in looked}
    theirs = {n: set(bodies.apart(n, founder)) for n in range(count)} if founder is not None else {}
    lacked = {name for name in bodies.tensors if founder is not None and not bodies.has(founder, name)}
    reasons = []
    # What everyone began for themselves is apart in every pair, and all of it is that the ancestor lacks; neurons in
    # another order are so in one model, and in some tensors of a layer.
    fresh = set.intersection(*apart.values()) if apart else set()
    if founder is not None:
        fresh = fresh if fresh == lacked else set()
    elif count == 2:
        fresh = {name for name in fresh if "pooler" in name}
    if fresh:
        why = "each by itself" if founder is None else "as the ancestor has none such"
        message = f"{some(sorted(fresh))}: initialised apart, {why}. `--select greedy` finds out who helps."
        reasons.append(Reason("parts-apart", message, tuple(names)))
    shared = set.intersection(*theirs.values()) if theirs and not any(apart.values()) else set()
    if shared:
        message = (
            f"{len(shared)} of {len(bodies.tensors)} tensors that were read are not the ancestor's: "
            f"{some(sorted(shared))}. The models agree about them, as after a common step between."
        )
        reasons.append(Reason("ancestor-apart", message, tuple(names)))
    # Whose neurons were moved, the ancestor knows; of what it lacks, all but the largest group that agrees.
    moved = {number: found - shared for number, found in theirs.items() if found - shared}
    rest = {pair: found & lacked if founder is not None else found for pair, found in apart.items()}
    rest = {pair: found - fresh for pair, found in rest.items()}
    family, *others = families({pair: not found for pair, found in rest.items()}, count)
    alike = bool(others) and len(others[0]) == len(family)
    for number in range(count):
        if others and (alike or number not in family):
            found = set().union(*(found for pair, found in rest.items() if number in pair))
            moved[number] = moved.get(number, set()) | found
    if not moved:
        return reasons
    who = [names[number] for number in sorted(moved)]
    tensors = sorted(set().union(*moved.values()), key=bodies.tensors.index)
    fair = len(who) == count
    hint = "" if founder is not None or named else " An ancestor that is named with --base tells whose."
    message = (
        f"{some(who)}: kin{'' if fair else ' to the others'}, but {len(tensors)} of {len(bodies.tensors)} tensors that "
        f"were read ({len(tensors) / len(bodies.tensors):.0%}) have nothing in common, in whole or in part: "
        f"{some(tensors)}. Neurons or attention heads stand in another order, or were initialised anew; averaged, they "
        f"would be noise. {'Leave all but one out.' if fair else f'Leave {_them(who)} out.'}{hint}"
    )
    return [*reasons, Reason("parts-apart", message, tuple(who), refuses=True)]


def heads_apart(heads: Kinship, names: Sequence[str]) -> list[Reason]:
    """Heads that were not initialised together."""
    every = {pair: float(heads.cosines[pair]) for pair in _pairs(len(names))}
    cosines = {pair: cosine for pair, cosine in every.items() if not math.isnan(cosine)}
    groups = families({pair: cosine >= kinship.HEADS_APART for pair, cosine in cosines.items()}, len(names))
    if len(groups) < 2 or not cosines:
        return []
    shown = "; ".join(some([names[number] for number in group]) for group in groups[:6])
    more = f"; and {len(groups) - 6} more" if len(groups) > 6 else ""
    message = (
        f"The heads were not initialised together (lowest cosine {min(cosines.values()):.2f}; groups: {shown}{more}), "
        "the commonest reason for a soup that is worse than its ingredients. Use `--select greedy`, which keeps only "
        "what helps."
    )
    return [Reason("heads-apart", message, tuple(names[n] for group in groups[1:] for n in group))]


def _them(who: Sequence[str]) -> str:
    return "it" if len(who) == 1 else "them"
