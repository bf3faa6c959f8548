"""The built-in metrics: scikit-learn's, reported through `evaluate`.

``evaluate.load`` would download a script, so the metrics are one subclass of ``evaluate.Metric``, kept in memory.
A new metric is one line in `METRICS`.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.scoring import statistics
from hf_soup.scoring.statistics import Ints, Metric, Score, bootstrap, wilson


def _scikit_learn(function: str, **options: Any) -> Metric:
    def metric(labels: Ints, answers: Ints, rows: Ints) -> float:
        import sklearn.metrics

        drawn = rows > 0  # a class of no rows would count as one with a score of zero
        with warnings.catch_warnings():
            # That an answer is a class that no row has, or that there is one class only: both happen in resamples.
            warnings.simplefilter("ignore", UserWarning)
            value = getattr(sklearn.metrics, function)(
                labels[drawn], answers[drawn], sample_weight=rows[drawn], **options
            )
        return float(value)

    return metric


#: Name → metric. Averages are macro: every class counts the same, however rare; a class that neither the
#: labels nor the answers have does not count, and a share of nothing is zero.
METRICS: dict[str, Metric] = {
    "accuracy": _scikit_learn("accuracy_score"),
    "f1": _scikit_learn("f1_score", average="macro", zero_division=0.0),
    "precision": _scikit_learn("precision_score", average="macro", zero_division=0.0),
    "recall": _scikit_learn("recall_score", average="macro", zero_division=0.0),
    "balanced_accuracy": _scikit_learn("balanced_accuracy_score"),
    "matthews_correlation": _scikit_learn("matthews_corrcoef"),
}


def find(metric: str) -> Metric:
    """The metric of that name, or an error that lists those that there are."""
    if metric not in METRICS:
        raise ScoringError(f"There is no metric '{metric}'.", hint=f"Use one of {', '.join(METRICS)}.")
    return METRICS[metric]


def compute(metric: str, labels: Ints, answers: Ints) -> float:
    """The value of a metric, through ``evaluate``, on ``(n,)`` class numbers."""
    find(metric)
    # evaluate makes a folder even for a metric in memory, by default below HF_HOME, which may be read-only. A seed
    # of its own: by default evaluate reads numpy's global state.
    with tempfile.TemporaryDirectory(prefix="hf-soup-metric-") as folder:
        module = _metric_class()(metric, keep_in_memory=True, cache_dir=folder, seed=0)
        value = float(module.compute(predictions=answers, references=labels)[metric])
    if not np.isfinite(value):
        raise ScoringError(
            f"The metric '{metric}' gives {value} on {len(labels):,} rows.", hint="Use more rows, or another metric."
        )
    return value


def score(metric: str, labels: Ints, answers: Ints) -> Score:
    """A metric with its 95 % interval: Wilson's for accuracy, the bootstrap's for others."""
    value, n = compute(metric, labels, answers), len(labels)
    if metric == "accuracy":
        low, high = wilson(int(np.sum(labels == answers)), n)
    else:
        low, high = bootstrap(labels, answers, METRICS[metric])
    return Score(metric, value, min(low, value), max(high, value), n)


def resampled(metric: str, labels: Ints, answers: Ints) -> NDArray[np.float64]:
    """A metric over 500 resamples of the rows, the same ones for every model; see `statistics.resampled`."""
    return statistics.resampled(labels, answers, _share_right if metric == "accuracy" else find(metric))


def _share_right(labels: Ints, answers: Ints, rows: Ints) -> float:
    # scikit-learn's takes a hundred times as long, most of it looking at its arguments.
    return float(rows[labels == answers].sum() / rows.sum())


@cache
def _metric_class() -> Any:
    """Made at first use, because importing ``evaluate`` takes five seconds."""
    import evaluate
    from datasets import Features, Value

    class SoupMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is not typed
        def _info(self) -> Any:
            features = Features({"predictions": Value("int64"), "references": Value("int64")})
            return evaluate.MetricInfo(description=self.config_name, citation="", features=features)

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            labels, answers = np.asarray(references), np.asarray(predictions)
            return {self.config_name: METRICS[self.config_name](labels, answers, np.ones_like(labels))}

    return SoupMetric
