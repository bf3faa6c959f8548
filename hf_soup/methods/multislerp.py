"""Several models on the sphere, in one step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_soup.methods import merge_method
from hf_soup.methods._sphere import mix_on_sphere, on_sphere


@merge_method(elementwise=True, neutral={}, bound=1e-12, measure=on_sphere)
def multislerp(tensors: Sequence[Tensor], weights: Sequence[float], *, measured: Tensor | None) -> Tensor:
    r"""Average the directions on the sphere in one step, and the lengths.

    Each tensor is one vector. With :math:`u_i = \theta_i/\lVert\theta_i\rVert`, weights that sum to one, and
    :math:`m` the normalised :math:`\sum_i w_iu_i`,

    .. math:: \theta = \Bigl(\sum_i w_i\lVert\theta_i\rVert\Bigr)\,\exp_m\Bigl(\sum_i w_i\log_m u_i\Bigr)

    where :math:`\log_m u` is the vector at :math:`m` along the great circle to :math:`u`, as long as the way there,
    and :math:`\exp_m` goes it. This is the first step of `karcher`, and with two ingredients it is exact: where their
    norms are equal, it is `slerp`, with the second's share of the weights for ``t``.

    Ingredients that are zero in a tensor, or have no weight, give it no direction; the former count as length zero.
    Tensors of one element, and parallel ones, have their linear mean, which is the limit.

    mergekit's method of this name projects the :math:`u_i` on the tangent space instead of taking logarithms. The mean
    of these projections is zero, so it gives :math:`m` itself. It also takes a base model to measure from.

    When:
        For models too far apart for `linear`, which makes weights shorter, the more the wider they are apart; and to do
        without the iterations of `karcher`.

    When not:
        For fine-tunes of one ancestor, which hardly differ in direction: it is all but `linear`.

    Args:
        tensors: ``n`` tensors of one shape, as stored.
        weights: ``n`` numbers of zero or more, whose sum is not zero.
        measured: Their coefficients, float64; None for the plain mean.

    Returns:
        The same shape, float32 where all tensors have 16 bits, else float64.

    Raises:
        ValueError: Where the directions cancel (:math:`\lVert\sum_i w_iu_i\rVert < 0.0158`), or one is opposite to
            their mean (a cosine below −0.9995).

    Reference:
        Goddard, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea, for the name; the step is that of Karcher,
        Riemannian center of mass and mollifier smoothing, Communications on Pure and Applied Mathematics 30, 1977.

    >>> import torch
    >>> from hf_soup.methods import Slices
    >>> tensors, weights = [torch.tensor([125.0, 0.0]), torch.tensor([-44.0, 117.0])], [2.0, 1.0]
    >>> multislerp(tensors, weights, measured=on_sphere(Slices.of(tensors), weights)).float()  # a third of the way
    tensor([100.,  75.])
    """
    return mix_on_sphere(tensors, weights, measured)
