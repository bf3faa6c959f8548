"""What weights say about models among themselves: strangers, neurons in another order, heads apart, copies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_soup import kinship
from hf_soup.compatibility import Reason, some
from hf_soup.kinship import Kinship, families


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(count) for b in range(a + 1, count)]


def copies(everything: Kinship, names: Sequence[str], pins: Sequence[object]) -> list[Reason]:
    """Models that are equal: they are said, as they count each.

    Args:
        everything: Heads and bodies.
        names: The ingredients.
        pins: What identifies their bytes; the same one twice is said elsewhere.
    """
    links = {pair: bool(everything.same[pair]) for pair in _pairs(len(names))}
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
    apart = {pair: set(found) for pair in _pairs(count) if (found := bodies.apart(*pair))}
    from_founder = {n: set(found) for n in range(count) if founder is not None and (found := bodies.apart(n, founder))}
    if not apart:
        if founder is None or len(from_founder) < count:
            return []
        found = sorted(set.intersection(*from_founder.values()), key=bodies.tensors.index)
        message = (
            f"{len(found)} of {len(bodies.tensors)} tensors that were read are not the ancestor's: {some(found)}. The "
            "models agree about them, as after a common step between."
        )
        return [Reason("ancestor-apart", message, tuple(names))] if found else []
    tensors = [name for name in bodies.tensors if any(name in found for found in apart.values())]
    held = bodies.products[[bodies.tensors.index(name) for name in tensors]]
    lacking = founder is not None and bool(np.isnan(held[:, founder, founder]).all())
    # What everyone began for themselves is apart in every pair; neurons in another order are so in one model.
    everyone = count > 2 and len(apart) == len(_pairs(count)) and all(found == set(tensors) for found in apart.values())
    if lacking or (founder is None and (everyone or all("pooler" in name for name in tensors))):
        why = "as the ancestor has none such" if lacking else "each by itself"
        message = f"{some(tensors)}: initialised apart, {why}. `--select greedy` finds out who helps."
        concerned = sorted({number for pair in apart for number in pair})
        return [Reason("parts-apart", message, tuple(names[number] for number in concerned))]
    # Whose neurons were moved, the ancestor knows; without one, all but the largest group that agrees.
    family, *rest = families({pair: pair not in apart for pair in _pairs(count)}, count)
    outside = list(from_founder) or [number for group in rest for number in group]
    if not outside:
        return []  # apart from each other and not from the others: training did it, and no order of neurons
    if not from_founder and len(family) == len(rest[0]):
        outside = list(range(count))
    who = [names[number] for number in outside]
    fair = len(who) == count
    hint = "" if founder is not None or named else " An ancestor that is named with --base tells whose."
    message = (
        f"{some(who)}: kin{'' if fair else ' to the others'}, but {len(tensors)} of {len(bodies.tensors)} tensors that "
        f"were read ({len(tensors) / len(bodies.tensors):.0%}) have nothing in common, in whole or in part: "
        f"{some(tensors)}. Neurons or attention heads stand in another order, or were initialised anew; averaged, they "
        f"would be noise. {'Leave all but one out.' if fair else f'Leave {_them(who)} out.'}{hint}"
    )
    return [Reason("parts-apart", message, tuple(who), refuses=True)]


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
