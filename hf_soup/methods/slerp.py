"""From one model to another along the sphere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from hf_soup.methods import Slices, Within, merge_method, shares
from hf_soup.methods._span import cosines, products
from hf_soup.methods._sphere import OPPOSITE, mix_on_sphere


def _ends(weights: Sequence[float], t: float) -> list[float]:
    """What the linear mean multiplies with."""
    first, second = shares(weights)
    return [(1 - t) * first, t * second]


def _coefficients(slices: Slices, weights: Sequence[float], *, t: float) -> Tensor | None:
    """What the two tensors are multiplied with; None for the linear mean."""
    ends = _ends(weights, t)
    if not any(ends):
        raise ValueError(f"slerp at t={t:g} is a model of weight zero alone. Take its weight or `t` away from zero.")
    if slices.size <= 1:
        return None
    there, between = cosines(products(slices))
    if not there.all() or between[0, 1] > -OPPOSITE:
        return None
    cosine = between[0, 1]
    if cosine < OPPOSITE:
        raise ValueError(
            f"slerp at t={t:g} has no way between tensors that point in opposite directions, with a cosine of "
            f"{cosine.item():.4f}. Override the method with `linear` there."
        )
    angle, share = cosine.acos(), ends[1] / sum(ends)
    return torch.stack([((1 - share) * angle).sin(), (share * angle).sin()]) / angle.sin()


@merge_method(elementwise=True, neutral={}, bound=1e-12, least=2, most=2, ordered=True, measure=_coefficients)
def slerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    measured: Tensor | None,
    t: Annotated[float, Within("[0, 1]")] = 0.5,
) -> Tensor:
    r"""Interpolate between two models at a constant angular speed.

    Each tensor is one vector, and :math:`\Omega` the angle between those of the two models:

    .. math:: \theta = \frac{\sin((1-s)\Omega)\,\theta_1 + \sin(s\Omega)\,\theta_2}{\sin\Omega},
        \qquad s = \frac{t\,w_2}{(1-t)\,w_1 + t\,w_2}

    so with equal weights ``t`` says how far to go, and with the default ``t`` the share of the second weight does.

    The linear mean :math:`(1-s)\,\theta_1 + s\,\theta_2` where :math:`\cos\Omega > 0.9995`, where one of the two is
    zero (its norm, below 1e-140), and for tensors of one element, which have no angle.

    mergekit goes back to the linear mean for opposite tensors also, which is nearly zero half way; here they are an
    error.

    When:
        For two models that trained long and apart, whose mean would be shorter than they are.

    When not:
        For fine-tunes of one ancestor, which are mostly nearer to each other than that: it is `linear`. For more than
        two models there are `multislerp` and `karcher`.

    Args:
        tensors: 2 tensors of one shape, as stored.
        weights: 2 numbers of zero or more, whose sum is not zero.
        measured: The coefficients of the two, float64; None for the linear mean.
        t: 0 is the first model, 1 the second.

    Returns:
        The same shape, float32 where both tensors have 16 bits, else float64.

    Raises:
        ValueError: Where :math:`\cos\Omega < -0.9995`: the ways round the sphere are equally long; and where `t` asks
            for nothing but a model of weight zero.

    Reference:
        Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, doi:10.1145/325334.325242.

    >>> import torch
    >>> tensors = [torch.tensor([25.0, 0.0]), torch.tensor([7.0, 24.0])]
    >>> measured = _coefficients(Slices.of(tensors), [1.0, 1.0], t=0.5)
    >>> slerp(tensors, [1.0, 1.0], measured=measured).float()  # as long as both
    tensor([20., 15.])
    """
    return mix_on_sphere(tensors, _ends(weights, t), measured)
