"""What else the ingredients' logits tell: ensembles as the yardstick of a soup, error diversity, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation.statistics import Ints
from hf_soup.selection import SELECTIONS

#: (n, classes) float32, row i for row i of the data.
Logits = NDArray[np.float32]
_Doubles = NDArray[np.float64]

BINS = 15


def ensemble(logits_list: Sequence[Logits]) -> Logits:
    r"""The logits of the probability ensemble, :math:`\log\frac1k\sum_i \operatorname{softmax}(x_i)`.

    Args:
        logits_list: One or more arrays, ``(n, classes)`` each.

    Returns:
        ``(n, classes)`` float32.

    Raises:
        ScoringError: There are none, or their shapes differ.

    >>> ensemble([np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.1, 0.9]]))]).round(3)
    array([[-1.204, -0.357]], dtype=float32)
    """
    from scipy.special import log_softmax, logsumexp

    # Through logarithms: a probability of zero in every model would be minus infinity.
    every = log_softmax(_stack(logits_list), axis=-1)
    return np.asarray(logsumexp(every, axis=0) - np.log(len(every)), dtype=np.float32)


def logit_ensemble(logits_list: Sequence[Logits]) -> Logits:
    r"""The ensemble that the paper compares soups with, :math:`\frac1k\sum_i x_i`.

    Args, returns and raises as `ensemble`.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, table 2.

    >>> logit_ensemble([np.array([[0.0, 1.0]]), np.array([[4.0, 0.0]])])
    array([[2. , 0.5]], dtype=float32)
    """
    return np.asarray(_stack(logits_list).mean(axis=0), dtype=np.float32)


def greedy_ensemble(
    held_out: Mapping[str, Sequence[Logits]], score: Callable[[Sequence[Logits]], float], accept: str = ">="
) -> tuple[str, ...]:
    """The models that the greedy soup's recipe keeps when it averages logits and not weights, best first.

    Args:
        held_out: Every model's logits on each of the held-out data sets, ``(n, classes)``.
        score: The held-out score of such logits; larger is better.
        accept: ``>=`` or ``>``, as for the soup.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, appendix on ensembles.

    >>> sure, unsure, wrong = np.array([[2.0, 0.0]]), np.array([[0.1, 0.0]]), np.array([[0.0, 9.0]])
    >>> models = {"wrong": [wrong], "unsure": [unsure], "sure": [sure]}
    >>> greedy_ensemble(models, lambda logits: float(logits[0][0, 0] > logits[0][0, 1]))
    ('unsure', 'sure')
    """

    def together(names: Mapping[str, float]) -> float:
        return score([logit_ensemble(each) for each in zip(*(held_out[name] for name in names), strict=True)])

    found = SELECTIONS["greedy"].function(dict.fromkeys(held_out, 1.0), together, accept=accept)
    return tuple(found.weights)


def diversity(logits: Mapping[str, Logits], labels: Ints) -> dict[str, Any]:
    """How differently models err: what an ensemble, and with luck a soup, lives on.

    Of every pair: ``disagreement``, the share of rows that they answer differently; ``double_fault``, the share that
    both get wrong; ``shared_errors``, rows that both get wrong among those that either does, or None where neither
    errs. With the ratio-error r (rows that one gets wrong, by rows that both do), it is 1 / (1 + r).

    Args:
        logits: Model → ``(n, classes)``.
        labels: ``(n,)`` int64.

    Returns:
        ``models``, a square matrix (a list of rows, in their order, to four digits) for each of the three, and
        ``mean``: each over all pairs of different models, None where there are none.

    Reference:
        Kuncheva & Whitaker, Measures of diversity in classifier ensembles, Machine Learning 2003 (double fault);
        Fort et al., Deep ensembles: a loss landscape perspective, arXiv:1912.02757 (disagreement);
        Ramé et al., Diverse weight averaging, NeurIPS 2022, arXiv:2205.09739 (ratio-error, after Aksela 2003).

    >>> one, other = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[0, 2, 1, 0]]
    >>> found = diversity({"one": one, "other": other}, np.array([0, 1, 1, 1]))
    >>> found["disagreement"], found["double_fault"]
    ([[0.0, 0.5], [0.5, 0.0]], [[0.5, 0.25], [0.25, 0.5]])
    >>> found["mean"]
    {'disagreement': 0.5, 'double_fault': 0.25, 'shared_errors': 0.3333333333333333}
    """
    answers = _stack(list(logits.values()), labels).argmax(axis=-1)  # (models, n)
    wrong = (answers != labels).astype(np.int64)
    both = wrong @ wrong.T
    either = wrong.sum(1)[:, None] + wrong.sum(1) - both
    matrices = {
        "disagreement": (answers[:, None] != answers).mean(axis=-1),
        "double_fault": both / len(labels),
        "shared_errors": np.divide(both, either, out=np.full(both.shape, np.nan), where=either > 0),
    }
    pairs = np.triu_indices(len(answers), 1)
    plain: dict[str, Any] = {
        name: [[None if math.isnan(value) else round(value, 4) for value in row] for row in matrix.tolist()]
        for name, matrix in matrices.items()
    }
    means = {name: matrix[pairs][~np.isnan(matrix[pairs])] for name, matrix in matrices.items()}
    mean = {name: float(values.mean()) if len(values) else None for name, values in means.items()}
    return {"models": list(logits), **plain, "mean": mean}


def calibration(logits: Logits, labels: Ints) -> dict[str, float]:
    r"""How far a model's probabilities :math:`p` can be believed; of all three, less is better.

    ``ece``, the expected calibration error over 15 bins of the largest probability, equally wide:
    :math:`\sum_b \frac{n_b}{n} |\operatorname{accuracy}_b - \operatorname{confidence}_b|`, from 0 to 1.
    ``nll``, the mean of :math:`-\log p_y`, from 0. ``brier``, the mean of
    :math:`\sum_c (p_c - [c = y])^2`, from 0 to 2.

    Args:
        logits: ``(n, classes)``.
        labels: ``(n,)`` int64.

    Reference:
        Guo et al., On calibration of modern neural networks, ICML 2017, arXiv:1706.04599;
        Brier, Verification of forecasts expressed in terms of probability, 1950.

    >>> found = calibration(np.log(np.array([[0.75, 0.25], [0.75, 0.25]])), np.array([0, 1]))
    >>> {name: round(value, 4) for name, value in found.items()}
    {'ece': 0.25, 'nll': 0.837, 'brier': 0.625}
    """
    from scipy.special import log_softmax

    logarithms = log_softmax(_stack([logits], labels)[0], axis=-1)
    rows, shares = np.arange(len(labels)), np.exp(logarithms)
    confidence = shares.max(axis=1)
    # Bins are closed above, as in the paper; a hair: twelve fifteenths do not belong to the next one.
    bins = np.clip(np.ceil(confidence * BINS - 1e-9).astype(np.int64) - 1, 0, BINS - 1)
    apart = np.bincount(bins, (shares.argmax(axis=1) == labels) - confidence, BINS)
    right = shares[rows, labels]
    return {
        "ece": float(np.abs(apart).sum() / len(labels)),
        "nll": float(-logarithms[rows, labels].mean()),
        "brier": float((np.square(shares).sum(axis=1) - 2 * right + 1).mean()),
    }


@dataclass(frozen=True)
class Gap:
    """Loss of a soup of two models minus that of their logit ensemble: as the paper predicts it, and as it is.

    ``predicted`` is made of ``curvature``, the second derivative of the soup's loss along the path, and ``variance``,
    of the difference of the two models' logits; ``scale`` is the β that calibrates the soup.
    """

    predicted: float
    measured: float
    curvature: float
    variance: float
    scale: float


def predicted_gap(
    path: Sequence[Logits], ends: Sequence[Logits], labels: Ints, *, step: float, alpha: float = 0.5
) -> Gap:
    r"""Where does averaging weights differ from averaging logits? The paper's approximation, beside the truth.

    With :math:`f_\alpha = f(x; (1-\alpha)\theta_0 + \alpha\theta_1)`, :math:`\Delta f = f_1 - f_0` and cross-entropies
    of logits times β,

    .. math:: L^{soup}_\alpha - L^{ens}_\alpha \approx \frac{\alpha(1-\alpha)}{2}\left(
        -\frac{d^2}{d\alpha^2} L^{soup}_\alpha
        + \beta^2 E_x \operatorname{Var}_{Y\sim\operatorname{softmax}(\beta f_\alpha)} \Delta f_Y\right)

    so a soup is near its ensemble where the path is flat and the models sure, or at one. The second derivative is the
    central difference over ``step``; β minimises the soup's loss on the same rows.

    Args:
        path: Logits at ``alpha - step``, ``alpha`` and ``alpha + step``, ``(n, classes)`` each.
        ends: Logits of the two models, at 0 and 1.
        labels: ``(n,)`` int64.
        step: Of the central difference.
        alpha: The share of the second model, in (0, 1).

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, section 4 and appendix on its derivation.

    Straight logits, as of a linear model: soup and ensemble are one, and curvature and variance cancel.

    >>> ends = np.array([[[0.0, 1.0], [2.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    >>> path = [(1 - share) * ends[0] + share * ends[1] for share in (0.49, 0.5, 0.51)]
    >>> gap = predicted_gap(path, ends, np.array([0, 1, 0]), step=0.01)
    >>> abs(gap.measured) < 1e-12, abs(gap.predicted / gap.curvature) < 1e-3
    (True, True)
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax, softmax

    before, soup, after, first, last = _stack([*path, *ends], labels)
    rows = np.arange(len(labels))

    def loss(logits: _Doubles, scale: float) -> float:
        return float(-log_softmax(scale * logits, axis=-1)[rows, labels].mean())

    scale = math.exp(minimize_scalar(lambda log: loss(soup, math.exp(log)), bounds=(-5, 5), method="bounded").x)
    curvature = (loss(before, scale) - 2 * loss(soup, scale) + loss(after, scale)) / step**2
    shares, difference = softmax(scale * soup, axis=-1), last - first
    spread = (shares * difference**2).sum(axis=-1) - (shares * difference).sum(axis=-1) ** 2
    variance = float(spread.mean())
    predicted = alpha * (1 - alpha) / 2 * (scale**2 * variance - curvature)
    measured = loss(soup, scale) - loss((1 - alpha) * first + alpha * last, scale)
    return Gap(predicted, measured, curvature, variance, scale)


def _stack(logits_list: Sequence[Logits], labels: Ints | None = None) -> _Doubles:
    """``(models, n, classes)`` float64."""
    shapes = sorted({np.shape(logits) for logits in logits_list})
    if len(shapes) != 1:
        raise ScoringError(f"Logits of one shape are needed, of models on the same rows; these are {shapes}.")
    if labels is not None and shapes[0][:1] != labels.shape:
        raise ScoringError(f"Logits of shape {shapes[0]} and {len(labels):,} labels do not belong together.")
    return np.stack([np.asarray(logits, dtype=np.float64) for logits in logits_list])
