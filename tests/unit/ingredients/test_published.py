"""What a stranger's soup.yaml and soup.json may say, and that nothing else in them is believed or run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_soup import RecipeError, ResolveError
from hf_soup._util import yaml as plain_yaml
from hf_soup.ingredients import Published, local_path, open_published

A, B, SHA = "a" * 40, "b" * 40, "sha256:" + "c" * 64
ROWS = {"task": "text-classification", "dataset": "acme/rows", "revision": B, "split": "test"}


def soup(folder: Path, text: str | None = None, *, summary: object = None, **said: Any) -> Path:
    """A folder that says that it is a soup."""
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {"ingredients": [f"acme/a@{A}", f"acme/b@{B}"], **said}
    (folder / "soup.yaml").write_text(yaml.safe_dump(values) if text is None else text)
    known = {"digest": "d" * 64, "scores": {}} if summary is None else summary
    (folder / "soup.json").write_text(known if isinstance(known, str) else json.dumps(known))
    return folder


def opened(folder: Path, **said: Any) -> Published:
    return open_published(str(soup(folder / "s", **said)))


def test_what_is_read_names_no_path_and_runs_nothing(tmp_path: Path) -> None:
    """Flags of the recipe do not count, and its data are apart from it."""
    metric = {**ROWS, "metric": "os:system", "trust_remote_code": True}
    found = opened(tmp_path, allow_pickle=True, test=[metric], ingredients=[f"acme/a@{A}", f"local:run@{SHA}"])
    assert found.model == "local:s"
    assert found.digest == "d" * 64
    assert not found.recipe.allow_pickle
    assert (found.recipe.validation, found.recipe.test) == ((), ())
    assert found.test[0].metric == "os:system"
    with pytest.raises(RecipeError, match="'os:system' is code"):
        found.with_data()
    assert found.with_data(trust_remote_code=True).test[0].metric == "os:system"
    assert open_published(str(tmp_path / "s"), allow_pickle=True).recipe.allow_pickle


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"ingredients": [f"/etc/passwd@{A}", f"acme/b@{B}"]}, "'/etc/passwd', which is neither a Hub id nor"),
        (
            {"ingredients": [{"model": "acme/a", "revision": A, "base": f"/etc/passwd@{B}"}]},
            "'/etc/passwd', which is neither a Hub id nor",
        ),
        (
            {"ingredients": [{"model": "acme/a", "revision": A, "base": "acme/base@main"}]},
            "does not say which commit 'acme/base' was",
        ),
        ({"ingredients": [f"../acme/a@{A}"]}, "'../acme/a', which is neither"),
        ({"ingredients": [f"local:/etc@{SHA}"]}, "'local:/etc', which is neither"),
        ({"ingredients": [f"local:..@{SHA}"]}, "'local:..', which is neither"),
        ({"ingredients": [f"file:///etc@{A}"]}, "which is neither"),
        ({"ingredients": ["acme/a@main"]}, "does not say which commit 'acme/a' was (it says 'main')"),
        ({"ingredients": ["acme/a"]}, "does not say which commit 'acme/a' was"),
        ({"ingredients": ["local:run"]}, "does not say which sha256 'local:run' was"),
        ({"ingredients": [f"local:run@{A}"]}, "does not say which sha256 'local:run' was"),
        ({"base_model": "/etc"}, "'/etc', which is neither"),
        ({"base_model": "acme/base"}, "does not say which commit 'acme/base' was"),
        ({"base_model": "local:../x"}, "names the base 'local:../x', which is no name of a folder"),
        ({"select": "greedy", "validation": ROWS}, "leaves a choice open"),
        ({"ingredients": [f"acme/m{n}@{A}" for n in range(1001)]}, "at most 1000 items"),
        ({"ingredients": [{"model": f"acme/a@{A}", "weight": 10**400}]}, "Cannot read its soup.yaml"),
        ({"ingredients": [{"model": f"acme/{n}@{A}", "weight": 1e308} for n in "ab"]}, "sum to inf"),
        ({"seed": 2**200}, "less than"),
        ({"script": "rm -rf /"}, "unknown key"),
        ({"text": "ingredients: !!python/object/apply:os.system [true]"}, "not valid YAML"),
        ({"text": "a: &a [x, x]\nb: &b [*a, *a]\ningredients: [*b, *b]"}, "a recipe has no aliases"),
        ({"text": "[" * 100_000}, "not valid YAML"),
        ({"text": "ingredients: []\n" + "#" * 5_000_000}, "has 5,000,016 bytes; at most 4,194,304 are read"),
        ({"text": "\x00"}, "not valid YAML"),
        ({"base_model": ""}, "'', which is neither"),
        ({"summary": "{"}, "it is not JSON"),
        ({"summary": "[" * 100_000}, "it is not JSON"),
        ({"summary": [1]}, "it states no digest"),
        ({"summary": {"digest": "x"}}, "it states no digest"),
    ],
)
def test_a_recipe_that_no_soup_has_is_refused(tmp_path: Path, said: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError) as error:
        opened(tmp_path, **said)
    assert reason in str(error.value)


def test_values_without_end_are_not_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_yaml, "_MOST_VALUES", 1000)
    with pytest.raises(RecipeError, match="it has more than 1,000 values"):
        opened(tmp_path, text="ingredients: [" + "a," * 2_000_000 + "]")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"dataset": "/etc/passwd"}, "neither a Hub id with a commit nor `local:name`"),
        ({"dataset": "../rows.csv"}, "neither a Hub id with a commit nor `local:name`"),
        ({"revision": "main"}, "neither a Hub id with a commit nor `local:name`"),
        ({"revision": None}, "neither a Hub id with a commit nor `local:name`"),
        ({"dataset": "local:rows.csv", "revision": SHA}, "'local:rows.csv' was a file on the machine"),
        ({"metric": "local:mine"}, "'local:mine' was a file on the machine"),
        ({"metric": "owner/metric"}, "is code"),
        ({"metric": "../mine.py"}, "is code"),
        ({"metric": "here"}, "is a path"),
    ],
)
def test_data_of_a_stranger_are_on_the_hub_or_where_the_caller_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    found = opened(tmp_path, test=[{k: v for k, v in {**ROWS, **data}.items() if v is not None}])
    with pytest.raises(RecipeError) as error:
        found.with_data()
    assert reason in str(error.value)


def test_a_folder_of_the_same_name_is_not_read_in_place_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = opened(tmp_path, test=[ROWS])
    assert found.with_data().test[0].dataset == "acme/rows"
    (tmp_path / "acme" / "rows").mkdir(parents=True)
    with pytest.raises(RecipeError, match="would be read in place of the Hub's data"):
        found.with_data()
    (tmp_path / "acme" / "b").mkdir()
    with pytest.raises(RecipeError, match="would be read in place of the Hub's model"):
        opened(tmp_path)


def test_files_of_another_machine_are_where_the_caller_says(tmp_path: Path) -> None:
    """They keep the names that they have in the soup's tables."""
    data = {**ROWS, "dataset": "local:rows.csv", "revision": SHA, "metric": "local:mine"}
    found = opened(tmp_path, validation=data)
    (scoring,) = found.with_data({"rows.csv": "elsewhere/x.csv", "local:mine": tmp_path / "mine.py"}).validation
    assert (scoring.dataset, scoring.metric) == ("elsewhere/x.csv", str(tmp_path / "mine.py"))
    assert scoring.name == "rows.csv test"
    paths = {"run@ddddddd": "1", "run@ccccccc": "2", "run": "3"}
    assert local_path("local:run", SHA, paths) == Path("2")
    assert local_path("local:other", SHA, paths) is None


def test_scores_are_numbers(tmp_path: Path) -> None:
    said = {"a": {"value": 0.5}, "b": {"value": "x"}, "c": 3, "d": {"value": True}, "e": {"value": 1e300}}
    found = opened(tmp_path, summary={"digest": "d" * 64, "scores": {"soup": said, "other": 3}})
    assert found.scores() == {"a": 0.5}


@pytest.mark.parametrize("said", [{}, {"scores": 3}, {"scores": {"soup": 3}}, {"scores": {"other": {}}}])
def test_a_report_without_scores_has_none(tmp_path: Path, said: dict[str, Any]) -> None:
    assert opened(tmp_path, summary={"digest": "d" * 64, **said}).scores() == {}


@pytest.mark.parametrize("name", ["nothing/../here", "a/b/c", "x" * 200])
def test_what_is_no_soup_is_said_to_be_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="is no soup"):
        open_published(str(tmp_path / "empty"))
    with pytest.raises(ResolveError, match="neither a folder nor a Hub id"):
        open_published(name)
