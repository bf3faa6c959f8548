"""What every method keeps."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hf_soup.methods import Method, Slices, accumulator, count_kept, round_into
from hf_soup.testing.registered import (
    Choose,
    check_documentation,
    check_parameters,
    check_signature,
    check_that_recipes_find_it,
    choices,
    named_entries,
    parameters_of,
    parametrize,
)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_SHAPES = [(), (1,), (0,), (7,), (5, 13), (13, 5), (1, 4), (3, 0, 2), (2, 3, 4)]
#: Sizes of slices, shorter than a vector instruction takes at once, and longer; each row makes 1,031 elements.
_SLICES = [[1] * 17 + [7] * 10 + [64] * 3 + [752], [333, 333, 333, 32], [1000, 31]]
_WEIGHTS = [0.1, 3.0, 1.0, 0.7, 1.5, 0.2, 2.0]
#: What a method may ask the engine for.
_HANDED_IN = {"random", "cutoffs", "measured", "statistics"}


def _dtypes(method: Method) -> dict[str, torch.dtype]:
    """What a method is handed: tensors as stored, or task vectors in an accumulator's dtype."""
    narrow = ("bfloat16", "float16") if method.needs_base else ()
    return {name: dtype for name, dtype in _DTYPES.items() if name not in narrow}


def _result_dtype(method: Method, tensors: Sequence[Tensor]) -> torch.dtype:
    """Task vectors are in an accumulator's dtype already."""
    return tensors[0].dtype if method.needs_base else accumulator(tensors)


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, special: bool = True) -> Tensor:
    """Values such as weights have, and, where ``special``, both zeros, the smallest and a large number."""
    values = (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)
    if special and values.numel() > 8:
        # The square of a large float64 would not be finite, and no weights are that large.
        large = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 64
        values.view(-1)[:4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal, -large], dtype=dtype)
    return values


def _count(method: Method, n: int) -> int:
    """How many ingredients a method that takes so many gets instead of ``n``."""
    return max(method.least, min(n, method.most or n))


def _squares(tensor: Tensor, place: int) -> Tensor:
    """Squared gradients, of many sizes; some entries have none."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2000 + place))
    return drawn.mul(3).exp().mul_(1e-3).mul_(drawn > -1)


def _gram(tensor: Tensor, place: int) -> Tensor:
    """Of inputs that are alike, fewer than they are wide; the first is never there."""
    width = tensor.shape[-1] if tensor.ndim else 0
    inputs = torch.randn(width // 2 + 1, width, generator=torch.Generator().manual_seed(2000 + place)) + 1
    inputs[:, :1] = 0
    return inputs.mT @ inputs / len(inputs)


_STATISTICS: dict[str, Callable[[Tensor, int], Tensor]] = {"fisher": _squares, "gram": _gram}


def _cutoff(tensor: Tensor, density: float) -> float:
    """The least magnitude that is kept, as a float32."""
    magnitudes = tensor.detach().abs().float().flatten().sort(descending=True).values
    return magnitudes[count_kept(len(magnitudes), density) - 1].item() if len(magnitudes) else 0.0


def _handed_in(
    method: Method, tensors: Sequence[Tensor], weights: Sequence[float], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """What the engine hands in besides tensors and weights."""
    arguments: dict[str, Any] = {}
    for name in method.given:
        if name in parameters:
            continue
        if name == "random":
            arguments[name] = [
                torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1000 + place))
                for place, tensor in enumerate(tensors)
            ]
        elif name == "cutoffs":
            density = {**method.parameters, **parameters}["density"]
            arguments[name] = [_cutoff(tensor, density) for tensor in tensors]
        elif name == "measured":
            assert method.measure, "`measured` is what the method's `measure` finds"
            own = {key: value for key, value in parameters.items() if key in method.parameters}
            arguments[name] = method.measure(Slices.of(tensors), weights, **{**method.parameters, **own})
        elif name == "statistics":
            arguments[name] = [_STATISTICS[method.statistics](tensor, place) for place, tensor in enumerate(tensors)]
        else:
            pytest.fail(f"`{name}` has no default, and the engine hands in {', '.join(sorted(_HANDED_IN))} only")
    return arguments


def mix(method: Method, tensors: Sequence[Tensor], weights: Sequence[float], **parameters: Any) -> Tensor:
    """Call a method as the engine does: what it asks for beside tensors and weights is drawn or measured.

    Args:
        method: ``METHODS["name"]``.
        tensors, weights: Of the ingredients.
        parameters: Of the method; what the engine would hand in may be among them.
    """
    return method.function(tensors, weights, **parameters, **_handed_in(method, tensors, weights, parameters))


def _grows_with_weights(method: Method, parameters: Mapping[str, Any]) -> bool:
    normalize = {**method.parameters, **parameters}.get("normalize")
    return method.sums if normalize is None else not normalize


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, so that -0 is not 0."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    left, right = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)


def rounded(mixed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mix as the engine writes it."""
    out = torch.empty_like(mixed, dtype=dtype)
    round_into(mixed, out)
    return out


def _assert_same_bits(actual: Tensor, expected: Tensor, message: str) -> None:
    """Else fail with the first element that differs, as whole tensors say little."""
    __tracebackhide__ = True
    if same_bits(actual, expected):
        return
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        pytest.fail(
            f"{message}: {actual.dtype} of shape {tuple(actual.shape)} in the place of "
            f"{expected.dtype} of shape {tuple(expected.shape)}"
        )
    ours, theirs = actual.detach().reshape(-1), expected.detach().reshape(-1)
    places = ((ours != theirs) | (ours.signbit() != theirs.signbit())).nonzero()[:, 0].tolist()
    pytest.fail(
        f"{message}: {len(places):,} of {len(ours):,} elements differ. Element {places[0]} is {ours[places[0]].item()} "
        f"in the place of {theirs[places[0]].item()}."
    )


def _assert_near(method: Method, actual: Tensor, expected: Tensor, share: float, message: str) -> None:
    """Within a share of the largest number, or as far as the method says that machines may be apart."""
    __tracebackhide__ = True
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0,
        atol=max(share, method.bound or 0.0) * largest,
        msg=lambda details: f"{message}\n{details}",
    )


@st.composite
def _orders(draw: Callable[[st.SearchStrategy[Any]], Any], method: Method) -> tuple[Any, ...]:
    """Tensors, weights and parameters that may be asked for."""
    dtype = draw(st.sampled_from(list(_dtypes(method).values())))
    large = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 64
    n = _count(method, draw(st.integers(1, 4)))
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 3), (3, 2), (4, 1), (2, 2, 2)]))
    values = draw(st.sampled_from([st.floats(-large, large), st.floats(-1, 1), st.integers(-2, 2)]))
    size = math.prod(shape)
    tensors = [
        torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).reshape(shape) for _ in range(n)
    ]
    if draw(st.booleans()):
        tensors = [tensors[0]] * n
    parameters = draw(parameters_of(method))
    lowest = -3 if _grows_with_weights(method, parameters) else 0
    weights = draw(st.lists(st.floats(lowest, 3), min_size=n, max_size=n))
    if not any(weights):
        weights = [1.0] * n
    return tensors, weights, parameters


def _assert_within_bound(method: Method, actual: Tensor, expected: Tensor, message: str) -> None:
    """The same bits, where the method states no bound."""
    if method.bound:
        _assert_near(method, actual, expected, 0.0, message)
    else:
        _assert_same_bits(actual, expected, message)


class MethodTests:
    """The contract of a method. A subclass names one, or several, and has all of these tests::

        class TestMedian(MethodTests):
            method = "median"

    Where a test does not concern a method it is skipped and says why.
    """

    #: The name of the method, or the names of several.
    method: str | Sequence[str] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for every method, choice of parameters and dtype that it takes."""
        parametrize(metafunc, "method", named_entries("method", self.method), choose=choices, dtype=_dtypes)

    def test_recipes_find_it(self, method: Method) -> None:
        """It is built in, or an installed package offers it."""
        check_that_recipes_find_it("method", method)

    def test_it_is_registered_truthfully(self, method: Method) -> None:
        """What the decorator and the signature say fits together."""
        assert 1 <= method.least <= (method.most or math.inf)
        assert set(method.given) <= _HANDED_IN, "parameters without a default, that nothing hands in"
        assert ("measured" in method.given) == (method.measure is not None)
        assert ("statistics" in method.given) == (method.statistics in _STATISTICS) == ("examples" in method.parameters)
        assert "cutoffs" not in method.given or "density" in method.parameters
        assert method.neutral is None or method.neutral.keys() <= method.parameters.keys()
        assert method.bound is None or 0 <= method.bound < 1
        check_signature(method, "deltas" if method.needs_base else "tensors", "weights")

    def test_every_parameter_says_what_it_may_be(self, method: Method) -> None:
        """Numbers by an interval, words by a list; and what is declared is among it."""
        check_parameters(method)
        for total in (0.5, 1.0, 3.0):
            for name, value in method.neutral_for(total).items():
                assert isinstance(value, bool) or value in method.allowed[name], (
                    f"`{name}` where the weights sum to {total}"
                )

    def test_equal_ingredients_give_themselves_back(self, method: Method, dtype: torch.dtype) -> None:
        """The soup of n copies of a model is that model at the parameters declared neutral.

        Bit for bit where it only goes entry by entry and states no bound, but for the zero's sign in a task vector,
        which adding it loses, and for sums, as 1/n is no binary number.
        """
        if method.neutral is None:
            pytest.skip("there are no neutral parameters")
        one = _random(5, 13, dtype=dtype)
        if method.needs_base:
            one += 0.0
        counts = sorted({_count(method, n) for n in (1, 2, 3, 7, 16)})
        for n, weight in itertools.product(counts, (1.0, 0.3)[: 1 if method.sums else 2]):
            weights = [weight] * n
            mixed = mix(method, [one.clone() for _ in range(n)], weights, **method.neutral_for(math.fsum(weights)))
            exact = dtype != torch.float32 or not method.needs_base  # in float32 a sum of float32s is rounded
            if method.elementwise and exact and not (method.sums or method.measure or method.bound):
                result = rounded(mixed, dtype) + (0.0 if method.needs_base else -0.0)
                _assert_same_bits(result, one, f"the mix of {n} equal tensors is not that tensor")
            else:
                expected = one.to(mixed.dtype)
                near = (method.bound or 0.0) * float(expected.abs().max())
                torch.testing.assert_close(mixed, expected, rtol=16 * torch.finfo(mixed.dtype).eps, atol=near)

    def test_the_order_of_ingredients_does_not_matter(self, method: Method, choose: Choose, dtype: torch.dtype) -> None:
        """Up to rounding; and not even that where the sum is exact. Where it does, `ordered=True` says so."""
        n = _count(method, 4)
        if method.ordered or n == 1:
            pytest.skip("the order is declared to count, or there is one ingredient")
        weights = _WEIGHTS[:n]

        def both(tensors: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
            parameters = choose(math.fsum(weights))
            there = _handed_in(method, tensors, weights, parameters)
            back = {name: values[::-1] for name, values in there.items() if name != "measured"}
            if method.measure:
                back["measured"] = _handed_in(method, tensors[::-1], weights[::-1], parameters)["measured"]
            return (
                method.function(tensors, weights, **parameters, **there),
                method.function(tensors[::-1], weights[::-1], **parameters, **back),
            )

        for shape in ((40,), (5, 8)):
            there, back = both([_random(*shape, dtype=dtype, seed=seed, special=False) for seed in range(n)], weights)
            _assert_near(method, back, there, 1e-6, "in the other order the ingredients give something else")
        decides = method.statistics or method.measure
        neutral = choose == method.neutral_for or method.neutral == {}  # where no parameter is needed, the default is
        if method.elementwise and neutral and not decides and not method.bound:
            # Small whole numbers, so that many sums are zero, of either sign.
            whole = [(20 * _random(400, dtype=dtype, seed=seed, special=False)).round() for seed in range(n)]
            there, back = both(whole, [1.0] * n)
            _assert_same_bits(back, there, "sums that are exact, or zeros of both signs, depend on the order")

    def test_only_the_proportion_of_weights_counts(self, method: Method, choose: Choose, dtype: torch.dtype) -> None:
        """Unless the method is a plain sum, which is as many times larger: `sums=True`, or `normalize=False`."""
        n = _count(method, 3)
        weights = _WEIGHTS[:n]
        parameters = choose(math.fsum(weights))
        for shape in ((40,), (5, 8)):
            tensors = [_random(*shape, dtype=dtype, seed=seed, special=False) for seed in range(n)]
            mixed = mix(method, tensors, weights, **parameters)

            def scaled(scale: float, tensors: list[Tensor] = tensors) -> Tensor:
                return mix(method, tensors, [scale * weight for weight in weights], **parameters)

            if _grows_with_weights(method, parameters):
                grown = "it is declared as a sum, and 4 times the weights do not make it 4 times as large"
                _assert_within_bound(method, scaled(4.0), mixed * 4.0, grown)
            else:
                for scale in (2.0**-900, 0.5, 4.0, 2.0**900):
                    _assert_same_bits(scaled(scale), mixed, f"all weights times {scale:g} give something else")
                _assert_near(method, scaled(1 / 3), mixed, 1e-6, "all weights divided by 3 give something else")

    def test_the_shape_stays_and_the_result_is_wide(self, method: Method, choose: Choose, dtype: torch.dtype) -> None:
        """Numbers stay finite too, whatever tensors there are: of zeros, equal ones, ones of weight zero."""
        n = _count(method, 3)
        weights = [1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 1.0][:n]
        for shape in _SHAPES:
            tensors = [_random(*shape, dtype=dtype, seed=seed) for seed in range(n)]
            zeros = [torch.zeros(shape, dtype=dtype) for _ in range(n)]
            for shares in (weights, [1.0] * n, [0.0, *weights[1:]] if n > 1 else weights):
                for ingredients in (tensors, [tensors[0]] * n, [zeros[0], *tensors[1:]], zeros):
                    mixed = mix(method, ingredients, shares, **choose(math.fsum(shares)))
                    assert mixed.shape == shape
                    assert mixed.dtype == _result_dtype(method, tensors), "the result is in the accumulator's dtype"
                    assert mixed.isfinite().all(), f"the result of shape {shape} is not finite"
                    if ingredients is zeros:
                        assert not mixed.any(), f"nothing was learned, so nothing is to be added to shape {shape}"

    def test_a_mix_of_types_is_added_up_in_the_widest(self, method: Method) -> None:
        """Float32 where all have 16 bits, else float64."""
        if method.needs_base or _count(method, 2) == 1:
            pytest.skip("task vectors are all of one type")
        n = _count(method, 2)
        tensors = [_random(9, dtype=torch.bfloat16), *(_random(9, dtype=torch.float32) for _ in range(n - 1))]
        assert mix(method, tensors, [1.0] * n).dtype == torch.float64

    def test_slices_give_what_the_whole_gives(self, method: Method, choose: Choose, dtype: torch.dtype) -> None:
        """The engine hands in slices that end anywhere; vector instructions must not show at their borders."""
        if not method.elementwise:
            pytest.skip("it gets whole tensors")
        n = _count(method, 3)
        tensors = [_random(sum(_SLICES[0]), dtype=dtype, seed=seed) for seed in range(n)]
        for weights in ([1.0] * n, [0.1, 3.0, 0.7, 1.0, 1.5, 0.2, 2.0][:n]):
            parameters = choose(math.fsum(weights))
            handed_in = _handed_in(method, tensors, weights, parameters)
            whole = method.function(tensors, weights, **parameters, **handed_in)

            def cut(start: int, stop: int, values: Any) -> Any:
                if not isinstance(values, list):
                    return values  # measured, and the same for all slices
                return [value[start:stop] if isinstance(value, Tensor) and value.ndim else value for value in values]

            for sizes in _SLICES:
                ends = list(itertools.accumulate(sizes))
                slices = [
                    method.function(
                        cut(start, stop, tensors),
                        weights,
                        **parameters,
                        **{name: cut(start, stop, values) for name, values in handed_in.items()},
                    )
                    for start, stop in itertools.pairwise([0, *ends])
                ]
                _assert_within_bound(method, torch.cat(slices), whole, "slices give something else")

    def test_what_is_handed_in_is_not_changed(self, method: Method, choose: Choose, dtype: torch.dtype) -> None:
        """Neither by the method, nor by whoever changes its result."""
        for n, shape in itertools.product({_count(method, n) for n in (1, 3)}, ((40,), (5, 8))):
            weights = [0.5, 0.25, 2.0, 1.0, 1.5, 0.2, 2.0][:n]
            kept, parameters = list(weights), choose(math.fsum(weights))
            tensors = [_random(*shape, dtype=dtype, seed=seed) for seed in range(n)]
            handed_in, copies = (_handed_in(method, tensors, weights, parameters) for _ in range(2))
            before = [tensor.clone() for tensor in tensors]
            mixed = method.function(tensors, weights, **parameters, **handed_in)
            mixed.zero_()
            for place, (tensor, copy) in enumerate(zip(tensors, before, strict=True)):
                _assert_same_bits(tensor, copy, f"the tensor of ingredient {place} was changed")
            assert weights == kept
            for name, values in handed_in.items():
                assert str(values) == str(copies[name]), f"`{name}` was changed"

    def test_gradients_flow_to_every_ingredient(self, method: Method, choose: Choose) -> None:
        """So that weights can be learned through it. What counts, ranks and votes decide is constant nearby."""
        n = _count(method, 3)
        weights = _WEIGHTS[:n]
        for shape in ((6,), (3, 4)):
            tensors = [
                _random(*shape, dtype=torch.float64, seed=seed, special=False).mul_(20).requires_grad_()
                for seed in range(n)
            ]
            parameters = choose(math.fsum(weights))
            assert torch.autograd.gradcheck(
                lambda *inputs, parameters=parameters: mix(method, inputs, weights, **parameters), tensors
            )

    def test_numbers_of_ingredients_and_weights_must_agree(self, method: Method) -> None:
        """Else there is a ValueError, and no mix of some of them."""
        tensors = [_random(3, 4)] * _count(method, 3)
        with pytest.raises(ValueError, match=r"\w"):
            mix(method, tensors, [1.0] * (len(tensors) - 1))

    def test_what_is_finite_stays_finite_and_the_same(self, method: Method) -> None:
        """At any parameters that may be given; those that are no good together, or tensors, are refused with values."""

        @settings(deadline=None, derandomize=True, max_examples=40)
        @given(_orders(method))
        def any_order(order: tuple[Any, ...]) -> None:
            tensors, weights, parameters = order
            try:
                mixed = mix(method, tensors, weights, **parameters)
            except ValueError as error:
                assert re.search(r"\d", str(error)), f"an error shows the values: {error}"  # noqa: PT017
                return
            assert mixed.isfinite().all()
            assert (mixed.shape, mixed.dtype) == (tensors[0].shape, _result_dtype(method, tensors))
            _assert_same_bits(
                mix(method, tensors, weights, **parameters), mixed, "the second time it gives something else"
            )

        any_order()

    def test_any_number_of_threads_gives_the_same(self, method: Method, choose: Choose) -> None:
        """Tensors large enough that torch shares them out, and with them whatever it adds up."""
        n = _count(method, 3)
        tensors = [_random(250, 300, seed=seed, special=False) for seed in range(n)]
        weights = _WEIGHTS[:n]
        before = torch.get_num_threads()
        mixes = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                mixes.append(mix(method, tensors, weights, **choose(math.fsum(weights))))
        finally:
            torch.set_num_threads(before)
        for mixed in mixes[1:]:
            _assert_within_bound(method, mixed, mixes[0], "more threads give something else")

    def test_it_is_documented_with_an_example_that_runs(self, method: Method) -> None:
        """The pages and help of `hf-soup methods` are made from the docstring."""
        parts = (".. math::", "When:", "When not:", "Args:", "Returns:", "Reference:")
        check_documentation(method, parts, examples=2)
