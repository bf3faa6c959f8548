"""`check`, `cook`, `validation` and `Soup` from Python."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_soup
from hf_soup import IncompatibleError, MergeError, Recipe, RecipeError, ResolveError, Soup
from hf_soup.hub import file_digests as digests
from hf_soup.lineage import AlignedModels
from hf_soup.merging import Workspace
from hf_soup.workflows.cook import preview

# The cards name an ancestor on the Hub, which must not be the real one.
pytestmark = pytest.mark.usefixtures("online")


@pytest.fixture
def models(family: Path) -> list[str]:
    return [str(family / name) for name in "abc"]


def test_a_soup_is_the_mean_of_its_ingredients(models: list[str], family: Path, tmp_path: Path) -> None:
    """By its weights; it loads; and what it says of itself is true."""
    recipe = Recipe(
        ingredients=[models[0], {"model": models[1], "weight": 3}, {"model": models[2], "weight": 0}],
        base_model=str(family / "base"),
    )
    soup = hf_soup.cook(recipe, tmp_path / "soup")
    assert soup.weights == {"local:a": 1.0, "local:b": 3.0}
    parts = [load_file(Path(model) / "model.safetensors") for model in models[:2]]
    for name, tensor in load_file(soup.folder / "model.safetensors").items():
        mean = (parts[0][name].double() + 3 * parts[1][name].double()) / 4
        torch.testing.assert_close(tensor, mean.float(), rtol=1e-6, atol=0)
    loaded = soup.load()
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    assert soup.scores == {}
    opened = Soup.open(soup.folder)
    assert (opened.weights, opened.digest, opened.recipe) == (soup.weights, soup.digest, soup.recipe)
    assert [str(each.weight) for each in soup.recipe.ingredients] == ["1.0", "3.0"]
    assert not [path for path in soup.folder.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]


def test_a_soup_cooked_from_its_own_recipe_has_its_bytes(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Path
) -> None:
    """Every file, the card's and the recipe's included, where nothing was looked up anew."""
    first = hf_soup.cook(models, tmp_path / "1" / "soup")
    second = hf_soup.cook(models, tmp_path / "2" / "soup", threads=1)
    names = [path.relative_to(first.folder) for path in sorted(first.folder.rglob("*")) if path.is_file()]
    assert [path.relative_to(second.folder) for path in sorted(second.folder.rglob("*")) if path.is_file()] == names
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name


def test_models_are_named_in_several_ways(models: list[str], family: Path, tmp_path: Path) -> None:
    """By paths, with weights, and one by itself; the method and the selection are arguments."""
    weighted = hf_soup.cook({models[0]: 0.9, models[1]: 0.1}, tmp_path / "weighted")
    assert weighted.weights == {"local:a": 0.9, "local:b": 0.1}
    by_path = hf_soup.cook({Path(models[0]): 0.9, Path(models[1]): 0.1}, tmp_path / "path")
    recipe = Recipe(ingredients=[{"model": models[0], "weight": 0.9}, {"model": models[1], "weight": 0.1}])
    spelled = hf_soup.cook(recipe, tmp_path / "spelled")
    assert weighted.digest == by_path.digest == spelled.digest
    assert hf_soup.check([Path(model) for model in models]).models.names == ("local:a", "local:b", "local:c")
    assert hf_soup.check({Path(model): 1.0 for model in models}).models.names == ("local:a", "local:b", "local:c")
    assert hf_soup.check(Path(models[0])).verdict == "refused"  # one is no soup
    options: dict[str, Any] = {"method": "slerp", "select": {"name": "uniform"}}
    between = hf_soup.cook(models[:2], tmp_path / "between", **options)
    assert between.recipe.method.name == "slerp"
    changed = hf_soup.cook(recipe, tmp_path / "changed", method="slerp")
    assert (changed.recipe.method.name, changed.weights) == ("slerp", weighted.weights)
    data = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    scored = Recipe(
        ingredients=[Path(models[0]), {"model": Path(models[1])}], base_model=family / "base", validation=data
    )
    assert [each.model for each in scored.ingredients] == models[:2]
    one, several = (hf_soup.score(each, scored) for each in (Path(models[0]), models[:1]))
    assert one == several
    ancestor = hf_soup.check(models, base=family / "base").ancestor
    assert ancestor is not None
    assert ancestor.model == "local:base"
    with pytest.raises(RecipeError, match='it is "much"'):
        hf_soup.check({models[0]: "much", models[1]: 1})  # type: ignore[dict-item]


def test_check_gives_a_verdict(models: list[str], family: Path) -> None:
    lineage = hf_soup.check(models, base=str(family / "base"))
    assert lineage.verdict in ("proven", "likely")
    assert lineage.models.names == ("local:a", "local:b", "local:c")
    assert json.loads(json.dumps(lineage.to_dict()))["verdict"] == lineage.verdict
    alone = hf_soup.check(models[:1])
    assert alone.verdict == "refused"
    with pytest.raises(IncompatibleError, match="needs two models or more"):
        alone.raise_if_refused()


def test_a_preview_writes_nothing(models: list[str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "soup"
    planned = preview(Recipe(ingredients=models, dtype="bfloat16"), out)
    assert planned["files"].keys() == {"model.safetensors"}
    assert planned["dtype"] == "bfloat16"
    assert planned["fetch_bytes"] == planned["cache_disk_bytes"] == 0
    assert planned["output_bytes"] == planned["output_disk_bytes"] == planned["files"]["model.safetensors"]
    assert 0 < planned["output_disk_bytes"] < planned["output_free_bytes"]
    assert not out.parent.exists()
    soup = hf_soup.cook(Recipe(ingredients=models, dtype="bfloat16"), out)
    assert planned["files"]["model.safetensors"] == (soup.folder / "model.safetensors").stat().st_size
    assert {tensor.dtype for tensor in load_file(soup.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((soup.folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No sha256 is known, and reading a whole weight file for one is noted."""
    monkeypatch.setattr(digests, "_known", {})
    found: list[str] = []
    original = hashlib.file_digest

    def noting(file: Any, name: str) -> Any:
        found.extend([Path(file.name).name] if file.name.endswith(".safetensors") else [])
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", noting)
    return found


def pin(folder: str) -> str:
    """What pins a folder of one weight file, worked out by hand."""
    digest = hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()
    return "sha256:" + hashlib.sha256(f"model.safetensors {digest}\n".encode()).hexdigest()


def test_new_folders_are_hashed_in_the_wake_of_the_merge(
    models: list[str], tmp_path: Path, nothing_known: list[str]
) -> None:
    """And read no second time for it; a check reads no whole file at all."""
    lineage = hf_soup.check(models)
    assert [each["revision"] for each in lineage.to_dict()["ingredients"]] == [None] * 3
    assert "local:a  " in str(lineage)
    soup = hf_soup.cook(models, tmp_path / "soup")
    assert nothing_known == []
    assert [leaf.revision for leaf in soup.recipe.ingredients] == [pin(model) for model in models]
    assert [each.revision for each in soup.report.lineage.ingredients] == [pin(model) for model in models]
    known = hf_soup.check(models)
    assert [each["revision"] for each in known.to_dict()["ingredients"]] == [pin(model) for model in models]
    assert f"local:a@{pin(models[0])[7:14]}  " in str(known)


def test_folders_of_one_name_are_told_apart_by_their_weights(
    models: list[str], tmp_path: Path, nothing_known: list[str]
) -> None:
    """For that they are read, so that they are called the same in every run."""
    for number, model in enumerate(models[:2]):
        shutil.copytree(model, tmp_path / str(number) / "run")
    folders = [str(tmp_path / str(number) / "run") for number in range(2)]
    names = hf_soup.check(folders).models.names
    assert names == tuple(f"local:run@{pin(folder)[7:14]}" for folder in folders)
    assert len(nothing_known) >= 2


def test_an_ingredient_that_is_written_to_meanwhile_is_refused(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its header was read, and in the middle of the merge."""
    shutil.copytree(models[0], tmp_path / "live")
    live = tmp_path / "live" / "model.safetensors"
    original = os.pwrite

    def training_goes_on(descriptor: int, data: memoryview, offset: int) -> int:
        live.write_bytes(live.read_bytes()[:-4] + b"\0\0\x80\x3f")
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", training_goes_on)
    with pytest.raises(MergeError, match=r"local:live.*: 'model.safetensors' changed while it was read"):
        hf_soup.cook([*models[1:], str(live.parent)], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_an_ingredient_that_is_removed_at_the_end_is_said(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sha256 is asked for when all of it was read."""
    gone = shutil.copytree(models[0], tmp_path / "gone")
    original = AlignedModels.pin

    def pin(self: AlignedModels) -> None:
        shutil.rmtree(gone)
        original(self)

    monkeypatch.setattr(AlignedModels, "pin", pin)
    with pytest.raises(MergeError, match=r"No such file or directory \('.*gone/model.safetensors'\)"):
        hf_soup.cook([*models[1:], str(gone)], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_a_folder_that_stands_in_for_another_meanwhile_is_refused(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path, and then the right folder's state at the end, would not show that others' weights were averaged."""
    for number in range(2):
        shutil.copytree(models[number], tmp_path / f"run{number}")
    one, other, away = tmp_path / "run0", tmp_path / "run1", tmp_path / "away"
    original = Workspace.open

    def swapping(self: Workspace, *arguments: Any, **options: Any) -> str | None:
        said = original(self, *arguments, **options)
        one.rename(away)
        other.rename(one)
        return said

    monkeypatch.setattr(Workspace, "open", swapping)
    with pytest.raises(MergeError, match=r"'model.safetensors' changed while it was read"):
        hf_soup.cook([str(one), models[2]], tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_warnings_are_logged_and_not_printed(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], log: pytest.LogCaptureFixture
) -> None:
    hf_soup.cook([models[0], models[0]], tmp_path / "soup")
    assert any("copies of one model" in each.message and each.levelname == "WARNING" for each in log.records)
    assert capsys.readouterr() == ("", "")


def test_what_is_wrong_is_one_of_the_errors(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(MergeError, match="exists already"):
        hf_soup.cook(models, tmp_path / "there")
    with pytest.raises(MergeError, match=r"The output '.*so\\x00up' has a zero byte in it\.\nChoose another"):
        hf_soup.cook(models, tmp_path / "so\0up")
    with pytest.raises(ResolveError, match="is not a soup"):
        Soup.open(tmp_path / "there")
    with pytest.raises(RecipeError, match="names no data"):
        hf_soup.score(models, Recipe(ingredients=models))
    with pytest.raises(RecipeError, match="Cannot read"):
        hf_soup.cook(tmp_path / "none.yaml", tmp_path / "soup")


def test_a_soup_of_one_is_a_soup_only_where_it_is_pinned(
    models: list[str], tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """A selection may keep one model; its ``soup.yaml`` is cooked again as any other."""
    with pytest.raises(IncompatibleError, match="needs two models or more"):
        hf_soup.cook(models[:1], tmp_path / "refused")
    revision = hf_soup.check(models[:1]).models.checkpoints[0].revision
    recipe = Recipe(ingredients=[{"model": models[0], "revision": revision}])
    soup = hf_soup.cook(recipe, tmp_path / "soup")
    assert any("[single]" in line for line in log.messages)
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (soup.folder, models[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_left_out_leaves_no_trace_in_the_bytes(models: list[str], family: Path, tmp_path: Path) -> None:
    """The first ingredient has old tensor names and is dropped; only it names the labels. The soup is the leaves'."""
    old, *rest = (tmp_path / name for name in ("old", "b", "c"))
    for folder, model in zip([old, *rest], models, strict=True):
        shutil.copytree(model, folder)
    tensors = load_file(old / "model.safetensors")
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    for folder in rest:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "label" not in k}))
    first = hf_soup.cook(
        Recipe(ingredients=[{"model": str(old), "weight": 0}, *map(str, rest)], base_model=str(family / "base")),
        tmp_path / "first",
    )
    assert json.loads((first.folder / "config.json").read_text())["id2label"] == {"0": "negative", "1": "positive"}
    assert not any("gamma" in name for name in load_file(first.folder / "model.safetensors"))
    leaves = [
        {"model": str(folder), "revision": leaf.revision}
        for folder, leaf in zip(rest, first.recipe.ingredients, strict=True)
    ]
    again = Recipe(**{**first.recipe.to_dict(), "ingredients": leaves})
    second = hf_soup.cook(again, tmp_path / "second")
    assert second.digest == first.digest
    assert (second.folder / "config.json").read_bytes() == (first.folder / "config.json").read_bytes()
