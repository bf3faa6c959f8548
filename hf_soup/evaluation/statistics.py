"""Intervals and paired tests: how much of a score is luck.

Rows with the same label and the same answers are interchangeable. Drawing rows is therefore drawing how many there
are of each kind: it is quick, and the order of the rows cannot matter. Rows that share a document are not independent:
where their clusters are given, whole clusters are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.recipe import Comparison, Score

#: The 97.5 % point of the normal distribution: two sides of 2.5 % leave 95 %.
Z = 1.959963984540054
RESAMPLES = 500
#: Of a permutation test, whose p is read near 0.05: at 500 its error there is 0.01. A metric that takes one draw at a
#: time has `RESAMPLES`.
PERMUTATIONS = 10_000
#: Resamples that are in memory together.
BLOCK = 50
#: Key of the generator; fixed, so that a score is the same number every time.
SEED = 20220310

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
#: The value of each draw, ``(draws,)``, of labels and answers, ``(n,)``, and how many rows of each draw every pair of
#: these stands for, ``(draws, n)``.
Metric = Callable[[Any, Any, Ints], Floats]


def mean(_: Any, values: NDArray[Any], rows: Ints) -> Floats:
    """The mean of what each row has, such as its loss."""
    return np.asarray(rows @ values / rows.sum(axis=1))


def told(p: float, least: float = 0.0) -> str:
    """A p as people read it; ``least``: the least one that the test can have.

    >>> told(0.012), told(0.0002), told(1 / 501, 1 / 501), told(0.04996)
    ('p = 0.012', 'p < 0.001', 'p < 0.002', 'p = 0.0499')
    """
    if p <= least or p < 0.001:
        return f"p < {max(least, 0.001):.1g}"
    # What is claimed is below 0.05, and two digits would make 0.05 of 0.0499.
    return f"p = {min(p, 0.0499):.3g}" if 0.0495 <= p < 0.05 else f"p = {p:.2g}"


def comparison_of(
    metric: str,
    difference: float,
    low: float,
    high: float,
    p: float,
    n: int,
    *,
    share: bool = True,
    clusters: Ints | None = None,
    least: float = 0.0,
) -> Comparison:
    """Two models on the same rows: ``difference`` is the first minus the second.

    A difference is claimed only where ``p`` is below 0.05 and zero lies outside the interval. ``share``: it is one of
    shares of one, which is told in points. ``clusters``: as in `bootstrap`. ``least``: the least p that the test has.

    >>> comparison_of("accuracy", 0.009, 0.002, 0.016, 0.01, 2000).sentence
    'better by 0.9 points (95 % interval 0.2 to 1.6, p = 0.01, n = 2,000)'
    >>> comparison_of("accuracy", 0.01, -0.02, 0.04, 0.6, 200).sentence
    'no difference can be seen with n = 200'
    >>> comparison_of("reward", 0.52, 0.08, 0.96, 1 / 501, 200, share=False, least=1 / 501).sentence
    'better by 0.52 (95 % interval 0.08 to 0.96, p < 0.002, n = 200)'
    """

    def shown(value: float) -> str:
        return f"{100 * value:.1f}" if share else f"{value:.3g}"

    significant = p < 0.05 and (low > 0 or high < 0)
    rows = f"n = {n:,}" if clusters is None else f"n = {n:,} in {int(clusters.max()) + 1:,} clusters"
    sentence = f"no difference can be seen with {rows}"
    if significant:
        nearer, farther = sorted((abs(low), abs(high)))
        sentence = (
            f"{'better' if difference > 0 else 'worse'} by {shown(abs(difference))}{' points' if share else ''} "
            f"(95 % interval {shown(nearer)} to {shown(farther)}, {told(p, least)}, {rows})"
        )
    return Comparison(
        metric=metric, difference=difference, low=low, high=high, p=p, n=n, sentence=sentence, significant=significant
    )


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    r"""The 95 % interval of the difference of two accuracies on the same ``n`` rows.

    Half a row is added to each of the four cells, and Wald's interval taken: with
    :math:`b, c` so raised and :math:`N = n + 2`,
    :math:`\frac{b - c}{N} \pm \frac{z}{N}\sqrt{b + c - (b - c)^2/N}`.

    Reference:
        Agresti & Min, Simple improved confidence intervals for comparing matched proportions, 2005.

    >>> [round(bound, 4) for bound in paired_interval(9, 1, 98)]
    [0.0169, 0.1431]
    """
    first, second, total = only_first + 0.5, only_second + 0.5, n + 2
    middle = (first - second) / total
    half = Z * math.sqrt(first + second - (first - second) ** 2 / total) / total
    return max(-1.0, middle - half), min(1.0, middle + half)


def accuracy_of(right: NDArray[np.bool_], metric: str = "accuracy", clusters: Ints | None = None) -> Score:
    """The share of rows that are right, with Wilson's 95 % interval: good for few rows, and for shares near 0 and 1.

    Of rows in clusters it is the bootstrap's.

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    from scipy.stats import binomtest

    count, n = int(right.sum()), len(right)
    if clusters is None:
        low, high = binomtest(count, n).proportion_ci(method="wilson")
    else:
        low, high = bootstrap(np.zeros(n), right.astype(float), mean, clusters)
    return Score(metric, count / n, float(min(low, count / n)), float(max(high, count / n)), n)


def compare_accuracies(
    metric: str, right: NDArray[np.bool_], other: NDArray[np.bool_], clusters: Ints | None = None
) -> Comparison:
    """Two models on the same rows: the exact two-sided test of McNemar, of rows that just one of them gets right, and
    the interval of Agresti and Min for matched shares. Of rows in clusters both are those of `paired_bootstrap`.

    Reference:
        McNemar, Note on the sampling error of the difference between correlated proportions, 1947.
    """
    from scipy.stats import binomtest

    first, second, n = int(np.sum(right & ~other)), int(np.sum(other & ~right)), len(right)
    if clusters is not None:
        low, high, p = paired_bootstrap(np.zeros(n), right.astype(float), other.astype(float), mean, clusters)
        least = 1 / (1 + PERMUTATIONS)
        return comparison_of(metric, (first - second) / n, low, high, p, n, clusters=clusters, least=least)
    low, high = paired_interval(first, second, n)
    p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
    return comparison_of(metric, (first - second) / n, low, high, p, n)


def bootstrap(
    labels: Ints | Floats, answers: Ints | Floats, metric: Metric, clusters: Ints | None = None
) -> tuple[float, float]:
    """The 95 % percentile interval of a metric over 500 resamples of the rows, always the same ones.

    Where every resample gives one value (all rows right, say) the interval is that value: a limit of the
    bootstrap, not knowledge.

    Args:
        labels, answers: ``(n,)``, class numbers or others; labels may be ``(n, k)``.
        clusters: ``(n,)``, of rows that belong together: the number of the cluster of each, from 0 on.

    Reference:
        Efron, Bootstrap methods: another look at the jackknife, 1979. Miller, Adding error bars to evals,
        arXiv:2411.00640 (clusters).
    """
    drawn = _Draws((labels, answers), clusters)
    label, answer = drawn.columns
    return _interval(lambda rows: metric(label, answer, rows), drawn, _generator(0))


def paired_bootstrap(
    labels: Ints | Floats,
    first: Ints | Floats,
    second: Ints | Floats,
    metric: Metric,
    clusters: Ints | None = None,
    permutations: int = PERMUTATIONS,
) -> tuple[float, float, float]:
    """Interval and p of the difference of a metric between two models on the same rows.

    The interval is the bootstrap's over rows. p comes from a permutation test: were the two models alike,
    exchanging their answers row by row (or cluster by cluster) at random would change nothing;
    ``p = (1 + #{|d*| >= |d|}) / (1 + permutations)``.

    Args:
        labels, first, second: ``(n,)``: the labels, and what each model answers.
        clusters: As in `bootstrap`.
        permutations: How often they are exchanged.

    Returns:
        Low, high (first minus second) and p.
    """
    drawn = _Draws((labels, first, second), clusters)
    label, one, two = drawn.columns
    twice, forward, exchanged = np.concatenate([label, label]), np.concatenate([one, two]), np.concatenate([two, one])
    kinds = len(drawn.counts)
    every = np.empty((BLOCK, 2 * kinds), dtype=np.int64)  # once, as its pages take longer than what is written on them

    def difference(rows: Ints, moved: Ints | int = 0) -> Floats:
        both = every[: len(rows)]
        both[:, :kinds], both[:, kinds:] = rows - moved, moved
        return metric(twice, forward, both) - metric(twice, exchanged, both)

    low, high = _interval(difference, drawn, _generator(1))
    generator, rows = _generator(2), np.tile(drawn.counts, (BLOCK, 1))
    null = [difference(rows, drawn.halves(generator)) for _ in range(permutations // BLOCK)]
    # A hair below: the same difference summed in another order is still the same difference.
    extreme = int(np.sum(np.abs(null) >= abs(difference(rows[:1])) - 1e-12))
    return low, high, (1 + extreme) / (1 + permutations)


def resampled(labels: Ints | Floats, answers: Ints | Floats, metric: Metric, clusters: Ints | None = None) -> Floats:
    """A metric over 500 resamples of the rows, ``(500,)``: the same rows for every model, in the same order.

    So any combination of several models' scores has a paired interval, the quantiles of that combination of their
    resamples, and each model is resampled once.

    Args:
        labels, answers: ``(n,)``, class numbers or others; labels may be ``(n, k)``.
        clusters: As in `bootstrap`.

    Reference:
        Efron, Bootstrap methods: another look at the jackknife, 1979.

    >>> rows = np.arange(4)
    >>> float(np.ptp(resampled(rows, rows, lambda labels, answers, counts: counts.sum(axis=1))))
    0.0
    """
    drawn, generator = _Draws((labels, answers), clusters), _generator(3)
    label, answer = drawn.columns
    return np.concatenate([metric(label, answer, drawn.alike(generator)) for _ in range(RESAMPLES // BLOCK)])


def clusters_drawn(clusters: Ints, draws: int, generator: np.random.Generator) -> Ints:
    """``(draws, n)``: how often each row is drawn, where whole clusters are, as many as there are.

    >>> clusters_drawn(np.array([0, 0, 1]), 1, np.random.default_rng(0)).tolist()
    [[1, 1, 1]]
    """
    n = int(clusters.max()) + 1
    counts: Ints = generator.multinomial(n, np.full(n, 1 / n), draws)[:, clusters]
    return counts


class _Draws:
    """Rows that are drawn again, `BLOCK` times together: kinds of them, or all, where they are drawn in clusters."""

    def __init__(self, columns: Sequence[Ints | Floats], clusters: Ints | None) -> None:
        self._clusters, self._n = clusters, len(columns[0])
        #: The columns of the rows that the counts of a draw are of, and how many there are of each.
        self.columns: Sequence[Any] = columns
        self.counts = np.ones(self._n, dtype=np.int64)
        if clusters is None:
            self.columns, self.counts, self._place = _kinds(*columns)

    def rows(self, generator: np.random.Generator) -> Ints:
        """``(BLOCK, counts)``: as many rows, or clusters, as there are."""
        if self._clusters is None:
            return generator.multinomial(self._n, self.counts / self._n, BLOCK)
        return clusters_drawn(self._clusters, BLOCK, generator)

    def halves(self, generator: np.random.Generator) -> Ints:
        """``(BLOCK, counts)``: each row, or cluster, or none of it, at even chances."""
        count = len(self.counts) if self._clusters is None else int(self._clusters.max()) + 1
        bits = np.frombuffer(generator.bytes(BLOCK * -(-count // 8)), np.uint8).reshape(BLOCK, -1)
        coins = np.unpackbits(bits, axis=1)[:, :count].astype(np.int64)
        if self._clusters is not None:
            return coins[:, self._clusters]
        many = self.counts > 1
        coins[:, many] = generator.binomial(self.counts[many], 0.5, (BLOCK, int(many.sum())))
        return coins

    def alike(self, generator: np.random.Generator) -> Ints:
        """As `rows`, the same rows whatever stands in the columns."""
        if self._clusters is not None:
            return self.rows(generator)
        n, kinds = self._n, len(self.counts)
        draws = (self._place[generator.integers(n, size=n)] for _ in range(BLOCK))
        return np.stack([np.bincount(places, minlength=kinds) for places in draws])


def _kinds(*columns: Ints | Floats) -> tuple[list[Any], Ints, Ints]:
    """Rows that differ, of arrays ``(n,)`` or ``(n, k)``; how many there are of each; and which one every row is."""
    kinds, place, counts = np.unique(np.column_stack(columns), axis=0, return_inverse=True, return_counts=True)
    ends = np.cumsum([1 if column.ndim == 1 else column.shape[1] for column in columns])
    parts = [
        part[:, 0] if column.ndim == 1 else part
        for column, part in zip(columns, np.split(kinds, ends[:-1], axis=1), strict=True)
    ]
    return parts, counts, place.reshape(-1)


def _interval(values: Callable[[Ints], Floats], drawn: _Draws, generator: np.random.Generator) -> tuple[float, float]:
    blocks = [values(drawn.rows(generator)) for _ in range(RESAMPLES // BLOCK)]
    low, high = np.quantile(blocks, [0.025, 0.975])
    return float(low), float(high)


def _generator(stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=SEED + stream))
