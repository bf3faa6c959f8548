"""What choosing among many candidates gains by chance alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_soup.evaluation.statistics import SEED, Floats, Ints, clusters_drawn, told
from hf_soup.recipe import Comparison

#: Draws of the rows, and how many values of candidates are in memory together.
DRAWS, _VALUES = 10_000, 1 << 24


@dataclass(frozen=True)
class Chance:
    """What the best of some candidates gains against the best ingredient where none is better than another.

    Args:
        candidates: How many were compared.
        gain: The mean of that, in the unit of the data's metric, more is better.
        p: How often it is as much as was seen, or more.
    """

    candidates: int
    gain: float
    p: float


def by_chance(
    values: Sequence[Floats],
    weights: Sequence[float],
    ingredients: int,
    seen: Sequence[float],
    clusters: Sequence[Ints | None] | None = None,
) -> list[Chance]:
    r"""What a choice gains by chance on each of its validation data, as they would be were all candidates alike.

    The rows are drawn again 10,000 times, the same ones for all candidates, and each candidate's mean over all rows
    is taken off its values: so all are equally good, and as noisy and as like each other as they are. Each time the
    candidate with the best weighted mean is taken, as a selection does, and compared with the best of the ingredients,
    which are candidates too: ``p = (1 + #{gain >= seen}) / (1 + 10000)``.

    Permuting the candidates' values within each row would say the same only where all are equally noisy: those that
    are nearly one model would dilute the others.

    Args:
        values: Of each data set, ``(rows, candidates)``: what its metric is the mean of, more is better; the
            ingredients are first.
        weights: Of the data sets.
        ingredients: How many candidates are ingredients.
        seen: What the chosen soup gained on each against the best ingredient.
        clusters: Of each data set, as in `hf_soup.evaluation.statistics.bootstrap`; whole ones are drawn.

    Reference:
        White, A reality check for data snooping, Econometrica 68, 2000.

    >>> luck = np.random.default_rng(0).integers(0, 2, (200, 12)).astype(float)
    >>> (found,) = by_chance([luck], [1.0], 3, [0.02])
    >>> found.candidates, 0.02 < found.gain < 0.04, found.p > 0.5
    (12, True, True)
    """
    generator = np.random.Generator(np.random.Philox(key=SEED + 4))
    block = max(1, min(DRAWS, _VALUES // max(each.shape[0] for each in values)))
    gains: list[Floats] = []
    for start in range(0, DRAWS, block):
        means = []
        for each, shared in zip(values, clusters or [None] * len(values), strict=True):
            alone = np.arange(len(each)) if shared is None else shared
            counts = clusters_drawn(alone, min(block, DRAWS - start), generator)
            means.append(counts @ (each - each.mean(axis=0)) / counts.sum(axis=1, keepdims=True))  # (draws, candidates)
        whole = sum((weight * mean for weight, mean in zip(weights, means, strict=True)), np.zeros(()))
        best, reference = whole.argmax(axis=1), whole[:, :ingredients].argmax(axis=1)
        places = np.arange(len(best))
        gains.append(np.array([mean[places, best] - mean[places, reference] for mean in means]))
    return [
        # A hair below: the same gain summed in another order is still the same gain.
        Chance(values[0].shape[1], float(own.mean()), (1 + int((own >= gain - 1e-12).sum())) / (1 + DRAWS))
        for own, gain in zip(np.concatenate(gains, axis=1), seen, strict=True)
    ]


def beside_chance(comparison: Comparison, chance: Chance, *, share: bool) -> Comparison:
    """A comparison on data that chose among many candidates, which gains something by chance alone.

    A gain is claimed only where it is more than that, too.

    >>> from hf_soup.evaluation.statistics import comparison_of
    >>> seen = comparison_of("accuracy", 0.009, 0.002, 0.016, 0.01, 9)
    >>> beside_chance(seen, Chance(20, 0.006, 0.2), share=True).sentence.partition(", and ")[2]
    'picking the best of 20 equally good candidates gains 0.6 points by chance (p = 0.2, n = 9)'
    """
    shown = f"{100 * chance.gain:.1f} points" if share else f"{chance.gain:.3g}"
    picking = f"picking the best of {chance.candidates} equally good candidates gains {shown} by chance"
    chances = f"{picking} ({told(chance.p)}"
    changes: dict[str, object] = {"candidates": chance.candidates, "chance": chance.gain, "chance_p": chance.p}
    if comparison.significant and comparison.difference > 0:
        if chance.p < 0.05:
            changes["sentence"] = f"{comparison.sentence}; {chances})"
        else:
            seen = f"{100 * comparison.difference:.1f} points" if share else f"{comparison.difference:.3g}"
            changes |= {"significant": False, "sentence": f"better by {seen}, and {chances}, n = {comparison.n:,})"}
    return comparison.model_copy(update=changes)
