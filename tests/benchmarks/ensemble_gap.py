"""The gap between a soup and an ensemble, as the paper predicts it: docs/evidence.md measures it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from hf_soup.evaluation.ensembles import Logits
from hf_soup.evaluation.statistics import Ints


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
    before, soup, after, first, last = np.stack([*path, *ends], dtype=np.float64)
    rows = np.arange(len(labels))

    def loss(logits: NDArray[np.float64], scale: float) -> float:
        return float(-log_softmax(scale * logits, axis=-1)[rows, labels].mean())

    scale = math.exp(minimize_scalar(lambda log: loss(soup, math.exp(log)), bounds=(-5, 5), method="bounded").x)
    curvature = (loss(before, scale) - 2 * loss(soup, scale) + loss(after, scale)) / step**2
    shares, difference = softmax(scale * soup, axis=-1), last - first
    spread = (shares * difference**2).sum(axis=-1) - (shares * difference).sum(axis=-1) ** 2
    variance = float(spread.mean())
    predicted = alpha * (1 - alpha) / 2 * (scale**2 * variance - curvature)
    measured = loss(soup, scale) - loss((1 - alpha) * first + alpha * last, scale)
    return Gap(predicted, measured, curvature, variance, scale)
