"""Methods that look at examples, from a recipe to a published soup."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_soup.recipe import Recipe

Cli = Callable[..., Any]
#: The client's, of its own uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
METHODS = ("fisher", "regmean")
#: Few steps, that show.
FEW = {"name": "entropy", "steps": 3, "lr": 0.1}


@pytest.fixture
def recipe(family: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of three kin and sixteen examples, with changes."""

    def write(method: object = "fisher", **changes: object) -> Path:
        values = {
            "base_model": str(family / "base"),
            "ingredients": [str(family / name) for name in "abc"],
            "method": method,
            "calibration": {"task": "text-classification", "dataset": str(family / "rows.csv"), "batch_size": 4},
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return write


@pytest.fixture
def passes() -> Iterator[list[str]]:
    """Each forward pass of a whole model."""
    seen: list[str] = []

    def count(module: torch.nn.Module, *_: object) -> None:
        if type(module).__name__ == "BertForSequenceClassification":
            seen.append("pass")

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    yield seen
    handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_the_second_cook_looks_at_nothing(
    cli: Cli, recipe: Callable[..., Path], passes: list[str], method: str
) -> None:
    path = recipe({"name": method, "examples": 16})
    first = cli("cook", path, "-o", "one", "--json")
    assert first.code == 0, first.err
    assert len(passes) == 3 * 16 if method == "fisher" else 0 < len(passes) < 3 * 16
    del passes[:]
    second = cli("cook", path, "-o", "two", "--json")
    assert second.code == 0, second.err
    assert passes == []
    assert weights("one") == weights("two")
    resolved = Recipe.load("one/soup.yaml")
    assert resolved.calibration is not None
    assert resolved.calibration.dataset == "local:rows.csv"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", resolved.calibration.revision or "")
    assert resolved.method.parameters == {"examples": 16}


def test_coefficients_are_learned_once_and_told(
    cli: Cli, recipe: Callable[..., Path], passes: list[str], family: Path
) -> None:
    path = recipe("linear", select={**FEW, "examples": 16})
    first = cli("cook", path, "-o", "one")
    assert first.code == 0, first.err
    # Sixteen rows in batches of four: before, in each step, and after.
    assert len(passes) == 4 * (1 + 3 + 1)
    means = ", ".join(rf"local:{name} 0\.\d{{3}}" for name in "abc")
    told = rf"in the mean over tensors: {means}\. The entropy of the answers to the examples 'rows.csv' was"
    assert re.search(told, first.err)
    assert any(re.search(told, note) for note in json.loads(Path("one/soup.json").read_text())["notes"])
    assert re.search(told, Path("one/README.md").read_text())
    del passes[:]
    resolved = Recipe.load("one/soup.yaml")
    assert resolved.method.model_dump() == {"name": "task_arithmetic", "scale": 1.0}
    assert (len(resolved.tensor_weights), resolved.overrides, resolved.select.name) == (41, (), "uniform")
    maps = [f"--map={name}={family / name}" for name in ("a", "b", "c", "base", "rows.csv")]
    verified = cli("verify", "one", *maps, "--json")
    assert verified.json["verdict"] == "identical", verified
    assert passes == [], "what was learned is not learned again"
    assert cli("cook", recipe({"name": "task_arithmetic"}, calibration=None), "-o", "three").code == 0
    assert weights("one") != weights("three")
    assert cli("cook", path, "-o", "four", "--dry-run").code == 0


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_what_has_no_statistics_is_averaged_and_said(cli: Cli, recipe: Callable[..., Path]) -> None:
    assert cli("cook", recipe("linear", calibration=None), "-o", "mean").code == 0
    done = cli("cook", recipe("regmean"), "-o", "soup")
    assert done.code == 0, done.err
    said = re.findall(r"note: (\d+) of (\d+) tensors have nothing that regmean goes by, and are averaged: .+", done.err)
    assert len(said) == 1
    mean, soup = load_file("mean/model.safetensors"), load_file("soup/model.safetensors")
    same = [name for name in mean if torch.equal(mean[name], soup[name])]
    assert [(str(len(same)), str(len(mean)))] == said
    assert {name for name in mean if name not in same} == {
        name for name in mean if re.search(r"(query|key|value|dense|classifier)\.weight$", name)
    }
    assert any(
        "nothing that regmean goes by" in note for note in json.loads(Path("soup/soup.json").read_text())["notes"]
    )
    fisher = cli("cook", recipe("fisher"), "-o", "other")
    assert "nothing that fisher goes by" not in fisher.err
    assert weights("other") != weights("mean")


@pytest.mark.parametrize("method", METHODS)
def test_candidates_and_the_written_soup_are_one(
    cli: Cli, recipe: Callable[..., Path], family: Path, trained: Path, method: object
) -> None:
    """A selection that leaves one out; what it kept is cooked with its own statistics."""
    data = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    path = recipe(
        method,
        ingredients=[str(trained / name) for name in ("poor", "fair", "good")],
        select="greedy",
        validation=data,
    )
    done = cli("cook", path, "-o", "soup", "--json")
    assert done.code == 0, done.err
    summary = done.json
    # Whose one answer nothing changes: to Fisher averages it has no say, so it does no harm there.
    assert ("poor" in " ".join(summary["selected"])) == (method == "fisher")
    # The written soup has the answers of the candidate that was kept, which are not asked again.
    kept = summary["trace"][-1]["score"] if summary["trace"][-1]["kept"] else summary["trace"][0]["score"]
    assert summary["scores"]["soup"]["rows.csv accuracy"]["value"] == pytest.approx(kept)


def test_a_published_soup_is_verified(
    cli: Cli, recipe: Callable[..., Path], publish: Callable[..., str], family: Path, tmp_path: Path
) -> None:
    """Where the examples are; they were a file, which only its owner has."""
    names = [publish(name) for name in ("base", "a", "b", "c")]
    path = recipe({"name": "fisher", "examples": 8}, base_model=names[0], ingredients=names[1:])
    assert cli("cook", path, "-o", "soup", "--quiet").code == 0
    rows = f"--map=rows.csv={family / 'rows.csv'}"
    done = cli("verify", "soup", rows, "--json")
    assert (done.code, done.json["verdict"], done.json["reasons"]) == (0, "identical", []), done.out
    shutil.rmtree(tmp_path / "home" / "hf-soup" / "statistics")  # so they are collected again
    assert cli("verify", "soup", rows, "--json").json["verdict"] == "identical"
    lacking = cli("verify", "soup", "--json")
    assert lacking.json["verdict"] == "unverifiable"
    assert "--map rows.csv=PATH" in lacking.json["reasons"][0]["message"]
    (tmp_path / "rows.csv").write_text("text\ngood film\n")
    changed = cli("verify", "soup", f"--map=rows.csv={tmp_path / 'rows.csv'}", "--json")
    assert changed.json["verdict"] == "unverifiable"
    assert "has changed" in changed.json["reasons"][0]["message"]


def test_rows_of_a_report_are_not_looked_at(
    cli: Cli, recipe: Callable[..., Path], family: Path, tmp_path: Path
) -> None:
    """Named twice it is refused before anything is read, sliced into it too, and equal rows elsewhere are dropped."""
    rows = str(family / "rows.csv")
    data = {"task": "text-classification", "dataset": rows}
    same = cli("cook", recipe(test=[data]), "-o", "soup")
    assert same.code == 1
    assert "`calibration` are the rows of the test data 'rows.csv accuracy'" in same.err
    sliced = cli("cook", recipe(test=[{**data, "split": "train[11:14]"}]), "-o", "soup")
    assert sliced.code == 1
    assert (
        "The examples 'rows.csv' and the test data 'rows.csv train[11:14]' share 3 rows: train rows 11-13."
        in sliced.err
    )
    lines = (family / "rows.csv").read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join([lines[0], *lines[1:24:2]]) + "\n")
    equal = cli("cook", recipe(test=[{**data, "dataset": "few.csv"}]), "-o", "soup")
    assert equal.code == 0, equal.err
    assert "warning: rows.csv: 12 of 24 rows equal a test row in content and were dropped" in equal.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"calibration": None},
            "fisher looks at what the ingredients do with examples, and the",
        ),
        (
            {"calibration": {"task": "text-classification", "dataset": "local:rows.csv"}},
            "'local:rows.csv' was on",
        ),
        (
            {"calibration": {"task": "text-classification", "dataset": "none.csv"}},
            "There is no file or folder 'none.csv'",
        ),
        (
            {"calibration": {"task": "text-classification", "dataset": "x", "metric": "f1"}},
            "'metric' is for `validation` and",
        ),
        ({"method": {"name": "fisher", "examples": 0}}, "fisher: 'examples' is 0; it is in [1, inf)."),
        ({"method": {"name": "fisher", "examples": [8, 16]}}, "fisher: 'examples' takes one number"),
        ({"method": {"name": "regmean", "offdiagonal": 1.5}}, "regmean: 'offdiagonal' is 1.5; it is in [0, 1]."),
        ({"method": "linear", "select": {"name": "entropy", "steps": 0}}, "entropy: 'steps' is 0; it is in [1, inf)."),
        ({"method": "linear", "select": {"name": "entropy", "by": "row"}}, "it is one of tensor, ingredient."),
        (
            {"method": "linear", "select": {"name": "entropy", "init": [0.2, 0.3]}},
            "entropy learns once, so 'init' takes one value.",
        ),
        (
            {"method": "linear", "select": {"name": "entropy", "lr": {"depth": [0.1, 0.2]}}},
            "entropy: 'lr' is {'depth': [0.1, 0.2]}; it is of type float",
        ),
        (
            {"method": "linear", "select": "entropy", "calibration": None},
            "entropy looks at what the ingredients do with examples, and",
        ),
        (
            {"method": "ties", "select": "entropy"},
            "learns the weights of task vectors, and names their method itself; here `method` is ties",
        ),
        (
            {"method": "linear", "select": "entropy", "ingredients": [{"model": "acme/a", "weight": -1}, "acme/b"]},
            "from weights of zero or more; one is -1.",
        ),
        ({"heads": "body"}, "with `heads: body` there are no outputs"),
    ],
)
def test_bad_input_is_said_before_anything_is_fetched(
    cli: Cli, recipe: Callable[..., Path], changes: dict[str, object], said: str
) -> None:
    done = cli("cook", recipe(changes.pop("method", "fisher"), **changes), "-o", "soup")
    assert (done.code, Path("soup").exists()) == (1, False)
    assert said in done.err


def test_examples_that_nothing_looks_at_are_said(cli: Cli, recipe: Callable[..., Path]) -> None:
    done = cli("cook", recipe("linear"), "-o", "soup")
    assert done.code == 0, done
    assert "warning: nothing looks at `calibration`: the method needs none" in done.err


def test_a_score_does_not_look_at_examples(cli: Cli, recipe: Callable[..., Path], family: Path) -> None:
    """Nor is it stopped by those that are gone."""
    gone = {"task": "text-classification", "dataset": "gone.csv"}
    looks = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    done = cli("score", family / "a", "--recipe", recipe("linear", calibration=gone, validation=looks), "--json")
    assert done.code == 0, done.err
    assert done.json["scores"]


def test_an_override_may_look_at_examples(cli: Cli, recipe: Callable[..., Path]) -> None:
    own = [{"tensors": "classifier.*", "method": {"name": "fisher", "examples": 4}}]
    done = cli("cook", recipe("linear", overrides=own), "-o", "soup")
    assert done.code == 0, done.err
    assert cli("cook", recipe("linear", calibration=None), "-o", "mean").code == 0
    mean, soup = load_file("mean/model.safetensors"), load_file("soup/model.safetensors")
    assert {name for name in mean if not torch.equal(mean[name], soup[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_streaming_and_examples_do_not_go_together(cli: Cli, recipe: Callable[..., Path]) -> None:
    done = cli("cook", recipe(), "-o", "soup", "--stream")
    assert done.code == 1
    assert "`--stream` drops every file after its last use, and fisher first runs" in done.err
    assert cli("cook", recipe(), "-o", "soup", "--dry-run").code == 0
