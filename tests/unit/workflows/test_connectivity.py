"""Barriers by themselves: heights of known lines, who belongs with whom, what is said of it, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi
from sklearn.metrics import f1_score

from hf_soup import ConnectivityReport, Recipe, RecipeError, connectivity
from hf_soup._util.text import short
from hf_soup.cli import tables as shown
from hf_soup.evaluation.metrics import find
from hf_soup.evaluation.statistics import RESAMPLES, resampled
from hf_soup.local_hub import LocalHub
from hf_soup.workflows.connectivity import LINES, MAX_PAIRS, PairBarrier, _measure, require_measurable

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
SCORE = {"task": "text-classification", "dataset": "rows.csv"}


def found(
    count: int, *parted: tuple[int, int], height: float = 0.05, n: int = 500, low: tuple[int, int] | None = None
) -> ConnectivityReport:
    """Models ``m0``, ``m1``, …, of which some pairs have a barrier of five points and the others none.

    ``low`` is a pair for which it cannot be told whether there is one.
    """
    pairs = []
    for a, b in itertools.combinations(range(count), 2):
        high = height + 0.001 * b if (a, b) in parted else 0.012 if (a, b) == low else -0.01
        line = {0.0: 0.9, 0.5: 0.9 - high, 1.0: 0.9}
        if (a, b) in parted[:LINES]:
            line = {0.0: 0.9, 0.25: 0.88, 0.5: 0.9 - high, 0.75: 0.88, 1.0: 0.9}
        pairs.append(PairBarrier(f"acme/m{a}", f"acme/m{b}", line, 0.5, high, high - 0.015, high + 0.015, high > 0.02))
    return ConnectivityReport(
        "rows accuracy", n, 0.02, {f"acme/m{number}": 0.9 for number in range(count)}, tuple(pairs)
    )


def names(*numbers: int) -> tuple[str, ...]:
    return tuple(f"acme/m{number}" for number in numbers)


# ---- heights ----------------------------------------------------------------------------------------------------


def test_heights_of_known_lines() -> None:
    """Below the straight line between ends of unlike scores; the maximum is where the line is lowest beneath it."""
    asked: list[Mapping[str, float]] = []
    place = {"a": 0.0, "b": 1.0, "c": 0.5}

    def point(weights: Mapping[str, float]) -> tuple[float, np.ndarray]:
        asked.append(dict(weights))
        x = sum(place[name] * share for name, share in weights.items())
        score = 0.5 + 0.2 * x - 0.4 * x * (1 - x) ** 2
        return score, np.full(RESAMPLES, score) + np.linspace(-0.01, 0.01, RESAMPLES) * len(weights)

    scores, pairs = _measure(["a", "b", "c"], point, 0.02)
    assert scores == pytest.approx({"a": 0.5, "b": 0.7, "c": 0.55})
    # The models first, then every midpoint with one end kept in memory, then the lines.
    assert asked[:3] == [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}]
    assert asked[3:6] == [{"a": 0.5, "b": 0.5}, {"a": 0.5, "c": 0.5}, {"b": 0.5, "c": 0.5}]
    assert len(asked) == 3 + 3 + 2 * 3
    first = pairs[0]
    assert (first.first, first.second, first.at) == ("a", "b", 0.25)
    assert list(first.line) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert first.height == pytest.approx(0.4 * 0.25 * 0.75**2)
    # The resamples of ends and middle cancel but for one spread of 0.01 to each side.
    assert (first.low, first.high) == pytest.approx((first.height - 0.0095, first.height + 0.0095), abs=1e-4)
    assert first.barrier


@pytest.mark.parametrize(
    ("height", "spread", "barrier"), [(0.03, 0.02, True), (0.03, 0.04, False), (0.015, 0.001, False), (-0.03, 0, False)]
)
def test_what_counts_as_a_barrier(height: float, spread: float, barrier: bool) -> None:
    """An interval above zero, and two points or more."""

    def point(weights: Mapping[str, float]) -> tuple[float, np.ndarray]:
        score = 0.8 if len(weights) == 1 else 0.8 - height * 4 * math.prod(weights.values())
        noise = np.linspace(-spread, spread, RESAMPLES) * (len(weights) == 2)
        return score, score + noise

    _, (pair,) = _measure(["a", "b"], point, 0.02)
    assert pair.barrier is barrier
    assert pair.low <= pair.height <= pair.high


def test_lines_are_measured_for_the_highest_pairs_only() -> None:
    place = {name: number**1.5 for number, name in enumerate("abcdefg")}

    def point(weights: Mapping[str, float]) -> tuple[float, np.ndarray]:
        score = sum(place[name] * share for name, share in weights.items()) ** 2 / 400
        return score, np.full(RESAMPLES, score)

    _, pairs = _measure(list(place), point, 0.02)
    whole = [pair for pair in pairs if len(pair.line) == 5]
    assert len(whole) == LINES
    rest = [pair.height for pair in pairs if len(pair.line) == 3]
    assert len(rest) == 21 - LINES
    assert min(pair.height for pair in whole) >= max(rest)


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro"])
def test_resamples_are_the_same_rows_for_every_model(metric: str) -> None:
    """So a model's difference to itself is always zero, and each resample is the metric on rows drawn again."""
    generator = np.random.default_rng(0)
    labels, answers = generator.integers(0, 3, 80), generator.integers(0, 3, 80)
    values = resampled(labels, answers, find(metric))
    assert values.shape == (RESAMPLES,)
    assert np.array_equal(values, resampled(labels, answers, find(metric)))
    seen = resampled(labels, answers, lambda label, answer, rows: rows @ (label == answer) / rows.sum(axis=1))
    if metric == "accuracy":
        assert np.array_equal(values, seen)
        assert values.std() == pytest.approx(np.std(labels == answers) / math.sqrt(80), rel=0.15)
    else:
        whole = f1_score(labels, answers, average="macro")
        assert values.mean() == pytest.approx(whole, abs=0.02)


# ---- who belongs ------------------------------------------------------------------------------------------------


def test_one_basin() -> None:
    seen = found(4)
    assert seen.groups == (names(0, 1, 2, 3),)
    assert seen.outsiders == seen.reasons == ()
    assert seen.text.startswith("No barrier of 2 points can be seen between these 4 models: they lie in one basin.")
    assert str(seen) == seen.text


def test_one_who_does_not_belong() -> None:
    seen = found(4, (0, 2), (1, 2), (2, 3))
    assert seen.groups == (names(0, 1, 3), names(2))
    assert seen.outsiders == names(2)
    (reason,) = seen.reasons
    assert (reason.code, reason.refuses, reason.ingredients) == ("barrier", False, names(2))
    assert seen.text == (
        "acme/m2 does not belong: a barrier in all 3 pairs, the highest 5.3 points (95 % interval 3.8 to 6.8), "
        "from acme/m2 to acme/m3. Leave it out, or let `--select greedy` decide."
    )


def test_two_halves_belong_to_neither() -> None:
    """Everybody has barriers to most: nobody is the outsider, and the groups are said."""
    seen = found(4, (0, 2), (0, 3), (1, 2), (1, 3))
    assert seen.groups == (names(0, 1), names(2, 3))
    assert seen.outsiders == ()
    assert seen.text == (
        "They fall into 2 groups: acme/m0 and acme/m1; acme/m2 and acme/m3. Between groups there is a barrier in all "
        "4 pairs, the highest 5.3 points (95 % interval 3.8 to 6.8), from acme/m0 to acme/m3. Average one of the "
        "groups, or let `--select greedy` decide."
    )
    (reason,) = seen.reasons
    assert reason.ingredients == names(0, 1, 2, 3)


def test_models_that_all_stand_alone() -> None:
    for count, pairs in {2: "the one pair", 3: "all 3 pairs"}.items():
        seen = found(count, *itertools.combinations(range(count), 2))
        assert seen.groups == tuple(names(number) for number in range(count))
        assert seen.outsiders == ()
        assert seen.text.startswith(f"No two of them belong together: a barrier in {pairs}, the highest 5.")
        assert seen.text.endswith(". Do not average them, or let `--select greedy` decide.")


@pytest.mark.parametrize("missing", range(9))
def test_a_wall_that_does_not_count_leaves_balanced_groups(missing: int) -> None:
    """Three and three, and with few rows one of the nine walls between them is not significant."""
    walls = list(itertools.product(range(3), range(3, 6)))
    seen = found(6, *(wall for wall in walls if wall != walls[missing]), low=walls[missing])
    assert seen.groups == (names(0, 1, 2), names(3, 4, 5))
    assert seen.outsiders == ()
    assert "They fall into 2 groups: acme/m0, acme/m1 and acme/m2; acme/m3, acme/m4 and acme/m5. " in seen.text
    assert "there is a barrier in 8 of 9 pairs" in seen.text
    assert "In 1 of 15 pairs, one of 2 points cannot be excluded with n = 500" in seen.text
    assert "Average one of the groups" in seen.text


def test_heights_tell_two_pairs_whose_walls_hardly_count() -> None:
    """Two light fine-tunes each of two ancestors on sixty rows: one wall of four can be told from zero."""
    heights = [[0, 0.01, 0.03, 0.06], [0, 0, 0.04, 0.09], [0, 0, 0, 0.005]]
    pairs = tuple(
        PairBarrier(f"m{a}", f"m{b}", {0: 0.9, 0.5: 0.9 - height, 1: 0.9}, 0.5, height, height - 0.07, height + 0.07,
             height > 0.08)
        for a, b in itertools.combinations(range(4), 2) for height in [heights[a][b]]
    )  # fmt: skip
    seen = ConnectivityReport("rows accuracy", 60, 0.02, {f"m{number}": 0.9 for number in range(4)}, pairs)
    assert seen.groups == (("m0", "m1"), ("m2", "m3"))
    # What may be a wall within a group is no ground for advice to average it.
    assert seen.text.startswith("They seem to fall into 2 groups: m0 and m1; m2 and m3. ")
    assert "Measure on more validation rows, or let" in seen.text
    assert "Average one" not in seen.text
    assert "In 5 of 6 pairs, 2 of them within a group, one of 2 points cannot be excluded with n = 60" in seen.text


def test_a_small_group_does_not_belong_to_a_large_one() -> None:
    """Less than half as many are outsiders, half as many a group of their own."""
    for large, outsiders in ((5, names(5, 6)), (4, ())):
        seen = found(large + 2, *itertools.product(range(large), range(large, large + 2)))
        assert [len(group) for group in seen.groups] == [large, 2]
        assert seen.outsiders == outsiders
        assert [reason.ingredients for reason in seen.reasons] == [outsiders or names(*range(6))]
    both = found(5, *itertools.product((0, 1), (2, 3)), *((number, 4) for number in range(4)))
    assert [reason.ingredients for reason in both.reasons] == [names(4), names(0, 1, 2, 3)]
    assert "acme/m4 does not belong: a barrier in all 4 pairs" in both.text
    assert "The others fall into 2 groups: acme/m0 and acme/m1; acme/m2 and acme/m3. " in both.text
    seen = found(13, *itertools.product(range(3), range(3, 13)))
    assert "acme/m0, acme/m1 and acme/m2 do not belong: a barrier in all 30 pairs" in seen.text
    assert "Leave them out" in seen.text


def test_no_group_holds_a_barrier() -> None:
    """Barriers need not be transitive: a chain of four."""
    walls = [(0, 1), (1, 2), (2, 3)]
    seen = found(4, *walls)
    for group in seen.groups:
        assert not any({*names(*wall)} <= {*group} for wall in walls)
    assert sorted(itertools.chain(*seen.groups)) == list(names(0, 1, 2, 3))


def test_what_cannot_be_excluded_is_said() -> None:
    """A small test says little, and neither basin nor barrier is claimed of it."""
    seen = found(2, (0, 1), height=0.014, n=60)
    assert not seen.pairs[0].barrier
    assert "one basin" not in seen.text
    assert "In the one pair, one of 2 points cannot be excluded with n = 60" in seen.text


def test_a_screen_holds_what_is_printed() -> None:
    for count in (2, 9, 11, 12, 40):
        lines = shown.barriers(found(count, (0, 1))).splitlines()
        assert len(lines) < 24
        assert max(len(line) for line in lines[:-2]) <= 110
    text = shown.barriers(found(3, (0, 2)))
    assert "  3 m2   90.0   5.2*  -1.0" in text
    assert "  m0 – m1   5.1 points (95 % interval 3.6 to 6.6) *" in shown.barriers(found(12, (0, 1)))


# ---- bad input --------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="the recipe has no `validation`"):
        connectivity(Recipe(ingredients=["acme/a", "acme/b"]))
    many = Recipe(ingredients=[f"acme/m{number}" for number in range(200)], validation=SCORE)
    with pytest.raises(RecipeError, match="200 models are 19,900 pairs") as error:
        connectivity(many)
    assert f"at most {MAX_PAIRS:,}" in str(error.value)
    require_measurable(Recipe(ingredients=[f"acme/m{number}" for number in range(45)], validation=SCORE))


def test_a_body_has_nothing_to_measure() -> None:
    """And no `validation` would help, as a recipe cannot have both."""
    body = Recipe(ingredients=["acme/a", "acme/b"], heads="body")
    with pytest.raises(RecipeError, match="a body has no outputs") as error:
        require_measurable(body)
    assert "leave `heads` out or set `heads: MODEL`" in str(error.value)


def test_names_in_tables_stay_apart() -> None:
    """Whatever is cut: what tells them apart may be at the start, in the middle, at the end, or too far inside."""
    long = 60 * "x"
    for names in (
        ["a/same", "b/same"], [f"{long}{n}{long}" for n in range(3)], [f"{n}{long}" for n in range(3)],
        [f"acme/{long}{n}" for n in range(12)], [f"{a}{long}{b}{long}" for a in "ab" for b in "ab"],
        [f"{owner}{long}/{name}{long}" for owner in "ab" for name in "cd"],
    ):  # fmt: skip
        seen = short(names)
        assert len({*seen}) == len(names)
        assert max(map(len, seen)) <= 24
    assert "…1" in short([f"{long}{n}{long}" for n in range(3)])[1]


def test_wrong_usage(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Exit code 2 and what is missing; nothing was looked at."""
    for arguments, said in {
        (): "name models, or a recipe of them with --recipe",
        ("acme/a", "acme/b", "--barrier"): "name a recipe that has `validation` with --recipe",
    }.items():
        done = cli("check", *arguments)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Recipe(ingredients=[str(family / "a"), str(family / "b")]).to_yaml())
    done = cli("check", "--recipe", recipe, "--barrier", "--json")
    assert done.code == 1
    assert (
        done.json["error"]["message"] == "Barriers are measured on validation data, and the recipe has no `validation`."
    )
    assert cli("check", "--recipe", tmp_path / "none.yaml").code == 1


def test_a_recipe_gives_the_models_of_a_check(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Without --barrier too; models that are named take the place of its own, and its base stays."""
    recipe = tmp_path / "of-models"
    base = str(family / "base")
    recipe.write_text(Recipe(ingredients=[str(family / "a"), str(family / "b")], base_model=base).to_yaml())
    for models, expected in {(): ["local:a", "local:b"], ("b", "c", "a"): ["local:b", "local:c", "local:a"]}.items():
        report = cli("check", *(family / name for name in models), "--recipe", recipe, "--json").json
        assert [each["name"] for each in report["ingredients"]] == expected
        assert report["ancestor"]["source"] == "recipe"
        assert "barrier" not in report


def test_one_model_has_no_barrier(
    cli: Cli, publish: Callable[..., str], online: LocalHub, family: Path, tmp_path: Path
) -> None:
    """A check refuses it; one that is pinned may be cooked, but there is nothing to measure."""
    score = {**SCORE, "dataset": str(family / "rows.csv")}
    (tmp_path / "one.yaml").write_text(Recipe(ingredients=[str(family / "a")], validation=score).to_yaml())
    done = cli("check", "--recipe", "one.yaml", "--barrier")
    assert done.code == 3
    assert done.out.startswith("refused")
    assert "have no barrier measured between them" in done.err
    model = publish("a")
    commit = HfApi(endpoint=online.endpoint, token=online.token).model_info(model).sha
    with pytest.raises(RecipeError, match="lies between two models, and there is one"):
        connectivity(Recipe(ingredients=[f"{model}@{commit}"], validation=score))


def test_barriers_of_texts(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Words for people: the report, the matrix, the sentence; progress on stderr."""
    score = {**SCORE, "dataset": str(family / "rows.csv")}
    (tmp_path / "recipe.yaml").write_text(
        Recipe(ingredients=[str(family / name) for name in "abc"], validation=score, select="greedy").to_yaml()
    )
    done = cli("check", "--recipe", "recipe.yaml", "--barrier", "--quiet", "-o", "new.yaml")
    assert done.code == 0, done
    assert "What to do" not in done.out
    assert (tmp_path / "new.yaml").exists()
    assert done.err.index("12 scorings") < done.err.index("Wrote new.yaml")
    assert done.out.startswith(("proven: ", "likely: "))
    assert "Barriers on rows.csv accuracy (n = 24), in points" in done.out
    assert "\n   3 c  " in done.out
    assert "note: 3 models, 3 pairs: 12 scorings of 24 rows\n" in done.err


@pytest.mark.usefixtures("online")
def test_whose_head_is_scored_is_said(family: Path, log: pytest.LogCaptureFixture) -> None:
    """With `heads: MODEL` a model's score is not its own."""
    score = {**SCORE, "dataset": str(family / "rows.csv")}
    models = [str(family / name) for name in "ab"]
    seen = connectivity(Recipe(ingredients=models, validation=score, heads=models[1]))
    assert seen.head_of == seen.to_dict()["head_of"] == "local:b"
    assert seen.text.endswith("All of them, the ends too, were scored with local:b's head.")
    own = connectivity(Recipe(ingredients=models, validation=score))
    assert own.head_of is None
    assert "head" not in own.text
    assert "2 models, 1 pair: 5 scorings of 24 rows" in log.messages


@pytest.mark.usefixtures("online")
def test_the_line_is_straight_whatever_the_recipe_does(family: Path) -> None:
    """By layer, by tensor, by another method: what is measured is the mean of all tensors."""
    recipe = Recipe(
        ingredients=[str(family / name) for name in "ab"], validation={**SCORE, "dataset": str(family / "rows.csv")}
    )
    plain = connectivity(recipe).to_dict()
    overrides = [{"tensors": "*.dense.*", "method": {"name": "linear", "normalize": False}}]
    layers = {"*.dense.*": [0.1, 0.9]}
    for changes in (
        {"overrides": overrides},
        {"tensor_weights": layers},
        {"method": {"name": "linear", "normalize": False}},
    ):
        assert (
            connectivity(Recipe.model_validate({**recipe.model_dump(exclude_unset=True), **changes})).to_dict() == plain
        )


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_measured_is_told_where_it_cannot_be_written(
    cli: Cli, family: Path, tmp_path: Path, as_json: bool
) -> None:
    """A name that no disk takes: the result, then the error; in JSON both in one object."""
    score = {**SCORE, "dataset": str(family / "rows.csv")}
    (tmp_path / "recipe.yaml").write_text(
        Recipe(ingredients=[str(family / name) for name in "ab"], validation=score).to_yaml()
    )
    output = f"{300 * 'b'}.yaml"
    done = cli("check", "--recipe", "recipe.yaml", "--barrier", "-o", output, *(["--json"] if as_json else []))
    assert done.code == 1
    if as_json:
        assert done.json["barrier"]["n"] == 24
        assert done.json["error"]["message"] == f"Cannot write '{output}': File name too long."
    else:
        assert "Barriers on rows.csv accuracy" in done.out
        assert f"Error: Cannot write '{output}': File name too long." in done.err


@pytest.mark.parametrize("command", [["check", "acme/a", "acme/b"], ["search", "acme/base"]])
def test_a_place_that_cannot_be_written_is_refused_at_once(
    cli: Cli, online: LocalHub, tmp_path: Path, command: list[str]
) -> None:
    """One object, and nothing was asked."""
    done = cli(*command, "-o", "no/where.yaml", "--json")
    assert done.code == 1
    assert "'no/where.yaml' cannot be written: there is no folder" in done.json["error"]["message"]
    assert online.requests == []
