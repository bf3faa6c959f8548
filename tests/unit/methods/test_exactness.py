"""The mean against exact fractions: what `linear` promises in its docstring, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hf_soup.methods import accumulator, round_into
from hf_soup.methods.linear import linear

#: Type → bits of the significand, and exponents of the smallest normal and of the largest number.
FORMATS = {
    torch.bfloat16: (8, -126, 127),
    torch.float16: (11, -14, 15),
    torch.float32: (24, -126, 127),
    torch.float64: (53, -1022, 1023),
}
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
READ_AND_WRITTEN = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
steady = settings(deadline=None, derandomize=True, max_examples=40)
each_type = pytest.mark.parametrize(("read", "written"), READ_AND_WRITTEN, ids=str)


def step(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The distance between neighbours of ``dtype`` at a value."""
    bits, low, _ = FORMATS[dtype]
    exponent = low
    if value:
        size = abs(value)
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        exponent -= Fraction(2) ** exponent > size
    return Fraction(2) ** (max(exponent, low) - bits + 1)


def nearest(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Rounded to nearest, ties to even (as Python rounds fractions), without a largest number."""
    return round(value / step(value, dtype)) * step(value, dtype)


def holds(value: Fraction, dtype: torch.dtype) -> bool:
    return nearest(value, dtype) == value and abs(value) < Fraction(2) ** (FORMATS[dtype][2] + 1)


def from_bits(bits: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Numbers from their bit patterns; what is not finite becomes the largest number of its sign."""
    size = 8 * dtype.itemsize
    signed = [each - (1 << size) if each >> (size - 1) else each for each in bits]
    values = torch.tensor(signed, dtype=INTEGERS[dtype]).view(dtype)
    largest = torch.finfo(dtype).max
    return torch.where(values.isfinite(), values, torch.where(values.signbit(), -largest, largest).to(dtype))


def write(mixed: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(mixed, dtype=dtype)
    round_into(mixed, out)
    return out


@st.composite
def ingredients(draw: Callable[[st.SearchStrategy[Any]], Any], read: torch.dtype) -> list[Tensor]:
    """Two to 33 ingredients of eight numbers: any bit patterns, siblings of one pattern, subnormals, or the extremes.

    All bits are drawn at once, as hypothesis takes long over thousands of numbers.
    """
    n = draw(st.sampled_from([2, 3, 5, 6, 7, 9, 10, 33]))
    size, mantissa = 8 * read.itemsize, FORMATS[read][0] - 1
    one, sign = 1 << mantissa, 1 << (size - 1)  # the smallest normal number, and what makes it negative
    top = sign - 2 - one
    kind = draw(st.sampled_from(["any", "siblings", "siblings", "subnormal", "large", "extreme"]))
    numbers = iter(np.frombuffer(draw(st.binary(min_size=32 * (n + 1), max_size=32 * (n + 1))), np.uint32).tolist())
    columns = []
    for _ in range(8):
        first, *more = [next(numbers) for _ in range(n + 1)]
        if kind == "any":
            column = [each % (2 * sign) for each in more]
        elif kind == "subnormal":
            column = [each % (2 * one) | (each & sign) for each in more]
        elif kind == "extreme":
            column = [(0, 1, one - 1, one, top + one)[each % 5] | (each & sign) for each in more]
        else:
            start = top if kind == "large" else one + first % (top - 3 * one)
            column = [start + each % one - one // 2 | (first & sign) for each in more]
        columns.append(column)
    return [from_bits([column[i] for column in columns], read) for i in range(n)]


@each_type
@steady
@given(data=st.data())
def test_the_uniform_mean_is_the_correctly_rounded_one(
    read: torch.dtype, written: torch.dtype, data: st.DataObject
) -> None:
    """Wherever the sum is exact in the accumulator; elsewhere within half a unit and the stated bound."""
    tensors = data.draw(ingredients(read))
    n, wide = len(tensors), accumulator(tensors)
    mixed = linear(tensors, [1.0] * n)
    found = write(mixed, written).tolist()
    for values, result in zip(zip(*(tensor.tolist() for tensor in tensors), strict=True), found, strict=True):
        parts = [Fraction(value) for value in values]
        sums = list(accumulate(parts))
        mean = sums[-1] / n
        if not all(abs(each) < Fraction(2) ** (FORMATS[wide][2] + 1) for each in sums):
            assert not math.isfinite(result)  # which the engine sees, and adds up in float64
        elif abs(nearest(mean, written)) >= Fraction(2) ** (FORMATS[written][2] + 1):
            assert math.isinf(result)  # which the engine refuses
        elif all(holds(each, wide) for each in sums):
            assert Fraction(result) == nearest(mean, written)
            if mean:
                assert math.copysign(1, result) == (1 if mean > 0 else -1)
        else:
            assert_near(result, mean, parts, [1] * n, wide, written)


@each_type
@steady
@given(data=st.data())
def test_other_weights_stay_within_the_stated_bound(
    read: torch.dtype, written: torch.dtype, data: st.DataObject
) -> None:
    tensors = data.draw(ingredients(read))
    weights = [
        data.draw(st.one_of(st.floats(0.01, 10), st.floats(0, 1e300), st.sampled_from([0.0, 5e-324, 1.0, 1e-30])))
        for _ in tensors
    ]
    if sum(weights) == 0:
        weights[0] = 1.0
    shares = [Fraction(weight) for weight in weights]
    wide = accumulator(tensors)
    found = write(linear(tensors, weights), written).tolist()
    for values, result in zip(zip(*(tensor.tolist() for tensor in tensors), strict=True), found, strict=True):
        parts = [Fraction(value) for value in values]
        mean = sum(share * part for share, part in zip(shares, parts, strict=True)) / sum(shares)
        largest = Fraction(torch.finfo(written).max)
        if abs(mean) > largest or sum(map(abs, parts)) > Fraction(torch.finfo(wide).max):
            continue  # the engine's part: it refuses, or adds up in float64
        assert_near(result, mean, parts, shares, wide, written)


def assert_near(
    result: float,
    mean: Fraction,
    parts: Sequence[Fraction],
    shares: Sequence[Fraction | int],
    wide: torch.dtype,
    written: torch.dtype,
) -> None:
    """Within half a unit in the last place, and the bound of `linear`'s docstring."""
    n, (bits, low, _) = len(parts), FORMATS[wide]
    size = sum(share * abs(part) for share, part in zip(shares, parts, strict=True)) / sum(shares)
    bound = (n + 4) * Fraction(2) ** -bits * size
    bound += (n + 1 + sum(map(abs, parts))) * Fraction(2) ** (low - bits + 1)
    if math.isinf(result):
        assert abs(mean) + bound >= torch.finfo(written).max
        return
    half = max(step(mean, written), step(Fraction(result), written)) / 2
    assert abs(Fraction(result) - mean) <= half + bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@steady
@given(numerator=st.integers(-(2**53), 2**53), exponent=st.integers(-1074, 60))
def test_float64_is_rounded_to_16_bits_once(dtype: torch.dtype, numerator: int, exponent: int) -> None:
    for value in (math.ldexp(numerator, exponent), math.ldexp(numerator, exponent // 10 - 50)):
        if math.isinf(value):
            continue
        result = write(torch.tensor([value], dtype=torch.float64), dtype).item()
        right = nearest(Fraction(value), dtype)
        if abs(right) >= Fraction(2) ** (FORMATS[dtype][2] + 1):
            assert math.isinf(result)
        else:
            assert Fraction(result) == right
        assert math.copysign(1, result) == math.copysign(1, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_tie_of_16_bits_and_its_neighbours(dtype: torch.dtype) -> None:
    """All 65,536 numbers: the tie above each, and the nearest float64 on both sides of it."""
    numbers = from_bits(range(1 << 16), dtype).double().unique()
    ties = (numbers[:-1] + numbers[1:]) / 2
    below, above = (torch.nextafter(ties, torch.full_like(ties, side * math.inf)) for side in (-1, 1))
    assert torch.equal(write(below, dtype).double(), numbers[:-1])
    assert torch.equal(write(above, dtype).double(), numbers[1:])
    even = torch.where(numbers.to(dtype).view(torch.int16) % 2 == 0, numbers, math.nan)
    expected = torch.where(even[:-1].isnan(), even[1:], even[:-1])
    assert torch.equal(write(ties, dtype).double(), expected)
    for special in (math.inf, -math.inf, math.nan):
        assert write(torch.tensor([special], dtype=torch.float64), dtype).double().equal(
            torch.tensor([special], dtype=torch.float64)
        ) or math.isnan(special)
    assert write(torch.tensor([math.nan], dtype=torch.float64), dtype).isnan().all()
