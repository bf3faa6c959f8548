"""Checkpoints of one run, weighed by their place in it: SWA, LAWA, EMA, and weights that imitate annealing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from hf_soup.errors import RecipeError
from hf_soup.selection import ScoreFunction, Selected, Weights, Within, selection


def _picks(count: int, **parameters: Any) -> tuple[Sequence[int], dict[str, Any]]:
    """Of so many checkpoints the numbers of those that go in with any of the values, and the parameters for these.

    >>> _picks(7, last=3, stride=2, schedule="ema")
    ([2, 4, 6], {'schedule': 'ema'})
    >>> _picks(7, last=[1, 2], stride=2)
    ([4, 6], {'last': [1, 2]})
    """
    lasts, strides = (
        value if isinstance(value, list) else [value]
        for value in (parameters.get("last", 0), parameters.get("stride", 1))
    )
    schedule = parameters.get("schedule", "uniform")
    if "decay" in parameters and schedule != "ema":
        raise RecipeError(
            f"run_average: `decay` is {parameters['decay']}, which only `schedule: ema` has; `schedule` is {schedule}.",
            hint="Leave `decay` out, or add `schedule: ema`.",
        )
    widest = 0 if 0 in lasts else max(lasts)
    others = {name: value for name, value in parameters.items() if name not in ("last", "stride")}
    if len(lasts) > 1:
        others["last"] = parameters["last"]
    if len(strides) > 1:
        # Every which one counts back from the latest, so all of the window stay.
        window = range(count)[-(widest - 1) * max(strides) - 1 :] if widest else range(count)
        return list(window), parameters
    return _recent(count, widest, strides[0]), others


def _recent(count: int, last: int, stride: int) -> list[int]:
    """Numbers of those that go in: counted back from the latest, every ``stride``-th, ``last`` of them, 0 for all."""
    numbers = range(count)[::-stride]
    return sorted(numbers[:last] if last else numbers)


@selection(needs_score=False, picks=_picks, reweighs=True)
def run_average(
    weights: Weights,
    score: ScoreFunction,
    *,
    last: Annotated[int, Within("[0, inf)")] = 0,
    stride: Annotated[int, Within("[1, inf)")] = 1,
    schedule: Literal["uniform", "ema", "minus_sqrt", "linear"] = "uniform",
    decay: Annotated[float, Within("(0, 1]")] = 0.9,
) -> Selected:
    r"""Average the checkpoints of one run, weighed by their place in it.

    With the checkpoints that go in :math:`\theta_1, \dots, \theta_k` in the order of their steps, the soup is
    :math:`\sum_j c_j w_j \theta_j / \sum_j c_j w_j`, with

    - ``uniform``: :math:`c_j = 1`. With all checkpoints of a cyclic or constant learning rate this is SWA, with the
      latest few LAWA.
    - ``ema``: :math:`c_j = \beta^{k-j}` with :math:`\beta` the ``decay``: the exponential moving average
      :math:`m_j = \beta m_{j-1} + (1-\beta)\theta_j` from :math:`m_0 = 0`, divided by :math:`1-\beta^k`.
    - ``minus_sqrt``, ``linear``: :math:`c_j = d\bigl(\frac{j-1}{k}\bigr) - d\bigl(\frac{j}{k}\bigr)` with
      :math:`d(x) = 1 - \sqrt{x}` or :math:`d(x) = 1 - x`. What a run learned between :math:`\theta_{j-1}` and
      :math:`\theta_j` then counts :math:`d\bigl(\frac{j-1}{k}\bigr)`, as if the learning rate had fallen along
      :math:`d`. It falls linearly with equal weights: ``linear`` gives those of ``uniform``.

    A number may be a list, of which the best on validation data is taken.

    When:
        For a run whose learning rate stays high or goes up and down: its checkpoints lie around a minimum, and their
        mean is nearer to the middle. It is as good as a checkpoint much later, or an annealed one.

    When not:
        Where the learning rate was annealed to zero: the last checkpoint is there already. A model with batch
        normalisation needs `calibration` in the recipe, with which its running statistics are collected again.

    Args:
        weights: The checkpoints in the order of their steps, and their shares.
        score: Not called.
        last: How many go in at most; 0 is all.
        stride: Every which one goes in, counted back from the latest; in the SWA paper the length of a cycle.
        schedule: How they are weighed.
        decay: Of ``ema``, from one checkpoint to the next. One that is meant by step, such as 0.999, is to the power of
            the steps between two checkpoints here: 0.61 for 500.

    Raises:
        RecipeError: All that go in have weight zero.

    Reference:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018, arXiv:1803.05407;
        Kaddour, Stop Wasting My Time!, 2022, arXiv:2209.14981; Szegedy et al., Rethinking the Inception Architecture
        for Computer Vision, CVPR 2016, arXiv:1512.00567; the schedules: Tian et al., WSM: Decay-Free Learning Rate
        Schedule via Checkpoint Merging for LLM Pre-training, ICLR 2026, arXiv:2507.17634.

    >>> run = {"step-1": 1.0, "step-2": 1.0, "step-3": 1.0, "step-4": 1.0}
    >>> run_average(run, len, last=2).weights
    {'step-3': 1.0, 'step-4': 1.0}
    >>> run_average(run, len, schedule="ema", decay=0.5).weights
    {'step-1': 0.125, 'step-2': 0.25, 'step-3': 0.5, 'step-4': 1.0}
    """
    names = list(weights)
    taken = [names[number] for number in _recent(len(names), last, stride)]
    factors = _factors(len(taken), schedule, decay)
    kept = {name: weights[name] * factor for name, factor in zip(taken, factors, strict=True)}
    kept = {name: weight for name, weight in kept.items() if weight}
    if not kept:
        raise RecipeError(f"run_average: the weights of the {len(taken)} checkpoints that go in are all zero.")
    return Selected(kept)


def _factors(count: int, schedule: str, decay: float) -> list[float]:
    """What each of so many checkpoints counts.

    >>> _factors(4, "minus_sqrt", 0.9)[0]
    0.5
    """
    if schedule == "ema":
        return [decay**age for age in reversed(range(count))]
    if schedule == "minus_sqrt":
        rate = [1 - math.sqrt(place / count) for place in range(count + 1)]
        return [before - after for before, after in itertools.pairwise(rate)]
    return [1.0] * count  # linear too, as its differences are equal
