"""Task vectors of which small entries are dropped more often, averaged where their signs win the vote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Within, merge_method, shares
from hf_soup.methods._signs import agreeing_mean

#: Elements of whole rows that are ranked at a time.
_ROWS = 1 << 18
#: More than a row has.
_PLACES = 1 << 32


@merge_method(elementwise=False, neutral={"density": 1.0, "epsilon": 0.0, "scale": 1.0}, needs_base=True, bound=0.0)
def della(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    random: Sequence[Tensor],
    density: Annotated[float, Within("(0, 1]")] = 0.5,
    epsilon: Annotated[float, Within("[0, 1)")] = 0.15,
    scale: Annotated[float, Within("(-inf, inf)")] = 1.0,
) -> Tensor:
    r"""Drop entries at random, small ones more often; average those whose sign wins.

    An entry whose magnitude has rank :math:`r` of :math:`c` in its row (the smallest is 0) is dropped with probability

    .. math:: p = 1 - d + \epsilon\Bigl(\frac12 - \frac{r}{c-1}\Bigr), \qquad
        \hat\tau_i = \frac{[u_i < 1-p]\,\tau_i}{1-p}

    with ``density`` :math:`d` and uniform random numbers :math:`u_i`, and

    .. math:: \theta = \theta_0 + \lambda \frac{\sum_{i\in A} w_i\hat\tau_i}{\sum_{i\in A} w_i}, \qquad
        A = \Bigl\{i : \operatorname{sign}\hat\tau_i = \operatorname{sign}\sum_j w_j\hat\tau_j \ne 0\Bigr\}.

    A row is what belongs to one output: all entries at one index of the first dimension. A tensor of one dimension is
    one row. Of equal magnitudes the earlier has the lower rank; a row of one entry has :math:`p = 1-d`.

    Both ends are reached, as in the authors' code; ``epsilon`` there, and in mergekit, is half of this one.

    When:
        For fine-tunes on different tasks, as a middle way between `ties`, which always drops the small, and
        `dare_ties`, to which magnitudes are all the same.

    When not:
        Where time counts: it takes longer than either, as rows are sorted.

    Args:
        deltas: ``n`` task vectors of one shape and dtype, float32 or float64. Magnitudes are compared as float32.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        random: ``n`` float32 tensors of that shape, uniform in [0, 1).
        density: Share of the entries kept.
        epsilon: How far the probabilities of the smallest and the largest entry of a row are apart.
        scale: :math:`\lambda`.

    Returns:
        The task vector of the mix, in their dtype.

    Raises:
        ValueError: ``density`` ± ``epsilon`` / 2 are no probabilities.

    Reference:
        Deep et al., DELLA-Merging, 2024, arXiv:2406.11617.

    >>> import torch
    >>> learned, drawn = torch.tensor([[1.0, 2.0], [8.0, 4.0]]), torch.full((2, 2), 0.4)
    >>> della([learned], [1.0], random=[drawn], density=0.5, epsilon=0.5)  # kept with 0.25 the small, 0.75 the large
    tensor([[ 0.0000,  2.6667],
            [10.6667,  0.0000]])
    """
    low, high = density - epsilon / 2, density + epsilon / 2
    if not (low > 0 and high <= 1 + 1e-9):
        most = f"less than {2 * density:g}" if density <= 0.5 else f"at most {2 * (1 - density):g}"
        raise ValueError(
            f"`density` {density:g} and `epsilon` {epsilon:g} would keep entries with probabilities of {low:g} to "
            f"{high:g}. Set `epsilon` to {most}."
        )
    shape = deltas[0].shape
    out = torch.zeros_like(deltas[0])
    if not out.numel():
        return out
    rows = shape[0] if len(shape) > 1 else 1
    table = [(delta.reshape(rows, -1), drawn.reshape(rows, -1)) for delta, drawn in zip(deltas, random, strict=True)]
    columns = out.numel() // rows
    ladder = torch.arange(columns, dtype=torch.float64).mul_(epsilon).div_(columns - 1).add_(low)
    if columns == 1:
        ladder.fill_(density)
    # Above zero as float32 too, as it is what is divided by.
    ladder = ladder.float().clamp_(torch.finfo(torch.float32).tiny, 1.0).to(out.device)
    step = max(1, _ROWS // columns)
    for start in range(0, rows, step):
        part = [(delta[start : start + step], drawn[start : start + step]) for delta, drawn in table]
        flat = [(delta.reshape(-1), _chances(delta, drawn, ladder).view(-1)) for delta, drawn in part]

        def trim(place: int, block: slice, flat: list[tuple[Tensor, Tensor]] = flat) -> Tensor:
            delta, chance = flat[place]
            return delta[block] / chance[block]

        out.view(rows, -1)[start : start + step] = agreeing_mean([delta for delta, _ in part], shares(weights), trim)
    return out.mul_(scale)


def _chances(deltas: Tensor, drawn: Tensor, ladder: Tensor) -> Tensor:
    """With which probability entries are kept, by rank in their row; infinite where they were not."""
    # Magnitude above, place below, in one number: numpy sorts those several times as fast as torch sorts pairs.
    bits = deltas.detach().abs().float().view(torch.int32)
    places = torch.arange(bits.shape[1], device=bits.device)
    ranked = bits.long().mul_(_PLACES).add_(places).cpu()
    ranked.numpy().sort(axis=1)
    order = ranked.bitwise_and_(_PLACES - 1).to(bits.device)
    chances = torch.empty_like(drawn).scatter_(1, order, ladder.expand(order.shape))
    return chances.div_(drawn.clone().lt_(chances))
