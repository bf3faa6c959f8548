"""Shares that are learned by gradient descent on validation loss."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from hf_soup.errors import RecipeError, ScoringError
from hf_soup.selection import Objective, Selected, Weights, Within, selection

#: By what shares differ → the paper's learning rate and passes over its data.
_PAPER = {"ingredient": (0.1, 3), "tensor": (0.05, 5)}
#: Fewest steps. A step moves a share's logarithm by about the learning rate: a hundred take an ingredient in or out.
_STEPS = 100
#: Shares that the recipe of a soup has room for.
_MOST = 100_000


@selection(needs_score=True, learns="loss", reweighs=True)
def learned(
    weights: Weights,
    descent: Objective,
    *,
    seed: int,
    by: Literal["ingredient", "tensor"] = "ingredient",
    constrain: Literal["softmax", "none"] = "softmax",
    epochs: Annotated[int, Within("[0, inf)")] = 0,
    lr: Annotated[float, Within("[0, inf)")] = 0.0,
    batch_size: Annotated[int, Within("[1, inf)")] = 256,
    patience: Annotated[int, Within("[1, inf)")] = 10,
) -> Selected:
    r"""Learn the shares that minimise the validation loss.

    .. math:: \min_{\alpha,\beta}\ \frac1n\sum_j
        \ell\Bigl(\beta f\bigl(x_j; \textstyle\sum_i\alpha_i\theta_i\bigr), y_j\Bigr)

    with :math:`\ell` the cross-entropy of classes, labels or choices; or, without :math:`\beta`, the squared error of
    numbers or the negative log-likelihood by token of texts; by AdamW without weight decay, from the given shares and
    :math:`\beta = 1` on. The logit scale :math:`\beta > 0` is learned too and left out of the soup, as it changes no
    answer. The paper trains on all validation rows for a fixed time; here a fifth of them, of every label
    alike, is kept apart: its loss, at the :math:`\beta` where it is least, is measured after every epoch, and
    ``patience`` epochs without a lower one end the search. The shares with the lowest are taken; the given ones are a
    candidate too, and so is the ingredient that alone is best on the rows that are learned from: where the given soup
    is of no use, its gradient may lead nowhere.

    When:
        For many validation rows, and ingredients that deserve unequal shares.

    When not:
        With few validation rows; or where the given soup is of no use, as its gradient may lead nowhere.

    Args:
        weights: The ingredients and their shares.
        descent: The validation loss and its gradient.
        seed: The recipe's: of the rows that are kept apart, and of the order of the others.
        by: ``ingredient``, one share for each; or ``tensor``, one for each in every tensor.
        constrain: ``softmax``: shares are positive and sum to one; ``none``: they are any numbers, and the soup is the
            plain weighted sum.
        epochs: Passes over the rows that are learned from; 0 for the paper's 3 (5 by tensor), but at least 100 steps:
            the paper's 3 passes were 300 steps over 26,000 rows, and would be 3 over 250.
        lr: Learning rate; 0 for the paper's 0.1 (0.05 by tensor).
        batch_size: Rows a step.
        patience: Epochs without a lower loss after which it stops.

    Raises:
        RecipeError: There would be more shares than a recipe holds.
        ScoringError: The loss is not finite.

    Reference:
        Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, appendix on learned soups.
    """
    import numpy as np
    import torch

    shared = len(descent.names) * len(descent.tensors)
    if by == "tensor" and shared > _MOST:
        raise RecipeError(f"learned: `by: tensor` would learn {shared:,} shares, and a recipe holds {_MOST:,}.")
    random = np.random.default_rng(seed)
    order = random.permutation(len(descent.strata))
    order = order[np.argsort(descent.strata[order], kind="stable")]
    inner, rows = order[::5], np.delete(order, np.s_[::5])
    batches = math.ceil(len(rows) / batch_size)
    epochs = epochs or max(_PAPER[by][1], math.ceil(_STEPS / batches))
    start = torch.tensor([weights[name] for name in descent.names], dtype=torch.float64)
    start = (start / start.sum()).repeat(len(descent.tensors) if by == "tensor" else 1, 1)
    softmax, n = constrain == "softmax", len(descent.names)
    # (tensors or 1, n). Free shares are counted in equal ones, or a first step would double the model.
    free = (start.log() if softmax else n * start).requires_grad_()
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([free, log_scale], lr=lr or _PAPER[by][0], weight_decay=0.0)
    history = []
    best, lowest, since = start.numpy(), math.inf, 0
    for epoch in range(epochs + 1):
        losses = []
        for batch in np.array_split(random.permutation(rows), batches) if epoch else ():
            shares = free.softmax(1) if softmax else free / n
            loss, slope, scale_slope = descent.gradient(shares.detach().numpy(), log_scale.exp().item(), batch)
            optimizer.zero_grad()
            shares.backward(torch.from_numpy(slope))  # type: ignore[no-untyped-call]
            log_scale.grad = scale_slope * log_scale.detach().exp()
            optimizer.step()
            losses.append(loss * len(batch))
        found = (free.softmax(1) if softmax else free / n).detach().numpy().copy()
        now, scale = descent.loss(found, inner)
        if not math.isfinite(now + sum(losses)):
            shown = ", ".join(f"{n} {share:.3g}" for n, share in zip(descent.names, found.mean(0), strict=True))
            raise ScoringError(
                f"learned: the validation loss is {now:g} in epoch {epoch}, with the shares {shown}.",
                hint="Lower `lr`, or look at the ingredients: one may be broken.",
            )
        history.append({
            "epoch": epoch, "train_loss": sum(losses) / len(rows) if epoch else None, "inner_loss": now,
            "scale": scale, "weights": dict(zip(descent.names, found.mean(0).tolist(), strict=True)),
        })  # fmt: skip
        if now < lowest:
            best, lowest, since = found, now, 0
        elif (since := since + 1) == patience:
            break
    single = int(np.argmin(descent.alone(rows)))
    if descent.alone(inner)[single] < lowest:
        return Selected({descent.names[single]: 1.0}, history=tuple(history))
    tensor_weights = dict(zip(descent.tensors, map(tuple, best.tolist()), strict=True)) if by == "tensor" else {}
    chosen = dict(zip(descent.names, best.mean(0).tolist(), strict=True))
    return Selected(chosen, tensor_weights=tensor_weights, normalize=softmax, history=tuple(history))
