"""Pairs of models and the barriers between them: which lie in one basin, and who does not belong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_soup import plots
from hf_soup.compatibility import Reason


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

    >>> line = {0: 0.9, 0.5: 0.4, 1: 0.9}
    >>> pair = Pair("acme/a", "acme/b", line, at=0.5, height=0.5, low=0.45, high=0.55, barrier=True)
    >>> Barriers("beans accuracy", 400, 0.02, {"acme/a": 0.9, "acme/b": 0.9}, (pair,)).groups
    (('acme/a',), ('acme/b',))
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
            worst = next(pair for pair in self.highest if pair.barrier and name in (pair.first, pair.second))
            other = worst.second if worst.first == name else worst.first
            message = (
                f"{name} does not belong: barriers to {len(self.walls[name])} of the {len(self.scores) - 1} others, "
                f"the highest {worst.shown}, to {other}. Leave it out, or let `--select greedy` decide."
            )
            reasons.append(Reason("barrier", message, (name,)))
        rest = [pair for pair in self.highest if pair.barrier and not {pair.first, pair.second} & {*self.outsiders}]
        if rest:
            worst, among = rest[0], " more" if self.outsiders else ""
            message = (
                f"A barrier lies between {len(rest)}{among} of {len(self.pairs)} pairs, the highest {worst.shown}, "
                f"from {worst.first} to {worst.second}. {self._advice} or let `--select greedy` decide."
            )
            parted = {name for pair in rest for name in (pair.first, pair.second)}
            reasons.append(Reason("barrier", message, tuple(name for name in self.scores if name in parted)))
        return tuple(reasons)

    @property
    def _advice(self) -> str:
        largest, *_ = self.groups
        if 2 * len(largest) > len(self.scores):
            outside = [name for name in self.scores if name not in largest]
            return f"None is left without {_listed(outside, most=len(outside))}: go without,"
        homes = [_listed(group) for group in self.groups if len(group) > 1]
        if not homes:
            return "Do not average them,"
        return f"There is none within {', nor within '.join(homes)}: average one of these,"

    @property
    def text(self) -> str:
        """The result in sentences."""
        lines = [reason.message for reason in self.reasons]
        least, worst = f"{100 * self.least:g} points", self.highest[0]
        unclear = sum(pair.high >= self.least and not pair.barrier for pair in self.pairs)
        if not lines:
            lines.append(
                f"No barrier of {least} can be seen between these {len(self.scores)} models"
                f"{'' if unclear else ': they lie in one basin'}. "
                f"The highest is {worst.shown}, from {worst.first} to {worst.second}."
            )
        if unclear:
            lines.append(
                f"For {unclear} of {len(self.pairs)} pairs one of {least} cannot be excluded with n = {self.n:,}; "
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


def _listed(names: Sequence[str], most: int = 4) -> str:
    """Some names as words.

    >>> _listed(["a"]), _listed(["a", "b"]), _listed(["a", "b", "c", "d", "e"])
    ('a', 'a and b', 'a, b, c and 2 more')
    """
    shown = names if len(names) <= most else (*names[: most - 1], f"{len(names) - most + 1} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
