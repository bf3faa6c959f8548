"""Do models lie in one basin? The score along the straight line between each two of them, on held-out data.

Statistics of weights cannot tell: two ancestors that share no more than their random initialisation look like
siblings, and their fine-tunes do not average. What is measured here is what averaging does to the score.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soup import plots
from hf_soup.client import Token
from hf_soup.compatibility import Reason
from hf_soup.contents import soup_config, write_assets
from hf_soup.errors import RecipeError
from hf_soup.lineage import Lineage
from hf_soup.preparation import Say, plan_of, prepare_benches, validate
from hf_soup.progress import bar, spoken
from hf_soup.recipe import Named, Recipe, as_recipe
from hf_soup.soup import check
from hf_soup.weights import fetch_weights

#: What counts as a barrier, as a share of one. Frankle et al. call a difference of less than 2 % in error no barrier:
#: the margin takes in noise, and what the score loses along curves that are known to stay in one basin.
LEAST = 0.02
#: More pairs than that are not measured: at ten seconds each it would be three hours.
MAX_PAIRS = 1000
#: So many pairs, those with the highest barrier at the midpoint, are measured at a quarter and three quarters too.
LINES = 5


@dataclass(frozen=True)
class Pair:
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
class Barriers:
    """What was measured between all pairs of some models.

    Args:
        title: Of the held-out data, with the metric.
        n: Its rows.
        least: The height from which on a barrier counts, as a share of one.
        scores: Of every model itself, in the recipe's order.
        pairs: All of them, in that order too.
    """

    title: str
    n: int
    least: float
    scores: Mapping[str, float]
    pairs: tuple[Pair, ...]

    @cached_property
    def walls(self) -> Mapping[str, frozenset[str]]:
        """Every model → those to which it has a barrier."""
        parted = [{pair.first, pair.second} for pair in self.pairs if pair.barrier]
        return {name: frozenset().union(*(both for both in parted if name in both)) - {name} for name in self.scores}

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Models without a barrier between any two of them, the largest group first.

        Greedily: those with the fewest barriers first, each joins the first group in which it has none.
        """
        groups: list[list[str]] = []
        for name in sorted(self.scores, key=lambda name: len(self.walls[name])):
            home = next((group for group in groups if not self.walls[name].intersection(group)), None)
            if home is None:
                groups.append([name])
            else:
                home.append(name)
        order = list(self.scores)
        return tuple(tuple(sorted(group, key=order.index)) for group in sorted(groups, key=len, reverse=True))

    @property
    def outsiders(self) -> tuple[str, ...]:
        """Who does not belong: models with barriers to more than half of the others, unless that is true of all."""
        found = tuple(name for name, walls in self.walls.items() if 2 * len(walls) > len(self.scores) - 1)
        return found if len(found) < len(self.scores) else ()

    @cached_property
    def highest(self) -> tuple[Pair, ...]:
        """The pairs, the highest barrier first."""
        return tuple(sorted(self.pairs, key=lambda pair: -pair.height))

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """A warning for everyone who does not belong, or one for all where they fall into groups."""
        if not any(self.walls.values()):
            return ()
        reasons = []
        for name in self.outsiders:
            worst = next(pair for pair in self.highest if name in (pair.first, pair.second))
            other = worst.second if worst.first == name else worst.first
            message = (
                f"{name} does not belong: barriers to {len(self.walls[name])} of the {len(self.scores) - 1} others, "
                f"the highest {worst.shown}, to {other}. Leave it out, or let `--select greedy` decide."
            )
            reasons.append(Reason("barrier", message, (name,)))
        rest = [pair for pair in self.highest if pair.barrier and not {pair.first, pair.second} & {*self.outsiders}]
        if rest:
            worst = rest[0]
            message = (
                f"{len(rest)} of {len(self.pairs)} pairs have a barrier between them"
                f"{' beside' if self.outsiders else ''}, the highest {worst.shown}, from {worst.first} to "
                f"{worst.second}. There is none within "
                + ", nor within ".join(" + ".join(group) for group in self.groups)
                + ". Average one of these, or let `--select greedy` decide."
            )
            parted = {name for pair in rest for name in (pair.first, pair.second)}
            reasons.append(Reason("barrier", message, tuple(name for name in self.scores if name in parted)))
        return tuple(reasons)

    @property
    def text(self) -> str:
        """The result in sentences."""
        lines = [reason.message for reason in self.reasons]
        least, count = f"{100 * self.least:g} points", len(self.pairs)
        if not lines:
            worst = self.highest[0]
            between = f"{worst.first} and {worst.second}"
            lines.append(
                f"No barrier of {least} can be seen: these {len(self.scores)} models lie in one basin. "
                f"The highest of {count} is {worst.shown}, between {between}."
                if count > 1
                else f"No barrier of {least} can be seen between {between}: it is {worst.shown}."
            )
        unclear = sum(pair.high >= self.least and not pair.barrier for pair in self.pairs)
        if unclear:
            lines.append(
                f"For {unclear} of {count} pairs one of {least} cannot be excluded with n = {self.n:,}; "
                "more held-out rows would tell."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``hf-soup check --barrier --json`` prints it under ``barrier``.

        ``matrix`` holds the models' own scores and those of the midpoints, ``heights`` and ``intervals`` the barriers.
        """
        names = list(self.scores)
        matrix: list[list[float]] = [[score if a == b else 0.0 for b in names] for a, score in self.scores.items()]
        heights = [[0.0 for _ in names] for _ in names]
        intervals = [[[0.0, 0.0] for _ in names] for _ in names]
        for pair in self.pairs:
            for a, b in ((pair.first, pair.second), (pair.second, pair.first)):
                row, column = names.index(a), names.index(b)
                matrix[row][column], heights[row][column] = pair.line[0.5], pair.height
                intervals[row][column] = [pair.low, pair.high]
        return {
            "data": self.title,
            "n": self.n,
            "least": self.least,
            "names": names,
            "matrix": matrix,
            "heights": heights,
            "intervals": intervals,
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

    def draw(self, path: Path) -> None:
        """Write the picture: the matrix of heights, and the lines that were measured, as PNG.

        Raises:
            RecipeError: The file exists, or cannot be written.
        """
        plots.barriers(path, self.to_dict())


def require_measurable(recipe: Recipe, picture: Path | None = None) -> None:
    """Refuse what cannot be measured or drawn, before anything is looked at.

    Raises:
        RecipeError: The recipe has no held-out data or too many models, or the picture's place is taken.
    """
    if recipe.score is None:
        raise RecipeError(
            "Barriers are measured on held-out data, and the recipe has no `score`.",
            hint="Add `score: {task: …, dataset: …, split: validation, metric: accuracy}`.",
        )
    count = len(recipe.ingredients)
    pairs = count * (count - 1) // 2
    if pairs > MAX_PAIRS:
        raise RecipeError(
            f"{count} models are {pairs:,} pairs, each of which would be scored; at most {MAX_PAIRS:,} are.",
            hint="Name some of the models before `--recipe`, or let `select: greedy` choose: it scores each once.",
        )
    if picture is None:
        return
    if picture.suffix != ".png":
        raise RecipeError(f"'{picture}' does not end in .png, and pictures are written as PNG.")
    if picture.exists() or picture.is_symlink():
        raise RecipeError(f"'{picture}' exists already, and nothing is overwritten.", hint="Name another file.")
    if not picture.absolute().parent.is_dir():
        raise RecipeError(f"There is no folder '{picture.absolute().parent}' for the picture.")


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)  # noqa: T201 -- the default way to tell a person at a terminal


def barriers(
    recipe: Recipe | str | Path,
    lineage: Lineage | None = None,
    *,
    least: float = LEAST,
    token: Token = None,
    device: str = "cpu",
    quiet: bool = True,
    say: Say = _to_stderr,
) -> Barriers:
    r"""Measure the barrier between each two ingredients on the held-out data of a recipe.

    With :math:`s(\alpha)` the score of :math:`(1-\alpha)\theta_1 + \alpha\theta_2`, in a metric that is better when
    it is higher,

    .. math:: B = \max_\alpha\;(1-\alpha)\,s(0) + \alpha\,s(1) - s(\alpha)

    over the inner :math:`\alpha` that are measured: the midpoint of every pair, and the quarters of the five pairs
    with the highest barrier there. It counts as a barrier where the bootstrap's 95 % interval lies above zero and
    :math:`B` is ``least`` or more. Every ingredient counts the same; shares, method and selection are not used.

    Args:
        recipe: With `score`; or the path of one.
        lineage: What `check` said of this recipe; it is checked here where that is absent.
        least: The height from which on a barrier counts, as a share of one (0.02: two points).
        token: As everywhere in huggingface_hub.
        device: Where models run.
        quiet: No progress bar.
        say: Gets warnings, and how much is to be done.

    Raises:
        RecipeError: The recipe has no `score`, or more than a thousand pairs.
        IncompatibleError: The models cannot be averaged.
        SoupError: A model or the data cannot be used.

    Reference:
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671
        (error barriers, against the mean of the ends; the 2 %). Entezari et al., The Role of Permutation Invariance
        in Linear Mode Connectivity of Neural Networks, ICLR 2022, arXiv:2110.06296, definition 2.1 (against the
        line between the ends; for the loss, which is turned round here).
    """
    from hf_soup.evaluation import Evaluation

    recipe = as_recipe(recipe)
    validate(recipe)
    require_measurable(recipe)
    lineage = lineage or check(recipe, token=token)
    lineage.raise_if_refused()
    names = lineage.names
    if len(names) < 2:
        raise RecipeError("A barrier lies between two models, and there is one.")
    # What is measured is the straight line, by whatever method the recipe averages.
    straight = recipe.model_copy(update={"method": Named(name="linear")})
    plan = plan_of(straight, lineage, dict.fromkeys(names, 1.0))
    pairs = len(names) * (len(names) - 1) // 2
    total = len(names) + pairs + 2 * min(LINES, pairs)
    with tempfile.TemporaryDirectory(prefix="hf-soup-") as kitchen:
        config = soup_config(lineage, plan.dtype, recipe.labels)
        write_assets(Path(kitchen), config, lineage)
        bench = prepare_benches(recipe, plan, Path(kitchen), config, device, token, say)[0]
        say(f"note: {len(names)} models, {pairs} pairs: {total} scorings of {bench.n:,} rows")
        with (
            Evaluation(
                [bench], held_out=True, names=names, plan=plan, paths=fetch_weights(lineage.checkpoints, quiet=quiet),
                config_folder=Path(kitchen), device=device, quiet=True,
            ) as evaluation,
            bar("Measuring barriers", total, unit="score", quiet=quiet) as shown,
        ):  # fmt: skip
            started = time.monotonic()

            def point(weights: Mapping[str, float]) -> _Point:
                logits = evaluation.logits(weights)
                found = bench.value(logits), bench.resampled(logits)
                shown.update(1)
                if shown.n == 1:
                    say(f"note: they take about {spoken((time.monotonic() - started) * total)}")
                return found

            scores, found = _measure(names, point, least)
    return Barriers(bench.title, bench.n, least, scores, found)


#: A score, and the score over resamples of the rows.
_Point = tuple[float, NDArray[np.float64]]


def _measure(
    names: Sequence[str], point: Callable[[Mapping[str, float]], _Point], least: float
) -> tuple[dict[str, float], tuple[Pair, ...]]:
    """The scores of all models, and their pairs: midpoints first, then the quarters of those that are highest."""
    ends = {name: point({name: 1.0}) for name in names}
    places = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    lines = {(a, b): {0.5: point({a: 0.5, b: 0.5})} for a, b in places}

    def pair(a: str, b: str) -> Pair:
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
        return Pair(a, b, line, at, height, min(low, height), max(high, height), low > 0 and height >= least)

    for a, b in sorted(places, key=lambda ends: -pair(*ends).height)[:LINES]:
        for at in (0.25, 0.75):
            lines[a, b][at] = point({a: 1 - at, b: at})
    return {name: score for name, (score, _) in ends.items()}, tuple(pair(a, b) for a, b in places)
