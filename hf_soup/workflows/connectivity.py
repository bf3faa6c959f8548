"""Do models lie in one basin? The score along the straight line between each two of them, on validation data.

Statistics of weights cannot tell: two ancestors that share no more than their random initialisation look like
siblings, and their fine-tunes do not average. What is measured here is what averaging does to the score."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from hf_soup._util.logs import PrintableLogger
from hf_soup._util.progress import bar
from hf_soup._util.text import counted, listed
from hf_soup.errors import RecipeError
from hf_soup.evaluation import (
    Candidates,
    load_data,
    model_template,
    require_memory,
    require_variance,
)
from hf_soup.hub import Token
from hf_soup.ingredients import expand_runs
from hf_soup.lineage import LineageReport
from hf_soup.merging import RunContext, fetch_weights, require_alone
from hf_soup.recipe import Finding, Mixture, Recipe, as_recipe
from hf_soup.workflows.check import check
from hf_soup.workflows.prepare import layout_of, log_notes
from hf_soup.workflows.validate import validate

logger = PrintableLogger(__name__)


@dataclass(frozen=True)
class PairBarrier:
    r"""The line between two models, :math:`\theta(\alpha) = (1-\alpha)\theta_1 + \alpha\theta_2`.

    Args:
        first, second: Its ends.
        line: :math:`\alpha` → score there; the ends at 0 and 1 are among them, and the midpoint.
        at: The inner :math:`\alpha` at which the barrier is highest.
        height: There, how far the score lies below the straight line between the ends' scores, as a share of one.
            Negative where the way between is better than its ends.
        low, high: The 95 % interval of ``height``, from resamples of the same rows for all models.
        barrier: Whether it counts as one: ``low`` is above zero, and ``height`` at least what was asked.
    """

    first: str
    second: str
    line: Mapping[float, float]
    at: float
    height: float
    low: float
    high: float
    barrier: bool

    @property
    def shown(self) -> str:
        """The height in points, with its interval."""
        return f"{100 * self.height:.1f} points (95 % interval {100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class ConnectivityReport:
    """What was measured between all pairs of some models.

    Args:
        title: Of the validation data, with the metric.
        n: Its rows.
        least: The height from which on a barrier counts, as a share of one.
        scores: Of every model itself, in the recipe's order.
        pairs: All of them, in that order too.
        head_of: Whose head every model was scored with, where the recipe averages bodies alone; None for their own.

    >>> line = {0: 0.9, 0.5: 0.4, 1: 0.9}
    >>> pair = PairBarrier("acme/a", "acme/b", line, at=0.5, height=0.5, low=0.45, high=0.55, barrier=True)
    >>> ConnectivityReport("beans accuracy", 400, 0.02, {"acme/a": 0.9, "acme/b": 0.9}, (pair,)).groups
    (('acme/a',), ('acme/b',))
    """

    title: str
    n: int
    least: float
    scores: Mapping[str, float]
    pairs: tuple[PairBarrier, ...]
    head_of: str | None = None

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Models without a barrier between any two of them, the largest group first.

        Clusters by complete linkage: those are joined first between which the highest barrier is lowest, and never
        where a pair counts as one. Heights decide and not how many barriers count, as with few rows one of several
        walls between two basins may not.
        """
        most = max(abs(pair.height) for pair in self.pairs)  # so that no distance is below zero
        distances = [2 * most + 1 if pair.barrier else most + pair.height for pair in self.pairs]
        numbers = fcluster(linkage(distances, "complete"), 2 * most + 0.5, "distance").tolist()
        members = {
            number: tuple(name for name, own in zip(self.scores, numbers, strict=True) if own == number)
            for number in dict.fromkeys(numbers)
        }
        return tuple(sorted(members.values(), key=len, reverse=True))

    @cached_property
    def _between(self) -> Mapping[frozenset[str], PairBarrier]:
        return {frozenset((pair.first, pair.second)): pair for pair in self.pairs}

    @cached_property
    def _apart(self) -> tuple[tuple[str, ...], ...]:
        largest = len(self.groups[0])
        return tuple(group for group in self.groups if largest > 1 and (len(group) == 1 or 2 * len(group) < largest))

    @property
    def outsiders(self) -> tuple[str, ...]:
        """Who does not belong: models alone, or in a group of less than half the largest, unless all are alone."""
        apart = {*chain(*self._apart)}
        return tuple(name for name in self.scores if name in apart)

    @cached_property
    def highest(self) -> tuple[PairBarrier, ...]:
        """The pairs, the highest barrier first."""
        return tuple(sorted(self.pairs, key=lambda pair: -pair.height))

    @property
    def reasons(self) -> tuple[Finding, ...]:
        """A warning for everyone who does not belong, and one for the others where they fall into groups."""
        seem, instead = ("", "") if not self._unclear_within else (" seem to", "Measure on more validation rows")
        reasons = []
        for group in self._apart:
            do, them = ("does", "it") if len(group) == 1 else ("do", "them")
            walls = self._walls(group, [name for name in self.scores if name not in group])
            message = f"{listed(group)} {do} not{seem} belong: {walls}. {instead or f'Leave {them} out'}"
            reasons.append(self._reason(message, group))
        rest = [group for group in self.groups if group not in self._apart]
        if len(rest) > 1 and len(rest[0]) == 1:
            message = f"No two of them belong together: {self._walls(*rest)}. Do not average them"
            reasons.append(self._reason(message, self.scores))
        elif len(rest) > 1:
            who, groups = "The others" if self._apart else "They", "; ".join(listed(group) for group in rest)
            message = (
                f"{who}{seem} fall into {len(rest)} groups: {groups}. Between groups there is {self._walls(*rest)}"
            )
            names = [name for name in self.scores if name not in self.outsiders]
            reasons.append(self._reason(f"{message}. {instead or 'Average one of the groups'}", names))
        return tuple(reasons)

    def _reason(self, message: str, names: Collection[str]) -> Finding:
        return Finding("barrier", f"{message}, or let `--select greedy` decide.", tuple(names))

    def _walls(self, *groups: Sequence[str]) -> str:
        """In how many of the pairs between groups there is a barrier, and how high it is."""
        ends = {frozenset(pair) for one, other in combinations(groups, 2) for pair in product(one, other)}
        across = [pair for pair in self.highest if {pair.first, pair.second} in ends]
        walls = [pair for pair in across if pair.barrier]
        of = counted(len(walls), len(across), "pair")
        return f"a barrier in {of}, the highest {walls[0].shown}, from {walls[0].first} to {walls[0].second}"

    @cached_property
    def _unclear(self) -> tuple[PairBarrier, ...]:
        return tuple(pair for pair in self.pairs if pair.high >= self.least and not pair.barrier)

    @cached_property
    def _unclear_within(self) -> int:
        """Pairs of one group between which a barrier cannot be excluded, so that the groups may be others."""
        return sum(any({pair.first, pair.second} <= {*group} for group in self.groups) for pair in self._unclear)

    @property
    def text(self) -> str:
        """The result in sentences."""
        lines = [reason.message for reason in self.reasons]
        least, worst = f"{100 * self.least:g} points", self.highest[0]
        if not lines:
            lines.append(
                f"No barrier of {least} can be seen between these {len(self.scores)} models"
                f"{'' if self._unclear else ': they lie in one basin'}. "
                f"The highest is {worst.shown}, from {worst.first} to {worst.second}."
            )
        if self._unclear:
            within = f", {self._unclear_within} of them within a group" if self.reasons and self._unclear_within else ""
            lines.append(
                f"In {counted(len(self._unclear), len(self.pairs), 'pair')}{within}, one of {least} cannot be excluded "
                f"with n = {self.n:,}; more validation rows would tell."
            )
        if self.head_of is not None:
            lines.append(f"All of them, the ends too, were scored with {self.head_of}'s head.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``hf-soup check --barrier --json`` prints it under ``barrier``.

        ``matrix`` holds the models' own scores and those of the midpoints, ``heights`` and ``intervals`` the barriers.
        """
        names = list(self.scores)
        rows = [[self._between.get(frozenset((a, b))) for b in names] for a in names]  # None for a model and itself
        return {
            "data": self.title,
            "n": self.n,
            "least": self.least,
            "names": names,
            "head_of": self.head_of,
            "matrix": [
                [pair.line[0.5] if pair else score for pair in row]
                for row, score in zip(rows, self.scores.values(), strict=True)
            ],
            "heights": [[pair.height if pair else 0.0 for pair in row] for row in rows],
            "intervals": [[[pair.low, pair.high] if pair else [0.0, 0.0] for pair in row] for row in rows],
            "barriers": [[pair.first, pair.second] for pair in self.pairs if pair.barrier],
            "lines": [
                {"first": pair.first, "second": pair.second, "line": [[at, value] for at, value in pair.line.items()]}
                for pair in self.highest
                if len(pair.line) > 3
            ],
            "groups": [list(group) for group in self.groups],
            "outsiders": list(self.outsiders),
            "text": self.text,
        }

    def __str__(self) -> str:
        return self.text


#: What counts as a barrier, as a share of one. Frankle et al. call a difference of less than 2 % in error no barrier:
#: the margin takes in noise, and what the score loses along curves that are known to stay in one basin.
LEAST = 0.02
#: More pairs than that are not measured: at ten seconds each it would be three hours.
MAX_PAIRS = 1000
#: So many pairs, those with the highest barrier at the midpoint, are measured at a quarter and three quarters too.
LINES = 5


def require_measurable(recipe: Recipe) -> None:
    """Refuse what cannot be measured, before anything is looked at.

    Raises:
        RecipeError: The recipe has no validation data or too many models.
    """
    if recipe.heads == "body":
        raise RecipeError(
            "The recipe has `heads: body`, and a body has no outputs that could be measured.",
            hint="Where the models have outputs, leave `heads` out or set `heads: MODEL`, and add `validation`.",
        )
    if not recipe.validation:
        raise RecipeError(
            "Barriers are measured on validation data, and the recipe has no `validation`.",
            hint="Add `validation: {task: …, dataset: …, split: validation, metric: accuracy}`.",
        )
    count = len(recipe.ingredients)
    pairs = count * (count - 1) // 2
    if pairs > MAX_PAIRS:
        raise RecipeError(
            f"{count} models are {pairs:,} pairs, each of which would be scored; at most {MAX_PAIRS:,} are.",
            hint="Name some of the models before `--recipe`, or let `select: greedy` choose: it scores each once.",
        )


def connectivity(
    recipe: Recipe | str | Path,
    lineage: LineageReport | None = None,
    *,
    least: float = LEAST,
    token: Token = None,
    device: str = "cpu",
    quiet: bool = True,
) -> ConnectivityReport:
    r"""Measure the barrier between each two ingredients on the validation data of a recipe, the first of several.

    With :math:`s(\alpha)` the score of :math:`(1-\alpha)\theta_1 + \alpha\theta_2`, in a metric that is better when
    it is higher,

    .. math:: B = \max_\alpha\;(1-\alpha)\,s(0) + \alpha\,s(1) - s(\alpha)

    over the inner :math:`\alpha` that are measured: the midpoint of every pair, and the quarters of the five pairs
    with the highest barrier there. It counts as a barrier where the bootstrap's 95 % interval lies above zero and
    :math:`B` is ``least`` or more. Every ingredient counts the same; shares, method and selection are not used.
    With the recipe's `calibration`, statistics of batch normalisation are collected again at every inner point.

    Args:
        recipe: With `validation`; or the path of one.
        lineage: What `check` said of this recipe; it is checked here where that is absent.
        least: The height from which on a barrier counts, as a share of one (0.02: two points).
        token: As everywhere in huggingface_hub.
        device: Where models run.
        quiet: No progress bar.

    Raises:
        RecipeError: The recipe has no `validation`, or more than a thousand pairs.
        IncompatibleError: The models cannot be averaged.
        SoupError: A model or the data cannot be used.

    Reference:
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671
        (error barriers, against the mean of the ends; the 2 %). Entezari et al., The Role of Permutation Invariance
        in Linear Mode Connectivity of Neural Networks, ICLR 2022, arXiv:2110.06296 (against the line between the ends;
        for the loss, which is turned round here).
    """
    require_alone("The measuring of barriers")
    recipe, _ = expand_runs(as_recipe(recipe), checks=True)
    validate(recipe)
    require_measurable(recipe)
    lineage = lineage or check(recipe, token=token)
    lineage.raise_if_refused()
    models, names, context = lineage.models, lineage.models.names, RunContext(token, device)
    if len(names) < 2:
        raise RecipeError("A barrier lies between two models, and there is one.")
    layout = layout_of(models, recipe.model_dtype)
    pairs = len(names) * (len(names) - 1) // 2
    total = len(names) + pairs + 2 * min(LINES, pairs)
    with model_template(models, layout.dtype) as template:
        require_memory(layout, device=context.device)
        data = load_data(recipe, template, context)
        log_notes(data)
        require_variance(layout, data.calibration)
        bench = data.validation[0]
        if not bench.share or bench.rows is None:
            raise RecipeError(
                f"Barriers are measured in points, which '{bench.title}' is not in.",
                hint="Name a metric such as accuracy or spearmanr, or other data first in `validation`.",
            )
        logger.info(f"{len(names)} models, {pairs} pair{'s'[: pairs - 1]}: {total} scorings of {bench.rows:,} rows")
        paths = fetch_weights(models.checkpoints, quiet=quiet)
        with (
            Candidates(layout, paths, replace(data, validation=(bench,), test=()), context) as candidates,
            bar("Measuring barriers", total, unit="score", quiet=quiet) as shown,
        ):

            def point(weights: Mapping[str, float]) -> _Point:
                alone = next(iter(weights)) if len(weights) == 1 else None
                # The straight line, by whatever method the recipe averages.
                (outputs,) = candidates.outputs_alone(alone) if alone else candidates.outputs(Mixture(weights))
                found = bench.judge(bench.answers(outputs)), bench.resampled(outputs)
                shown.update(1)
                return found

            scores, found = _measure(names, point, least)
    return ConnectivityReport(bench.title, bench.rows, least, scores, found, models.head_of)


#: A score, and the score over resamples of the rows.
_Point = tuple[float, NDArray[np.float64]]


def _measure(
    names: Sequence[str], point: Callable[[Mapping[str, float]], _Point], least: float
) -> tuple[dict[str, float], tuple[PairBarrier, ...]]:
    """The scores of all models, and their pairs: midpoints first, then the quarters of those that are highest."""
    ends = {name: point({name: 1.0}) for name in names}
    places = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    lines = {(a, b): {0.5: point({a: 0.5, b: 0.5})} for a, b in places}

    def pair(a: str, b: str) -> PairBarrier:
        (first, drawn), (second, redrawn) = ends[a], ends[b]
        heights = {
            at: ((1 - at) * first + at * second - score, (1 - at) * drawn + at * redrawn - draws)
            for at, (score, draws) in lines[a, b].items()
        }
        at = max(heights, key=lambda at: heights[at][0])
        height = heights[at][0]
        low, high = (float(bound) for bound in np.quantile(heights[at][1], [0.025, 0.975]))
        inner = {at: score for at, (score, _) in lines[a, b].items()}
        line = dict(sorted({0.0: first, **inner, 1.0: second}.items()))
        return PairBarrier(a, b, line, at, height, min(low, height), max(high, height), low > 0 and height >= least)

    for a, b in sorted(places, key=lambda ends: -pair(*ends).height)[:LINES]:
        for at in (0.25, 0.75):
            lines[a, b][at] = point({a: 1 - at, b: at})
    return {name: score for name, (score, _) in ends.items()}, tuple(pair(a, b) for a, b in places)
