"""Built-in metrics of each kind of head, draw by draw, against scikit-learn and scipy, which `evaluate` calls too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import answered
import numpy as np
import pytest
import sklearn.metrics as theirs
from numpy.typing import NDArray
from scipy import stats
from scipy.special import log_softmax, softmax

from hf_soup.evaluation import statistics
from hf_soup.evaluation.formulas import (
    BINARY,
    CLASS_METRICS,
    CORRELATIONS,
    LOSSES,
    MULTI_LABEL_METRICS,
    REGRESSION_METRICS,
)
from hf_soup.evaluation.statistics import bootstrap, paired_bootstrap, resampled

RNG = np.random.default_rng(0)
N = 60
ONCE = np.ones((1, N), dtype=np.int64)


def draws() -> NDArray[np.int64]:
    """All rows once; and rows drawn again, of which many are not there."""
    return np.concatenate([ONCE, RNG.poisson([[0.3], [1.0], [3.0]], (3, N))])


def one_by_one(function: Callable[..., float], labels: Any, answers: Any, rows: Any) -> list[float]:
    return [float(function(np.repeat(labels, each, axis=0), np.repeat(answers, each, axis=0))) for each in rows]


@pytest.mark.parametrize("name", BINARY)
def test_of_two_classes_is_of_class_1(name: str) -> None:
    """As scikit-learn's ``average="binary"``; where nothing is of that class it is zero."""
    expected = partial(getattr(theirs, f"{name}_score"), average="binary", zero_division=0.0)
    labels, answers = RNG.integers(0, 2, (2, N))
    rows = draws()
    rows = np.concatenate([rows, rows * (labels == 0), rows * (answers == 0), rows * (labels + answers == 0)])
    found = CLASS_METRICS[name](labels, answers, rows)
    assert found == pytest.approx(one_by_one(expected, labels, answers, rows), abs=1e-12)


def test_by_hand() -> None:
    labels, answers = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert answered.value("f1", labels, answers) == pytest.approx(2 / 3)  # of class 0 it is 4/5
    assert answered.value("f1_macro", labels, answers) == pytest.approx((2 / 3 + 4 / 5) / 2)
    # Of four pairs of a row of class 1 and one of class 0, two are in order, and one is a tie.
    assert answered.value("roc_auc", np.array([0, 1, 1, 0]), np.array([0.5, 0.5, 0.9, 0.7])) == 0.625
    numbers = np.array([1.0, 2.0, 4.0]), np.array([10.0, 30.0, 20.0])
    values = {name: answered.value(name, *numbers, built_in=REGRESSION_METRICS) for name in ("spearmanr", "mae", "mse")}
    assert values == pytest.approx({"spearmanr": 0.5, "mae": 53 / 3, "mse": (81 + 784 + 256) / 3})
    sets = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [0, 1], [1, 0]])
    names = ("accuracy", "f1_micro", "f1_macro", "roc_auc")
    values = {name: answered.value(name, *sets, built_in=MULTI_LABEL_METRICS) for name in names}
    assert values == pytest.approx({"accuracy": 1 / 3, "f1_micro": 2 / 3, "f1_macro": 0.75, "roc_auc": 0.625})


def test_the_area_under_the_curve_of_two_classes_and_of_more() -> None:
    logits = RNG.normal(size=(N, 4)).round(1)
    labels = np.where(RNG.random(N) < 0.5, logits.argmax(1), RNG.integers(0, 4, N))
    rows = draws()[[0, 2, 3]]  # in which all classes are
    found = CLASS_METRICS["roc_auc"](labels, log_softmax(logits, axis=1), rows)
    expected = partial(theirs.roc_auc_score, multi_class="ovr", average="macro", labels=range(4))
    assert found == pytest.approx(one_by_one(expected, labels, softmax(logits, axis=1), rows), abs=1e-12)
    two, score = labels % 2, logits[:, 0]  # a tenth apart, so there are ties
    found = CLASS_METRICS["roc_auc"](two, score, rows)
    assert found == pytest.approx(one_by_one(theirs.roc_auc_score, two, score, rows), abs=1e-12)
    # A class that a draw lacks does not count; where a draw has one class only, nothing can be ordered.
    without = ONCE * (labels != 3)
    kinds = [
        theirs.roc_auc_score(labels[labels != 3] == kind, softmax(logits, 1)[labels != 3, kind]) for kind in range(3)
    ]
    assert CLASS_METRICS["roc_auc"](labels, log_softmax(logits, axis=1), without) == pytest.approx([np.mean(kinds)])
    assert CLASS_METRICS["roc_auc"](two, score, ONCE * (two == 1)).tolist() == [0.5]


SETS = (RNG.random((N, 5)) < [0.5, 0.3, 0.2, 0.1, 0.02]).astype(np.int64)
SETS[0, 4] = 1
SAID = np.where(RNG.random((N, 5)) < 0.8, SETS, 1 - SETS).astype(np.int8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", theirs.accuracy_score),
        ("f1_micro", partial(theirs.f1_score, average="micro", zero_division=0.0)),
        ("f1_macro", partial(theirs.f1_score, average="macro", zero_division=0.0)),
    ],
)
def test_of_several_labels_a_row(name: str, expected: Callable[..., float]) -> None:
    """Labels that a draw does not have count as zero, as in scikit-learn."""
    rows = draws()
    found = MULTI_LABEL_METRICS[name](SETS, SAID, rows)
    assert found == pytest.approx(one_by_one(expected, SETS, SAID, rows), abs=1e-12)


def test_the_area_under_the_curve_of_several_labels_a_row() -> None:
    scores = (SETS + RNG.normal(size=SETS.shape)).astype(np.float32)
    expected = theirs.roc_auc_score(SETS, scores, average="macro")
    assert MULTI_LABEL_METRICS["roc_auc"](SETS, scores, ONCE) == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("spearmanr", lambda labels, answers: stats.spearmanr(labels, answers).statistic),
        ("pearsonr", lambda labels, answers: stats.pearsonr(labels, answers).statistic),
        ("mse", theirs.mean_squared_error),
        ("mae", theirs.mean_absolute_error),
    ],
)
def test_of_numbers(name: str, expected: Callable[..., float]) -> None:
    """With ties, as people give whole and half points, and far from zero, where squares round."""
    rows = draws()
    for middle in (0.0, 1e4):
        labels = middle + RNG.integers(0, 11, N) / 2
        answers = (labels + RNG.normal(size=N)).astype(np.float32)
        found = REGRESSION_METRICS[name](labels, answers, rows)
        assert found == pytest.approx(one_by_one(expected, labels, answers.astype(np.float64), rows), abs=1e-9)


@pytest.mark.parametrize("name", ["spearmanr", "pearsonr"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 3.7, 1e9])
def test_one_answer_to_everything_says_nothing(name: str, constant: float) -> None:
    """Zero, as Matthews' correlation is; scipy has no number for it. The least change in float32 is one already."""
    labels, answers = RNG.normal(size=N), np.full(N, constant, dtype=np.float32)
    assert REGRESSION_METRICS[name](labels, answers, draws()).tolist() == [0.0] * 4
    answers[7] = np.nextafter(answers[7], np.float32(np.inf))
    expected = getattr(stats, name)(labels, answers.astype(np.float64)).statistic
    assert REGRESSION_METRICS[name](labels, answers, ONCE) == pytest.approx([expected], rel=1e-6)


KINDS = {
    "roc_auc": (CLASS_METRICS, RNG.integers(0, 2, N), RNG.normal(size=(2, N))),
    "f1_micro": (MULTI_LABEL_METRICS, SETS, np.stack([SAID, SETS * (RNG.random(SETS.shape) < 0.5)])),
    "spearmanr": (REGRESSION_METRICS, np.arange(N) / 7, np.arange(N) + 20 * RNG.normal(size=(2, N))),
    "loss": (REGRESSION_METRICS, np.arange(N) / 7, RNG.random((2, N))),
}


@pytest.mark.parametrize("name", KINDS)
def test_intervals_and_tests_are_those_of_rows_drawn_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows are drawn as one kind, many draws at a time; here each row is drawn by itself."""
    monkeypatch.setattr(statistics, "RESAMPLES", 40)
    monkeypatch.setattr(statistics, "BLOCK", 20)
    built_in, labels, (first, second) = KINDS[name]
    metric = built_in[name]

    def value(labels: Any, answers: Any) -> float:
        return answered.value(name, labels, answers, built_in=built_in)

    draw = np.random.Generator(np.random.Philox(key=20220310 + 3))
    chosen = [draw.integers(N, size=N) for _ in range(40)]
    expected = [value(labels[each], first[each]) for each in chosen]
    assert resampled(labels, first, metric) == pytest.approx(expected, abs=1e-12)
    low, high = bootstrap(labels, first, metric)
    assert (low, high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=2 * np.std(expected))
    score = answered.score(name, labels, first, built_in=built_in)
    assert (score.low, score.value, score.high) == (low, value(labels, first), high)
    assert (score.share, score.less_is_better) == (name not in (*LOSSES, *CORRELATIONS), name in LOSSES)
    *_, p = paired_bootstrap(labels, first, second, metric)
    apart = abs(value(labels, first) - value(labels, second))
    exchange = np.random.default_rng(1).random((400, N)) < 0.5
    mixed = [
        np.where(each if first.ndim == 1 else each[:, None], [first, second], [second, first]) for each in exchange
    ]
    null = [abs(value(labels, one) - value(labels, other)) for one, other in mixed]
    assert p == pytest.approx(np.mean(np.array(null) >= apart), abs=0.2)
    assert paired_bootstrap(labels, first, first, metric) == (0.0, 0.0, 1.0)
