"""What else the ingredients' logits tell: ensembles as the yardstick of a soup, error diversity, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.evaluation.statistics import Ints
from hf_soup.recipe import CalibrationErrors, Diversity
from hf_soup.selection import SELECTIONS

#: (n, classes) float32, row i for row i of the data.
Logits = NDArray[np.float32]
BINS = 15


def ensemble(logits_list: Sequence[Logits]) -> Logits:
    r"""The logits of the probability ensemble, :math:`\log\frac1k\sum_i \operatorname{softmax}(x_i)`.

    Args:
        logits_list: One or more arrays, ``(n, classes)`` each.

    Returns:
        ``(n, classes)`` float32.

    >>> ensemble([np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.1, 0.9]]))]).round(3)
    array([[-1.204, -0.357]], dtype=float32)
    """
    from scipy.special import log_softmax, logsumexp

    # Through logarithms: a probability of zero in every model would be minus infinity.
    every = log_softmax(np.stack(logits_list, dtype=np.float64), axis=-1)
    return np.asarray(logsumexp(every, axis=0) - np.log(len(every)), dtype=np.float32)


def logit_ensemble(logits_list: Sequence[Logits]) -> Logits:
    r"""The ensemble that the paper compares soups with, :math:`\frac1k\sum_i x_i`.

    Args and returns as `ensemble`.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, table 2.

    >>> logit_ensemble([np.array([[0.0, 1.0]]), np.array([[4.0, 0.0]])])
    array([[2. , 0.5]], dtype=float32)
    """
    return np.asarray(np.mean(logits_list, axis=0, dtype=np.float64), dtype=np.float32)


def greedy_ensemble(
    validation: Mapping[str, Sequence[Logits]], score: Callable[[Sequence[Logits]], float]
) -> tuple[str, ...]:
    """The models that the greedy soup's recipe keeps when it averages logits and not weights, best first.

    Args:
        validation: Every model's logits on each of the validation data sets, ``(n, classes)``.
        score: The validation score of such logits; larger is better.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, appendix on ensembles.

    >>> sure, unsure, wrong = np.array([[2.0, 0.0]]), np.array([[0.1, 0.0]]), np.array([[0.0, 9.0]])
    >>> models = {"wrong": [wrong], "unsure": [unsure], "sure": [sure]}
    >>> greedy_ensemble(models, lambda logits: float(logits[0][0, 0] > logits[0][0, 1]))
    ('unsure', 'sure')
    """

    def together(names: Mapping[str, float]) -> float:
        return score([logit_ensemble(each) for each in zip(*(validation[name] for name in names), strict=True)])

    found = SELECTIONS["greedy"].function(dict.fromkeys(validation, 1.0), together)
    return tuple(found.weights)


def diversity(logits: Mapping[str, Logits], labels: Ints) -> Diversity:
    """How differently models err: what an ensemble, and with luck a soup, lives on.

    Of every pair: ``disagreement``, the share of rows that they answer differently; ``double_fault``, the share that
    both get wrong; ``shared_errors``, rows that both get wrong among those that either does, or None where neither
    errs. With the ratio-error r (rows that one gets wrong, by rows that both do), it is 1 / (1 + r).

    Args:
        logits: Model → ``(n, classes)``.
        labels: ``(n,)`` int64.

    Returns:
        With numbers to four digits; the mean is over all pairs of different models.

    Reference:
        Kuncheva & Whitaker, Measures of diversity in classifier ensembles, Machine Learning 2003 (double fault);
        Fort et al., Deep ensembles: a loss landscape perspective, arXiv:1912.02757 (disagreement);
        Ramé et al., Diverse weight averaging, NeurIPS 2022, arXiv:2205.09739 (ratio-error, after Aksela 2003).

    >>> one, other = np.eye(3)[[0, 1, 2, 0]], np.eye(3)[[0, 2, 1, 0]]
    >>> found = diversity({"one": one, "other": other}, np.array([0, 1, 1, 1]))
    >>> found.disagreement, found.double_fault
    (((0.0, 0.5), (0.5, 0.0)), ((0.5, 0.25), (0.25, 0.5)))
    >>> found.mean
    MeanDiversity(disagreement=0.5, double_fault=0.25, shared_errors=0.3333333333333333)
    """
    answers = np.stack([each.argmax(axis=-1) for each in logits.values()])  # (models, n)
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
    return Diversity.model_validate({"models": list(logits), **plain, "mean": mean})


def calibration(logits: Logits, labels: Ints) -> CalibrationErrors:
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
    >>> round(found.ece, 4), round(found.nll, 4), round(found.brier, 4)
    (0.25, 0.837, 0.625)
    """
    from scipy.special import log_softmax

    logarithms = log_softmax(logits.astype(np.float64), axis=-1)
    rows, shares = np.arange(len(labels)), np.exp(logarithms)
    confidence = shares.max(axis=1)
    # Bins are closed above, as in the paper; a hair: twelve fifteenths do not belong to the next one.
    bins = np.clip(np.ceil(confidence * BINS - 1e-9).astype(np.int64) - 1, 0, BINS - 1)
    apart = np.bincount(bins, (shares.argmax(axis=1) == labels) - confidence, BINS)
    right = shares[rows, labels]
    return CalibrationErrors(
        ece=float(np.abs(apart).sum() / len(labels)),
        nll=float(-logarithms[rows, labels].mean()),
        brier=float((np.square(shares).sum(axis=1) - 2 * right + 1).mean()),
    )
