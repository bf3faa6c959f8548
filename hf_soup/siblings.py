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


def strangers(bodies: Kinship, names: Sequence[str]) -> list[Reason]:
    """Those that are kin to nobody in the largest family; where there are none, those that drifted far apart.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
    """
    kin = {pair: bodies.kin(*pair) for pair in _pairs(len(names))}
    known = {pair: link for pair, link in kin.items() if link is not None}
    cosines = {pair: float(bodies.cosines[pair]) for pair in known}
    family, *rest = families(known, len(names))
    if rest and known:
        outside = [names[number] for group in rest for number in group]
        across = [cosine for (a, b), cosine in cosines.items() if (a in family) != (b in family)]
        message = (
            f"{some(outside)}: the weights have nothing in common with those of "
            f"{some([names[number] for number in family])} (cosine {max(across, default=math.nan):.3f} at most; "
            f"siblings have {kinship.STRANGERS} or more). They were not fine-tuned from the same model, or their "
            f"neurons stand in another order, and the average would be noise. Leave {_them(outside)} out."
        )
        return [Reason("strangers", message, tuple(outside), refuses=True)]
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


def parts_apart(bodies: Kinship, names: Sequence[str], founders: int) -> list[Reason]:
    """Tensors that have nothing in common where all others do: initialised anew, or neurons in another order.

    Args:
        bodies: The ingredients come first in it, then the founders.
        names: The ingredients.
        founders: How many founders there are.
    """
    count = len(names)
    apart = {pair: found for pair in _pairs(count) if (found := bodies.apart(*pair))}
    tensors = [name for name in bodies.tensors if any(name in found for found in apart.values())]
    if not tensors:
        return []
    # Whose neurons were moved, the ancestor knows; without one, all but the largest group that agrees.
    moved = [n for n in range(count) if any(bodies.apart(n, place) for place in range(count, count + founders))]
    links = {pair: pair not in apart for pair in _pairs(count)}
    family, *rest = families(links, count)
    who = moved or [number for group in rest for number in group]
    outside = [names[number] for number in (who if moved or len(family) > 1 else range(count))]
    held = bodies.products[[bodies.tensors.index(name) for name in tensors]][:, count:, count:]
    if founders and np.isnan(held).all():
        message = (
            f"{some(tensors)}: initialised apart, as the ancestor has no such tensor, in {some(outside)}. "
            "`--select greedy` finds out who helps."
        )
        return [Reason("parts-apart", message, tuple(outside))]
    hint = "" if founders else ", or name the ancestor with --base, which tells the two apart"
    message = (
        f"{some(outside)}: kin to the others, but {len(tensors)} of {len(bodies.tensors)} tensors that were read "
        f"({len(tensors) / len(bodies.tensors):.0%}) have nothing in common with theirs: {some(tensors)}. Their "
        f"neurons stand in another order, or they were initialised anew; averaged, they would be noise. "
        f"Leave {_them(outside)} out{hint}."
    )
    return [Reason("parts-apart", message, tuple(outside), refuses=True)]


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
