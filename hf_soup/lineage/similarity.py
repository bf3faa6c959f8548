"""Do weights show a common base? What samples of rows have in common.

Fine-tuning moves weights little and keeps every neuron in its place. So for fine-tunes of one model, and for a model
and its base, the same rows of the same tensors point the same way, while for models that were initialised apart they
are as good as orthogonal. docs/lineage.md has the distributions behind the thresholds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse.csgraph import connected_components

from hf_soup._util.text import listed, some
from hf_soup.checkpoint import Array
from hf_soup.recipe import Finding

#: Median cosine of the body below which two models are unrelated.
UNRELATED = 0.05
#: Share of rows that find themselves below which they are too, whatever the cosine: a common mean is no relation.
SAME_ROWS = 0.05
#: Median cosine of the body below which related models have drifted apart.
DRIFTED = 0.9
#: Cosine below which a single tensor is unrelated …
TENSOR_UNRELATED = 0.1
#: … where the median cosine is at least this, so that hard training has not done it.
SURELY_RELATED = 0.6
#: Share of the median cosine below which a single tensor has drifted.
TENSOR_DRIFTED = 0.6
#: Cosine of the heads below which they were initialised apart.
HEADS_UNRELATED = 0.3
#: Lowest cosine of task vectors above which the base that they are measured from is hardly the models' own …
WRONG_BASE = 0.8
#: … where they have at least this size, relative to the base: short runs on the same data move alike too.
FAR_FROM_BASE = 0.35

#: Tensors that refuse nobody. Poolers: everyone begins one anew who makes a classifier of a model that predicts words.
#: Tables that are looked up: a few tokens or places that moved far are most of what their cosine says, and nobody puts
#: them in another order, as the tokenizer would be another.
_HARMLESS = re.compile(r"pooler|embed|wte|wpe|shared\.weight")

#: Models of which each is compared with each row by row; of more, with the first two and the last.
_BY_ROWS = 12
#: Rows, and numbers in each, below which single rows say nothing.
_FEWEST = 16

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Similarity:
    r"""How alike models are in a part of their weights, each with each.

    For models :math:`a, b` and a sampled tensor :math:`t`, less its mean, which says nothing about a relation, it
    holds
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
        return (self.cosines >= UNRELATED) & ~(self.rows < SAME_ROWS)

    @cached_property
    def tensors_unrelated(self) -> Flags:
        """``(tensors, models, models)``, which have nothing in common in two models that otherwise clearly do."""
        counts = np.array([not _HARMLESS.search(tensor) for tensor in self.tensors], dtype=bool)[:, None, None]
        return counts & (self.by_tensor < TENSOR_UNRELATED) & (self.cosines >= SURELY_RELATED)

    @cached_property
    def tensors_drifted(self) -> Flags:
        """``(tensors, models, models)``, which have far less in common than the other tensors of two models."""
        return self.by_tensor < np.maximum(TENSOR_UNRELATED, TENSOR_DRIFTED * self.cosines)

    def task_vectors(self, models: Sequence[int], base: int) -> tuple[float, float] | None:
        """The lowest cosine of two task vectors measured from ``base``, and their size relative to it.

        Measured from the right base some pair has a low one, or all are small; from another one all task vectors are
        mostly the way between the two bases.
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


def group_numbers(linked: Flags) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The number of each model's group, in the order of their first members; a link passes from one to the next."""
    return np.asarray(connected_components(linked, directed=False)[1])


def connected_groups(linked: Flags) -> list[list[int]]:
    """Groups of models that are linked, the largest first.

    >>> connected_groups(np.array([[0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=bool))
    [[0, 2], [1]]
    """
    numbers = group_numbers(linked)
    groups = [np.flatnonzero(numbers == first).tolist() for first in np.unique(numbers)]
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def _unit(rows: Matrix) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0), dtype=np.float32)


def _median(stacked: Matrix) -> Matrix:
    """The median over the first axis of what is a number; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that nothing is
        return np.asarray(np.nanmedian(np.where(np.isfinite(stacked), stacked, np.nan), axis=0))


def _plain(matrix: Matrix, digits: int) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), digits) for value in row] for row in matrix]


def identical(same: Flags, names: Sequence[str]) -> Iterator[Finding]:
    """Models that are equal, or one that is named twice: they are said, as they count each.

    Args:
        same: ``(models, models)``, whether every number of two that was read is equal, heads included.
        names: The ingredients.
    """
    for group in connected_groups(same[: len(names), : len(names)]):
        if len(group) > 1:
            who = [names[number] for number in group]
            message = f"{some(who)} are equal in every number that was read: copies of one model, which all count."
            yield Finding("identical", message, tuple(who))


def unrelated(bodies: Similarity, names: Sequence[str]) -> list[Finding]:
    """Ingredients that have nothing in common with the others: all but the largest group of related ones.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
    """
    count = len(names)
    cosines, related = bodies.cosines[:count, :count], bodies.related[:count, :count]
    known = np.isfinite(cosines) & ~np.eye(count, dtype=bool)
    groups = [group for group in connected_groups(related & known) if known[group].any()]
    if len(groups) < 2:
        return []
    outside, fair = _outside(groups)
    who = [names[number] for number in outside]
    a, b = _extreme(cosines, known & ~related, -1)
    numbers = f"cosine {bodies.cosines[a, b]:.3f} at most; related models have {UNRELATED} or more"
    if bodies.cosines[a, b] >= UNRELATED:
        numbers = f"{bodies.rows[a, b]:.0%} of their rows match beyond chance; of related models, nearly all do"
    if fair:
        shown = "; ".join(some([names[number] for number in group]) for group in groups[:6])
        message = f"The weights have nothing in common: {shown} ({numbers})."
        remedy = "Leave all but one group out. A base that is named with --base tells who is not from it."
    else:
        theirs = some([names[number] for number in groups[0]])
        message = f"{some(who)}: the weights have nothing in common with those of {theirs} ({numbers})."
        remedy = f"Leave {_them(who)} out."
    why = "They were not fine-tuned from the same model, or their neurons stand in another order, and the average "
    return [Finding("unrelated", f"{message} {why}would be noise. {remedy}", tuple(who), refuses=True)]


def drifted(bodies: Similarity, names: Sequence[str]) -> list[Finding]:
    """Ingredients that are related but far from the largest group of those that are near each other."""
    count = len(names)
    cosines = np.where(np.eye(count, dtype=bool), np.nan, bodies.cosines[:count, :count])
    groups = connected_groups(~(cosines < DRIFTED))
    if len(groups) < 2:
        return []
    outside, fair = _outside(groups)
    who, rest = [names[number] for number in outside], groups[0]
    message = f"{listed(who)} are far from each other ({np.nanmin(cosines):.2f})"
    if not fair:
        near = f"; they are {np.nanmin(cosines[rest][:, rest]):.2f} to each other" if len(rest) > 1 else ""
        far = f"{np.nanmin(cosines[outside][:, rest]):.2f}{near}"
        message = f"{listed(who)} {_is(who)} far from the other {len(rest)} ({far})"
    advice = f"often a learning rate that was too high. Leave {_them(who)} out, or let `--select greedy` decide."
    return [Finding("drifted", f"{message}; {advice}", tuple(who))]


def unrelated_tensors(bodies: Similarity, names: Sequence[str], base: int | None) -> list[Finding]:
    """Tensors that have nothing in common where the others do: initialised anew, or neurons in another order.

    Two models between whom a tensor is unrelated are refused, unless others that have it link them: a link passes from
    one to the next, and the base is one of them. So more models, or a base, link more and never less.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
        base: The place of the base, where it could be compared.
    """
    count = len(names)
    places = [*range(count), *([] if base is None else [base])]
    apart = bodies.tensors_unrelated[:, places][:, :, places]
    split = np.zeros(apart.shape[1:], dtype=bool)
    for tensor in np.flatnonzero(apart.any(axis=(1, 2))).tolist():
        having = np.isfinite(bodies.products[tensor, places, places])
        both = having[:, None] & having
        group = group_numbers(~apart[tensor] & both)
        split |= (group[:, None] != group) & both
    groups = connected_groups(~split[:count, :count])
    if len(groups) < 2:
        return _drifted_tensors(bodies, names)
    # Whose neurons were moved, the base tells.
    outside, fair = _outside(groups, [group for group in groups if base is not None and not split[group, count].all()])
    among = apart[:, outside]
    who, tensors = [names[number] for number in outside], _where(bodies, among)
    lowest = bodies.by_tensor[:, places][:, :, places][:, outside][among].min()
    message = (
        f"{some(who)}: related{'' if fair else ' to the others'}, but {len(tensors)} of {len(bodies.tensors)} tensors "
        f"that were read have nothing in common: {some(tensors)} (lowest cosine {lowest:.2f}, where half of the "
        f"tensors have {SURELY_RELATED} or more). Their neurons or attention heads stand in another order, or were "
        "initialised anew; averaged, they would be noise. "
        f"{'Leave all but one out; a base named with --base tells whose.' if fair else f'Leave {_them(who)} out.'}"
    )
    return [Finding("tensors-unrelated", message, tuple(who), refuses=True)]


def doubts_about_base(bodies: Similarity, names: Sequence[str], base: int) -> Iterator[Finding]:
    """Signs that a base to which all are related is not the one that they were fine-tuned from.

    Args:
        bodies: The ingredients come first in it.
        names: The ingredients.
        base: The place of the base.
    """
    model, count = bodies.names[base], len(names)
    tensors = [
        tensor
        for tensor, unlike in zip(bodies.tensors, bodies.tensors_unrelated[:, :count, base], strict=True)
        if unlike.all()
    ]
    if tensors:
        message = (
            f"{len(tensors)} of {len(bodies.tensors)} tensors that were read are not {model}'s: {some(tensors)}. The "
            "models agree about them, as after a common step between."
        )
        yield Finding("base-tensors-unrelated", message, tuple(names))
    moved = bodies.task_vectors(range(count), base)
    if moved and moved[0] > WRONG_BASE and moved[1] > FAR_FROM_BASE:
        message = (
            f"Measured from {model} the models all moved far ({moved[1]:.0%} of its size) and the same way (cosine "
            f"{moved[0]:.2f} or more): they share a later base, or this is not theirs."
        )
        yield Finding("base-doubtful", message, tuple(names))


def equal_to_base(bodies: Similarity, names: Sequence[str], base: int) -> Iterator[Finding]:
    """Ingredients that are the base itself, or of which only the head was trained."""
    if equal := [name for number, name in enumerate(names) if bodies.same[number, base]]:
        message = (
            f"{some(equal)}: the body is equal to {bodies.names[base]}'s in every number that was read, so it is the "
            "base itself, or only its head was trained. It counts like every other and draws the soup back."
        )
        yield Finding("identical", message, tuple(equal))


def _drifted_tensors(bodies: Similarity, names: Sequence[str]) -> list[Finding]:
    """Tensors that are far less alike than the others of two models: to know, as hard training may have done it."""
    count = len(names)
    # Of models that are far apart as a whole that is said.
    drifted = (bodies.tensors_drifted & (bodies.cosines >= DRIFTED))[:, :count, :count]
    if not (tensors := _where(bodies, drifted)):
        return []
    who = [names[number] for number in np.flatnonzero(drifted.any(axis=(0, 1))).tolist()]
    cosines = np.where(drifted, bodies.by_tensor[:, :count, :count], np.inf)
    tensor, a, b = np.unravel_index(int(cosines.argmin()), cosines.shape)
    message = (
        f"{some(who)}: {len(tensors)} of {len(bodies.tensors)} tensors that were read have far less in common than the "
        f"others, as after hard training, where neurons stand in another order, or where each began them anew: the "
        f"cosine is {cosines[tensor, a, b]:.2f} in {bodies.tensors[tensor]}, and {bodies.cosines[a, b]:.2f} or more in "
        "half of all. `--select greedy` finds out who helps."
    )
    return [Finding("tensors-drifted", message, tuple(who))]


def unrelated_heads(heads: Similarity, names: Sequence[str]) -> list[Finding]:
    """Heads that were not initialised together."""
    cosines = np.where(np.eye(len(names), dtype=bool), np.nan, heads.cosines)
    groups = connected_groups(cosines >= HEADS_UNRELATED)
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


def _outside(groups: Sequence[list[int]], own: Sequence[list[int]] = ()) -> tuple[list[int], bool]:
    """Who does not belong, of groups that are split, the largest first; and whether nobody can know.

    The base's ``own`` group stays, else the largest. Where two are as large, all are named.
    """
    if len(own) != 1 and len(groups[0]) == len(groups[1]):
        return sorted(number for group in groups for number in group), True
    stays = own[0] if len(own) == 1 else groups[0]
    return sorted(number for group in groups if group is not stays for number in group), False


def _extreme(cosines: Matrix, among: Flags, sign: int) -> tuple[int, int]:
    """The pair with the lowest cosine, or, with a ``sign`` of -1, the highest."""
    a, b = np.unravel_index(int(np.where(among, sign * cosines, np.inf).argmin()), cosines.shape)
    return int(a), int(b)


def _where(bodies: Similarity, flags: Flags) -> list[str]:
    """The tensors for which a flag is set."""
    return [bodies.tensors[number] for number in np.flatnonzero(flags.any(axis=(1, 2))).tolist()]


def _is(who: Sequence[str]) -> str:
    return "is" if len(who) == 1 else "are"


def _them(who: Sequence[str]) -> str:
    return "it" if len(who) == 1 else "them"
