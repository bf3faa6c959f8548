"""What every registered method keeps. A new method is tested by being registered."""

from __future__ import annotations

import doctest
import inspect
import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_soup.methods import METHODS, Method, accumulator, round_into

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: str(method.name))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values such as weights have, among them both zeros and the smallest and a large number."""
    values = (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    flat = values.view(-1)
    special = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).max / 64], dtype=dtype)
    if flat.numel() > 8:
        flat[:4] = special
    return values


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, so that -0 is not 0."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    left, right = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (left, right))
    return torch.equal(left, right)


def rounded(mixed: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(mixed, dtype=dtype)
    round_into(mixed, out)
    return out


@every_method
@every_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_equal_ingredients_give_themselves_back(method: Method, dtype: torch.dtype, n: int) -> None:
    """The soup of n copies of a model is that model, bit for bit, at the parameters declared neutral."""
    one = random(5, 13, dtype=dtype)
    for weights in ([1.0] * n, [0.3] * n)[: 1 if method.sums else 2]:
        mixed = method.function([one.clone() for _ in range(n)], weights, **method.neutral_for(n))
        if method.sums:  # 1/n is no binary number
            torch.testing.assert_close(rounded(mixed, dtype), one, rtol=torch.finfo(dtype).eps, atol=0)
        else:
            assert same_bits(rounded(mixed, dtype), one)


@every_method
@every_dtype
def test_the_order_of_ingredients_does_not_matter(method: Method, dtype: torch.dtype) -> None:
    """Up to rounding; and not even that where the sum is exact."""
    tensors = [random(40, dtype=dtype, seed=seed) for seed in range(4)]
    weights = [0.1, 3.0, 1.0, 0.7]
    there = method.function(tensors, weights, **method.neutral_for(4))
    back = method.function(tensors[::-1], weights[::-1], **method.neutral_for(4))
    torch.testing.assert_close(there, back, rtol=0, atol=1e-6 * float(there.abs().max()))
    whole = [(256 * tensor.clamp(-1, 1)).round() for tensor in tensors]
    there = method.function(whole, [1.0] * 4, **method.neutral_for(3))
    back = method.function(whole[::-1], [1.0] * 4, **method.neutral_for(3))
    assert torch.equal(there, back)


@every_method
@every_dtype
def test_only_the_proportion_of_weights_counts(method: Method, dtype: torch.dtype) -> None:
    """Unless the method is a plain sum, which is as many times larger."""
    tensors = [random(40, dtype=dtype, seed=seed) for seed in range(3)]
    weights = [0.1, 3.0, 1.0]
    mixed = method.function(tensors, weights, **method.neutral_for(3))
    if method.sums:
        assert same_bits(
            mixed.mul(4.0), method.function(tensors, [4 * weight for weight in weights], **method.neutral_for(3))
        )
        return
    for scale in (2.0**-900, 0.5, 4.0, 2.0**900):
        assert same_bits(
            mixed, method.function(tensors, [scale * weight for weight in weights], **method.neutral_for(3))
        )
    third = method.function(tensors, [weight / 3 for weight in weights], **method.neutral_for(3))
    torch.testing.assert_close(third, mixed, rtol=0, atol=1e-6 * float(mixed.abs().max()))


@every_method
@every_dtype
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_the_shape_stays_and_the_result_is_wide(method: Method, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = [random(*shape, dtype=dtype, seed=seed) for seed in range(3)]
    mixed = method.function(tensors, [1.0, 2.0, 1.0], **method.neutral_for(3))
    assert mixed.shape == shape
    assert mixed.dtype == accumulator(tensors) == (torch.float32 if dtype.itemsize == 2 else torch.float64)


@every_method
def test_a_mix_of_types_is_added_up_in_the_widest(method: Method) -> None:
    tensors = [random(9, dtype=torch.bfloat16), random(9, dtype=torch.float32)]
    assert method.function(tensors, [1.0, 1.0], **method.neutral_for(3)).dtype == torch.float64
    assert accumulator([random(9, dtype=torch.bfloat16), random(9, dtype=torch.float16)]) == torch.float32


@every_method
@every_dtype
def test_slices_give_what_the_whole_gives(method: Method, dtype: torch.dtype) -> None:
    """The engine hands in slices that end anywhere; vector instructions must not show at their borders."""
    assert method.elementwise, "the engine works on slices only"
    tensors = [random(1031, dtype=dtype, seed=seed) for seed in range(3)]
    for weights in ([1.0, 1.0, 1.0], [0.1, 3.0, 0.7]):
        whole = method.function(tensors, weights, **method.neutral_for(3))
        for step in (1, 7, 64, 333, 1000):
            cut = [
                method.function([tensor[start : start + step] for tensor in tensors], weights, **method.neutral_for(3))
                for start in range(0, 1031, step)
            ]
            assert same_bits(torch.cat(cut), whole)


@every_method
@every_dtype
@pytest.mark.parametrize("n", [1, 3])
def test_the_ingredients_are_not_changed(method: Method, dtype: torch.dtype, n: int) -> None:
    tensors = [random(40, dtype=dtype, seed=seed) for seed in range(n)]
    before = [tensor.clone() for tensor in tensors]
    weights = [0.5, 0.25, 2.0][:n]
    mixed = method.function(tensors, weights, **method.neutral_for(3))
    mixed.zero_()
    assert all(same_bits(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
    assert weights == [0.5, 0.25, 2.0][:n]


@every_method
def test_gradients_flow_to_every_ingredient(method: Method) -> None:
    """So that weights can be learned through it."""
    tensors = [random(6, dtype=torch.float64, seed=seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(
        lambda *each: method.function(list(each), [0.1, 3.0, 1.0], **method.neutral_for(3)), tensors
    )


@every_method
def test_numbers_of_ingredients_and_weights_must_agree(method: Method) -> None:
    with pytest.raises(ValueError, match="zip"):
        method.function([random(3)] * 3, [1.0, 2.0], **method.neutral_for(3))


@every_method
def test_it_is_documented_with_an_example_that_runs(method: Method) -> None:
    module = sys.modules[method.function.__module__]
    text = inspect.getdoc(method.function) or ""
    assert text.partition("\n")[0].endswith(".")
    for part in (".. math::", "Args:", "Returns:", "Reference:"):
        assert part in text
    assert all(f"{parameter}:" in text for parameter in method.parameters)
    examples = doctest.DocTestFinder().find(method.function, method.name, module=module, globs=vars(module).copy())
    assert sum(len(found.examples) for found in examples) >= 2
    assert doctest.DocTestRunner().run(examples[0]).failed == 0


@every_method
def test_it_has_golden_cases(method: Method) -> None:
    assert len(json.loads((GOLDEN / f"{method.name}.json").read_text())) >= 3


def golden() -> list[Any]:
    return [
        pytest.param(path.stem, case, id=f"{path.stem}: {case['title']}")
        for path in sorted(GOLDEN.glob("*.json"))
        for case in json.loads(path.read_text())
    ]


def exactly(texts: list[str], dtype: str) -> Tensor:
    """Numbers written as fractions; each must be one that the type can hold."""
    values = torch.tensor(
        [-0.0 if text == "-0" else float(Fraction(text)) for text in texts], dtype=getattr(torch, dtype)
    )
    assert [Fraction(value) for value in values.tolist()] == [Fraction(text) for text in texts]
    return values


@pytest.mark.parametrize(("name", "case"), golden())
def test_golden_case(name: str, case: dict[str, Any]) -> None:
    """Cases worked by hand, with the derivation beside them."""
    assert case["derivation"]
    tensors = [exactly(values, case["dtype"]) for values in case["tensors"]]
    mixed = METHODS[name].function(tensors, case["weights"], **case["parameters"])
    written = case.get("written", case["dtype"])
    found, expected = rounded(mixed, getattr(torch, written)), exactly(case["expected"], written)
    assert same_bits(found, expected), found
    assert [math.copysign(1, value) for value in found] == [math.copysign(1, value) for value in expected]
