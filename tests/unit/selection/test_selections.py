"""Selections against numbers worked out by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from hf_soup.errors import RecipeError
from hf_soup.selection import SELECTIONS, ScoreFunction, Selected, Selection, Step, Weights
from hf_soup.selection.best import best, top_k
from hf_soup.selection.greedy import greedy
from hf_soup.selection.pruned import pruned
from hf_soup.selection.uniform import uniform


def table(scores: dict[str, float]) -> tuple[ScoreFunction, list[str]]:
    """A score function that looks soups up by their sorted names, and the list of what it was asked."""
    asked: list[str] = []

    def score(weights: Weights) -> float:
        asked.append("".join(weights))
        return scores["".join(sorted(weights))]

    return score, asked


#: b is best alone; with c it gains, with a it is equal, with d it loses.
BY_HAND = {"a": 0.7, "b": 0.9, "c": 0.8, "d": 0.6, "bc": 0.92, "abc": 0.92, "abcd": 0.5, "bcd": 0.5}


@pytest.mark.parametrize(
    ("accept", "kept", "tried"),
    [
        (">=", {"b": 1.0, "c": 2.0, "a": 0.5}, [("b", 0.9, True), ("bc", 0.92, True), ("bca", 0.92, True),
                                               ("bcad", 0.5, False)]),
        (">", {"b": 1.0, "c": 2.0}, [("b", 0.9, True), ("bc", 0.92, True), ("bca", 0.92, False),
                                     ("bcd", 0.5, False)]),
    ],
)  # fmt: skip
def test_greedy_by_hand(accept: str, kept: dict[str, float], tried: list[tuple[str, float, bool]]) -> None:
    """Best first; each next one stays when the soup is no worse (``>=``), or better (``>``); shares are kept."""
    score, asked = table(BY_HAND)
    found = greedy({"a": 0.5, "b": 1.0, "c": 2.0, "d": 1.0}, score, accept=accept)
    assert found.weights == kept
    assert list(found.weights) == list(kept)
    assert found.trace == tuple(Step(tuple(names), value, was) for names, value, was in tried)
    assert asked == ["a", "b", "c", "d", *(names for names, _, _ in tried[1:])]


def test_greedy_takes_equal_ones_in_the_order_of_the_recipe() -> None:
    for order in ("abc", "cba", "bca"):
        score, _ = table({"a": 0.8, "b": 0.8, "c": 0.8, "ab": 0.8, "ac": 0.8, "bc": 0.8, "abc": 0.8})
        found = greedy(dict.fromkeys(order, 1.0), score)
        assert "".join(found.weights) == order


def test_greedy_goes_on_after_one_that_hurts() -> None:
    """Measured against the best soup so far, not against the last one."""
    score, _ = table({"a": 0.9, "b": 0.8, "c": 0.7, "ab": 0.5, "ac": 0.95})
    found = greedy({"a": 1.0, "b": 1.0, "c": 1.0}, score)
    assert "".join(found.weights) == "ac"


def test_greedy_is_never_below_the_best_ingredient_on_validation() -> None:
    score, _ = table({"a": 0.9, "b": 0.8, "ab": 0.1})
    assert greedy({"a": 1.0, "b": 1.0}, score).weights == {"a": 1.0}
    score, _ = table({"a": 0.9})
    assert greedy({"a": 1.0}, score).weights == {"a": 1.0}


def test_uniform_asks_nothing() -> None:
    def score(_: Weights) -> float:
        raise AssertionError

    assert uniform({"a": 1.0, "b": 3.0}, score).weights == {"a": 1.0, "b": 3.0}


def test_the_best_and_the_best_few_by_hand() -> None:
    score, asked = table(BY_HAND)
    found = best({"a": 0.5, "b": 2.0, "c": 1.0, "d": 1.0}, score)
    assert found.weights == {"b": 2.0}
    assert [(step.ingredients, step.kept) for step in found.trace] == [
        (("b",), True), (("c",), False), (("a",), False), (("d",), False),
    ]  # fmt: skip
    assert asked == ["a", "b", "c", "d"]
    found = top_k(dict.fromkeys("abcd", 1.0), score, k=2)
    assert list(found.weights) == ["b", "c"]
    assert found.trace[-1] == Step(("b", "c"), 0.92, kept=True)
    with pytest.raises(RecipeError, match="`k` is 5, and there are 4 ingredients"):
        SELECTIONS["top_k"].check(dict.fromkeys("abcd", 1.0), k=5)
    assert 0 not in SELECTIONS["top_k"].allowed["k"]


def test_pruned_by_hand() -> None:
    """Worst first, again until a round drops none; on a tie an ingredient stays."""
    scores = {"a": 0.7, "b": 0.9, "c": 0.8, "d": 0.6, "abcd": 0.5, "abc": 0.8, "bc": 0.8, "ac": 0.7, "ab": 0.85}
    score, asked = table({**scores, "bcd": 0.1, "b": 0.9})
    found = pruned({"a": 0.5, "b": 1.0, "c": 2.0, "d": 1.0}, score)
    # Without d it gains, without a it does not, without c it does; without a it gains in the second round.
    assert found.weights == {"b": 1.0}
    assert asked == ["abcd", "a", "b", "c", "d", "abc", "bc", "ab", "a", "b"]
    assert [step.kept for step in found.trace] == [True, True, False, True, False, True]


def test_pruned_keeps_one() -> None:
    score, _ = table({"a": 0.7, "b": 0.9, "ab": 0.1})
    assert pruned({"a": 1.0, "b": 1.0}, score).weights == {"b": 1.0}
    assert pruned({"a": 1.0}, score).weights == {"a": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": 1.0}, "it gives dict and not Selected"),
        (Selected({}), "the weights are [], and a mean needs some above zero"),
        (Selected({"c": 1.0}), "'c' is none of them"),
        (Selected({"a": -1.0, "b": 3.0}), "the weights are [-1.0, 3.0], and a mean needs some above zero and none"),
        (Selected({"a": math.nan}), "the weights are [nan]."),
        (Selected({"a": 1.0, "b": 1.0}, tensor_weights={"t": (1.0,)}), "the weights of the tensor 't' are not 2"),
    ],
)
def test_what_is_no_soup_of_the_ingredients_is_refused(given: Any, said: str) -> None:
    one = Selection("one", lambda weights, score: given, needs_score=False)
    with pytest.raises(RecipeError, match=re.escape(f"The selection 'one' gives no soup of these ingredients: {said}")):
        one.select({"a": 1.0, "b": 1.0}, None, {}, 0)


def test_whoever_asks_for_the_seed_gets_it() -> None:
    def drawn(weights: Weights, score: ScoreFunction, *, n: int = 1, seed: int) -> Selected:
        return Selected({list(weights)[seed % len(weights)]: float(n)})

    one = Selection("drawn", drawn, needs_score=False)
    assert one.select({"a": 1.0, "b": 1.0}, None, {"n": 3}, 7).weights == {"b": 3.0}


def test_who_picks_before_anything_is_opened_cannot_ask_for_scores() -> None:
    with pytest.raises(TypeError, match="`picks` is asked before anything can be scored"):
        Selection("early", uniform, needs_score=True, picks=lambda count: (range(count), {}))


def test_every_selection_is_registered_under_its_name() -> None:
    """These names and parameters stand in people's recipes; there may be more."""
    settled = {
        "best": (True, {}),
        "top_k": (True, {"k": 3}),
        "pruned": (True, {}),
        "greedy": (True, {"accept": ">="}),
        "learned": (
            True,
            {
                "by": "ingredient",
                "constrain": "softmax",
                "epochs": 0,
                "lr": 0.0,
                "batch_size": 256,
                "patience": 10,
            },
        ),
        "entropy": (
            False,
            {"examples": 1024, "by": "tensor", "init": 0.3, "lr": 1e-3, "steps": 500, "batch_size": 16},
        ),
        "run_average": (False, {"last": 0, "stride": 1, "schedule": "uniform", "decay": 0.9}),
        "uniform": (False, {}),
    }
    assert {name: (SELECTIONS[name].needs_score, SELECTIONS[name].parameters) for name in settled} == settled
    for each in SELECTIONS.values():
        assert "Reference:" in (each.function.__doc__ or "")


def test_a_checkpoint_without_weight_is_not_in_the_average_of_a_run() -> None:
    """A weight of zero would keep its file from being left out."""
    run = {"step-1": 1.0, "step-2": 0.0, "step-3": 1.0}
    assert SELECTIONS["run_average"].function(run, None).weights == {"step-1": 1.0, "step-3": 1.0}
    with pytest.raises(RecipeError, match="the weights of the 1 checkpoints that go in are all zero"):
        SELECTIONS["run_average"].function({"step-1": 1.0, "step-2": 0.0}, None, last=1)
