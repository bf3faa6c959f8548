"""Learned shares: on linear models of real digits, whose loss and gradient are exact."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from hf_soup.errors import RecipeError, ScoringError
from hf_soup.recipe import Named, require_named
from hf_soup.selection import SELECTIONS, Selected
from hf_soup.selection.learned import learned

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS = PIXELS / 16


@cache
def fitted() -> list[LogisticRegression]:
    return [
        LogisticRegression(C=penalty, max_iter=300).fit(PIXELS[begin:1000:3], LABELS[begin:1000:3])
        for begin, penalty in enumerate((0.05, 0.5, 5.0))
    ]


class Linear:
    """Classifiers of digits that were fitted to different halves of the labels' rows, and their `Objective`.

    Args:
        rows: How many validation rows.
        broken: The last classifier's weights are drawn.
    """

    def __init__(self, rows: int = 400, broken: bool = True) -> None:
        self.names, self.tensors, self.strata = ("a", "b", "c"), ("weight", "bias"), LABELS[1000 : 1000 + rows]
        self.pixels = torch.from_numpy(PIXELS[1000 : 1000 + rows])
        self.weight = torch.from_numpy(np.stack([each.coef_ for each in fitted()]))  # (3, 10, 64)
        self.bias = torch.from_numpy(np.stack([each.intercept_ for each in fitted()]))  # (3, 10)
        if broken:
            self.weight[2] = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 64)))
        self.seen: list[set[int]] = []
        self.judged: list[set[int]] = []

    def _loss(self, shares: torch.Tensor, scale: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        weight = torch.einsum("n,nij->ij", shares[0], self.weight)
        logits = self.pixels[rows] @ weight.T + shares[-1] @ self.bias
        return torch.nn.functional.cross_entropy(scale * logits, torch.from_numpy(self.strata[rows]))

    def loss(self, shares: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, float]:
        self.judged.append(set(rows.tolist()))
        mixed = torch.from_numpy(shares)
        found = minimize_scalar(
            lambda log: self._loss(mixed, torch.tensor(math.exp(log)), rows).item(), bounds=(-5, 5), method="bounded"
        )
        return float(found.fun), math.exp(found.x)

    def alone(self, rows: NDArray[np.int64]) -> list[float]:
        return [self.loss(share[np.newaxis], rows)[0] for share in np.eye(3)]

    def gradient(
        self, shares: NDArray[np.float64], scale: float, rows: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], float]:
        self.seen.append(set(rows.tolist()))
        free, beta = torch.from_numpy(shares).requires_grad_(), torch.tensor(scale, requires_grad=True)
        loss = self._loss(free, beta, rows)
        slope, scale_slope = torch.autograd.grad(loss, [free, beta])
        return loss.item(), slope.numpy(), scale_slope.item()


def inner_losses(found: Selected) -> list[float]:
    return [entry["inner_loss"] for entry in found.history]


EQUAL = {"a": 1.0, "b": 1.0, "c": 1.0}


@pytest.mark.parametrize("constrain", ["softmax", "none"])
@pytest.mark.parametrize("by", ["ingredient", "tensor"])
def test_it_learns_to_leave_out_what_is_broken(by: str, constrain: str) -> None:
    machine = Linear()
    found = learned(EQUAL, machine, seed=0, by=by, constrain=constrain)
    alone = len(found.weights) == 1  # where that is better still
    assert list(found.weights) == (["b"] if alone else ["a", "b", "c"])
    assert list(found.tensor_weights) == (["weight", "bias"] if by == "tensor" and not alone else [])
    shares = np.array(list(found.tensor_weights.values()) or [[found.weights.get(name, 0.0) for name in "abc"]])
    assert abs(shares[0, 2]) < 0.1 < shares[0, :2].max()
    everything = np.arange(400)
    assert machine.loss(shares, everything)[0] < 0.7 * machine.loss(np.full((1, 3), 1 / 3), everything)[0]
    assert found.normalize == (constrain == "softmax")
    if constrain == "softmax":
        assert alone or (shares > 0).all()
        np.testing.assert_allclose(shares.sum(1), 1.0)
    np.testing.assert_allclose(shares.mean(0), [found.weights.get(name, 0.0) for name in "abc"])


def test_what_is_kept_apart_is_not_learned_from_and_has_every_label() -> None:
    machine = Linear()
    learned(EQUAL, machine, seed=0, batch_size=100)
    inner = machine.judged[0]
    assert all(each == inner for each in machine.judged if len(each) == 80)
    assert set().union(*machine.seen) == set(range(400)) - inner
    assert len(inner) == 80
    counts, all_counts = (np.bincount(machine.strata[rows], minlength=10) for rows in (sorted(inner), slice(None)))
    assert (abs(counts - all_counts / 5) < 1).all()
    assert {len(batch) for batch in machine.seen} == {80}  # 320 rows in four equal batches of at most 100


def test_the_best_epoch_is_taken_and_the_start_is_one() -> None:
    """Learning far too fast ends where it began; else what is taken is what the history calls lowest."""
    good = learned(EQUAL, Linear(), seed=0)
    lowest = min(good.history, key=lambda entry: entry["inner_loss"])
    assert good.weights == lowest["weights"]
    assert lowest["epoch"] > 0
    wild = learned({"a": 2.0, "b": 1.0, "c": 1e-9}, Linear(), seed=0, constrain="none", lr=50.0, patience=3)
    assert len(wild.history) == 4
    assert min(inner_losses(wild)) == inner_losses(wild)[0]
    assert list(wild.weights.values()) == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-6)


def test_an_ingredient_that_no_soup_on_the_way_beats_is_taken_alone() -> None:
    """As where the given soup is of no use, and its gradient leads nowhere."""
    machine = Linear()
    machine.weight[2] *= 1000
    for by in ("ingredient", "tensor"):
        found = learned(EQUAL, machine, seed=0, by=by, lr=1e-6, patience=2)
        inner = np.array(sorted(machine.judged[-1]))
        single = int(np.argmin(machine.alone(np.setdiff1d(np.arange(400), inner))))
        assert machine.alone(inner)[single] < min(inner_losses(found))
        assert found.weights == {"abc"[single]: 1.0}
        assert not found.tensor_weights


def test_the_logit_scale_of_the_start_does_not_count_against_it() -> None:
    """A soup that answers right and is far too sure loses to no worse one that is less sure."""
    loud, quiet = Linear(broken=False), Linear(broken=False)
    loud.weight *= 50
    loud.bias *= 50
    losses = [inner_losses(learned(EQUAL, machine, seed=0, epochs=1))[0] for machine in (loud, quiet)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_stops_when_nothing_gets_better() -> None:
    machine = Linear(rows=60, broken=False)
    found = learned(EQUAL, machine, seed=0, by="tensor", constrain="none", lr=0.3, epochs=400, patience=7)
    losses = inner_losses(found)
    assert len(losses) < 400
    assert int(np.argmin(losses)) == len(losses) - 1 - 7
    trained = [entry["train_loss"] for entry in found.history]
    assert trained[0] is None
    assert trained[-1] < trained[1]  # it would have gone on: only what is kept apart shows that it overfits


@pytest.mark.parametrize(
    ("rows", "more", "epochs"),
    [
        (400, {}, 50),
        (400, {"by": "tensor"}, 50),
        (797, {"batch_size": 16}, 3),
        (797, {"batch_size": 16, "by": "tensor"}, 5),
    ],
)
def test_few_rows_are_gone_through_more_often(rows: int, more: dict[str, Any], epochs: int) -> None:
    """A hundred steps at least, else the paper's epochs."""
    found = learned(EQUAL, Linear(rows), seed=0, patience=1000, **more)
    assert [entry["epoch"] for entry in found.history] == list(range(epochs + 1))
    assert len(learned(EQUAL, Linear(rows), seed=0, patience=1000, epochs=2, **more).history) == 3


def test_the_same_seed_gives_the_same_shares() -> None:
    first, again, other = (learned(EQUAL, Linear(broken=False), seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.weights != other.weights


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"by": "layer"}, "'by' is 'layer', which is `by: tensor` here; it is one of ingredient, tensor."),
        ({"constrain": "sum"}, "'constrain' is 'sum'; it is one of softmax, none."),
        ({"epochs": -1}, "'epochs' is -1; it is in [0, inf)."),
        ({"lr": math.nan}, "'lr' is nan; it is a finite number"),
        ({"batch_size": 0}, "'batch_size' is 0; it is in [1, inf)."),
        ({"patience": 0}, "'patience' is 0; it is in [1, inf)."),
        ({"seed": 1}, "learned has no parameter 'seed'."),
    ],
)
def test_what_a_parameter_may_be(more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        require_named("select", Named(name="learned", **more), SELECTIONS, lists=True)
    assert said in str(raised.value)


def test_a_loss_that_is_no_number() -> None:
    machine = Linear()
    machine.weight[1, 0, 0] = math.inf
    with pytest.raises(ScoringError, match=r"loss is nan in epoch 0, with the shares a 0.333, b 0.333, c 0.333"):
        learned(EQUAL, machine, seed=0)


def test_ten_rows_are_enough() -> None:
    assert learned(EQUAL, Linear(10), seed=0).history
