"""Weights of single tensors with which the soup is sure of its answers to examples without labels: AdaMerging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from hf_soup.errors import ScoringError
from hf_soup.selection import EntropyObjective, Selected, Weights, Within, selection

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Derivatives below this part of the largest are rounding, as those by the biases of keys, on which no answer depends;
#: Adam would take steps of full length along them.
_ROUNDING = 1e-7


@selection(needs_score=False, learns="entropy", method={"name": "task_arithmetic", "scale": 1.0})
def entropy(
    weights: Weights,
    objective: EntropyObjective,
    *,
    seed: int,
    examples: Annotated[int, Within("[1, inf)")] = 1024,
    by: Literal["tensor", "ingredient"] = "tensor",
    init: Annotated[float, Within("[0, 1]")] = 0.3,
    lr: Annotated[float, Within("(0, inf)")] = 1e-3,
    steps: Annotated[int, Within("[1, inf)")] = 500,
    batch_size: Annotated[int, Within("[1, inf)")] = 16,
) -> Selected:
    r"""Learn by how much of each task vector the soup is surest of its answers.

    .. math:: \theta_l = \theta_{0,l} + \sum_i w_i \lambda_{li} \tau_{li}, \qquad
        \min_{0 \le \lambda \le 1}\ \frac{1}{m} \sum_k H\bigl(p(\cdot \mid x_k; \theta)\bigr), \qquad
        H(p) = -\sum_c p_c \log p_c

    for each tensor :math:`l` and ingredient :math:`i`, by Adam from ``init`` on, over :math:`m` examples :math:`x_k`
    without their labels; of texts it is the mean over all tokens, after each of which the next one is predicted. The
    recipe of the soup has :math:`w_i\lambda_{li}` as `tensor_weights` of `task_arithmetic` with ``scale: 1``; running
    statistics of batch normalisation, of which no answer tells anything, are the mean.

    Weights are not in the paper; ones are the paper's. As in the authors' code a layer is a tensor, and coefficients
    stay between 0 and 1; here one that has reached an end can come back. The paper has examples of each task and a head
    for each; here there is one head, and the examples are the recipe's `calibration`. AdaMerging++, which trims task
    vectors as `ties` does before, is not built. Where no answer depends on a tensor, as on the biases of keys, its
    coefficients stay at ``init``.

    When:
        For models of different tasks or data with one head, with examples of the inputs that the soup shall be good at.

    When not:
        Where the soup that it begins with is often wrong, or the examples are of few labels: it gets surer of what it
        says already, and may come to say one thing always; fewer ``steps`` stay nearer to the begin. For runs on one
        data set, which `linear` averages without data.

    Args:
        weights: The ingredients and their weights.
        objective: The entropy of the answers and its gradient.
        seed: The recipe's: of the examples that are drawn, and of their order.
        examples: How many rows are drawn from the calibration data; all of them where there are fewer.
        by: ``tensor``, a coefficient for each ingredient in every tensor; or ``ingredient``, one for each.
        init: Where coefficients begin; 0.3 is the paper's.
        lr: Learning rate of Adam; 0.001 is the paper's.
        steps: How many steps; the authors' code takes 500. None brings a coefficient further than about ``lr``.
        batch_size: Examples a step; 16 is the paper's, of each task.

    Raises:
        ScoringError: The entropy is not finite.

    Reference:
        Yang et al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024, arXiv:2310.02575.
    """
    import numpy as np
    import torch

    rows = objective.drawn(examples, seed)
    shape = (len(objective.tensors), len(weights))
    free = torch.full((shape[0] if by == "tensor" else 1, shape[1]), init, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=lr)

    def finite(value: float, step: int) -> float:
        if math.isfinite(value):
            return value
        mean = ", ".join(f"{each:.3g}" for each in free.detach().mean(0).tolist())
        raise ScoringError(
            f"The entropy of the answers to {objective.title} is {value:g} in step {step}, with the mean coefficients "
            f"{mean}.",
            hint="Lower `init` or `lr`, or look at the ingredients: one may be broken.",
        )

    before = finite(objective.mean(free.detach().expand(shape).numpy(), rows), 0)
    for step, batch in zip(range(steps), _batches(rows, batch_size, seed), strict=False):
        spread = free.expand(shape)
        value, slope = objective.gradient(spread.detach().numpy(), batch)
        finite(value, step + 1)
        slope[np.abs(slope) < _ROUNDING * np.abs(slope).max()] = 0.0
        optimizer.zero_grad()
        spread.backward(torch.from_numpy(slope))  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            free.clamp_(0, 1)
        objective.progress(1)
    # As float32, so that a soup's numbers are those of before they stood in its recipe.
    coefficients = free.detach().expand(shape).float().double().numpy()
    after = finite(objective.mean(coefficients, rows), steps)
    own = coefficients * np.array(list(weights.values()))
    told = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(weights, coefficients.mean(0).tolist(), strict=True))
    return Selected(
        weights,
        tensor_weights=dict(zip(objective.tensors, map(tuple, own.tolist()), strict=True)),
        averaged=tuple(objective.others),
        notes=(
            f"The coefficients of the task vectors, in the mean over tensors: {told}. The entropy of the answers to "
            f"{objective.title} was {before:.3f} where they began, and is {after:.3f}.",
        ),
    )


def _batches(rows: NDArray[np.int64], size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Rows in random order, again and again."""
    import numpy as np

    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(rows)
        yield from (np.sort(order[begin : begin + size]) for begin in range(0, len(order), size))
