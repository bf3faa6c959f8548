"""Several models on the sphere, at the point nearest to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from hf_soup.methods import Within, merge_method
from hf_soup.methods._sphere import mix_on_sphere, on_sphere


@merge_method(elementwise=True, neutral={}, bound=1e-5, measure=on_sphere)
def karcher(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    measured: Tensor | None,
    max_iter: Annotated[int, Within("[1, inf)")] = 10,
    tol: Annotated[float, Within("[0, 1e-5]")] = 1e-5,
) -> Tensor:
    r"""Average the directions of the ingredients on the sphere, and their lengths.

    Each tensor is one vector. With :math:`u_i = \theta_i/\lVert\theta_i\rVert` and weights that sum to one,

    .. math:: \theta = \Bigl(\sum_i w_i\lVert\theta_i\rVert\Bigr)
        \operatorname*{argmin}_{\lVert m\rVert = 1} \sum_i w_i \arccos^2\langle m, u_i\rangle

    found by steps of :math:`m \leftarrow \exp_m(\sum_i w_i\log_m u_i)` from the normalised :math:`\sum_i w_iu_i` on.
    With two ingredients of one length it is `slerp`, with the second's share of the weights for ``t``.

    Ingredients that are zero in a tensor, or have no weight, give it no direction; the former count as length zero.
    Tensors of one element, and parallel ones, have their linear mean, which is the limit.

    mergekit's method of this name has no weights, looks at the length of a step before it takes it, and starts from
    the first ingredient where the directions cancel; here that is an error.

    When:
        For models too far apart for `linear`, which makes weights shorter, the more the wider they are apart.

    When not:
        For fine-tunes of one ancestor, which hardly differ in direction: it is all but `linear`.

    Args:
        tensors: ``n`` tensors of one shape, as stored.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        measured: Their coefficients, float64; None for the plain mean.
        max_iter: Steps at most. They cost nothing beside reading the tensors, which is done twice.
        tol: A step shorter than this, in radians, is the last.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Raises:
        ValueError: Where the directions cancel (:math:`\lVert\sum_i w_iu_i\rVert < 0.0158`), or one is opposite to
            their mean (a cosine below −0.9995).

    Reference:
        Karcher, Riemannian center of mass and mollifier smoothing, Communications on Pure and Applied Mathematics 30,
        1977.

    >>> import torch
    >>> from hf_soup.methods import Slices
    >>> tensors = [torch.tensor([25.0, 0.0]), torch.tensor([7.0, 24.0])]
    >>> measured = on_sphere(Slices.of(tensors), [1.0, 1.0], max_iter=10, tol=1e-5)
    >>> karcher(tensors, [1.0, 1.0], measured=measured).float()  # as long as both
    tensor([20., 15.])
    """
    return mix_on_sphere(tensors, weights, measured)
