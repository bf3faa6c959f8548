"""The built-in metrics: formulas of labels, answers, and how many rows of each draw stand for each pair of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.evaluation.statistics import Floats, Ints, Metric, mean


def _of_counts(value: Callable[[Ints, Ints, Ints], Floats]) -> Metric:
    """A metric that needs no more than three counts of each class, and so takes many draws at once.

    Args:
        value: The metric, ``(draws,)``, of three ``(classes, draws)`` int64: how many rows of a class are answered
            rightly, how many have it as their label, and how many as their answer.
    """

    def metric(labels: Ints, answers: Ints, rows: Ints) -> Floats:
        from scipy.sparse import csr_array

        classes, place = np.unique(np.stack([labels, answers]), return_inverse=True)
        (label, answer), shape = place.reshape(2, -1), (len(classes), len(labels))
        every, columns = np.ones_like(label), np.ascontiguousarray(rows.T)  # else scipy copies it three times
        of_kinds = ((label == answer, label), (every, label), (every, answer))
        return value(*(csr_array((kept, (of, np.arange(shape[1]))), shape=shape) @ columns for kept, of in of_kinds))

    return metric


def _of_class_1(value: Callable[[Ints, Ints, Ints], Floats]) -> Metric:
    """A metric of two classes, that needs the counts of class 1 alone, ``(draws,)`` each, as `_of_counts` has them."""

    def metric(labels: Ints, answers: Ints, rows: Ints) -> Floats:
        return value(rows @ (labels * answers == 1), rows @ (labels == 1), rows @ (answers == 1))

    return metric


def _of_label_counts(value: Callable[[Ints, Ints, Ints], Floats]) -> Metric:
    """A metric of sets of labels, ``(n, labels)`` of 0 and 1: as `_of_counts`, with counts ``(labels, draws)``."""

    def metric(labels: Ints, answers: Ints, rows: Ints) -> Floats:
        from scipy.sparse import csr_array

        columns = np.ascontiguousarray(rows.T)
        return value(*(csr_array(each.T) @ columns for each in (labels * answers, labels, answers)))

    return metric


def _share(part: Any, whole: Any) -> Floats:
    """A share of nothing is zero."""
    return np.asarray(part / np.maximum(whole, 1))


def _macro(part: Ints, whole: Ints, of: Ints) -> Floats:
    """The mean share over the classes that ``of`` has."""
    return np.asarray(_share(part, whole).sum(axis=0) / (of > 0).sum(axis=0))


def _matthews(right: Ints, label: Ints, answer: Ints) -> Floats:
    """Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004."""
    n = label.sum(axis=0)
    # One class only among the labels or among the answers: zero above, and one below.
    squares = [np.maximum(n**2 - (count**2).sum(axis=0), 1) for count in (label, answer)]
    return np.asarray((right.sum(axis=0) * n - (label * answer).sum(axis=0)) / np.sqrt(squares).prod(axis=0))


def rows_right(labels: Ints, answers: Ints) -> NDArray[np.bool_]:
    """Which rows have the right answer, all of it."""
    return np.asarray((labels == answers).reshape(len(labels), -1).all(axis=1))


def _accuracy(labels: Ints, answers: Ints, rows: Ints) -> Floats:
    return mean(labels, rows_right(labels, answers), rows)


def _groups(values: Floats) -> tuple[Ints, Ints]:
    """The order of values from small to large, and where in it each group of equal ones begins."""
    order = np.argsort(values, kind="stable")
    return order, np.flatnonzero(np.diff(values[order], prepend=np.nan))


def _above(labels: Ints, scores: Floats, rows: Ints) -> Floats:
    """Of all pairs of a row with a label and one without, in how many the first scores higher; equal ones are half.

    It is the area under the ROC curve (Hanley & McNeil, 1982), as a mean over the labels of which a draw has both
    kinds of rows; where there is none, 0.5: what nobody can order says nothing.

    Args:
        labels, scores: ``(n, labels)``.
    """
    total, counted = np.zeros(len(rows)), np.zeros(len(rows))
    for label, score in zip(labels.T, scores.T, strict=True):
        order, begins = _groups(score)
        drawn = rows[:, order]
        positive, negative = (np.add.reduceat(drawn * kind[order], begins, axis=1) for kind in (label, 1 - label))
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        total += _share((positive * below).sum(axis=1), pairs)
        counted += pairs > 0
    return np.where(counted > 0, _share(total, counted), 0.5)


def _roc_auc(labels: Ints, scores: Floats, rows: Ints) -> Floats:
    """Of classes: scores ``(n,)`` of class 1 among two, or ``(n, classes)``, each against the rest."""
    if scores.ndim == 1:
        return _above(labels[:, None], scores[:, None], rows)
    return _above((labels[:, None] == np.arange(scores.shape[1])).astype(np.int64), scores, rows)


def _correlation(first: Floats, second: Floats, rows: Ints) -> Floats:
    """Pearson's r of ``(n,)`` or ``(draws, n)`` each; zero where one is constant and so tells nothing of the other."""
    n = rows.sum(axis=1, keepdims=True)
    # Of a constant in float32, or of ranks, no sum here is rounded, so that what is left of it is zero.
    one, other = (each - (rows * each).sum(axis=1, keepdims=True) / n for each in (first, second))
    squares = (rows * one**2).sum(axis=1) * (rows * other**2).sum(axis=1)
    found = (rows * one * other).sum(axis=1) / np.sqrt(np.where(squares > 0, squares, 1))
    return np.asarray(np.clip(found, -1, 1))


def _pearson(labels: Floats, answers: Floats, rows: Ints) -> Floats:
    return _correlation(labels.astype(np.float64), answers.astype(np.float64), rows)


def _ranks(values: Floats, rows: Ints) -> Floats:
    """``(draws, n)``: the rank of each value in each draw, of equal ones the mean of theirs."""
    order, begins = _groups(values)
    counts = np.add.reduceat(rows[:, order], begins, axis=1)
    places = np.unique(values, return_inverse=True)[1]
    return np.asarray((np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, places])


def _spearman(labels: Floats, answers: Floats, rows: Ints) -> Floats:
    """Spearman, The proof and measurement of association between two things, 1904."""
    return _correlation(_ranks(labels, rows), _ranks(answers, rows), rows)


def _mean_error(power: int) -> Metric:
    def metric(labels: Floats, answers: Floats, rows: Ints) -> Floats:
        return mean(labels, np.abs(labels - answers.astype(np.float64)) ** power, rows)

    return metric


def _f1(right: Any, label: Any, answer: Any) -> Floats:
    return _share(2 * right, label + answer)


#: Name → metric of one class a row, as scikit-learn has it; a share of nothing is zero. ``_macro`` is the mean over the
#: classes: each counts the same, however rare, and one that neither the labels nor the answers have does not count.
CLASS_METRICS: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _of_class_1(_f1),
    "precision": _of_class_1(lambda right, _, answer: _share(right, answer)),
    "recall": _of_class_1(lambda right, label, _: _share(right, label)),
    "f1_macro": _of_counts(lambda right, label, answer: _macro(2 * right, label + answer, label + answer)),
    "precision_macro": _of_counts(lambda right, label, answer: _macro(right, answer, label + answer)),
    "recall_macro": _of_counts(lambda right, label, answer: _macro(right, label, label + answer)),
    "balanced_accuracy": _of_counts(lambda right, label, answer: _macro(right, label, label)),
    "matthews_correlation": _of_counts(_matthews),
    "roc_auc": _roc_auc,
    "loss": mean,
}
#: Of several labels a row, or none: here every label counts in the mean.
MULTI_LABEL_METRICS: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "f1_micro": _of_label_counts(lambda *counts: _f1(*(count.sum(axis=0) for count in counts))),
    "f1_macro": _of_label_counts(lambda *counts: np.asarray(_f1(*counts).mean(axis=0))),
    "roc_auc": _above,
    "loss": mean,
}
#: Of one number a row, by the names that `evaluate` has for them.
REGRESSION_METRICS: Mapping[str, Metric] = {
    "spearmanr": _spearman,
    "pearsonr": _pearson,
    "mse": _mean_error(2),
    "mae": _mean_error(1),
    "loss": mean,
}
#: Those of two classes alone.
BINARY = ("f1", "precision", "recall")
#: Those of which less is better; none is a share of one.
LOSSES = ("loss", "mse", "mae")
#: Those from -1 to 1, which are no shares either.
CORRELATIONS = ("spearmanr", "pearsonr", "matthews_correlation")
