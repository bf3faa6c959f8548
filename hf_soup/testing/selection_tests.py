"""What every selection keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from hf_soup.errors import RecipeError
from hf_soup.methods import METHODS
from hf_soup.selection import Selected, Selection, Weights
from hf_soup.testing.registered import (
    check_documentation,
    check_parameters,
    check_signature,
    check_that_recipes_find_it,
    choices,
    named_entries,
    parameters_of,
    parametrize,
)

_WEIGHTS = {"a": 0.5, "b": 1.0, "c": 2.0, "d": 1.0}
_TENSORS = ("body.weight", "head.weight")
_ROWS = 40


class _Scores:
    """Validation scores of soups: the sum of what their ingredients are worth, times how well they go together.

    Args:
        weights: The ingredients that there are.
        seed: Of what each is worth.
    """

    def __init__(self, weights: Weights, seed: int = 0) -> None:
        self.known = set(weights)
        random = np.random.default_rng(seed)
        # A few values only, so that some are equal.
        self.worth = {name: random.integers(1, 5) / 10 for name in weights}
        self.harmony = 1 + random.integers(-2, 3, size=len(weights) + 1) / 4
        #: What was asked, by the names in it, and the answers.
        self.answers: dict[frozenset[str], float] = {}

    def __call__(self, weights: Weights) -> float:
        assert weights, "it asked for the score of a soup of nothing"
        assert set(weights) <= self.known, "it asked for a soup of ingredients that there are not"
        assert all(0 < weight < math.inf for weight in weights.values()), f"it asked for a soup with weights {weights}"
        worth = sum(self.worth[name] for name in weights) / len(weights)
        self.answers[frozenset(weights)] = float(worth * self.harmony[len(weights)])
        return self.answers[frozenset(weights)]


def _no_score(weights: Weights) -> float:
    raise AssertionError("it asked for a score, and `needs_score=False` says that it does not")


class _Loss:
    """An `Objective` whose loss is the distance from a soup that is known."""

    tensors = _TENSORS

    def __init__(self, weights: Weights) -> None:
        self.names = tuple(weights)
        self.strata: NDArray[np.int64] = np.arange(_ROWS, dtype=np.int64) % 4
        self._best = np.arange(1.0, len(weights) + 1) / (len(weights) * (len(weights) + 1) / 2)

    def loss(self, shares: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, float]:
        return self.gradient(shares, 1.0, rows)[0], 1.0

    def alone(self, rows: NDArray[np.int64]) -> list[float]:
        return [self.loss(share[np.newaxis], rows)[0] for share in np.eye(len(self.names))]

    def gradient(
        self, shares: NDArray[np.float64], scale: float, rows: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], float]:
        assert len(rows), "it asked for the loss of no rows"
        off = (shares - self._best) / len(shares)
        return float((off * (shares - self._best)).sum() + math.log(scale) ** 2), 2 * off, 2 * math.log(scale) / scale


class _Entropy:
    """An `EntropyObjective` that is least where all coefficients are a half."""

    tensors = _TENSORS
    others = ("norm.running_mean",)
    title = "drawn rows"

    def drawn(self, count: int, seed: int) -> NDArray[np.int64]:
        return np.random.default_rng(seed).permutation(_ROWS)[:count]

    def mean(self, coefficients: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
        return self.gradient(coefficients, rows)[0]

    def gradient(self, coefficients: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, NDArray[np.float64]]:
        assert len(rows), "it asked for the entropy of no rows"
        off = coefficients - 0.5
        return 0.1 + float((off**2).mean()), 2 * off / off.size

    def progress(self, steps: int) -> None:
        """Nothing is shown."""


def _source(selection: Selection, weights: Weights) -> Any:
    """What a selection gets beside the weights."""
    if selection.learns == "loss":
        return _Loss(weights)
    if selection.learns == "entropy":
        return _Entropy()
    return _Scores(weights) if selection.needs_score else _no_score


def _select(selection: Selection, weights: Weights, source: Any, parameters: Mapping[str, Any]) -> Selected:
    """As a cook does; where the parameters are refused, so are they here."""
    before = list(weights.items())
    selection.check(weights, **parameters)
    handed_in = {"seed": 7} if "seed" in selection.given else {}
    selected = selection.function(weights, source, **handed_in, **parameters)
    assert list(weights.items()) == before, "the weights that it was given were changed"
    assert isinstance(selected, Selected)
    return selected


def _check_selected(selection: Selection, selected: Selected, weights: Weights) -> None:
    """That a soup can be made of it."""
    kept = selected.weights
    assert kept, "it selected nothing"
    assert set(kept) <= set(weights), "it selected ingredients that there are not"
    assert all(map(math.isfinite, kept.values()))
    if selected.normalize:
        assert all(weight > 0 for weight in kept.values()), f"an ingredient without a positive weight: {kept}"
    for tensor, shares in selected.tensor_weights.items():
        assert tensor in _TENSORS
        assert len(shares) == len(kept), "tensor_weights has a number for each ingredient that goes in"
        assert all(map(math.isfinite, shares))
    if not selection.reweighs:
        factors = [kept[name] / weights[name] for name in kept]
        assert factors == pytest.approx([factors[0]] * len(factors)), (
            f"the weights were {dict(weights)} and became {dict(kept)}; a selection that changes their ratios is "
            "registered with `reweighs=True`"
        )


class SelectionTests:
    """The contract of a selection. A subclass names one, or several, and has all of these tests::

        class TestFirstHalf(SelectionTests):
            selection = "first_half"

    Where a test does not concern a selection it is skipped and says why.
    """

    #: The name of the selection, or the names of several.
    selection: str | Sequence[str] = ()
    #: Parameters in all tests, such as a few steps only for one that learns.
    parameters: ClassVar[Mapping[str, Any]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for every selection and choice of parameters that it takes."""
        entries = named_entries("selection", self.selection)
        parametrize(metafunc, "selection", entries, parameters=self._choices)

    def _choices(self, selection: Selection) -> dict[str, dict[str, Any]]:
        return {title: {**self.parameters, **choose(1.0)} for title, choose in choices(selection).items()}

    def test_recipes_find_it(self, selection: Selection) -> None:
        """It is built in, or an installed package offers it."""
        check_that_recipes_find_it("selection", selection)

    def test_it_is_registered_truthfully(self, selection: Selection) -> None:
        """What the decorator and the signature say fits together."""
        check_signature(selection, "weights")
        assert set(selection.given) <= {"seed"}, "parameters without a default, that nothing hands in"
        assert selection.learns in ("", "loss", "entropy")
        if selection.method:
            name, *parameters = ({"name": None} | dict(selection.method)).keys()
            method = METHODS[selection.method[name]]
            assert set(parameters) <= method.parameters.keys(), "parameters that the method does not have"

    def test_every_parameter_says_what_it_may_be(self, selection: Selection) -> None:
        """Numbers by an interval, words by a list; and the default is among it."""
        check_parameters(selection)

    def test_a_soup_can_be_made_of_what_it_selects(self, selection: Selection, parameters: dict[str, Any]) -> None:
        """Ingredients that there are, with positive weights, in the ratios that were given."""
        for weights in ({"b": 3.0, "a": 1e-3, "c": 1e3}, dict.fromkeys("abcdefg", 1.0), _WEIGHTS):
            _check_selected(selection, _select(selection, weights, _source(selection, weights), parameters), weights)

    def test_one_ingredient_is_enough(self, selection: Selection, parameters: dict[str, Any]) -> None:
        """Or it is refused with values, by the selection's `check`."""
        weights = {"only": 2.0}
        try:
            selected = _select(selection, weights, _source(selection, weights), parameters)
        except RecipeError as error:
            assert re.search(r"\d", str(error)), f"an error shows the values: {error}"  # noqa: PT017
            return
        _check_selected(selection, selected, weights)

    def test_the_same_again_gives_the_same(self, selection: Selection, parameters: dict[str, Any]) -> None:
        """With the same seed, where it takes one."""
        first, second = (_select(selection, _WEIGHTS, _source(selection, _WEIGHTS), parameters) for _ in range(2))
        assert first == second

    def test_the_trace_says_what_was_scored(self, selection: Selection, parameters: dict[str, Any]) -> None:
        """Every step with the score that it got: reports, cards and pictures show it."""
        if selection.learns or not selection.needs_score:
            pytest.skip("it scores nothing")
        scores = _Scores(_WEIGHTS)
        selected = _select(selection, _WEIGHTS, scores, parameters)
        assert selected.trace, "the trace is empty"
        for step in selected.trace:
            assert frozenset(step.ingredients) in scores.answers, f"in the trace, and was not asked for: {step}"
            assert step.score == scores.answers[frozenset(step.ingredients)]

    def test_what_it_picks_beforehand_is_what_it_selects(self, selection: Selection) -> None:
        """Of a run's many checkpoints only those that are picked are opened, and the others do not count.

        Parameters that are no good together are refused with values.
        """
        picks = selection.picks
        if picks is None:
            pytest.skip("it picks nothing beforehand")

        @settings(deadline=None, derandomize=True, max_examples=100)
        @given(st.integers(1, 12), parameters_of(selection))
        def any_order(count: int, parameters: dict[str, Any]) -> None:
            weights = {f"step-{number}": 1.0 + number for number in range(count)}
            try:
                numbers, others = picks(count, **parameters)
            except RecipeError as error:
                assert re.search(r"\d", str(error)), f"an error shows the values: {error}"  # noqa: PT017
                return
            assert list(numbers) == sorted(set(numbers))
            assert set(numbers) <= set(range(count))
            picked = {f"step-{number}": weights[f"step-{number}"] for number in numbers}
            whole = _select(selection, weights, _source(selection, weights), parameters)
            assert _select(selection, picked, _source(selection, picked), others) == whole

        any_order()

    def test_any_parameters_give_a_soup(self, selection: Selection) -> None:
        """Those that are no good together, or for so many ingredients, are refused with values."""
        if selection.learns:
            pytest.skip("it would learn for long")

        @settings(deadline=None, derandomize=True, max_examples=100)
        @given(_weights, parameters_of(selection), st.integers(0, 99))
        def any_order(weights: dict[str, float], parameters: dict[str, Any], seed: int) -> None:
            source = _Scores(weights, seed) if selection.needs_score else _no_score
            try:
                selected = _select(selection, weights, source, parameters)
            except RecipeError as error:
                assert re.search(r"\d", str(error)), f"an error shows the values: {error}"  # noqa: PT017
                return
            _check_selected(selection, selected, weights)

        any_order()

    def test_it_is_documented(self, selection: Selection) -> None:
        """The help of `hf-soup methods` is made from the docstring; an example runs where it takes no gradient."""
        parts = ("When:", "When not:", "Args:", "Reference:")
        check_documentation(selection, parts, examples=0 if selection.learns else 1)


_weights: st.SearchStrategy[dict[str, float]] = st.dictionaries(
    st.sampled_from("abcdef"), st.sampled_from([0.25, 1.0, 3.0]), min_size=1
)
