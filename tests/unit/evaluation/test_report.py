"""What is scored, when, and on what: validation first, reports once at the end, and the files that were written."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from hf_soup import Ingredient, Recipe, cook, score
from hf_soup.cli.tables import table
from hf_soup.errors import IncompatibleError, ScoringError
from hf_soup.evaluation import model_answers
from hf_soup.evaluation.model import require_device
from hf_soup.merging import Reading
from hf_soup.merging.layout import Run, Segment
from hf_soup.recipe import SoupReport
from hf_soup.selection import Step

# The cards name an ancestor on the Hub, which must not be the real one.
pytestmark = pytest.mark.usefixtures("online")

VALIDATION, REPORT = "rows.csv accuracy", "test accuracy"


@pytest.fixture
def recipe(family: Path, trained: Path) -> Recipe:
    data = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    return Recipe(
        ingredients=[str(trained / name) for name in ("poor", "fair", "good")],
        select="greedy",
        validation=data,
        test=[{**data, "dataset": str(family / "report.csv"), "name": "test"}],
        base_model=str(family / "base"),
    )


def ensemble(recipe: Recipe, family: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the mean of the ingredients' probabilities answers on the report, and its labels."""
    from transformers import BertForSequenceClassification, BertTokenizer

    lines = [line.rsplit(",", 1) for line in (family / "report.csv").read_text().splitlines()[1:]]
    tokens = BertTokenizer.from_pretrained(family / "base")([text for text, _ in lines], return_tensors="pt")
    with torch.inference_mode():
        parts = [
            BertForSequenceClassification.from_pretrained(each.model)(**tokens).logits.softmax(-1)
            for each in recipe.ingredients
        ]
    return torch.stack(parts).mean(0).argmax(-1).numpy(), np.array([int(label) for _, label in lines])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tensors of each ingredient were read."""
    found: Counter[str] = Counter()
    through = Reading.read

    def count(self: Reading, run: Run, segment: Segment, source: int) -> Any:
        found[self._layout.names[source]] += run.stop - run.first
        return through(self, run, segment, source)

    monkeypatch.setattr(Reading, "read", count)
    return found


def test_greedy_from_validation_data_to_reports(
    recipe: Recipe, asked: list[str], read: Counter[str], family: Path, trained: Path, tmp_path: Path
) -> None:
    soup = cook(recipe, tmp_path / "soup")
    # Every ingredient alone and every candidate sees validation data; only then does anything see a report.
    steps = len(soup.report.trace)
    assert steps == 3
    candidates = 3 + (steps - 1)
    assert asked == [VALIDATION] * candidates + [REPORT] * 3 + [VALIDATION, REPORT]

    # It starts with the best and leaves out what hurts.
    scores = {name: each[VALIDATION]["value"] for name, each in soup.scores.items()}
    assert scores["local:good"] == 1.0
    assert scores["local:good"] > scores["local:fair"] > scores["local:poor"]
    assert list(soup.weights) == ["local:fair", "local:good"]  # the recipe's order, not the one of the steps
    assert soup.report.trace[0] == Step(ingredients=("local:good",), score=1.0, kept=True)
    assert soup.report.trace[-1].kept is False
    assert "local:poor" not in soup.weights
    assert soup.report.best == {VALIDATION: "local:good", REPORT: "local:good"}
    assert soup.report.comparisons[REPORT].against == "local:good"

    # A candidate costs the ingredient that is tried, and once the one before it when that was kept.
    tensors = len(load_file(trained / "good" / "model.safetensors"))
    # Alone, as a candidate and in the report; the ones that were kept are once folded into the sum.
    assert read["local:poor"] == 3 * tensors
    assert read["local:fair"] <= 4 * tensors
    assert read["local:good"] == 3 * tensors

    # Measured again, on the folder that came out, the scores are the same.
    (again,) = score([str(soup.folder)], recipe).values()
    assert again == soup.scores["soup"]
    last = [step for step in soup.report.trace if step.kept][-1]
    assert last.score == soup.scores["soup"][VALIDATION]["value"]
    assert set(last.ingredients) == set(soup.weights)

    answers, labels = ensemble(recipe, family)
    assert soup.scores["ensemble"][REPORT]["value"] == pytest.approx(float((answers == labels).mean()))
    assert soup.scores["ensemble"][REPORT]["n"] == len(labels)


def test_a_model_that_nobody_could_make_is_not_scored(recipe: Recipe, family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "base", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    odd = {key: value for key, value in config.items() if key not in ("id2label", "label2id")} | {"num_labels": 10**12}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(odd))
    with pytest.raises(IncompatibleError, match="asks for num_labels = 1,000,000,000,000"):
        score([str(tmp_path / "odd")], recipe)


def test_who_errs_by_a_system_on_one_of_several_data_is_of_another_task(
    recipe: Recipe, family: Path, tmp_path: Path
) -> None:
    """Outputs in another order err on all data, so there it is refused."""
    _, *rows = (family / "report.csv").read_text().splitlines()
    turned = [f"{text},{1 - int(label)}" for text, label in (row.rsplit(",", 1) for row in rows)]
    (tmp_path / "turned.csv").write_text("\n".join(["text,label", *turned]) + "\n")
    other = {"task": "text-classification", "dataset": str(tmp_path / "turned.csv")}
    own = {**other, "dataset": str(family / "rows.csv")}
    for number, (score_on, report) in enumerate([([other, own], []), ([own], [other])]):
        several = Recipe(ingredients=recipe.ingredients, base_model=recipe.base_model, validation=score_on, test=report)
        assert cook(several, tmp_path / f"soup-{number}").scores
    alone = Recipe(ingredients=recipe.ingredients, base_model=recipe.base_model, validation=[other])
    with pytest.raises(ScoringError, match="With its outputs in another order it would get 100"):
        cook(alone, tmp_path / "refused")
    # Who asks for a model's scores gets them, however low: they tell it.
    good = str(recipe.ingredients[-1].model)
    ((_, scores),) = score([good], alone).items()
    assert {each["value"] for each in scores.values()} == {0.0}


@pytest.fixture
def passes() -> Iterator[list[str]]:
    """The classes of the models that were run, a forward pass each."""
    seen: list[str] = []

    def note(module: torch.nn.Module, *_: object) -> None:
        if type(module).__name__.endswith("Classification"):
            seen.append(type(module).__name__)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    yield seen
    hook.remove()


def cooked(recipe: Recipe, out: Path) -> SoupReport:
    return cook(recipe, out).report


def damaged_answers_are_asked_again(recipe: Recipe, tmp_path: Path, passes: list[str], first: SoupReport) -> None:
    notes = sorted((Path(constants.HF_HOME) / "hf-soup" / "logits").iterdir())
    right = [note.read_bytes() for note in notes]
    assert len(notes) > 3
    for number, note in enumerate(notes):
        logits = np.load(note)
        if number % 4 == 0:
            note.write_bytes(right[number][:-1])
        elif number % 4 == 1:
            np.save(note, np.where(np.arange(logits.size).reshape(logits.shape), logits, np.nan))
        elif number % 4 == 2:
            np.save(note, np.array([{"not": "logits"}], dtype=object), allow_pickle=True)
        else:
            np.save(note, logits[1:])
    passes.clear()
    assert cooked(recipe, tmp_path / "damaged") == first
    assert len(passes) >= len(notes)
    assert [note.read_bytes() for note in notes] == right


def test_what_was_answered_once_is_not_asked_again_if_it_can_be_believed(
    recipe: Recipe, tmp_path: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:  # a home that cannot be written costs no more than time
        patch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
        cannot = cooked(recipe, tmp_path / "without a home")
    assert passes
    passes.clear()
    first = cooked(recipe, tmp_path / "first")
    assert first == cannot
    asked = len(passes)
    assert asked >= 3 + 2 + 3 + 2  # ingredients, candidates, and the report and the soup, a batch each
    assert cooked(recipe, tmp_path / "again") == first
    assert len(passes) == asked
    damaged_answers_are_asked_again(recipe, tmp_path, passes, first)
    asked = len(passes)

    # Fewer ingredients in another order, and another selection: nothing is new but the soup of all.
    some = recipe.model_copy(update={"ingredients": (recipe.ingredients[2], recipe.ingredients[1])})
    found = cooked(some, tmp_path / "some")
    assert len(passes) == asked
    assert found.scores["soup"] == first.scores["soup"]
    every = recipe.model_copy(update={"select": Recipe(ingredients=["x/y"]).select})
    found = cooked(every, tmp_path / "every")
    assert len(passes) == asked + 2
    assert {name: found.scores[name] for name in found.weights} == {name: first.scores[name] for name in found.weights}


def test_whatever_answers_depend_on_is_looked_at(recipe: Recipe, family: Path, trained: Path, tmp_path: Path) -> None:
    """Ingredients that are remembered with other weights, config, data or batches are asked anew."""
    for name in ("good", "fair"):
        shutil.copytree(trained / name, tmp_path / name)
    data = tmp_path / "rows.csv"
    shutil.copy(family / "rows.csv", data)
    scoring = recipe.validation[0].model_copy(update={"dataset": str(data)})
    pair = recipe.model_copy(
        update={
            "ingredients": tuple(Ingredient(model=str(tmp_path / name)) for name in ("good", "fair")),
            "validation": (scoring,),
            "test": (),
        }
    )
    seen: set[Path] = set()

    def new() -> int:
        score([ingredient.model for ingredient in pair.ingredients], pair)
        before = len(seen)
        seen.update((Path(constants.HF_HOME) / "hf-soup" / "logits").iterdir())
        return len(seen) - before

    every = new()
    path = tmp_path / "fair" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert new() == every - 1, "`good` alone is what it was"
    for name in ("good", "fair"):
        path = tmp_path / name / "config.json"
        path.write_text(path.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-11'))
    assert new() == every
    data.write_text(data.read_text().replace("good film", "good book", 1))
    assert new() == every
    pair = pair.model_copy(update={"validation": (scoring.model_copy(update={"batch_size": 5}),)})
    assert new() == every


def test_what_is_remembered_is_bounded(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe.model_copy(update={"test": ()})
    cooked(recipe, tmp_path / "first")
    folder = Path(constants.HF_HOME) / "hf-soup" / "logits"
    notes = list(folder.iterdir())
    sizes = sum(note.stat().st_size for note in notes)
    for note in notes:
        os.utime(note, (0, 0))
    monkeypatch.setattr(model_answers, "MAX_BYTES", sizes // 2)
    some = recipe.model_copy(update={"ingredients": recipe.ingredients[1:]})
    cook(some, tmp_path / "some")
    left = list(folder.iterdir())
    assert sum(note.stat().st_size for note in left) <= sizes // 2
    assert [note for note in left if note.stat().st_mtime > 0], "what was used last stays"


def test_without_validation_data_each_report_has_its_own_best(recipe: Recipe, tmp_path: Path, asked: list[str]) -> None:
    uniform = recipe.model_copy(update={"validation": (), "select": Recipe(ingredients=["x/y"]).select})
    soup = cook(uniform, tmp_path / "soup")
    assert asked == [REPORT] * 4
    assert soup.report.validation == ()
    assert soup.report.best == {REPORT: "local:good"}
    assert soup.weights == {"local:poor": 1.0, "local:fair": 1.0, "local:good": 1.0}


def test_a_device_that_is_not_there() -> None:
    require_device("cpu")
    for device in ("tpu9", "", "cuda:99"):
        with pytest.raises(ScoringError, match=f"the device '{device}'"):
            require_device(device)


def test_a_table_is_aligned() -> None:
    score = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    assert table({"soup": {"x accuracy": score}, "a": {"x accuracy": score, "y f1": score}}, marked=["a"]) == (
        "        x accuracy           y f1\n"
        "  soup  50.0 (25.0 to 75.0)\n"
        "  a *   50.0 (25.0 to 75.0)  50.0 (25.0 to 75.0)"
    )
