"""The mean on the sphere, which `multislerp` and `karcher` take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soup.methods import Slices, accumulator
from hf_soup.methods._span import cosines, portions, products
from hf_soup.methods._sums import weighted_sum
from hf_soup.methods.linear import linear

#: Cosines below this are those of opposite tensors: which way round the sphere goes between them, rounding decides.
OPPOSITE = -0.9995
#: Cosines this near to one differ from it by rounding: the tensors are parallel, and so is their plain mean.
_PARALLEL = 1 - 1e-14


def on_sphere(slices: Slices, weights: Sequence[float], *, max_iter: int = 1, tol: float = 0.0) -> Tensor | None:
    """What the tensors are multiplied with in the Karcher mean of their directions, as long as they are on average.

    All points that the iteration visits are sums of the tensors' directions, so it runs on the coefficients of these
    and on the cosines between them, and the tensors are read twice, however many steps it takes.

    Args:
        slices: Of ``n`` tensors.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        max_iter: How often to go to the mean of the tangent space, at most.
        tol: A step shorter than this, in radians, is the last.

    Returns:
        ``(n,)`` float64; None for the plain mean.
    """
    parts = portions(slices, weights)
    if slices.size <= 1:
        return None
    gram = products(slices)
    there, between = cosines(gram)
    weighed = parts[there] > 0
    used = there.nonzero().squeeze(1)[weighed]
    between = between[weighed][:, weighed]
    # Where all are zero it is zero, and on one line the mean is the plain one, exact for equal ingredients.
    if not len(used) or between.min() > _PARALLEL:
        return None
    norms = gram.diagonal()[used].sqrt()
    length = (parts[used] * norms).sum() / parts.sum()
    parts = parts[used] / parts[used].sum()
    mean = _unit(parts, between)
    # As near to opposite as two ingredients of equal weight are at that cosine.
    if _square(parts, between) < (1 + OPPOSITE) / 2:
        raise _opposed(used, between)
    for _ in range(max_iter):
        along = (between @ mean).clamp(-1, 1)
        if along.min() < OPPOSITE:
            raise _opposed(used, between)
        pull = parts * _stretch(along)
        step = pull - mean * (pull @ along)
        square = _square(step, between)
        if square < 1e-30:
            break
        angle = square.sqrt()
        mean = _unit(angle.cos() * mean + torch.sinc(angle / torch.pi) * step, between)
        if angle < tol:
            break
    return torch.zeros(len(there), dtype=torch.float64).index_put((used,), length * mean / norms)


def mix_on_sphere(tensors: Sequence[Tensor], weights: Sequence[float], measured: Tensor | None) -> Tensor:
    """The tensors, combined with the coefficients that `on_sphere` found."""
    dtype = accumulator(tensors)
    return linear(tensors, weights) if measured is None else weighted_sum(tensors, measured.to(dtype), dtype)


def _square(coefficients: Tensor, between: Tensor) -> Tensor:
    """The squared length of a sum of directions."""
    return coefficients @ between @ coefficients


def _unit(coefficients: Tensor, between: Tensor) -> Tensor:
    return coefficients / _square(coefficients, between).sqrt()


def _stretch(cosine: Tensor) -> Tensor:
    """An angle over its sine: how much longer the way on the sphere is than its projection."""
    gap = 1 - cosine
    # Near zero the quotient of two small numbers is a series in 1 − cos, good to the last bit below 1e-4.
    near = gap < 1e-4
    series = 1 + gap * (1 / 3 + gap * (2 / 15 + gap * (2 / 35)))
    far = torch.where(near, 0.0, cosine)
    return torch.where(near, series, far.acos() / (1 - far * far).sqrt())


def _opposed(used: Tensor, between: Tensor) -> ValueError:
    place = int(between.detach().argmin())
    first, second = sorted(int(used[index]) + 1 for index in divmod(place, len(used)))
    return ValueError(
        f"There is no mean on the sphere, as the ingredients' directions cancel. Those of "
        f"number {first} and number {second} have a cosine of {between.min().item():.4f}. Leave one out, or "
        f"override the method with `linear` there."
    )
