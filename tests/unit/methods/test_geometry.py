"""Methods on the sphere, by angles and by singular vectors: against closed forms, and what defines their results."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import Tensor

from hf_soup.methods import METHODS, Slices, weighted_sum
from hf_soup.methods._span import products
from hf_soup.methods.iso_c import iso_c
from hf_soup.methods.linear import linear
from hf_soup.methods.tsv_m import tsv_m


def mix(name: str, tensors: Sequence[Tensor], weights: Sequence[float], **parameters: float) -> Tensor:
    """By a method that measures the tensors first."""
    method = METHODS[name]
    assert method.measure
    measured = method.measure(Slices.of(tensors), weights, **{**method.parameters, **parameters})
    return method.function(tensors, weights, measured=measured, **parameters)


slerp, karcher = partial(mix, "slerp"), partial(mix, "karcher")
multislerp, model_stock = partial(mix, "multislerp"), partial(mix, "model_stock")

WIDE_AND_TALL = pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)], ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed))[0]


def with_values(shape: tuple[int, int], values: Sequence[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values, and others of zero."""
    left, right = orthonormal(shape[0], len(values), seed), orthonormal(shape[1], len(values), seed + 1000)
    return left * torch.tensor(values, dtype=torch.float64) @ right.mT


def around(base: Tensor, spread: float, n: int) -> list[Tensor]:
    return [base + spread * normal(*base.shape, seed=seed + 1) for seed in range(n)]


def close(found: Tensor, expected: Tensor, within: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=within * float(expected.abs().max()))


def at(steps: int, slope: int) -> tuple[Fraction, Fraction]:
    """Cosine and sine of so many times the angle whose half has this cotangent: exactly."""
    cosine, sine = Fraction(1), Fraction(0)
    one = Fraction(slope**2 - 1, slope**2 + 1), Fraction(2 * slope, slope**2 + 1)
    for _ in range(steps):
        cosine, sine = cosine * one[0] - sine * one[1], cosine * one[1] + sine * one[0]
    return cosine, sine


@pytest.mark.parametrize(("slope", "steps"), [(3, 3), (2, 3), (9, 8), (20, 4), (2, 2), (40, 2)])
def test_slerp_goes_through_equal_angles(slope: int, steps: int) -> None:
    """On the plane of (1, 2, 2) and (2, 1, −2), in fractions of an angle that has exact cosines."""
    unit = (slope**2 + 1) ** steps  # so that both ends are whole numbers, and float64 holds them

    def exact(place: int) -> list[Fraction]:
        cosine, sine = at(place, slope)
        return [unit * (cosine * x + sine * y) for x, y in zip((1, 2, 2), (2, 1, -2), strict=True)]

    ends = [torch.tensor([float(value) for value in exact(place)], dtype=torch.float64) for place in (0, steps)]
    for place in range(steps + 1):
        found = slerp(ends, [1.0, 1.0], t=place / steps)
        worst = max(abs(Fraction(value) - right) for value, right in zip(found.tolist(), exact(place), strict=True))
        assert worst < unit * Fraction(1, 10**14)


def test_slerp_is_linear_only_where_it_says() -> None:
    one, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for cosine, straight in ((0.99951, True), (0.99949, False)):
        other = cosine * one + (1 - cosine**2) ** 0.5 * across
        assert torch.equal(slerp([one, other], [1, 1]), linear([one, other], [1, 1])) is straight
    with pytest.raises(ValueError, match=r"at t=0.5 .* cosine of -0.9996"):
        slerp([one, -0.99965 * one + 0.02646 * across], [1, 1])
    slerp([one, -0.9994 * one + 0.0346 * across], [1, 1])
    for size in (1e-100, 1e-20, 1e100):  # only angles count, not sizes
        close(
            slerp([size * one.double(), size * across.double()], [1, 1]), size * torch.full((2,), 0.5).double().sqrt()
        )


def test_slerp_between_ends_of_no_weight() -> None:
    ends = [torch.tensor([25.0, 0.0]), torch.tensor([7.0, 24.0])]
    close(slerp(ends, [0.0, 2.0]), ends[1].double())
    close(slerp(ends, [1.0, 1.0], t=0.0), ends[0].double())
    with pytest.raises(ValueError, match="t=0 is a model of weight zero"):
        slerp(ends, [0.0, 2.0], t=0.0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_with_two_ingredients_of_one_length_all_are_slerp(share: float) -> None:
    first, second = (3 * each / each.norm() for each in (normal(4, 5), normal(4, 5, seed=1)))
    expected = slerp([first, second], [1.0, 1.0], t=share)
    for method in (karcher, multislerp):
        close(method([first, second], [1 - share, share]), expected)


def log(start: Tensor, end: Tensor) -> Tensor:
    """From a point on the sphere along the great circle, as long as the way."""
    across = end - torch.dot(start, end) * start
    # Not from the cosine, which has no digits for small angles.
    return across / across.norm() * torch.atan2(across.norm(), torch.dot(start, end))


@pytest.mark.parametrize("spread", [1e-4, 0.1, 1.0])
def test_the_karcher_mean_is_pulled_nowhere(spread: float) -> None:
    """The condition that defines it, on the vectors themselves; and it has the mean length."""
    tensors, weights = around(normal(50, seed=9), spread, 5), torch.tensor([0.5, 1.0, 2.0, 0.0, 1.0]).double()
    for parameters, within in (({}, 1e-5), ({"max_iter": 100, "tol": 0.0}, 1e-13)):
        mean = karcher(tensors, weights.tolist(), **parameters)
        length = sum(w * x.norm() for w, x in zip(weights, tensors, strict=True)) / weights.sum()
        torch.testing.assert_close(mean.norm(), length)
        start = mean / mean.norm()
        pull = sum(w * log(start, x / x.norm()) for w, x in zip(weights, tensors, strict=True)) / weights.sum()
        assert pull.norm() < within


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_multislerp_is_the_step_that_it_says(spread: float) -> None:
    tensors, weights = around(normal(30, seed=9), spread, 4), [1.0, 2.0, 0.5, 1.5]
    units = [x / x.norm() for x in tensors]
    start = sum(w / 5 * u for w, u in zip(weights, units, strict=True))
    start = start / start.norm()
    step = sum(w / 5 * log(start, u) for w, u in zip(weights, units, strict=True))
    end = start * step.norm().cos() + step / step.norm() * step.norm().sin()
    length = sum(w / 5 * x.norm() for w, x in zip(weights, tensors, strict=True))
    close(multislerp(tensors, weights), length * end, 1e-11)
    assert torch.equal(multislerp(tensors, weights), karcher(tensors, weights, max_iter=1))


@pytest.mark.parametrize("method", [multislerp, karcher])
def test_directions_that_cancel_are_named(method: object) -> None:
    one, across = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match=r"number 2 and number 3 have a cosine of -1.0000"):
        method([0 * one, one, -2 * one, across], [1.0, 1.0, 1.0, 0.0])  # type: ignore[operator]
    with pytest.raises(ValueError, match="number 1 and number 2"):  # the mean is the first, and opposite to the other
        method([one, -one], [3.0, 1.0])  # type: ignore[operator]
    turned = [-0.5 * one + sign * 0.75**0.5 * across for sign in (1, -1)]  # with the first three in a plane, evenly
    with pytest.raises(ValueError, match=r"cosine of -0\.5000"):
        method([one, *turned], [1.0, 1.0, 1.0])  # type: ignore[operator]
    assert method([one[:, :1], -one[:, :1]], [3.0, 1.0]).item() == 0.5  # type: ignore[operator]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.5, 0.0]], ids=str)
def test_model_stock_is_the_nearest_point_to_the_centre(weights: list[float]) -> None:
    """Of all between the ancestor and the mean, where its picture is true: noise at right angles, of one size."""
    axes = orthonormal(40, 5).mT
    centre = 2 * axes[0]
    deltas = [centre + 3 * axis for axis in axes[1:]]
    found, mean = model_stock(deltas, weights), linear(deltas, weights)
    close(found, mean * (torch.dot(found, mean) / torch.dot(mean, mean)))
    assert abs(float(torch.dot(found - centre, mean))) < 1e-12


@WIDE_AND_TALL
def test_iso_c_makes_all_singular_values_their_mean(shape: tuple[int, int]) -> None:
    """On the same directions, also where there are fewer of them than rows and columns."""
    deltas = (
        [with_values(shape, [4.0, 1.0], seed), with_values(shape, [2.0, 0.5, 0.1], seed + 7)] if (seed := 3) else []
    )
    found, values = iso_c(deltas, [1.0, 1.0]), torch.linalg.svdvals(deltas[0] + deltas[1])
    assert int((values > 1e-12).sum()) == 5
    flat = torch.zeros_like(values)
    flat[:5] = values.sum() / 5
    close(torch.linalg.svdvals(found), flat)
    left, _, right = torch.linalg.svd(deltas[0] + deltas[1], full_matrices=False)
    close(left[:, :5] @ left[:, :5].mT @ found @ right[:5].mT @ right[:5], found)
    close(iso_c(deltas, [3.0, 3.0], scale=1.3), 1.3 * found)
    close(iso_c(deltas, [3.0, 1.0]), iso_c([1.5 * deltas[0], 0.5 * deltas[1]], [1.0, 1.0]))
    rounded = iso_c([delta.float() for delta in deltas], [1.0, 1.0]).double()  # rounding fills no directions
    close(torch.linalg.svdvals(rounded), flat, 1e-6)


@WIDE_AND_TALL
@pytest.mark.parametrize("condition", [1e2, 5e4, 1e8])
def test_iso_c_is_as_good_as_a_decomposition_of_the_sum(shape: tuple[int, int], condition: float) -> None:
    """Also where the Gram matrix has too few digits."""
    delta = with_values(shape, torch.logspace(0, -(torch.tensor(condition).log10()), 9).tolist())
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    close(iso_c([delta], [1.0]), values[:9].sum() / 9 * left[:, :9] @ right[:9], 1e-6)


def reference(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TSV-M by decompositions of the matrices themselves, which is the paper's way where all directions differ."""
    kept = min(deltas[0].shape) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    values = torch.cat(
        [w * len(weights) / sum(weights) * each.S[:kept] for w, each in zip(weights, parts, strict=True)]
    )
    p, _, q = torch.linalg.svd(torch.cat([each.U[:, :kept] for each in parts], dim=1), full_matrices=False)
    r, _, s = torch.linalg.svd(torch.cat([each.Vh[:kept] for each in parts]), full_matrices=False)
    merged: Tensor = p @ q @ torch.diag(values) @ r @ s
    return merged


@WIDE_AND_TALL
@pytest.mark.parametrize("n", [2, 3, 4])
def test_tsv_m_is_what_the_paper_says(shape: tuple[int, int], n: int) -> None:
    deltas, weights = [normal(*shape, seed=seed) for seed in range(n)], [1.0, 2.0, 0.5, 1.5][:n]
    close(tsv_m(deltas, [0.3] * n), reference(deltas, [1.0] * n), 1e-10)
    close(tsv_m(deltas, weights), reference(deltas, weights), 1e-10)
    close(tsv_m(deltas, weights, scale=0.5), 0.5 * reference(deltas, weights), 1e-10)
    close(tsv_m([*deltas, normal(*shape)], [*weights, 0.0]), reference(deltas, weights), 1e-10)


@WIDE_AND_TALL
def test_tsv_m_adds_up_what_is_at_right_angles(shape: tuple[int, int]) -> None:
    """And has the singular values of all."""
    left, right = orthonormal(shape[0], 9), orthonormal(shape[1], 9, seed=1)
    deltas = [
        left[:, each] * torch.tensor([3.0, 2.0, 1.0 + each.start]).double() @ right[:, each].mT
        for each in (slice(0, 3), slice(3, 6), slice(6, 9))
    ]
    close(tsv_m(deltas, [1.0, 1.0, 1.0]), deltas[0] + deltas[1] + deltas[2], 1e-12)
    mixed = tsv_m([normal(*shape), normal(*shape, seed=1)], [1.0, 1.0])
    expected = torch.cat([torch.linalg.svdvals(normal(*shape, seed=seed))[: min(shape) // 2] for seed in (0, 1)])
    close(torch.linalg.svdvals(mixed)[: len(expected)], expected.sort(descending=True).values, 1e-10)


@WIDE_AND_TALL
@pytest.mark.parametrize("n", [2, 3, 20])
def test_tsv_m_of_equal_ingredients_is_their_main_directions(shape: tuple[int, int], n: int) -> None:
    """Where U has no full rank, nothing arbitrary comes in. Of fewer values than tasks, each has one."""
    delta, kept = normal(*shape), max(1, min(shape) // n)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    close(tsv_m([delta.clone() for _ in range(n)], [2.0] * n), left[:, :kept] * values[:kept] @ right[:kept], 1e-10)


@WIDE_AND_TALL
def test_tsv_m_keeps_task_vectors_of_low_rank(shape: tuple[int, int]) -> None:
    """Directions of zero have no part in the turning."""
    left, right = orthonormal(shape[0], 2), orthonormal(shape[1], 2, seed=1)
    deltas = [torch.outer(left[:, place], right[:, place]) for place in (0, 1)]
    close(tsv_m(deltas, [1.0, 1.0]), deltas[0] + deltas[1])
    close(tsv_m([delta.float() for delta in deltas], [1.0, 1.0]).double(), deltas[0] + deltas[1], 1e-6)
    close(tsv_m([deltas[0], torch.zeros(shape).double()], [1.0, 1.0]), deltas[0])


@pytest.mark.parametrize("method", [iso_c, tsv_m])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1), (2, 3, 2, 2), (), (0, 4)], ids=str)
def test_what_is_no_matrix_is_averaged(method: object, shape: tuple[int, ...]) -> None:
    deltas = [normal(*shape, seed=seed) for seed in range(3)]
    found = method(deltas, [1.0, 2.0, 1.0], scale=0.5)  # type: ignore[operator]
    assert torch.equal(found, 0.5 * linear(deltas, [1.0, 2.0, 1.0]))


@pytest.mark.parametrize("size", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1, 70000])
def test_long_tensors_are_read_in_pieces(size: int) -> None:
    """None is lost at their ends, and none is counted twice."""
    tensors, weights = [normal(size, seed=seed) for seed in range(3)], torch.tensor([1.0, 2.0, 0.5]).double()
    stack = torch.stack(tensors)
    close(products(Slices.of(tensors)), stack @ stack.mT)
    narrow = products(Slices.of([each.float() for each in tensors]), dtype=None)
    torch.testing.assert_close(narrow, stack @ stack.mT, rtol=1e-6, atol=1e-6 * size)
    close(weighted_sum(tensors, weights, torch.float64), weights @ stack)


@pytest.mark.parametrize("power", [-110, -75, 100])
@pytest.mark.parametrize("name", ["model_stock", "sce"])
def test_task_vectors_whose_squares_float32_cannot_hold(name: str, power: int) -> None:
    deltas = [each.float() for each in around(normal(70, 60), 0.5, 3)]
    deltas[1][:50] = 0.0  # also where many are untouched
    found = mix(name, [delta * 2.0**power for delta in deltas], [1.0, 2.0, 0.5])
    torch.testing.assert_close(found * 2.0**-power, mix(name, deltas, [1.0, 2.0, 0.5]), rtol=1e-5, atol=1e-6)


def test_the_vote_of_sce_does_not_overflow() -> None:
    """Two against three that did more elsewhere, in whose favour the last ones speak."""
    deltas = [torch.tensor([sign * 3e38, elsewhere]) for sign, elsewhere in [(1, 0.0)] * 2 + [(-1, 3e38)] * 3]
    assert mix("sce", deltas, [1.0] * 5)[0] < 0
