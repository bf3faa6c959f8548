"""The built-in metrics: one function of counts each, and the `evaluate.Metric` that reports the value.

``evaluate.load`` would download a script, so each metric is a subclass of ``evaluate.Metric`` over
scikit-learn, kept in memory. A new metric is one `Formula` in `METRICS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.scoring.statistics import Floats, FromCounts, Ints, Score, bootstrap, wilson


@dataclass(frozen=True)
class Formula:
    """A metric twice: scikit-learn's for the value, a function of counts for a thousand resamples.

    Args:
        summary: One line for people.
        value: ``(labels, answers)`` → the number, through scikit-learn.
        from_counts: The same from counts by class; a test holds the two together.
    """

    summary: str
    value: Callable[[Ints, Ints], float]
    from_counts: FromCounts


def _accuracy(labels: Ints, answers: Ints) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, answers))


def _f1(labels: Ints, answers: Ints) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, answers, average="macro", zero_division=0.0))


def _precision(labels: Ints, answers: Ints) -> float:
    from sklearn.metrics import precision_score

    return float(precision_score(labels, answers, average="macro", zero_division=0.0))


def _recall(labels: Ints, answers: Ints) -> float:
    from sklearn.metrics import recall_score

    return float(recall_score(labels, answers, average="macro", zero_division=0.0))


def _balanced_accuracy(labels: Ints, answers: Ints) -> float:
    from sklearn.metrics import recall_score

    # balanced_accuracy_score is this number, and warns when an answer is a class that no row has.
    return float(recall_score(labels, answers, labels=np.unique(labels), average="macro"))


def _matthews(labels: Ints, answers: Ints) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, answers))


def _mean_over(values: Floats, used: Floats) -> Floats:
    """The mean over the classes that are used; there is always one, since there is always a row."""
    return np.asarray(np.where(used > 0, values, 0.0).sum(-1) / (used > 0).sum(-1))


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _matthews_from_counts(hits: Floats, support: Floats, predicted: Floats) -> Floats:
    n = support.sum(-1)
    covariance = hits.sum(-1) * n - (support * predicted).sum(-1)
    spread = (n**2 - (predicted**2).sum(-1)) * (n**2 - (support**2).sum(-1))
    return _share(covariance, np.sqrt(spread))


#: Name → metric. Averages are macro: every class counts the same, however rare; a class that neither the
#: labels nor the answers have does not count, and a share of nothing is zero.
METRICS: dict[str, Formula] = {
    "accuracy": Formula(
        "share of rows answered correctly", _accuracy, lambda hits, support, _: hits.sum(-1) / support.sum(-1)
    ),
    "f1": Formula(
        "harmonic mean of precision and recall, averaged over classes",
        _f1,
        lambda hits, support, predicted: _mean_over(_share(2 * hits, support + predicted), support + predicted),
    ),
    "precision": Formula(
        "share of a class's answers that are right, averaged over classes",
        _precision,
        lambda hits, support, predicted: _mean_over(_share(hits, predicted), support + predicted),
    ),
    "recall": Formula(
        "share of a class's rows that are found, averaged over classes",
        _recall,
        lambda hits, support, predicted: _mean_over(_share(hits, support), support + predicted),
    ),
    "balanced_accuracy": Formula(
        "recall averaged over the classes that the rows have",
        _balanced_accuracy,
        lambda hits, support, predicted: _mean_over(_share(hits, support), support),
    ),
    "matthews_correlation": Formula(
        "correlation of labels and answers, from -1 to 1", _matthews, _matthews_from_counts
    ),
}


def find(metric: str) -> Formula:
    """The metric of that name.

    Raises:
        ScoringError: There is none; the message lists those that there are.
    """
    if metric not in METRICS:
        raise ScoringError(
            f"There is no metric '{metric}'.", hint=f"Use one of the built-in metrics: {', '.join(METRICS)}."
        )
    return METRICS[metric]


def compute(metric: str, labels: Ints, answers: Ints) -> float:
    """The value of a metric, through ``evaluate``.

    Args:
        labels, answers: ``(n,)`` int64 class numbers, ``n >= 1``.

    Raises:
        ScoringError: There is no such metric, or it gives no number.
    """
    formula = find(metric)
    # evaluate makes a folder even for a metric in memory, by default below HF_HOME, which may be read-only.
    with tempfile.TemporaryDirectory(prefix="hf-soup-metric-") as folder:
        module = _metric_class()(metric, formula, folder)
        value = float(module.compute(predictions=answers, references=labels)[metric])
    if not np.isfinite(value):
        raise ScoringError(
            f"The metric '{metric}' gives {value} on {len(labels):,} rows.",
            hint="Use more rows, or another metric.",
        )
    return value


def score(metric: str, labels: Ints, answers: Ints, classes: int) -> Score:
    """A metric with its 95 % interval: Wilson's for accuracy, the bootstrap's for others.

    Raises:
        ScoringError: As `compute`.
    """
    value, n = compute(metric, labels, answers), len(labels)
    if metric == "accuracy":
        low, high = wilson(int(np.sum(labels == answers)), n)
    else:
        low, high = bootstrap(labels, answers, classes, find(metric).from_counts)
    return Score(metric, value, min(low, value), max(high, value), n)


@cache
def _metric_class() -> Any:
    """The subclass of ``evaluate.Metric``; made at first use because the import takes five seconds."""
    import evaluate
    from datasets import Features, Value

    class SoupMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is not typed
        def __init__(self, metric: str, formula: Formula, folder: str) -> None:
            self._metric, self._formula = metric, formula
            # A seed of its own: by default evaluate reads numpy's global state.
            super().__init__(config_name=metric, keep_in_memory=True, cache_dir=folder, seed=0)

        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description=self._formula.summary,
                citation="",
                inputs_description="predictions and references: class numbers.",
                features=Features({"predictions": Value("int64"), "references": Value("int64")}),
            )

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            labels, answers = np.asarray(references), np.asarray(predictions)
            return {self._metric: self._formula.value(labels, answers)}

    return SoupMetric
