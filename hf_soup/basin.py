"""Pairs of models and the barriers between them: which lie in one basin, and who does not belong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations, product
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
        head_of: Whose head every model was scored with, where the recipe averages bodies alone; None for their own.

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
    head_of: str | None = None

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Models without a barrier between any two of them, the largest group first.

        Clusters by complete linkage: those are joined first between which the highest barrier is lowest, and never
        where a pair counts as one. Heights decide and not how many barriers count, as with few rows one of several
        walls between two basins may not.
        """
        between = {frozenset((pair.first, pair.second)): pair for pair in self.pairs}
        groups: list[tuple[str, ...]] = [(name,) for name in self.scores]
        while True:
            joins = []
            for one, other in combinations(range(len(groups)), 2):
                pairs = [between[frozenset(ends)] for ends in product(groups[one], groups[other])]
                if not any(pair.barrier for pair in pairs):
                    joins.append((max(pair.height for pair in pairs), one, other))
            if not joins:
                break
            _, one, other = min(joins)
            groups[one] += groups.pop(other)
        order = list(self.scores)
        return tuple(tuple(sorted(group, key=order.index)) for group in sorted(groups, key=len, reverse=True))

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
    def highest(self) -> tuple[Pair, ...]:
        """The pairs, the highest barrier first."""
        return tuple(sorted(self.pairs, key=lambda pair: -pair.height))

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """A warning for everyone who does not belong, and one for the others where they fall into groups."""
        seem, instead = ("", "") if not self._unclear_within else (" seem to", "Measure on more held-out rows")
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

    def _reason(self, message: str, names: Collection[str]) -> Reason:
        return Reason("barrier", f"{message}, or let `--select greedy` decide.", tuple(names))

    def _walls(self, *groups: Sequence[str]) -> str:
        """In how many of the pairs between groups there is a barrier, and how high it is."""
        ends = {frozenset(pair) for one, other in combinations(groups, 2) for pair in product(one, other)}
        across = [pair for pair in self.highest if {pair.first, pair.second} in ends]
        walls = [pair for pair in across if pair.barrier]
        of = counted(len(walls), len(across), "pair")
        return f"a barrier in {of}, the highest {walls[0].shown}, from {walls[0].first} to {walls[0].second}"

    @cached_property
    def _unclear(self) -> tuple[Pair, ...]:
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
                f"with n = {self.n:,}; more held-out rows would tell."
            )
        if self.head_of is not None:
            lines.append(f"All of them, the ends too, were scored with {self.head_of}'s head.")
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
            "head_of": self.head_of,
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


def counted(some: int, many: int, word: str) -> str:
    """How many of a number of things.

    >>> counted(1, 1, "pair"), counted(2, 2, "pair"), counted(3, 3, "pair"), counted(1, 4, "pair")
    ('the one pair', 'both pairs', 'all 3 pairs', '1 of 4 pairs')
    """
    if some < many:
        return f"{some} of {many} {word}s"
    return f"the one {word}" if many == 1 else f"{'both' if many == 2 else f'all {many}'} {word}s"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Some names as words.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c", "d", "e"], most=4)
    ('a', 'a and b', 'a, b, c and 2 more')
    """
    shown = names if len(names) <= most else (*names[: most - 1], f"{len(names) - most + 1} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
