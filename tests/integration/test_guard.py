"""`at_least`: no data set much worse than with the best ingredient; and what many looks gain by chance."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from hf_soup import Recipe, RecipeError, cook
from hf_soup.evaluation.looks import by_chance

Cli = Callable[..., Any]
#: What two tasks want of the two numbers of the head's bias, row by row; and what is luck alone.
MODULE = """
import numpy as np

def value(model, place):
    return 1 - abs(float(model.classifier.bias[place]) - 1)

def one(model): return [value(model, 0)] * 30
def two(model): return [value(model, 1)] * 30

def luck(model):
    seed = int.from_bytes(model.classifier.bias.numpy().tobytes(), "little")
    return np.random.default_rng(seed).normal(size=60)

def worth(model):
    return np.random.default_rng(0).normal(size=60) * 0.01 + value(model, 0)
"""


@pytest.fixture
def models(family: Path, cli: Cli, tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """Makes fine-tunes that differ in two numbers alone; the functions that look at these are in the current folder."""
    (tmp_path / "guarded.py").write_text(MODULE)

    def made(**numbers: tuple[float, float]) -> list[str]:
        for name, bias in numbers.items():
            shutil.copytree(family / "a", tmp_path / name)
            tensors = load_file(tmp_path / name / "model.safetensors")
            tensors["classifier.bias"][:] = tensors["classifier.bias"].new_tensor(bias)
            save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return [str(tmp_path / name) for name in numbers]

    yield made
    sys.modules.pop("guarded", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def asked(models: list[str], select: Any, **more: Any) -> Recipe:
    validation = [
        {"function": "guarded:one", "weight": 3},
        {"function": "guarded:two", "at_least": {"below_best": 0.1}},
    ]
    return Recipe(**{"ingredients": models, "select": select, "validation": validation, "allow": ["identical"], **more})


@pytest.mark.parametrize(
    "select", ["greedy", "best", {"name": "top_k", "k": [1, 2, 3]}], ids=["greedy", "best", "top_k"]
)
def test_a_choice_that_breaks_it_is_not_made(models: Callable[..., list[str]], select: Any, tmp_path: Path) -> None:
    """The first expert would score most, and is nothing on the second task; what it would have given is said."""
    recipe = asked(models(first=(1, 0), second=(0, 1), both=(0.6, 0.95)), select)
    report = cook(recipe, "soup").report
    assert report.selected == ("local:both",)
    assert set(report.best.values()) == {"local:both"}, "the best of those that keep the guard"
    assert (report.copy_of, report.comparisons) == ("local:both", {}), "nothing is compared with itself"
    assert [report.scores["soup"][title].value for title in report.validation] == pytest.approx([0.6, 0.95])
    (note,) = [note for note in report.notes if "at_least" in note]
    assert note == (
        "Without `at_least`, local:first would score 0.75 on the validation data, and not 0.6875; it is "
        "1 below the best ingredient on 'guarded:two', where 0.1 is allowed."
    )
    assert note in (tmp_path / "soup" / "README.md").read_text().replace("\\", "")
    plain = cook(
        asked(recipe.model_dump()["ingredients"], select, validation=[{"function": "guarded:one"}]), "plain"
    ).report
    assert plain.selected != ("local:both",)
    if select == "greedy":
        tried = {frozenset(step.ingredients): (step.score, step.kept) for step in report.trace}
        assert tried == {
            frozenset({"local:both"}): (pytest.approx(0.6875), True),
            frozenset({"local:both", "local:second"}): (pytest.approx(0.46875), False),
            frozenset({"local:both", "local:first"}): (pytest.approx(0.71875), False),
        }
    if isinstance(select, dict):
        assert max(point.score for point in report.curve) < 1, "scores, and not the ranks of what breaks the guard"
        assert min(point.score for point in report.curve) > 0


def test_a_copy_of_one_model_is_told_and_not_proposed_to_be_pushed(models: Callable[..., list[str]], cli: Cli) -> None:
    folders = models(first=(1, 0), second=(0, 1))
    command = ["--select", "greedy", "--validation", "guarded:one", "--allow", "identical", "-o"]
    done = cli("cook", *folders, *command, "one")
    assert "The selection kept one model, local:first: the soup is a copy of it." in done.out
    assert "Next: " not in done.out
    assert "soup against" not in done.out
    done = cli("cook", *folders, "-o", "two", "--allow", "identical")
    assert "Next: hf-soup push" in done.out


def test_values_of_a_method_are_guarded_too(models: Callable[..., list[str]]) -> None:
    """Along the way from the base, as far as the second task allows."""
    base, *ingredients = models(base=(0.2, 0.9), first=(1, 0), both=(0.6, 0.95))
    grid = {"name": "wise_ft", "alpha": [0.0, 0.1, 0.5, 1.0]}
    report = cook(asked(ingredients, "uniform", base_model=base, method=grid), "soup").report
    assert report.parameters["alpha"] == 0.1
    assert [round(point.score, 3) for point in report.curve] == [0.375, 0.409, 0.547, 0.719]
    assert sum("would score 0.7188 on the validation data, and not 0.4094" in note for note in report.notes) == 1


def test_where_nothing_keeps_it_nothing_is_cooked(models: Callable[..., list[str]], cli: Cli) -> None:
    recipe = asked(models(first=(1, 0), second=(0, 1), both=(0.6, 0.95)), "uniform")
    Path("recipe.yaml").write_text(recipe.to_yaml())
    done = cli("cook", "recipe.yaml", "-o", "soup", "--json")
    assert done.code == 1
    said = done.json["error"]["message"]
    assert re.fullmatch(
        r"Nothing that `select: uniform` tried keeps `at_least`: what comes nearest scores 0\.56\d+ on the validation "
        r"data, and is 0\.35 below the best ingredient on 'guarded:two', where 0\.1 is allowed\.", said
    )  # fmt: skip
    assert not Path("soup").exists()


def test_it_is_for_validation_data() -> None:
    with pytest.raises(RecipeError, match="`at_least` is for `validation`"):
        Recipe(ingredients=["acme/a"], test={"function": "guarded:one", "at_least": {"below_best": 1}})
    with pytest.raises(RecipeError, match="greater than or equal to 0"):
        Recipe(ingredients=["acme/a"], validation={"function": "guarded:one", "at_least": {"below_best": -1}})


def test_many_looks_gain_something_by_chance(models: Callable[..., list[str]]) -> None:
    """A gain that is no more than that is not claimed, and one that is stands beside it."""
    numbers = {f"m{number}": (number / 10, 0.0) for number in range(6)}
    folders = models(**numbers)
    report = cook(asked(folders, "greedy", validation={"function": "guarded:luck"}), "luck").report
    comparison = report.comparisons["guarded:luck"]
    assert comparison.candidates == 6 + 5
    assert comparison.chance > 0
    assert comparison.chance_p > 0.05
    assert not comparison.significant
    folders = models(low=(0.0, 1.0), high=(2.0, 1.0))
    report = cook(asked(folders, "greedy", validation={"function": "guarded:worth"}), "worth").report
    comparison = report.comparisons["guarded:worth"]
    assert comparison.difference == pytest.approx(1.0)
    assert (comparison.candidates, comparison.significant) == (3, True)
    assert 0 < comparison.chance < 0.2
    assert comparison.chance_p < 0.05
    assert comparison.sentence.endswith("by chance (p < 0.001)")
    report = cook(asked(folders, "uniform", validation={"function": "guarded:worth"}), "uniform").report
    assert report.comparisons["guarded:worth"].candidates is None, "nothing was compared"


def test_what_is_gained_by_chance() -> None:
    """By hand: half of the rows speak for the second candidate, and a draw of four has B of them."""
    rows = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    (chance,) = by_chance([rows], [1.0], 1, [0.5])
    assert chance.candidates == 2
    # B is binomial of 4 and 1/2, and the gain (B - 2) / 4 where that is above zero.
    assert chance.gain == pytest.approx(4 / 16 / 4 + 1 / 16 / 2, abs=0.015)
    assert chance.p == pytest.approx(1 / 16, abs=0.02)
    # Of two data sets the weights decide who is best, and each has its own gain.
    other = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
    first, second = by_chance([rows, other], [0.0, 1.0], 1, [0.5, 0.0])
    assert first.gain == pytest.approx(0.0, abs=0.03)
    assert second.gain > 0.1
    assert second.p == 1.0


def test_what_is_claimed_of_candidates_that_are_all_alike() -> None:
    """Most of them nearly one model, a few others noisy: one in twenty at most."""
    generator, claims = np.random.default_rng(0), 0
    for _ in range(200):
        base = generator.random(400) < 0.7
        columns = [np.where(generator.random(400) < share, generator.random(400) < 0.7, base)
                   for share in [0.01] * 10 + [0.3] * 8]  # fmt: skip
        values = np.stack(columns, axis=1).astype(float)
        gain = values.mean(axis=0).max() - values[:, :3].mean(axis=0).max()
        (chance,) = by_chance([values], [1.0], 3, [gain])
        claims += chance.p < 0.05
    assert claims <= 10
