"""Ensembles, diversity, calibration and the predicted gap, on models of real digits and against scikit-learn."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

# pytest's importlib mode leaves them off the path.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import numpy as np
import pytest
import sklearn.metrics
import torch
from ensemble_gap import predicted_gap
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from hf_soup.evaluation.ensembles import calibration, diversity, ensemble, greedy_ensemble, logit_ensemble
from hf_soup.recipe import CalibrationErrors, Diversity

Doubles = NDArray[np.float64]
PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS, SEEN, UNSEEN = PIXELS / 16, slice(0, 300), slice(300, 1797)
ANSWERS = LABELS[UNSEEN].astype(np.int64)


@pytest.fixture(scope="module")
def linear() -> dict[str, LogisticRegression]:
    """Linear models with more and less weight decay, each of other rows; the last of hardly any."""
    rows = {"a": slice(0, 200), "b": slice(100, 300), "c": slice(50, 250), "poor": slice(0, 12)}
    return {
        name: LogisticRegression(C=10.0 ** (1 - number), max_iter=2000).fit(PIXELS[some], LABELS[some])
        for number, (name, some) in enumerate(rows.items())
    }


@pytest.fixture(scope="module")
def logits(linear: dict[str, LogisticRegression]) -> dict[str, NDArray[np.float32]]:
    return {name: model.decision_function(PIXELS[UNSEEN]).astype(np.float32) for name, model in linear.items()}


def share_right(logits: NDArray[np.float32]) -> float:
    return float((logits.argmax(1) == ANSWERS).mean())


def test_the_logit_ensemble_of_linear_models_is_their_soup(
    linear: dict[str, LogisticRegression], logits: dict[str, NDArray[np.float32]]
) -> None:
    soup = PIXELS[UNSEEN] @ np.mean([m.coef_ for m in linear.values()], axis=0).T
    soup += np.mean([m.intercept_ for m in linear.values()], axis=0)
    found = logit_ensemble(list(logits.values()))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, soup, rtol=1e-5, atol=1e-5)
    assert share_right(ensemble(list(logits.values()))) != share_right(found)


def of_first(logits: Sequence[NDArray[np.float32]]) -> float:
    return share_right(logits[0])


def alone(logits: dict[str, NDArray[np.float32]]) -> dict[str, list[NDArray[np.float32]]]:
    """With one validation data set."""
    return {name: [each] for name, each in logits.items()}


def test_a_greedy_ensemble_keeps_what_does_not_hurt(logits: dict[str, NDArray[np.float32]]) -> None:
    """Worked again step by step; the order is that of the single scores."""
    validation = {"poor": logits["poor"], **logits, "twin": logits["a"]}
    found = greedy_ensemble(alone(validation), of_first)
    order = sorted(validation, key=lambda name: -share_right(validation[name]))
    kept, best = [order[0]], share_right(validation[order[0]])
    for name in order[1:]:
        score = share_right(np.mean([validation[each] for each in [*kept, name]], axis=0, dtype=np.float64))
        if score >= best:
            kept, best = [*kept, name], score
    assert found == tuple(kept)
    assert len(found) < len(validation)
    assert greedy_ensemble(alone({"a": logits["a"], "twin": logits["a"]}), of_first) == ("a", "twin")


def test_diversity_is_counted_pair_by_pair(logits: dict[str, NDArray[np.float32]]) -> None:
    found = diversity(logits, ANSWERS)
    answers = {name: each.argmax(1) for name, each in logits.items()}
    sums = {"disagreement": 0.0, "double_fault": 0.0, "shared_errors": 0.0}
    for one, other in combinations(logits, 2):
        i, j = found.models.index(one), found.models.index(other)
        counted = list(zip(answers[one], answers[other], ANSWERS, strict=True))
        both = sum(y not in (a, b) for a, b, y in counted)
        expected = {
            "disagreement": sum(a != b for a, b, _ in counted) / len(counted),
            "double_fault": both / len(counted),
            "shared_errors": both / sum(a != y or b != y for a, b, y in counted),
        }
        for name, value in expected.items():
            matrix = getattr(found, name)
            assert matrix[i][j] == matrix[j][i] == pytest.approx(value, abs=5e-5)
            sums[name] += value / 6
    assert found.mean.model_dump() == pytest.approx(sums)
    assert [found.double_fault[i][i] for i in range(4)] == pytest.approx(
        [1 - share_right(x) for x in logits.values()], abs=5e-5
    )
    assert Diversity.model_validate_json(found.model_dump_json()) == found


def test_diversity_of_models_that_do_not_err_has_no_shared_errors() -> None:
    right = np.eye(10, dtype=np.float32)[ANSWERS]
    found = diversity({"one": right, "other": right}, ANSWERS)
    assert found.shared_errors == ((None, None), (None, None))
    assert found.mean.model_dump() == {"disagreement": 0.0, "double_fault": 0.0, "shared_errors": None}
    assert diversity({"one": right}, ANSWERS).mean.disagreement is None


def test_calibration_is_scikit_learns(logits: dict[str, NDArray[np.float32]]) -> None:
    for each in logits.values():
        found, shares = calibration(each, ANSWERS), softmax(each.astype(np.float64), axis=1)
        assert found.nll == pytest.approx(sklearn.metrics.log_loss(ANSWERS, shares))
        assert found.brier == pytest.approx(np.mean(np.sum((shares - np.eye(10)[ANSWERS]) ** 2, axis=1)))
        confidence, right, error = shares.max(1), shares.argmax(1) == ANSWERS, 0.0
        for number in range(15):
            mine = (confidence > number / 15) & (confidence <= (number + 1) / 15)
            if mine.any():
                error += mine.mean() * abs(right[mine].mean() - confidence[mine].mean())
        assert found.ece == pytest.approx(error)


def test_a_calibrated_model_has_no_calibration_error() -> None:
    """Of rows answered with confidence 12/15, a border of two bins, just that share is right."""
    shares = np.tile(np.log([12 / 15, 3 / 15]), (15, 1))
    assert calibration(shares, np.array([0] * 12 + [1] * 3)).ece == pytest.approx(0.0, abs=1e-12)
    surely_wrong = calibration(np.array([[1000.0, 0.0]]), np.array([1]))
    assert surely_wrong == CalibrationErrors(ece=1.0, nll=1000.0, brier=2.0)


def test_linear_models_have_no_gap(
    linear: dict[str, LogisticRegression], logits: dict[str, NDArray[np.float32]]
) -> None:
    """Soup and ensemble are one: the curvature is the variance times the square of the scale."""
    ends = [linear[name].decision_function(PIXELS[UNSEEN]) for name in ("a", "c")]
    for alpha in (0.2, 0.5):
        path = [(1 - at) * ends[0] + at * ends[1] for at in (alpha - 0.01, alpha, alpha + 0.01)]
        gap = predicted_gap(path, ends, ANSWERS, step=0.01, alpha=alpha)
        assert gap.measured == pytest.approx(0.0, abs=1e-12)
        assert gap.curvature == pytest.approx(gap.scale**2 * gap.variance, rel=1e-3)
        assert gap.curvature > 1e-3
        assert abs(gap.predicted) < 1e-3 * gap.curvature


def test_a_path_of_known_bend_has_the_gap_that_is_worked_by_hand(linear: dict[str, LogisticRegression]) -> None:
    """Logits bent by c·α(1-α)·q: in the middle the gap is, to first order in c, that times the loss's gradient."""
    ends = [linear[name].decision_function(PIXELS[UNSEEN]) for name in ("a", "c")]
    bend = 1e-3 * linear["b"].decision_function(PIXELS[UNSEEN])

    def at(alpha: float) -> Doubles:
        return (1 - alpha) * ends[0] + alpha * ends[1] + alpha * (1 - alpha) * bend

    gap = predicted_gap([at(0.499), at(0.5), at(0.501)], ends, ANSWERS, step=0.001)
    slope = softmax(gap.scale * at(0.5), axis=1) - np.eye(10)[ANSWERS]
    expected = 0.25 * gap.scale * float((slope * bend).sum(1).mean())
    assert abs(expected) > 1e-6
    assert gap.measured == pytest.approx(expected, rel=0.01)
    assert gap.predicted == pytest.approx(expected, rel=0.02)


@pytest.fixture(scope="module")
def network() -> Callable[[int], dict[str, torch.Tensor]]:
    """Fine-tunes of one network of two layers: number → weights."""
    pixels, labels = torch.tensor(PIXELS[SEEN], dtype=torch.float64), torch.tensor(LABELS[SEEN])

    def train(model: torch.nn.Module, seed: int, steps: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            rows = torch.randint(len(labels), (16,), generator=generator)
            functional.cross_entropy(model(pixels[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    start = train(two_layers(), 0, 300)

    def fine_tune(number: int) -> dict[str, torch.Tensor]:
        model = two_layers()
        model.load_state_dict(start)
        return train(model, number, 200)

    return fine_tune


def two_layers() -> torch.nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)
        return torch.nn.Sequential(*layers).double()


def test_the_gap_of_real_fine_tunes_is_predicted(network: Callable[[int], dict[str, torch.Tensor]]) -> None:
    first, last = network(1), network(2)

    def answers(alpha: float) -> Any:
        model = two_layers()
        model.load_state_dict({name: (1 - alpha) * value + alpha * last[name] for name, value in first.items()})
        with torch.no_grad():
            return model(torch.tensor(PIXELS[UNSEEN], dtype=torch.float64)).numpy()

    path = [answers(at) for at in (0.4, 0.5, 0.6)]
    gap = predicted_gap(path, [answers(0), answers(1)], ANSWERS, step=0.1)
    assert abs(gap.measured) > 1e-6
    assert gap.predicted == pytest.approx(gap.measured, rel=0.1)
    best = min(np.linspace(0.5, 3, 251), key=lambda scale: calibration(scale * path[1], ANSWERS).nll)
    assert math.isclose(gap.scale, best, abs_tol=0.01)
