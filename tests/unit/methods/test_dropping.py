"""The methods that leave entries out, against plain loops and against what chance must give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hf_soup import methods
from hf_soup.methods import METHODS, Slices, _ranks, _signs, count_kept, della, ranked, sce
from hf_soup.methods._ranks import cutoff

steady = settings(deadline=None, derandomize=True, max_examples=40)
#: Few values, so that magnitudes repeat, votes are drawn and zeros are common.
entries = st.one_of(st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 2.0]), st.floats(-4, 4, width=16))
several = st.integers(1, 9).flatmap(
    lambda size: st.lists(st.lists(entries, min_size=size, max_size=size), min_size=1, max_size=4)
)
shares = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4)


def given_weights(drawn: list[float], n: int) -> list[float]:
    return drawn[:n] if any(drawn[:n]) else [1.0] * n


def elected(columns: Sequence[Sequence[float]], votes: Sequence[float], factors: Sequence[float]) -> list[float]:
    """The vote and the mean, one entry after the other."""
    result = []
    for column in zip(*columns, strict=True):
        vote = math.fsum(share * value for share, value in zip(votes, column, strict=True))
        agreeing = [(f, v) for f, v in zip(factors, column, strict=True) if v * vote > 0 and f > 0]
        total = math.fsum(factor for factor, _ in agreeing)
        result.append(math.fsum(f * v for f, v in agreeing) / total if total else 0.0)
    return result


def near(found: Tensor, expected: Sequence[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def mix(name: str, deltas: Sequence[Tensor], weights: Sequence[float], **parameters: Any) -> Tensor:
    """By a method that measures task vectors first, if it does."""
    method, hand = METHODS[name], {}
    if method.measure:
        asked = {key: value for key, value in parameters.items() if key in method.parameters}
        hand["measured"] = method.measure(Slices.of(deltas), weights, **{**method.parameters, **asked})
    return method.function(deltas, weights, **hand, **parameters)


@steady
@given(rows=several, drawn=shares, density=st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]))
def test_ties_is_what_a_loop_finds(rows: list[list[float]], drawn: list[float], density: float) -> None:
    weights = given_weights(drawn, len(rows))
    kept = []
    for row in rows:
        least = sorted(map(abs, row), reverse=True)[count_kept(len(row), density) - 1]
        kept.append([value if abs(value) >= least else 0.0 for value in row])
    deltas = [torch.tensor(row).double() for row in rows]
    cutoffs = [cutoff(delta, density) for delta in deltas]
    found = METHODS["ties"].function(deltas, weights, cutoffs=cutoffs, density=density)
    near(found, elected(kept, weights, weights))


@steady
@given(rows=several, drawn=shares, density=st.sampled_from([0.1, 0.4, 0.9]), gamma=st.sampled_from([0.0, 0.1, 0.5]))
def test_breadcrumbs_is_what_a_loop_finds(
    rows: list[list[float]], drawn: list[float], density: float, gamma: float
) -> None:
    if density + gamma > 1:
        return
    weights = given_weights(drawn, len(rows))
    expected = [0.0] * len(rows[0])
    for row, weight in zip(rows, weights, strict=True):
        ranked = sorted(map(abs, row), reverse=True)
        dropped = math.floor(gamma * len(row) + 1e-9)
        stays = ranked[dropped : dropped + count_kept(len(row), density)]
        for place, value in enumerate(row):
            if stays[-1] <= abs(value) <= (stays[0] if dropped else math.inf):
                expected[place] += weight * value
    deltas = [torch.tensor(row).double() for row in rows]
    near(mix("breadcrumbs", deltas, weights, density=density, gamma=gamma, scale=1.0), expected)


@steady
@given(rows=several, drawn=shares, topk=st.sampled_from([0.1, 0.5, 1.0]))
def test_sce_is_what_a_loop_finds(rows: list[list[float]], drawn: list[float], topk: float) -> None:
    weights = given_weights(drawn, len(rows))
    total = math.fsum(weights)
    spread = []
    for column in zip(*rows, strict=True):
        mean = math.fsum(w * v for w, v in zip(weights, column, strict=True)) / total
        spread.append(math.sqrt(math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, column, strict=True))))
    least = sorted(spread, reverse=True)[count_kept(len(spread), topk) - 1]
    if any(0 < abs(each - least) < 1e-6 for each in spread):
        return  # equal but for rounding, here or there
    kept = [[v if s >= least else 0.0 for v, s in zip(row, spread, strict=True)] for row in rows]
    energies = [w * math.fsum(v * v for v in row) for w, row in zip(weights, kept, strict=True)]
    deltas = [torch.tensor(row).double() for row in rows]
    near(mix("sce", deltas, weights, select_topk=topk), elected(kept, weights, energies))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_the_mean_over_the_draws_is_the_task_vector(name: str, density: float) -> None:
    """What is kept makes up for what is dropped, for one ingredient, where nobody is outvoted."""
    draws, generator = 4000, torch.Generator().manual_seed(7)
    delta = torch.tensor([[1.0, -2.0, 0.5, 4.0, 0.25]])
    drawn = torch.rand((draws, 5), generator=generator)
    options = {"epsilon": 0.1} if name == "della" else {}
    found = METHODS[name].function([delta.expand(draws, 5)], [1.0], random=[drawn], density=density, **options)
    error = (found.mean(0) / delta[0].double() - 1).abs().max()
    assert error < 5 * math.sqrt((1 / (density - 0.05) - 1) / draws)
    kept = (found != 0).double().mean()
    assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / (5 * draws))


def test_della_keeps_the_large_more_often() -> None:
    """The share kept rises evenly with the rank in the row, from one end to the other."""
    draws, generator = 20000, torch.Generator().manual_seed(3)
    delta, drawn = torch.tensor([3.0, -1.0, 4.0, 2.0, -5.0]), torch.rand((draws, 5), generator=generator)
    found = METHODS["della"].function([delta.expand(draws, 5)], [1.0], random=[drawn], density=0.6, epsilon=0.4)
    expected = torch.tensor([0.6, 0.4, 0.7, 0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close((found != 0).double().mean(0), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("density", "epsilon", "advice"),
    [(1.0, 0.15, "at most 0."), (0.9, 0.5, "at most 0.2."), (0.2, 0.4, "less than 0.4."), (0.1, 0.9, "less than 0.2.")],
)
def test_della_refuses_what_are_no_probabilities(density: float, epsilon: float, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"{density:g} and `epsilon` {epsilon:g} .*{advice}"):
        della.della([torch.ones(3)], [1.0], random=[torch.zeros(3)], density=density, epsilon=epsilon)


@pytest.mark.parametrize(("density", "epsilon"), [(1.0, 0.0), (0.925, 0.15), (0.7, 0.6), (0.5, 0.99)])
def test_della_takes_what_are(density: float, epsilon: float) -> None:
    found = della.della([torch.ones(2, 3)], [1.0], random=[torch.zeros(2, 3)], density=density, epsilon=epsilon)
    assert found.isfinite().all()
    assert found.all()


def test_breadcrumbs_refuses_to_keep_and_drop_more_than_everything() -> None:
    with pytest.raises(ValueError, match=r"`density` 0\.9 and `gamma` 0\.2 are 1\.1 .* at most 0\.1, .* at most 0\.8"):
        mix("breadcrumbs", [torch.ones(3)], [1.0], density=0.9, gamma=0.2)
    for density, gamma in ((0.9, 0.1), (0.7, 0.3), (0.99, 0.01)):
        mix("breadcrumbs", [torch.ones(3)], [1.0], density=density, gamma=gamma)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "breadcrumbs", "della", "sce"])
def test_the_size_of_blocks_does_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[name]
    deltas = [torch.randn((7, 11), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    drawn = [torch.rand((7, 11), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    hand = {"random": drawn, "cutoffs": [cutoff(delta, 0.2) for delta in deltas]}
    asked = {key: hand[key] for key in method.given if key in hand}
    whole = mix(name, deltas, [1.0, 0.3, 2.0], **asked)
    monkeypatch.setattr(_signs, "BLOCK", 5)
    monkeypatch.setattr(methods, "SLICE", 9)
    monkeypatch.setattr(della, "_ROWS", 22)
    found = mix(name, deltas, [1.0, 0.3, 2.0], **asked)
    if name == "sce":  # whose energies are added up by slice
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=0)
    else:
        assert torch.equal(found, whole)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 1031])
def test_sums_in_halves_lose_nothing(size: int) -> None:
    values = torch.arange(float(size)).double()
    found = sce._sum(values.clone())
    assert found == values.sum()
    assert found.untyped_storage().nbytes() == 8, "the values are not held"


@steady
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    places=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_magnitudes_are_within_their_cutoffs_as_float32(values: list[float], places: tuple[int, int]) -> None:
    narrow = torch.tensor(values)
    low, high = sorted(abs(narrow[place % len(values)].item()) for place in places)
    # As float64 also a little beside, which float32 does not tell from the cutoff.
    for tensor in (narrow, narrow.double(), narrow.double() * (1 - 2e-9)):
        magnitudes = tensor.abs().float()
        for most in (high, math.inf):
            expected = torch.where((magnitudes >= low) & (magnitudes <= most), tensor, 0.0)
            assert torch.equal(_signs.within(tensor, low, most), expected)


@steady
@given(
    values=st.lists(st.one_of(entries, st.floats(width=32, allow_nan=False, allow_infinity=False)), min_size=1),
    density=st.floats(0.0, 1.0, exclude_min=True),
)
def test_the_cutoff_is_the_last_magnitude_kept(values: list[float], density: float) -> None:
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(values, dtype=dtype)
        magnitudes = tensor.abs().float().sort(descending=True).values
        assert cutoff(tensor, density) == magnitudes[count_kept(len(values), density) - 1]


@pytest.mark.parametrize("kind", ["spread", "few values", "equal", "zero"])
def test_the_cutoff_of_a_long_tensor(kind: str) -> None:
    values = torch.randn(600_001, generator=torch.Generator().manual_seed(1))
    values = {"spread": values, "few values": values.round(), "equal": values.sign(), "zero": values * 0}[kind]
    ranked = values.abs().sort(descending=True).values
    for density in (1e-9, 0.01, 0.5, 0.999, 1.0):
        assert cutoff(values, density) == ranked[count_kept(len(values), density) - 1]


class Passes(list[list[Tensor]]):
    """Parts of a tensor, and how often they were gone through."""

    passes = 0

    def __getitem__(self, place: Any) -> Any:
        self.passes += place == 0
        return super().__getitem__(place)


#: Continuous values, and such as differences of 16-bit numbers are: zeros, and few others, each many times.
KINDS = {
    "spread": lambda drawn: drawn,
    "lumps": lambda drawn: (8 * drawn).round() / 8,
    "zeros": lambda drawn: drawn * (drawn.abs() > 1),
}


@pytest.mark.parametrize(("held", "bins"), [(1 << 21, 20), (100, 20), (100, 4)], ids=["kept", "counted", "narrowed"])
@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_magnitudes_of_a_rank_are_exact_whatever_the_sample(
    kind: str, held: int, bins: int, misled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ranks, "_HELD", held)
    monkeypatch.setattr(_ranks, "_BINS", bins)
    values = KINDS[kind](torch.randn(60_000, generator=torch.Generator().manual_seed(1)))
    parts = Passes([values[start : start + 7_000]] for start in range(0, len(values), 7_000))
    sample = torch.linspace(9.0, 10.0, 500) if misled else values[::7]
    sizes = values.abs().sort(descending=True).values
    for wanted in ([1], [2], [600], [12_000], [30_000], [59_999], [60_000], [54_600, 600]):
        parts.passes = 0
        assert ranked(parts, wanted, len(values), [sample]) == [[sizes[rank - 1] for rank in wanted]]
        if not misled and held > 100:
            assert parts.passes == 1  # which is why it is fast


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 2.0, 3.0, math.nan])
def test_magnitudes_of_a_rank_are_exact_where_the_sample_is_of_one_value(value: float) -> None:
    values = torch.tensor([0.5] * 10_000 + [1.0] * 10_000 + [2.0] * 10_000 + [math.nan] * 10_000)
    wanted = [1, 10_000, 10_001, 20_000, 20_001, 30_000, 30_001, 40_000]
    found = ranked([[values]], wanted, len(values), [torch.full((500,), value)])
    assert np.array_equal(found, [[math.nan] * 2 + [2.0] * 2 + [1.0] * 2 + [0.5] * 2], equal_nan=True)


def test_magnitudes_of_several_tensors_are_found_by_several_threads() -> None:
    tensors = [torch.randn(40_000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    parts = [[each[start : start + 999] for each in tensors] for start in range(0, 40_000, 999)]
    expected = [[each.abs().sort(descending=True).values[rank - 1] for rank in (400, 8_000)] for each in tensors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert ranked(parts, [400, 8_000], 40_000, [each[::9] for each in tensors], pool.map) == expected


@pytest.mark.parametrize("count", [1, 4, 5, 48, 1000])
def test_slices_of_many_tensors_take_no_more_memory_than_those_of_a_few(count: int) -> None:
    asked: list[int] = []

    def read(begin: int, end: int) -> Tensor:
        asked.append((end - begin) * count)
        return torch.zeros(1, 1).expand(count, end - begin)

    slices = Slices(read, count, 1_000_003)
    assert sum(part.shape[1] for part in slices) == slices.size
    assert max(asked) <= max(1 << 20, count << 13)
    assert sum(sample.numel() for sample in _ranks.sampled(slices)) <= 256 * max(4096 * 4, count * 64)


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_the_first_bounds_are_as_far_off_as_places_differ(uneven: bool) -> None:
    """Rows of an embedding differ in size; a sample of a few of them is further off than its number says."""
    values = torch.randn(256, 8192, generator=torch.Generator().manual_seed(2))
    values *= torch.linspace(0.2, 2, 256)[:, None] if uneven else 1.0
    flat = values[torch.randperm(256, generator=torch.Generator().manual_seed(3))].reshape(-1)
    sample = torch.cat(_ranks.sampled(Slices.of([flat])))
    assert len(sample) < len(flat) / 20
    low, high = _ranks._bounds(0.2, _ranks._bits(sample))
    found = torch.tensor(cutoff(flat, 0.2)).view(torch.int32).item()
    assert low <= found <= high
    share = ((flat.abs().view(torch.int32) >= low) & (flat.abs().view(torch.int32) <= high)).float().mean()
    assert share < (0.3 if uneven else 0.03)


def test_the_cutoff_of_what_is_no_number_is_none() -> None:
    assert math.isnan(cutoff(torch.tensor([math.nan, 1.0, -math.nan]), 0.5))
    assert cutoff(torch.tensor([math.nan, 1.0, -2.0]), 0.9) == 2.0
    assert cutoff(torch.full((300_000,), math.inf), 0.5) == math.inf
