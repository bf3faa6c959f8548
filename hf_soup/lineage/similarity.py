"""Do weights show a common ancestor? What samples of rows have in common.

Fine-tuning moves weights little and keeps every neuron in its place. So for siblings, and for a model and its
ancestor, the same rows of the same tensors point the same way, while for models that were initialised apart they
are as good as orthogonal. docs/lineage.md has the distributions behind the thresholds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hf_soup._util.text import some
from hf_soup.checkpoint import Array
from hf_soup.recipe import Finding

#: Median cosine of the body below which two models are strangers.
STRANGERS = 0.05
#: Share of rows that find themselves below which they are too, whatever the cosine: a common mean is no kinship.
SAME_ROWS = 0.05
#: Median cosine of the body below which siblings have drifted apart.
DRIFTED = 0.9
#: Cosine below which a single tensor has nothing in common …
APART = 0.1
#: … where the median cosine is at least this, so that hard training has not done it.
SURE = 0.6
#: Share of the median cosine below which a single tensor is worth a word.
FAR_BELOW = 0.6
#: Cosine of the heads below which they were initialised apart.
HEADS_APART = 0.3
#: Lowest cosine of siblings' task vectors above which the ancestor they are measured from is hardly theirs …
WRONG_BASE = 0.8
#: … where they have at least this size, relative to the ancestor: short runs on the same data move alike too.
FAR_FROM_BASE = 0.35

#: Models of which each is compared with each row by row; of more, with the first two and the last.
_BY_ROWS = 12
#: Rows, and numbers in each, below which single rows say nothing.
_FEWEST = 16

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Similarity:
    r"""How alike models are in a part of their weights, each with each.

    For models :math:`a, b` and a sampled tensor :math:`t`, less its mean, which says nothing about kinship, it holds
    :math:`\langle\theta_a^t,\theta_b^t\rangle`, from which cosines follow, those of task vectors too:
    :math:`\langle\theta_a-\theta_0,\theta_b-\theta_0\rangle`.

    Args:
        part: ``body`` or ``head``.
        names: Whose.
        tensors: Which were sampled.
        products: ``(tensors, models, models)`` float64; NaN where one of two does not have the tensor.
        rows: ``(models, models)`` float64, the median share of rows whose nearest row in the other model is the one of
            the same number, less what chance gives; NaN where that was not looked at.
        same: ``(models, models)``, whether every sampled number is equal.
    """

    part: str
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    products: Matrix = field(repr=False)
    rows: Matrix = field(repr=False)
    same: Flags = field(repr=False)

    @cached_property
    def by_tensor(self) -> Matrix:
        """``(tensors, models, models)``, the cosine of each tensor."""
        lengths = np.sqrt(np.diagonal(self.products, axis1=1, axis2=2))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = self.products / (lengths[:, :, None] * lengths[:, None, :])
        return np.where(np.isfinite(cosines), np.clip(cosines, -1, 1), np.nan)

    @cached_property
    def cosines(self) -> Matrix:
        """``(models, models)``, the median over tensors; NaN where two share none."""
        return _median(self.by_tensor)

    @cached_property
    def related(self) -> Flags:
        """``(models, models)``, which two come from one initialisation."""
        return (self.cosines >= STRANGERS) & ~(self.rows < SAME_ROWS)

    def kin(self, a: int, b: int) -> bool | None:
        """Whether two do; None where nothing can be compared."""
        return None if np.isnan(self.cosines[a, b]) else bool(self.related[a, b])

    @cached_property
    def apart(self) -> Flags:
        """``(tensors, models, models)``, which have nothing in common in two models that otherwise clearly do."""
        return (self.by_tensor < APART) & (self.cosines >= SURE)

    @cached_property
    def low(self) -> Flags:
        """``(tensors, models, models)``, which have far less in common than the other tensors of two models."""
        return self.by_tensor < np.maximum(APART, FAR_BELOW * self.cosines)

    def moved(self, models: Sequence[int], base: int) -> tuple[float, float] | None:
        """The lowest cosine of two task vectors measured from ``base``, and their size relative to it.

        Measured from the right ancestor some pair has a low one, or all are small; from another one all task vectors
        are mostly the way between the two ancestors.
        """
        products, own = self.products[:, models][:, :, models], self.products[:, models, base]
        norm = self.products[:, base, base]
        between = products - own[:, :, None] - own[:, None, :] + norm[:, None, None]
        squares = np.diagonal(between, axis1=1, axis2=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            lengths = np.sqrt(np.where(squares > 0, squares, np.nan))
            cosines = _median(between / (lengths[:, :, None] * lengths[:, None, :]))
            sizes = lengths / np.sqrt(norm)[:, None]
        pairs = cosines[np.triu_indices(len(models), 1)]
        if not np.isfinite(pairs).any() or not np.isfinite(sizes).any():
            return None
        return float(np.nanmin(pairs)), float(np.nanmedian(sizes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rounded to what the sample can say."""
        return {
            "part": self.part,
            "names": list(self.names),
            "tensors": list(self.tensors),
            "cosine": _plain(self.cosines, 4),
            "rows": _plain(self.rows, 3),
        }


def measure_similarity(samples: Sequence[Mapping[str, Array]], names: Sequence[str], part: str) -> Similarity:
    """Each of several samples with each.

    Args:
        samples: From `sample`.
        names: Whose they are.
        part: ``body`` or ``head``.

    >>> import numpy as np
    >>> one, other = np.array([[1, -1, 0, 0]], np.float32), np.array([[0, 0, 1, -1]], np.float32)
    >>> found = measure_similarity([{"w": one}, {"w": 2 * one}, {"w": other}], ["a", "b", "c"], "body")
    >>> found.cosines.round(6).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    count = len(samples)
    tensors = tuple(dict.fromkeys(name for each in samples for name in each))
    products = np.full((len(tensors), count, count), np.nan)
    finding = np.full((len(tensors), count, count), np.nan)
    same = np.ones((count, count), dtype=bool)
    for number, tensor in enumerate(tensors):
        shape = next(each[tensor].shape for each in samples if tensor in each)
        having = [i for i, each in enumerate(samples) if tensor in each and each[tensor].shape == shape]
        stack = np.stack([samples[i][tensor].ravel() for i in having]).astype(np.float64)  # (models, numbers)
        kinds: dict[bytes, int] = {}
        content = np.full(count, -1)  # of those that lack it
        content[having] = [kinds.setdefault(row.tobytes(), len(kinds)) for row in stack]
        same &= np.equal.outer(content, content)
        # A padding token's row is zeros, and a pruned one: those say nothing.
        full = np.any(stack.reshape(len(having), shape[0], -1) != 0, axis=2)
        stack -= stack.mean(axis=1, keepdims=True)
        products[number][np.ix_(having, having)] = stack @ stack.T
        if min(shape[0], stack.shape[1] // shape[0]) >= _FEWEST:
            rows = np.where(full[:, :, None], stack.reshape(*full.shape, -1), 0.0)
            finding[number] = _by_rows(dict(zip(having, rows, strict=True)), count)
    return Similarity(part, tuple(names), tensors, products, _median(finding), same & bool(tensors))


def _by_rows(rows: Mapping[int, Matrix], count: int) -> Matrix:
    """``(models, models)``: of pairs of models the share of a tensor's rows that find themselves; see `Similarity`."""
    found = np.full((count, count), np.nan)
    units = {index: _unit(each) for index, each in rows.items()}
    holding = {index: np.any(each != 0, axis=1) for index, each in rows.items()}
    hubs = range(count) if count <= _BY_ROWS else (0, 1, count - 1)
    for a, b in {
        (min(hub, other), max(hub, other)) for hub in hubs for other in units if hub in units and hub != other
    }:
        holds = holding[a] & holding[b]
        if holds.sum() < _FEWEST:
            continue
        near = units[a][holds] @ units[b][holds].T
        finds, chance = float((near.argmax(axis=1) == np.arange(len(near))).mean()), 1 / len(near)
        found[a, b] = found[b, a] = max(0.0, (finds - chance) / (1 - chance))
    return found


def families(linked: Flags) -> list[list[int]]:
    """Groups of models that are linked, the largest first; a link passes from one to the next.

    >>> families(np.array([[0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=bool))
    [[0, 2], [1]]
    """
    count = len(linked)
    group, either = np.arange(count), linked | linked.T | np.eye(count, dtype=bool)
    while (least := np.where(either, group, count).min(axis=1, initial=count)).tolist() != group.tolist():
        group = least[least]  # whom those are linked to, so that a chain takes few turns
    members: dict[int, list[int]] = {}
    for index, first in enumerate(group.tolist()):
        members.setdefault(first, []).append(index)
    return sorted(members.values(), key=lambda family: (-len(family), family[0]))


def _unit(rows: Matrix) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0), dtype=np.float32)


def _median(stacked: Matrix) -> Matrix:
    """The median over the first axis of what is a number; NaN where nothing is."""
    if not len(stacked):
        return np.full(stacked.shape[1:], np.nan)
    known = np.isfinite(stacked)
    ordered = np.sort(np.where(known, stacked, np.inf), axis=0)
    count = known.sum(axis=0)
    low, high = (np.take_along_axis(ordered, np.maximum(0, at)[None], 0)[0] for at in ((count - 1) // 2, count // 2))
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, (low + high) / 2, np.nan)


def _plain(matrix: Matrix, digits: int) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), digits) for value in row] for row in matrix]


#: What everyone begins anew who makes a classifier of a model that predicts words.
_POOLER = re.compile(r"pooler")
#: Tables that are looked up: a few tokens or places that moved far are most of what their cosine says, and nobody puts
#: them in another order, as the tokenizer would be another.
_TABLE = re.compile(r"embed|wte|wpe|shared\.weight")


def copies(same: Flags, names: Sequence[str], pins: Sequence[object]) -> Iterator[Finding]:
    """Models that are equal: they are said, as they count each.

    Args:
        same: ``(models, models)``, whether every number of two that was read is equal, heads included.
        names: The ingredients.
        pins: What identifies their bytes; the same one twice is said elsewhere.
    """
    for group in families(same[: len(names), : len(names)]):
        if len({pins[number] for number in group}) > 1:
            who = [names[number] for number in group]
            message = f"{some(who)} are equal in every number that was read: copies of one model, which all count."
            yield Finding("identical", message, tuple(who))


def strangers(bodies: Similarity, names: Sequence[str], ancestor: int | None = None) -> list[Finding]:
    """Those who are not kin to the others; where there are none, those that drifted far apart.

    The family is whoever is kin to the ancestor, else the largest group; where several are as large, nobody is singled
    out.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
        ancestor: The place of the ancestor that all name.
    """
    count = len(names)
    cosines, related = bodies.cosines[:count, :count], bodies.related[:count, :count]
    known = np.isfinite(cosines) & ~np.eye(count, dtype=bool)
    groups = [group for group in families(related & known) if known[group].any()]
    if not groups:
        return []
    if ancestor is not None:
        own = [group for group in groups if bodies.related[group, ancestor].any()]
        if own:
            groups = [sorted(number for group in own for number in group), *(g for g in groups if g not in own)]
    family, *rest = groups
    if rest:
        fair = ancestor is None and len(family) == len(rest[0])
        outside = [number for group in (groups if fair else rest) for number in group]
        who = [names[number] for number in outside]
        inside = np.isin(np.arange(count), family)
        apart = known & ~related
        across = apart & (inside[:, None] != inside)
        a, b = _extreme(cosines, apart if fair or not across.any() else across, -1)
        numbers = f"cosine {bodies.cosines[a, b]:.3f} at most; kin have {STRANGERS} or more"
        if bodies.cosines[a, b] >= STRANGERS:
            numbers = f"their rows do not find themselves: {bodies.rows[a, b]:.0%} beyond chance; of kin, nearly all do"
        if fair:
            listed = "; ".join(some([names[number] for number in group]) for group in groups[:6])
            message = f"The weights have nothing in common: {listed} ({numbers})."
            remedy = "Leave all but one group out; an ancestor that is named with --base tells who is not from it."
        else:
            theirs = some([names[number] for number in family])
            message = f"{some(who)}: the weights have nothing in common with those of {theirs} ({numbers})."
            remedy = f"Leave {_them(who)} out."
        why = "They were not fine-tuned from the same model, or their neurons stand in another order, and the average "
        return [Finding("unrelated", f"{message} {why}would be noise. {remedy}", tuple(who), refuses=True)]
    drifted = (known & (cosines < DRIFTED)).any(axis=1)
    if not drifted.any():
        return []
    far = sorted(np.flatnonzero(drifted).tolist(), key=np.where(known, cosines, 0.0).sum(axis=1).__getitem__)
    a, b = _extreme(cosines, known, 1)
    farthest = f"; {names[far[0]]} is the farthest from the others" if len(names) > 2 else ""
    message = (
        f"{names[a]} and {names[b]} are kin but far apart (cosine {cosines[a, b]:.2f}), as after training with a high "
        f"learning rate{farthest}. `--select greedy` finds out who helps."
    )
    return [Finding("drifted", message, tuple(names[number] for number in far))]


def parts_apart(bodies: Similarity, names: Sequence[str], ancestor: int | None, *, named: bool) -> list[Finding]:
    """Tensors that have nothing in common where the others do: initialised anew, or neurons in another order.

    Two models between whom a tensor is apart are refused, unless others that have it link them: a link passes from one
    to the next, and the ancestor is one of them. So more models, or an ancestor, link more and never less.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
        ancestor: The place of the ancestor, where it could be compared.
        named: Whether there is an ancestor that somebody names.
    """
    count = len(names)
    places = [*range(count), *([] if ancestor is None else [ancestor])]
    poolers, tables = (
        np.array([bool(kind.search(tensor)) for tensor in bodies.tensors], dtype=bool)[:, None, None]
        for kind in (_POOLER, _TABLE)
    )
    apart = (bodies.apart & ~poolers & ~tables)[:, places][:, :, places]
    reasons = []
    if fresh := _where(bodies, bodies.apart[:, :count, :count] & poolers):
        message = f"{some(fresh)}: initialised apart, each by itself. `--select greedy` finds out who helps."
        reasons.append(Finding("tensors-unrelated", message, tuple(names)))
    if ancestor is not None and (shared := _where(bodies, apart[:, :count, count:].all(axis=1, keepdims=True))):
        message = (
            f"{len(shared)} of {len(bodies.tensors)} tensors that were read are not the ancestor's: {some(shared)}. "
            "The models agree about them, as after a common step between."
        )
        reasons.append(Finding("base-tensors-unrelated", message, tuple(names)))
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
    own = [group for group in groups if ancestor is not None and not split[group, count].all()]
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
        f"have {SURE} or more). Their neurons or attention heads stand in another order, or were "
        "initialised anew; averaged, they would be noise. "
        f"{'Leave all but one out.' if fair else f'Leave {_them(who)} out.'}{hint}"
    )
    return [*reasons, Finding("tensors-unrelated", message, tuple(who), refuses=True)]


def _far_below(bodies: Similarity, names: Sequence[str], low: Flags) -> list[Finding]:
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
    return [Finding("tensors-drifted", message, tuple(who))]


def _extreme(cosines: Matrix, among: Flags, sign: int) -> tuple[int, int]:
    """The pair with the lowest cosine, or, with a ``sign`` of -1, the highest."""
    a, b = np.unravel_index(int(np.where(among, sign * cosines, np.inf).argmin()), cosines.shape)
    return int(a), int(b)


def _where(bodies: Similarity, found: Flags) -> list[str]:
    """The tensors of which anything was found."""
    return [bodies.tensors[number] for number in np.flatnonzero(found.any(axis=(1, 2))).tolist()]


def heads_apart(heads: Similarity, names: Sequence[str]) -> list[Finding]:
    """Heads that were not initialised together."""
    cosines = np.where(np.eye(len(names), dtype=bool), np.nan, heads.cosines)
    groups = families(cosines >= HEADS_APART)
    if len(groups) < 2 or np.isnan(cosines).all():
        return []
    shown = "; ".join(some([names[number] for number in group]) for group in groups[:6])
    more = f"; and {len(groups) - 6} more" if len(groups) > 6 else ""
    message = (
        f"The heads were not initialised together (lowest cosine {np.nanmin(cosines):.2f}; groups: {shown}{more}), "
        "the commonest reason for a soup that is worse than its ingredients. Use `--select greedy`, which keeps only "
        "what helps."
    )
    return [Finding("heads-unrelated", message, tuple(names[n] for group in groups[1:] for n in group))]


def _them(who: Sequence[str]) -> str:
    return "it" if len(who) == 1 else "them"
