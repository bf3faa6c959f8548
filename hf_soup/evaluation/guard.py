"""No data set may be much worse than with the best ingredient: `at_least`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_soup.evaluation.dataset import EvalDataset

#: Below every score: those of candidates that break a guard are lower still, by how much they do.
_BROKEN = -1e9


@dataclass(frozen=True)
class Breach:
    """How a candidate breaks a guard.

    Args:
        title: The data on which it is farthest from what is allowed.
        below: How far it is below the best ingredient there, in the unit of the metric.
        allowed: How far it may be.
        share: Whether these are shares of one.
    """

    title: str
    below: float
    allowed: float
    share: bool

    @property
    def rank(self) -> float:
        """What a selection sees in the place of a score: the worse, the lower."""
        return _BROKEN - (self.below - self.allowed)

    @property
    def text(self) -> str:
        """It in words.

        >>> Breach("beans accuracy", 0.0213, 0.01, True).text
        "2.1 points below the best ingredient on 'beans accuracy', where 1 is allowed"
        """
        factor, unit = (100, " points") if self.share else (1, "")
        shown = f"{factor * self.below:.1f}" if self.share else f"{self.below:.3g}"
        return f"{shown}{unit} below the best ingredient on '{self.title}', where {factor * self.allowed:g} is allowed"


def breach(data: Sequence[EvalDataset], values: Sequence[float], best: Sequence[float]) -> Breach | None:
    """How values break the guards of their data, the one that is broken most; None where they break none.

    Args:
        data: The validation data.
        values: Of a candidate on each, more is better.
        best: Of the ingredients on each, the greatest.
    """
    found = None
    for bench, value, most in zip(data, values, best, strict=True):
        guard = bench.scoring.at_least
        if guard is None:
            continue
        allowed = guard.below_best / (100 if bench.share else 1)
        below = most - value
        over = below - allowed
        if over > 1e-12 and (found is None or over > found.below - found.allowed):
            found = Breach(bench.title, below, allowed, bench.share)
    return found
