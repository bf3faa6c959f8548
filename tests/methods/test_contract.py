"""What every registered method keeps. A new method is tested by being registered."""

from __future__ import annotations

import doctest
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hf_soup.methods import METHODS, Method, Slices, Within, accumulator, round_into
from hf_soup.methods._ranks import cutoff

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(), (1,), (0,), (7,), (5, 13), (13, 5), (1, 4), (3, 0, 2), (2, 3, 4)]

Chooses = Callable[[float], dict[str, Any]]


def dtypes(method: Method) -> list[torch.dtype]:
    """What a method is handed: tensors as stored, or task vectors in an accumulator's dtype."""
    return DTYPES[2:] if method.needs_base else DTYPES


def mixes_in(method: Method, tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the result: task vectors are in an accumulator's dtype already."""
    return tensors[0].dtype if method.needs_base else accumulator(tensors)


def choices(method: Method) -> dict[str, Chooses]:
    """Parameters to test a method with: the defaults, the neutral ones, and every word and switch by itself."""
    found: dict[str, Chooses] = {"default": lambda _: {}}
    if method.neutral:
        found["neutral"] = method.neutral_for
    for name, default in method.parameters.items():
        words = [not default] if isinstance(default, bool) else method.allowed.get(name)
        for word in words if isinstance(words, (list, tuple)) else ():
            if word != default:
                found[f"{name}={word}"] = lambda _, name=name, word=word: {name: word}  # type: ignore[misc]
    return found


def named(value: object) -> str | None:
    if isinstance(value, Method):
        return value.name
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


every_method = pytest.mark.parametrize("method", METHODS.values(), ids=named)
every_choice = pytest.mark.parametrize(
    ("method", "choose"),
    [
        pytest.param(method, choose, id=f"{method.name}-{title}")
        for method in METHODS.values()
        for title, choose in choices(method).items()
    ],
)
every_dtype = pytest.mark.parametrize(
    ("method", "choose", "dtype"),
    [
        pytest.param(method, choose, dtype, id=f"{method.name}-{title}-{named(dtype)}")
        for method in METHODS.values()
        for title, choose in choices(method).items()
        for dtype in dtypes(method)
    ],
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, special: bool = True) -> Tensor:
    """Values such as weights have, and, where ``special``, both zeros, the smallest and a large number."""
    values = (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    if special and values.numel() > 8:
        # The square of a large float64 would not be finite, and no weights are that large.
        large = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 64
        values.view(-1)[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal, -large], dtype=dtype)
    return values


def several(method: Method, n: int) -> int:
    """How many ingredients a method that takes so many gets instead of ``n``."""
    return max(method.least, min(n, method.most or n))


def squares(tensor: Tensor, place: int) -> Tensor:
    """Squared gradients, of many sizes; some entries have none."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2000 + place))
    return drawn.mul(3).exp().mul_(1e-3).mul_(drawn > -1)


def gram(tensor: Tensor, place: int) -> Tensor:
    """Of inputs that are alike, fewer than they are wide; the first is never there."""
    width = tensor.shape[-1] if tensor.ndim else 0
    inputs = torch.randn(width // 2 + 1, width, generator=torch.Generator().manual_seed(2000 + place)) + 1
    inputs[:, :1] = 0
    return inputs.mT @ inputs / len(inputs)


def coefficient(_: Tensor, place: int) -> Tensor:
    """Learned ones are between 0 and 1."""
    return torch.rand((), generator=torch.Generator().manual_seed(2000 + place))


STATISTICS = {"fisher": squares, "gram": gram, "coefficients": coefficient}


def handed(
    method: Method, tensors: Sequence[Tensor], weights: Sequence[float], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """What the engine hands in besides tensors and weights."""
    found: dict[str, Any] = {}
    for name in method.given:
        if name == "random":
            found[name] = [
                torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1000 + place))
                for place, tensor in enumerate(tensors)
            ]
        elif name == "cutoffs":
            density = {**method.parameters, **parameters}["density"]
            found[name] = [cutoff(tensor.detach(), density) for tensor in tensors]
        elif name == "measured":
            assert method.measure
            found[name] = method.measure(Slices.of(tensors), weights, **{**method.parameters, **parameters})
        elif name == "statistics":
            found[name] = [STATISTICS[method.statistics](tensor, place) for place, tensor in enumerate(tensors)]
        else:
            raise AssertionError(f"nothing hands in `{name}`")
    return found


def mix(method: Method, tensors: Sequence[Tensor], weights: Sequence[float], parameters: Mapping[str, Any]) -> Tensor:
    return method.function(tensors, weights, **parameters, **handed(method, tensors, weights, parameters))


def sums(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Whether the result grows with the weights."""
    normalize = {**method.parameters, **parameters}.get("normalize")
    return method.sums if normalize is None else not normalize


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, so that -0 is not 0."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    left, right = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (left, right))
    return torch.equal(left, right)


def assert_near(method: Method, found: Tensor, expected: Tensor, share: float) -> None:
    """Within a share of the largest number, or as far as the method says that machines may be apart."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=max(share, method.bound) * largest)


def rounded(mixed: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(mixed, dtype=dtype)
    round_into(mixed, out)
    return out


@every_method
def test_it_is_registered_truthfully(method: Method) -> None:
    assert 1 <= method.least <= (method.most or math.inf)
    assert set(method.given) <= {"random", "cutoffs", "measured", "statistics"}
    assert ("measured" in method.given) == (method.measure is not None)
    assert ("statistics" in method.given) == (method.statistics in STATISTICS) == ("examples" in method.parameters)
    assert "cutoffs" not in method.given or "density" in method.parameters
    assert method.neutral is None or method.neutral.keys() <= method.parameters.keys()
    # What goes entry by entry is the same everywhere, but for what models show, and what is measured.
    assert not (method.elementwise and method.bound and not method.statistics and not method.measure)
    first, second, *rest = inspect.signature(method.function).parameters.values()
    assert first.name == ("deltas" if method.needs_base else "tensors")
    assert second.name == "weights"
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in rest)


@every_method
def test_every_parameter_says_what_it_may_be(method: Method) -> None:
    """Numbers by an interval, words by a list; and what is declared is among it."""
    for name, default in method.parameters.items():
        if isinstance(default, bool):
            continue
        assert name in method.allowed, f"{name} needs Annotated[…, Within(…)] or Literal[…]"
        assert default in method.allowed[name]
        for total in (0.5, 1.0, 3.0):
            assert method.neutral_for(total).get(name, default) in method.allowed[name]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        pytest.param(method, dtype, id=f"{method.name}-{named(dtype)}")
        for method in METHODS.values()
        if method.neutral is not None
        for dtype in dtypes(method)
    ],
)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_equal_ingredients_give_themselves_back(method: Method, dtype: torch.dtype, n: int) -> None:
    """The soup of n copies of a model is that model at the parameters declared neutral.

    Bit for bit where it only goes entry by entry, but for the zero's sign in a task vector, which adding it loses, and
    for sums, as 1/n is no binary number.
    """
    n, one = several(method, n), random(5, 13, dtype=dtype)
    if method.needs_base:
        one += 0.0
    for weights in ([1.0] * n, [0.3] * n)[: 1 if method.sums else 2]:
        mixed = mix(method, [one.clone() for _ in range(n)], weights, method.neutral_for(math.fsum(weights)))
        exact = dtype != torch.float32 or not method.needs_base  # in float32 a sum of float32s is rounded
        if method.elementwise and exact and not method.sums and not method.measure:
            assert same_bits(rounded(mixed, dtype) + (0.0 if method.needs_base else -0.0), one)
        else:
            expected = one.to(mixed.dtype)
            near = method.bound * float(expected.abs().max())
            torch.testing.assert_close(mixed, expected, rtol=16 * torch.finfo(mixed.dtype).eps, atol=near)


@every_dtype
def test_the_order_of_ingredients_does_not_matter(method: Method, choose: Chooses, dtype: torch.dtype) -> None:
    """Up to rounding; and not even that where the sum is exact."""
    n = several(method, 4)
    if method.ordered or n == 1:
        return
    weights = [0.1, 3.0, 1.0, 0.7, 1.5, 0.2, 2.0][:n]

    def both(tensors: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
        parameters = choose(math.fsum(weights))
        hand = handed(method, tensors, weights, parameters)
        turned = {name: each[::-1] for name, each in hand.items() if name != "measured"}
        if method.measure:
            turned["measured"] = handed(method, tensors[::-1], weights[::-1], parameters)["measured"]
        return (
            method.function(tensors, weights, **parameters, **hand),
            method.function(tensors[::-1], weights[::-1], **parameters, **turned),
        )

    for shape in ((40,), (5, 8)):
        there, back = both([random(*shape, dtype=dtype, seed=seed, special=False) for seed in range(n)], weights)
        assert_near(method, back, there, 1e-6)
    decides = method.statistics or method.measure
    if method.elementwise and method.neutral is not None and choose == method.neutral_for and not decides:
        whole = [(256 * random(40, dtype=dtype, seed=seed).clamp(-1, 1)).round() for seed in range(n)]
        assert torch.equal(*both(whole, [1.0] * n))


@every_dtype
def test_only_the_proportion_of_weights_counts(method: Method, choose: Chooses, dtype: torch.dtype) -> None:
    """Unless the method is a plain sum, which is as many times larger."""
    n = several(method, 3)
    weights = [0.1, 3.0, 1.0, 0.7, 1.5, 0.2, 2.0][:n]
    parameters = choose(math.fsum(weights))
    for shape in ((40,), (5, 8)):
        tensors = [random(*shape, dtype=dtype, seed=seed, special=False) for seed in range(n)]
        mixed = mix(method, tensors, weights, parameters)

        def scaled(scale: float, tensors: list[Tensor] = tensors) -> Tensor:
            return mix(method, tensors, [scale * weight for weight in weights], parameters)

        if sums(method, parameters):
            if method.bound:
                assert_near(method, scaled(4.0), mixed * 4.0, 0.0)
            else:
                assert same_bits(scaled(4.0), mixed * 4.0)
        else:
            assert all(same_bits(scaled(scale), mixed) for scale in (2.0**-900, 0.5, 4.0, 2.0**900))
            assert_near(method, scaled(1 / 3), mixed, 1e-6)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shape_stays_and_the_result_is_wide(
    method: Method, choose: Chooses, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Numbers stay finite too, whatever tensors there are: of zeros, equal ones, ones of weight zero."""
    n = several(method, 3)
    tensors = [random(*shape, dtype=dtype, seed=seed) for seed in range(n)]
    zeros = [torch.zeros(shape, dtype=dtype) for _ in range(n)]
    weights = [1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 1.0][:n]
    for given_weights in (weights, [1.0] * n, [0.0, *weights[1:]] if n > 1 else weights):
        for given_tensors in (tensors, [tensors[0]] * n, [zeros[0], *tensors[1:]], zeros):
            mixed = mix(method, given_tensors, given_weights, choose(math.fsum(given_weights)))
            assert mixed.shape == shape
            assert mixed.dtype == mixes_in(method, tensors)
            assert mixed.isfinite().all()
            if given_tensors is zeros:
                assert not mixed.any(), "nothing was learned, so nothing is to be added"


@every_method
def test_a_mix_of_types_is_added_up_in_the_widest(method: Method) -> None:
    assert accumulator([random(9, dtype=torch.bfloat16), random(9, dtype=torch.float16)]) == torch.float32
    if method.needs_base or several(method, 2) == 1:
        return  # task vectors are all of one type
    n = several(method, 2)
    tensors = [random(9, dtype=torch.bfloat16), *(random(9, dtype=torch.float32) for _ in range(n - 1))]
    assert mix(method, tensors, [1.0] * n, {}).dtype == torch.float64


@every_dtype
def test_slices_give_what_the_whole_gives(method: Method, choose: Chooses, dtype: torch.dtype) -> None:
    """The engine hands in slices that end anywhere; vector instructions must not show at their borders."""
    if not method.elementwise:
        return
    n = several(method, 3)
    tensors = [random(1031, dtype=dtype, seed=seed) for seed in range(n)]
    for weights in ([1.0] * n, [0.1, 3.0, 0.7, 1.0, 1.5, 0.2, 2.0][:n]):
        parameters = choose(math.fsum(weights))
        hand = handed(method, tensors, weights, parameters)
        whole = method.function(tensors, weights, **parameters, **hand)

        def cut(start: int, stop: int, values: Any) -> Any:
            if not isinstance(values, list):
                return values  # measured, and the same for all slices
            return [value[start:stop] if isinstance(value, Tensor) and value.ndim else value for value in values]

        for step in (1, 7, 64, 333, 1000):
            slices = [
                method.function(
                    cut(start, start + step, tensors),
                    weights,
                    **parameters,
                    **{name: cut(start, start + step, values) for name, values in hand.items()},
                )
                for start in range(0, 1031, step)
            ]
            assert same_bits(torch.cat(slices), whole)


@every_dtype
@pytest.mark.parametrize("n", [1, 3])
def test_what_is_handed_in_is_not_changed(method: Method, choose: Chooses, dtype: torch.dtype, n: int) -> None:
    n = several(method, n)
    weights = [0.5, 0.25, 2.0, 1.0, 1.5, 0.2, 2.0][:n]
    kept, parameters = list(weights), choose(math.fsum(weights))
    for shape in ((40,), (5, 8)):
        tensors = [random(*shape, dtype=dtype, seed=seed) for seed in range(n)]
        hand, copies = handed(method, tensors, weights, parameters), handed(method, tensors, weights, parameters)
        before = [tensor.clone() for tensor in tensors]
        mixed = method.function(tensors, weights, **parameters, **hand)
        mixed.zero_()
        assert all(same_bits(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
        assert weights == kept
        for name, values in hand.items():
            assert str(values) == str(copies[name])


@every_choice
def test_gradients_flow_to_every_ingredient(method: Method, choose: Chooses) -> None:
    """So that weights can be learned through it. What counts, ranks and votes decide is constant nearby."""
    n = several(method, 3)
    weights = [0.1, 3.0, 1.0, 0.7, 1.5, 0.2, 2.0][:n]
    for shape in ((6,), (3, 4)):
        tensors = [
            random(*shape, dtype=torch.float64, seed=seed, special=False).mul_(20).requires_grad_() for seed in range(n)
        ]
        parameters = choose(math.fsum(weights))
        assert torch.autograd.gradcheck(lambda *each: mix(method, each, weights, parameters), tensors)  # noqa: B023


@every_method
def test_numbers_of_ingredients_and_weights_must_agree(method: Method) -> None:
    tensors = [random(3, 4)] * several(method, 3)
    with pytest.raises(ValueError, match=r"\w"):
        mix(method, tensors, [1.0] * (len(tensors) - 1), {})


def number(allowed: Within, default: float) -> st.SearchStrategy[float]:
    """Any that a parameter may be, but for the immensely large and small."""
    low, high = (float(part.strip("[]() ")) for part in allowed.interval.split(","))
    if isinstance(default, int):
        ends = int(max(low, -10)), int(min(high, 10))
        return st.integers(*ends).filter(lambda value: value in allowed)
    low, high = max(low, -10.0), min(high, 10.0)
    return st.floats(low if low in allowed else low + 1e-3, high if high in allowed else high - 1e-3)


@st.composite
def orders(draw: Callable[[st.SearchStrategy[Any]], Any], method: Method) -> tuple[Any, ...]:
    """Tensors, weights and parameters that may be asked for."""
    dtype = draw(st.sampled_from(dtypes(method)))
    large = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 64
    n = several(method, draw(st.integers(1, 4)))
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 3), (3, 2), (4, 1), (2, 2, 2)]))
    values = draw(st.sampled_from([st.floats(-large, large), st.floats(-1, 1), st.integers(-2, 2)]))
    size = math.prod(shape)
    tensors = [
        torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).reshape(shape) for _ in range(n)
    ]
    if draw(st.booleans()):
        tensors = [tensors[0]] * n
    parameters = {}
    for name, default in method.parameters.items():
        allowed = method.allowed.get(name)
        if isinstance(allowed, Within):
            parameters[name] = draw(st.one_of(st.just(default), number(allowed, default)))
        else:
            parameters[name] = draw(st.sampled_from(allowed or [True, False]))
    weights = draw(st.lists(st.floats(-3 if sums(method, parameters) else 0, 3), min_size=n, max_size=n))
    if not any(weights):
        weights = [1.0] * n
    return tensors, weights, parameters


@every_method
@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data())
def test_what_is_finite_stays_finite_and_the_same(method: Method, data: st.DataObject) -> None:
    """At any parameters that may be given; those that are no good together, or tensors, are refused with values."""
    tensors, weights, parameters = data.draw(orders(method))
    try:
        mixed = mix(method, tensors, weights, parameters)
    except ValueError as error:
        assert re.search(r"\d", str(error))  # noqa: PT017
        return
    assert mixed.isfinite().all()
    assert (mixed.shape, mixed.dtype) == (tensors[0].shape, mixes_in(method, tensors))
    assert same_bits(mix(method, tensors, weights, parameters), mixed)


@every_choice
def test_any_number_of_threads_gives_the_same(method: Method, choose: Chooses) -> None:
    """Tensors large enough that torch shares them out, and with them whatever it adds up."""
    n = several(method, 3)
    tensors = [random(300, 400, seed=seed, special=False) for seed in range(n)]
    weights = [0.1, 3.0, 1.0, 0.7, 1.5, 0.2, 2.0][:n]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(mix(method, tensors, weights, choose(math.fsum(weights))))
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        if method.bound:
            assert_near(method, each, found[0], 0.0)
        else:
            assert same_bits(each, found[0])


@every_method
def test_it_is_documented_with_an_example_that_runs(method: Method) -> None:
    module = sys.modules[method.function.__module__]
    text = inspect.getdoc(method.function) or ""
    assert text.partition("\n")[0].endswith(".")
    for part in (".. math::", "When:", "When not:", "Args:", "Returns:", "Reference:"):
        assert part in text
    assert all(f"{parameter}:" in text for parameter in (*method.parameters, *method.given))
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
    """Cases worked by hand, with the derivation beside them.

    Numbers are fractions, written out flat; ``shape`` gives their shape if there is more than one dimension. ``random``
    and ``statistics`` are handed in as written, ``cutoffs`` too, or where they are absent as the density has them. With
    ``atol``, which is for results that are no fractions, ``expected`` are decimals.
    """
    assert case["derivation"]
    method, parameters = METHODS[name], case["parameters"]
    shape = case.get("shape", [-1])
    tensors = [exactly(values, case["dtype"]).reshape(shape) for values in case["tensors"]]
    hand = {} if {"random", "statistics"} & {*method.given} else handed(method, tensors, case["weights"], parameters)
    if "random" in method.given:
        hand["random"] = [exactly(values, "float32").reshape(shape) for values in case["random"]]
    if "statistics" in method.given:
        width = tensors[0].shape[-1]
        sizes = (width, width) if method.statistics == "gram" and tensors[0].ndim == 2 else tensors[0].shape
        sizes = () if method.statistics == "coefficients" else sizes
        hand["statistics"] = [exactly(values, "float32").reshape(sizes) for values in case["statistics"]]
    if "cutoffs" in case:
        hand["cutoffs"] = [float(Fraction(text)) for text in case["cutoffs"]]
    mixed = method.function(tensors, case["weights"], **parameters, **hand)
    assert mixed.shape == tensors[0].shape
    written = case.get("written", case["dtype"])
    found = rounded(mixed, getattr(torch, written)).reshape(-1)
    if "atol" in case:
        expected = torch.tensor([float(Fraction(text)) for text in case["expected"]], dtype=found.dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=case["atol"])
        return
    expected = exactly(case["expected"], written)
    assert same_bits(found, expected), found
    assert [math.copysign(1, value) for value in found] == [math.copysign(1, value) for value in expected]
