"""Intervals, paired tests and metrics: numbers worked by hand, and against scipy and scikit-learn."""

import os
import subprocess
import sys
import tracemalloc
from functools import partial

import answered
import numpy as np
import pytest
import sklearn.metrics
from scipy.stats import binom, binomtest

from hf_soup.errors import ScoringError
from hf_soup.evaluation import statistics
from hf_soup.evaluation.formulas import CLASS_METRICS
from hf_soup.evaluation.statistics import Ints, comparison_of
from hf_soup.recipe import Score

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 300)
ANSWERS = np.where(RNG.random(300) < 0.7, LABELS, RNG.integers(0, 5, 300))


def test_wilson_by_hand() -> None:
    # Wilson for 1 of 2: (0.5 + z²/4) / (1 + z²/2) ± z·sqrt(1/8 + z²/16) / (1 + z²/2), z² = 3.8414588
    score = answered.score("accuracy", np.array([0, 1]), np.array([0, 0]))
    assert (score.low, score.high) == pytest.approx((0.0945312, 0.9054688), abs=1e-6)


def test_paired_interval_is_symmetric_and_covers_no_difference() -> None:
    low, high = statistics.paired_interval(3, 3, 100)
    assert low == pytest.approx(-high)
    assert high > 0
    first, second = statistics.paired_interval(20, 2, 500), statistics.paired_interval(2, 20, 500)
    assert first == pytest.approx((-second[1], -second[0]))
    assert first[0] > 0


#: Those of several classes, by the answer of each row.
SCIKIT_LEARN = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1_macro": partial(sklearn.metrics.f1_score, average="macro", zero_division=0.0),
    "precision_macro": partial(sklearn.metrics.precision_score, average="macro", zero_division=0.0),
    "recall_macro": partial(sklearn.metrics.recall_score, average="macro", zero_division=0.0),
    # balanced_accuracy_score warns when an answer is a class that no row has.
    "balanced_accuracy": lambda labels, answers: sklearn.metrics.recall_score(
        labels, answers, labels=np.unique(labels), average="macro"
    ),
    "matthews_correlation": sklearn.metrics.matthews_corrcoef,
}


@pytest.mark.parametrize("name", SCIKIT_LEARN)
@pytest.mark.parametrize("case", range(4))
def test_counts_and_scikit_learn_agree(name: str, case: int) -> None:
    """What is resampled, by kinds of rows, is the metric that is reported, also with absent and unasked classes."""
    labels, answers = [
        (LABELS, ANSWERS),
        (np.array([0, 0, 1]), np.array([2, 2, 2])),
        (np.array([0, 1, 1]), np.array([0, 1, 1])),
        (np.array([3, 3, 1]), np.array([3, 1, 1])),
    ][case]
    value = SCIKIT_LEARN[name](labels, answers)
    every = np.array([(label, answer) for label in range(6) for answer in range(6)])
    counts = np.array([np.sum((labels == label) & (answers == answer)) for label, answer in every])
    assert CLASS_METRICS[name](every[:, 0], every[:, 1], counts[None]) == pytest.approx([value], abs=1e-12)
    assert answered.value(name, labels, answers) == pytest.approx(value, abs=1e-15)


@pytest.mark.parametrize("name", SCIKIT_LEARN)
@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:The number of unique classes")
def test_many_draws_at_once_are_scikit_learns_one_by_one(name: str) -> None:
    """Up to 20 classes with gaps in their numbers, few rows, many kinds that a draw does not have."""
    for seed in range(20):
        generator = np.random.default_rng(seed)
        classes = generator.choice(np.arange(-3, 40), generator.integers(1, 21), replace=False)
        label, answer = generator.choice(classes, (2, 30))
        rows = generator.poisson(generator.choice([0.1, 0.5, 3.0]), (4, 30))
        rows[0] = np.where(label == label[0], rows[0], 0)  # one class only among the labels,
        rows[1] = np.where(answer == answer[0], rows[1], 0)  # or among the answers,
        rows[2] = np.where((label == classes[0]) & (answer == classes[0]), rows[2], 0)  # or in both
        rows = rows[rows.sum(axis=1) > 0]
        expected = [SCIKIT_LEARN[name](np.repeat(label, each), np.repeat(answer, each)) for each in rows]
        assert CLASS_METRICS[name](label, answer, rows) == pytest.approx(expected, abs=1e-12), seed


@pytest.mark.parametrize("name", ["accuracy", "f1_macro", "matthews_correlation"])
def test_resamples_are_those_drawn_and_scored_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole procedure once more, of few resamples, with scikit-learn's metric and one draw at a time."""
    monkeypatch.setattr(statistics, "RESAMPLES", 40)
    monkeypatch.setattr(statistics, "BLOCK", 20)
    quick = CLASS_METRICS[name]
    other = np.where(np.random.default_rng(3).random(300) < 0.8, ANSWERS, LABELS)

    def one(label: Ints, answer: Ints, rows: Ints) -> float:
        return SCIKIT_LEARN[name](np.repeat(label, rows), np.repeat(answer, rows))

    def generator(stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=20220310 + stream))

    (label, answer), counts = np.unique(np.stack([LABELS, ANSWERS]), axis=1, return_counts=True)
    draws = [one(label, answer, rows) for rows in generator(0).multinomial(300, counts / 300, 40)]
    expected = np.quantile(draws, [0.025, 0.975])
    assert statistics.bootstrap(LABELS, ANSWERS, quick) == pytest.approx(expected, abs=1e-12)

    draw, same = generator(3), np.unique(np.stack([LABELS, ANSWERS]), axis=1, return_inverse=True)[1]
    drawn = [np.bincount(same[draw.integers(300, size=300)], minlength=len(label)) for _ in range(40)]
    expected = [one(label, answer, rows) for rows in drawn]
    assert statistics.resampled(LABELS, ANSWERS, quick) == pytest.approx(expected, abs=1e-12)

    (label, first, second), counts = np.unique(np.stack([LABELS, ANSWERS, other]), axis=1, return_counts=True)

    def difference(rows: Ints, moved: Ints | int = 0) -> float:
        both = np.concatenate([rows - moved, np.zeros_like(rows) + moved])
        answers, exchanged = np.concatenate([first, second]), np.concatenate([second, first])
        return one(np.tile(label, 2), answers, both) - one(np.tile(label, 2), exchanged, both)

    draws = [difference(rows) for rows in generator(1).multinomial(300, counts / 300, 40)]
    coin, many, null = generator(2), counts > 1, []
    for _ in range(2):  # a bit for each kind of which there is one row
        bits = np.frombuffer(coin.bytes(20 * -(-len(counts) // 8)), np.uint8).reshape(20, -1)
        moved = np.unpackbits(bits, axis=1)[:, : len(counts)].astype(np.int64)
        moved[:, many] = coin.binomial(counts[many], 0.5, (20, many.sum()))
        null += [difference(counts, each) for each in moved]
    p = (1 + np.sum(np.abs(null) >= abs(difference(counts)) - 1e-12)) / 41
    expected = (*np.quantile(draws, [0.025, 0.975]), p)
    found = statistics.paired_bootstrap(LABELS, ANSWERS, other, quick, permutations=40)
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_thousand_classes_need_no_table_of_class_by_class() -> None:
    labels, first, second = np.random.default_rng(4).integers(0, 1000, (3, 4000))
    statistics.bootstrap(LABELS, ANSWERS, CLASS_METRICS["f1_macro"])  # what is imported at first use does not count
    tracemalloc.start()
    statistics.paired_bootstrap(labels, first, second, CLASS_METRICS["matthews_correlation"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # of one draw alone the table has 8 MB, of a block's 400 MB


def test_f1_by_hand() -> None:
    # class 0: P 1/2, R 1 → 2/3; class 1: P 1, R 1/2 → 2/3
    assert answered.value("f1_macro", np.array([0, 1, 1]), np.array([0, 0, 1])) == pytest.approx(2 / 3)


def test_accuracy_has_wilsons_interval() -> None:
    score = answered.score("accuracy", LABELS, ANSWERS)
    correct = int((LABELS == ANSWERS).sum())
    assert score == Score("accuracy", correct / 300, *binomtest(correct, 300).proportion_ci(method="wilson"), 300)
    assert score.to_dict() == {
        "metric": "accuracy",
        "value": score.value,
        "low": score.low,
        "high": score.high,
        "n": 300,
        "share": True,
        "less_is_better": False,
    }


@pytest.mark.parametrize("name", [name for name in SCIKIT_LEARN if name != "accuracy"])
def test_the_bootstrap_is_seeded_and_blind_to_the_order_of_rows(name: str) -> None:
    first = answered.score(name, LABELS, ANSWERS)
    order = np.random.default_rng(1).permutation(300)
    assert answered.score(name, LABELS[order], ANSWERS[order]) == first
    assert first.low < first.value < first.high


def test_the_bootstrap_finds_the_width_that_theory_gives() -> None:
    labels, answers = np.zeros(400, dtype=np.int64), np.repeat([0, 1], [300, 100])
    low, high = statistics.bootstrap(labels, answers, CLASS_METRICS["accuracy"])
    assert high - low == pytest.approx(2 * 1.96 * (0.75 * 0.25 / 400) ** 0.5, rel=0.1)
    assert (low + high) / 2 == pytest.approx(0.75, abs=0.005)


def test_paired_bootstrap_sees_a_difference_and_none() -> None:
    formula = CLASS_METRICS["f1_macro"]
    good = np.where(np.random.default_rng(2).random(300) < 0.95, LABELS, 0)
    low, high, p = statistics.paired_bootstrap(LABELS, good, ANSWERS, formula)
    assert 0 < low < high
    assert p == 1 / 10_001
    worse = statistics.paired_bootstrap(LABELS, ANSWERS, good, formula)
    assert worse[1] < 0
    assert statistics.paired_bootstrap(LABELS, good, good, formula) == (0.0, 0.0, 1.0)


def test_permutations_tell_p_to_a_hundredth_of_itself_and_say_where_they_end() -> None:
    """12 of 16 rows with a difference, all in one direction: by counting, 2 of 4,096 exchanges are as extreme."""
    values = np.repeat([1.0, 0.0], [12, 4])
    *_, p = statistics.paired_bootstrap(np.zeros(16), values, np.zeros(16), statistics.mean)
    assert p == pytest.approx(2 / 4096, abs=4e-4)
    spread = np.repeat([1.0, -1.0], [14, 4])  # 14 or more of 18 the same way, in both directions
    *_, p = statistics.paired_bootstrap(np.zeros(18), spread, np.zeros(18), statistics.mean)
    assert p == pytest.approx(2 * binom.sf(13, 18, 0.5), abs=0.006)
    rows = np.random.default_rng(0).normal(2, 1, 200)
    data = answered.answered("loss", np.zeros(200))
    assert "p < 0.001," in data.compare(rows, 2 * rows).sentence
    by_rows = answered.answered("sklearn.metrics:accuracy_score", LABELS)
    assert "p < 0.002," in by_rows.compare(LABELS, ANSWERS).sentence, "one draw at a time has 500"


def test_permutation_p_by_hand() -> None:
    # Two discordant rows, both won by the first model: |d*| reaches |d| when neither or both are exchanged: ½.
    labels = np.array([0, 0, 1, 1])
    first, second = np.array([0, 0, 1, 1]), np.array([1, 0, 0, 1])
    _, _, p = statistics.paired_bootstrap(labels, first, second, CLASS_METRICS["accuracy"])
    assert p == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("low", "high", "p", "sentence"),
    [
        (0.002, 0.016, 0.01, "better by 0.9 points (95 % interval 0.2 to 1.6, p = 0.01, n = 2,000)"),
        (0.002, 0.016, 0.0002, "better by 0.9 points (95 % interval 0.2 to 1.6, p < 0.001, n = 2,000)"),
        (-0.002, 0.016, 0.04, "no difference can be seen with n = 2,000"),
        (0.002, 0.016, 0.06, "no difference can be seen with n = 2,000"),
    ],
)
def test_a_difference_is_claimed_only_where_both_agree(low: float, high: float, p: float, sentence: str) -> None:
    comparison = comparison_of("accuracy", 0.009, low, high, p, 2000)
    assert comparison.sentence == sentence


def test_worse_is_said_in_positive_numbers() -> None:
    comparison = comparison_of("f1", -0.05, -0.08, -0.02, 0.004, 300)
    assert comparison.sentence == "worse by 5.0 points (95 % interval 2.0 to 8.0, p = 0.004, n = 300)"


def test_an_unknown_metric_lists_those_that_there_are() -> None:
    with pytest.raises(ScoringError, match="no built-in metric 'bleu'") as raised:
        answered.value("bleu", LABELS, ANSWERS)
    assert all(name in raised.value.hint for name in CLASS_METRICS)


def test_metrics_need_no_network_and_no_home() -> None:
    """A home that cannot be written (a folder below a device, so that root cannot either), and no network."""
    code = (
        "import numpy as np; from hf_soup.evaluation.metrics import find;"
        "print(find('f1_macro')(np.array([0, 1, 1]), np.array([0, 1, 0]), np.ones((1, 3), int))[0])"
    )
    home = "/dev/null/home"
    environment = {**os.environ, "HOME": home, "HF_HOME": f"{home}/hf", "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_METRICS_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (0.04999, "p = 0.0499,"),
        (0.0496, "p = 0.0496,"),
        (0.0494, "p = 0.049,"),
        (0.01, "p = 0.01,"),
        (0.0001, "p < 0.001,"),
    ],
)
def test_a_p_beside_a_claim_is_below_the_limit_as_it_is_printed_too(p: float, shown: str) -> None:
    assert shown in comparison_of("accuracy", 0.01, 0.001, 0.02, p, 100).sentence
