"""KnOTS against decompositions of the task vectors side by side, and what follows from its definition."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hf_soup.methods import METHODS, count_kept
from hf_soup.methods._ranks import cutoff
from hf_soup.methods._spectral import joint_directions
from hf_soup.methods.knots import knots
from hf_soup.methods.ties import ties

#: Fewer rows than all columns, fewer than one's, as many, and more than all columns of up to four.
SHAPES = pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10), (70, 6)], ids=str)
WEIGHTS = [1.0, 2.0, 0.5, 1.5]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed))[0]


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> Tensor:
    return normal(shape[0], rank, seed=seed) @ normal(rank, shape[1], seed=seed + 1000)


def close(found: Tensor, expected: Tensor, within: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=within * float(expected.abs().max()))


def reference(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, rank: int | None = None
) -> tuple[Tensor, list[Tensor]]:
    """By one decomposition, sorted magnitudes and masks; and what is kept of each ingredient along the directions."""
    roots = [weight**0.5 for weight in weights]
    joint = torch.cat([root * delta.double() for root, delta in zip(roots, deltas, strict=True)], dim=1)
    left, values, rows = torch.linalg.svd(joint, full_matrices=False)
    parts = (values[:rank, None] * rows[:rank]).split(deltas[0].shape[1], dim=1)
    kept = []
    for part, root in zip(parts, roots, strict=True):
        sizes = part.abs() / root
        least = sizes.flatten().sort(descending=True).values[count_kept(part.numel(), density) - 1]
        kept.append(torch.where(sizes >= least, part / root, 0.0))
    stack, shares = torch.stack(kept), torch.tensor(weights, dtype=torch.float64)[:, None, None]
    elected = (shares * stack).sum(0).sign()
    counted = shares * (stack.sign() == elected) * (elected != 0)
    return left[:, :rank] @ ((counted * stack).sum(0) / counted.sum(0).clamp(min=1e-300)), kept


@SHAPES
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_it_is_what_the_paper_says(shape: tuple[int, int], n: int, density: float) -> None:
    deltas, weights = [normal(*shape, seed=seed) for seed in range(n)], WEIGHTS[:n]
    close(knots(deltas, [0.3] * n, density=density), reference(deltas, [1.0] * n, density)[0])
    expected, _ = reference(deltas, weights, density)
    close(knots(deltas, weights, density=density), expected)
    close(knots(deltas, weights, density=density, scale=-0.5), -0.5 * expected)
    for absent in (normal(*shape, seed=9), torch.zeros(shape).double()):
        close(knots([*deltas, absent], [*weights, 0.0], density=density), expected)
    close(knots([*deltas, torch.zeros(shape).double()], [*weights, 3.0], density=density), expected)


@SHAPES
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_of_zero_do_not_count(shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    """A share is of what the rank has, also where rounding to the task vectors' type fills all directions."""
    deltas = [low_rank(shape, 2, seed).to(dtype) for seed in (0, 1)]
    assert joint_directions(deltas, [1.0, 1.0]).shape == (shape[0], 4)
    expected, kept = reference(deltas, [1.0, 1.0], density, rank=4)
    assert all(int((each != 0).sum()) == count_kept(4 * shape[1], density) for each in kept)
    found = knots(deltas, [1.0, 1.0], density=density)
    close(found.double(), expected, 1e-11 if dtype == torch.float64 else 1e-6)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-9 if dtype == torch.float64 else 1e-5)) <= 4


@SHAPES
def test_faint_directions_are_trimmed_first(shape: tuple[int, int]) -> None:
    """As singular values are multiplied to what is trimmed: noise has the same place among vectors alone."""
    strong = [low_rank(shape, 1, seed) for seed in (0, 1)]
    noisy = [each + 1e-6 * normal(*shape, seed=seed + 5) for seed, each in enumerate(strong)]
    directions = min(shape[0], 2 * shape[1])
    density = 2 / directions
    close(knots(noisy, [1.0, 1.0], density=density), knots(strong, [1.0, 1.0], density=1.0), 1e-4)


def test_of_rounded_loras_a_share_is_that_of_the_rank() -> None:
    """What the docstring says: rounding fills all directions, and the smaller share drops most of it again."""
    base = (0.02 * normal(96, 96)).bfloat16().double()
    loras = [2e-3 * low_rank((96, 96), 4, seed) for seed in (1, 2)]
    rounded = [(base + each).bfloat16().double() - base for each in loras]
    assert joint_directions(rounded, [1.0, 1.0]).shape[1] == 96
    expected = knots(loras, [1.0, 1.0], density=0.2)
    off = [
        float((knots(rounded, [1.0, 1.0], density=density) - expected).norm() / expected.norm())
        for density in (0.2, 0.2 * 8 / 96)
    ]
    assert off[0] > 0.2
    assert off[1] < 0.1


@SHAPES
def test_a_weight_of_two_is_two_ingredients(shape: tuple[int, int]) -> None:
    one, other = normal(*shape), normal(*shape, seed=1)
    for density in (0.2, 1.0):
        twice = knots([one, one, other], [1.0, 1.0, 1.0], density=density)
        close(knots([one, other], [2.0, 1.0], density=density), twice)


@SHAPES
def test_it_turns_with_the_outputs(shape: tuple[int, int]) -> None:
    """The basis of the outputs is found and not given, as it is for `ties`; that of the inputs is given."""
    deltas, turned = [normal(*shape, seed=seed) for seed in range(3)], orthonormal(shape[0], shape[0], seed=7)
    moved = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0))
    for density in (0.3, 1.0):
        found = knots(deltas, WEIGHTS[:3], density=density)
        close(knots([turned @ each for each in deltas], WEIGHTS[:3], density=density), turned @ found)
        close(knots([each[:, moved] for each in deltas], WEIGHTS[:3], density=density), found[:, moved])


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_its_own_directions_is_added_up(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Nobody else votes there, and what rounding leaves along them is no voice."""
    axes = orthonormal(shape[0], 6)
    parts = [axes[:, place : place + 2] * torch.tensor([2.0 + place, 1.0 + place / 3]).double() for place in (0, 2, 4)]
    deltas = [(part @ orthonormal(shape[1], 2, seed).mT).to(dtype) for seed, part in enumerate(parts)]
    found = knots(deltas, [1.0, 1.0, 1.0], density=1.0)
    close(found.double(), torch.stack(deltas).double().sum(0), 1e-11 if dtype == torch.float64 else 1e-6)


@SHAPES
def test_directions_are_orthonormal_and_span_what_is_there(shape: tuple[int, int]) -> None:
    """Also faint ones, within what `joint_directions` says."""
    for faint in (1e-2, 1e-4, 1e-6):
        deltas = [low_rank(shape, 2, seed) + faint * low_rank(shape, 2, seed + 9) for seed in (0, 1)]
        left = joint_directions(deltas, [1.0, 3.0])
        for each in deltas:
            close(left @ (left.mT @ each), each, 1e-14 / faint)
        products = left.mT @ left - torch.eye(left.shape[1]).double()
        values = torch.linalg.vector_norm(left.mT @ torch.cat(deltas, dim=1), dim=1)
        assert float((products * values).abs().max()) < 1e-14 / faint * float(values.max())


@pytest.mark.parametrize("spread", [0.3, 1e-1, 1e-2, 1e-3])
def test_the_bound_holds_where_sums_come_in_another_order(spread: float) -> None:
    """As on another machine: rows and columns in another order change nothing else."""
    for seed, shape in enumerate([(96, 96), (160, 40), (40, 160)]):
        deltas = [(low_rank(shape, 4, 3 * seed + i) + spread * normal(*shape, seed=i)).float() for i in range(3)]
        rows, columns = (torch.randperm(side, generator=torch.Generator().manual_seed(seed)) for side in shape)
        for density in (0.2, 1.0):
            there = knots(deltas, WEIGHTS[:3], density=density)
            back = knots([each[rows][:, columns] for each in deltas], WEIGHTS[:3], density=density)
            close(back, there[rows][:, columns], METHODS["knots"].bound)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1), (2, 3, 2, 2), (), (0, 4)], ids=str)
def test_what_is_no_matrix_is_merged_entry_by_entry(shape: tuple[int, ...]) -> None:
    deltas = [normal(*shape, seed=seed) for seed in range(3)]
    found = knots(deltas, [1.0, 2.0, 1.0], density=0.4, scale=0.5)
    cutoffs = [cutoff(each, 0.4) for each in deltas]
    assert torch.equal(found, ties(deltas, [1.0, 2.0, 1.0], cutoffs=cutoffs, density=0.4, scale=0.5))
