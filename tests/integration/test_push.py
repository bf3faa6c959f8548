"""A soup on its way to the Hub: one commit, a card that says what is in it, a repo that anybody can load."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import enable_progress_bars
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

from hf_soup import Recipe, Soup, cook
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
Publish = Callable[..., str]

EVIL = "apache-2.0\n---\nevil: true\n---\n# <b>Owned</b> | `x` [y](z)"


@pytest.fixture
def api(online: LocalHub) -> HfApi:
    return HfApi(endpoint=online.endpoint, token=online.token)


def with_card(family: Path, name: str, target: Path, **front: object) -> Path:
    """A copy of a model with other front matter."""
    shutil.copytree(family / name, target)
    (target / "README.md").write_text(f"---\n{yaml.safe_dump({'base_model': 'acme/base', **front})}---\n# {name}\n")
    return target


def front_matter(card: str) -> dict[str, Any]:
    """As anybody's YAML parser sees it: the text between the first two lines of dashes."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = yaml.safe_load(found[1])
    return values


def tables(card: str) -> list[list[list[str]]]:
    """The tables of a card, row by row and cell by cell, as GitHub's Markdown splits and shows them."""
    found: list[list[list[str]]] = [[]]
    for line in card.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found[-1].append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def commits(api: HfApi, repo: str) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo)]


def test_a_soup_is_pushed_once_and_loads_by_its_name(cli: Cli, publish: Publish, api: HfApi, tmp_path: Path) -> None:
    """One commit; none for the same soup; one for another; and plain transformers needs no more than the id."""
    for name in ("base", "a", "b", "c"):
        publish(name)
    done = cli("cook", "acme/a", "acme/b", "-o", "soup", "--quiet", "--push", "acme/soup")
    assert (done.code, done.err) == (0, "")
    enable_progress_bars()
    assert commits(api, "acme/soup") == ["Model soup of 2 models", "initial commit"]
    (tmp_path / "soup" / ".DS_Store").write_text("a desktop's")

    again = cli("push", "soup", "acme/soup")
    assert "holds this soup already" in again.out
    assert len(commits(api, "acme/soup")) == 2

    assert cli("cook", "acme/a", "acme/b", "acme/c", "-o", "better").code == 0
    assert cli("push", "better", "acme/soup", "--json").json["pull_request"] is None
    assert commits(api, "acme/soup") == ["Model soup of 3 models", "Model soup of 2 models", "initial commit"]
    assert ".DS_Store" not in api.list_repo_files("acme/soup")

    weight = AutoModelForSequenceClassification.from_pretrained("acme/soup").bert.encoder.layer[1].output.dense.weight
    written = load_file(tmp_path / "better" / "model.safetensors")["bert.encoder.layer.1.output.dense.weight"]
    assert torch.equal(weight, written)
    label = pipeline("text-classification", model="acme/soup")("good film")[0]["label"]
    assert label in ("negative", "positive")


def test_the_card_is_one_that_the_hub_takes(cli: Cli, publish: Publish, api: HfApi, family: Path) -> None:
    for name in ("base", "a", "b"):
        publish(name)
    report = cli("cook", "acme/a", "acme/b", "-o", "soup", "--data", family / "rows.csv", "--task",
                 "text-classification", "--json", "--push", "acme/soup").json  # fmt: skip
    card = ModelCard.load("acme/soup")
    card.validate()
    assert front_matter(card.content) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": ["acme/a", "acme/b"],
        "base_model_relation": "merge",
        "language": ["en"],
        "tags": ["model-soup", "merge", "hf-soup", "linear"],
    }
    assert report["pushed"]["repo"] == "acme/soup"
    assert re.search(r"^Made with hf-soup \S+, .* on Linux", card.content, re.MULTILINE)
    assert report["digest"] in card.content
    assert "THIS_REPO" not in card.content
    assert 'from_pretrained("acme/soup")' in card.content
    assert "hf download acme/soup soup.yaml" in card.content
    assert "## Licenses" not in card.content
    assert "\n\n\n" not in card.content
    scores, calibrated, ingredients = tables(card.content)
    assert [row[0] for row in calibrated[2:]][:2] == ["soup", "acme/a"]
    assert [row[0] for row in scores[2:]] == [
        "**this soup**", "acme/a (in the soup)", "acme/b (in the soup)",
        "ensemble of all 2: mean of probabilities, 2 times the cost",
        "ensemble of all 2: mean of logits, 2 times the cost",
        "ensemble of 2 that help each other: mean of logits, 2 times the cost",
    ]  # fmt: skip
    assert {len(row) for row in scores} == {2}
    assert [row[2:] for row in ingredients[2:]] == [["50 %", "apache-2.0"]] * 2
    assert "plots/scores.png" in api.list_repo_files("acme/soup")


def test_licences_that_differ_are_listed_and_said(cli: Cli, publish: Publish, family: Path, tmp_path: Path) -> None:
    publish("base")
    publish("a")
    publish("b", with_card(family, "b", tmp_path / "b", license="openrail"))
    assert cli("cook", "acme/a", "acme/b", "-o", "soup").code == 0
    said = cli("push", "soup", "acme/soup")
    assert "warning: the ingredients' licences are not all the same" in said.err
    assert "--license" in said.err
    card = ModelCard.load("acme/soup").content
    front = front_matter(card)
    assert front["license"] == "other"
    assert front["license_name"] == "see-ingredients"
    assert front["license_link"] == "https://huggingface.co/acme/soup#licenses"
    assert tables(card)[-1][2:] == [["acme/a", "apache-2.0"], ["acme/b", "openrail"], ["acme/base", "apache-2.0"]]

    said = cli("push", "soup", "acme/soup", "--license", "mit")
    assert "warning" not in said.err
    front = front_matter(ModelCard.load("acme/soup", ignore_metadata_errors=False).content)
    assert front["license"] == "mit"
    assert not {"license_name", "license_link"} & set(front)

    said = cli("push", "soup", "acme/soup", "--license", "my-own")
    assert said.code == 1
    assert "my-own" in said.err


def test_permissive_licences_are_named_without_a_warning(
    cli: Cli, publish: Publish, family: Path, tmp_path: Path
) -> None:
    publish("base")
    publish("a")
    publish("b", with_card(family, "b", tmp_path / "b", license="mit"))
    said = cli("cook", "acme/a", "acme/b", "-o", "soup", "--push", "acme/soup")
    assert "licences" not in said.err
    card = ModelCard.load("acme/soup").content
    front = front_matter(card)
    assert front["license"] == "other"
    assert front["license_name"] == "apache-2.0-and-mit"
    assert front["license_link"] == "https://huggingface.co/acme/soup#licenses"
    assert tables(card)[-1][2:] == [["acme/a", "apache-2.0"], ["acme/b", "mit"], ["acme/base", "apache-2.0"]]


def test_the_base_has_a_licence_too(cli: Cli, publish: Publish, family: Path, tmp_path: Path) -> None:
    """One that says nothing is not passed over, and `other` is not one licence."""
    publish("base", with_card(family, "base", tmp_path / "base", base_model=None, license="openrail"))
    for name in ("a", "b"):
        publish(name)
    assert cli("cook", "acme/a", "acme/b", "-o", "soup").code == 0
    front = front_matter((tmp_path / "soup" / "README.md").read_text())
    assert front["license"] == "other"
    for name in ("a", "b"):
        other = with_card(family, name, tmp_path / f"{name}-2", license="other", license_name="llama")
        publish(f"{name}-2", other)
    assert cli("cook", "acme/a-2", "acme/b-2", "-o", "soup-2").code == 0
    card = (tmp_path / "soup-2" / "README.md").read_text()
    assert front_matter(card)["license_name"] == "see-ingredients"
    assert ["acme/a-2", "other (llama)"] in tables(card)[-1]


def test_a_base_whose_weights_cannot_be_read_has_its_licence(
    cli: Cli, publish: Publish, family: Path, tmp_path: Path
) -> None:
    """It is on the card, which is there for all, whatever the weights are in."""
    base = shutil.copytree(family / "base", tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    for name in ("base", "a", "b"):
        publish(name, base if name == "base" else None)
    assert cli("cook", "acme/a", "acme/b", "-o", "soup").code == 0
    card = (tmp_path / "soup" / "README.md").read_text()
    assert front_matter(card)["license"] == "apache-2.0"
    assert "not stated" not in card


def test_a_body_without_a_head_has_no_task(cli: Cli, family: Path, tmp_path: Path) -> None:
    """Whatever the cards of those with heads say."""
    models = [str(with_card(family, name, tmp_path / name, pipeline_tag="text-classification")) for name in "ab"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"ingredients": models, "heads": "body"}))
    assert cli("cook", "recipe.yaml", "-o", "soup").code == 0
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "pipeline_tag" not in front_matter(card)
    assert "pipeline(" not in card


def test_nothing_breaks_out_of_a_card(cli: Cli, publish: Publish, family: Path, tmp_path: Path) -> None:
    """What strangers wrote in theirs is text in ours."""
    publish("base")
    name = "x|y `z` <img src=q onerror=alert(1)> [a](b) $m$ ![c](d)"
    evil = with_card(
        family, "a", tmp_path / name, license=EVIL, datasets=["acme/rows", "my own | data", "x\n---\ny"],
        language=["en\n---\nz: 1"], pipeline_tag="x\n---\nevil: 2", tags=[EVIL],
    )  # fmt: skip
    publish("b")
    assert cli("cook", evil, "acme/b", "-o", "soup", "--base", "acme/base").code == 0
    assert cli("push", "soup", "acme/soup").code == 0
    card = ModelCard.load("acme/soup").content
    front = front_matter(card)
    assert set(front) == {
        "license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model",
        "base_model_relation", "datasets", "language", "tags",
    }  # fmt: skip
    assert front["datasets"] == ["acme/rows"]
    assert front["license"] == "other"
    # A folder has no address, so its ancestor stands for it.
    assert front["base_model"] == ["acme/b", "acme/base"]
    for table in tables(card):
        assert {len(row) for row in table} == {len(table[0])}
    body = re.sub(r"```.*?```|\\.", "", card.split("\n---\n", 1)[1], flags=re.DOTALL)
    assert "<" not in body
    assert "evil: true" not in front
    assert not re.search(r"^evil", card, re.MULTILINE)
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])["ingredients"][0]["model"]


def test_every_report_is_in_the_model_index(
    cli: Cli, publish: Publish, api: HfApi, family: Path, tmp_path: Path
) -> None:
    """Of the Hub's data and of local data, in one metric and in another; validation data is no result."""
    for name in ("base", "a", "b"):
        publish(name)
    api.create_repo("acme/rows", repo_type="dataset")
    api.upload_file(
        repo_id="acme/rows", repo_type="dataset", path_in_repo="test.csv", path_or_fileobj=family / "report.csv"
    )  # fmt: skip
    report: list[dict[str, Any]] = [
        {"task": "text-classification", "dataset": "acme/rows", "split": "test", "labels": ["negative", "positive"]},
        {"task": "text-classification", "dataset": str(family / "report.csv"), "metric": "f1", "name": "mine"},
        {"task": "text-classification", "dataset": str(family / "report.csv")},
    ]
    score = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    recipe = {"ingredients": ["acme/a", "acme/b"], "validation": score, "test": report}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("cook", "recipe.yaml", "-o", "soup", "--push", "acme/soup", "--json")
    scores = done.json["scores"]["soup"]
    found = ModelCard.load("acme/soup").data.eval_results
    assert [(each.dataset_type, each.dataset_name, each.metric_type) for each in found] == [
        ("acme/rows", "acme/rows", "accuracy"),
        ("csv", "mine", "f1"),
        ("csv", "local:report.csv", "accuracy"),
    ]
    assert [each.metric_value for each in found] == [round(each["value"], 6) for each in list(scores.values())[1:]]
    assert re.fullmatch("[0-9a-f]{40}", found[0].dataset_revision)
    assert found[1].dataset_revision == found[2].dataset_revision
    assert found[1].dataset_revision.startswith("sha256:")


def test_no_path_of_this_machine_is_pushed(
    cli: Cli, online: LocalHub, api: HfApi, family: Path, tmp_path: Path
) -> None:
    """Nor the token. Folders are called `local:<name>`, and so is local data."""
    recipe = {
        "ingredients": [str(family / "a"), str(family / "b")], "base_model": str(family / "base"),
        "validation": {"task": "text-classification", "dataset": str(family / "rows.csv")},
        "test": [{"task": "text-classification", "dataset": str(family / "report.csv")}],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli("cook", "recipe.yaml", "-o", "soup").code == 0
    assert cli("push", "soup", "acme/mine").code == 0
    pushed = Path(api.snapshot_download("acme/mine", cache_dir=tmp_path / "cache"))
    files = [path for path in pushed.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"README.md", "soup.yaml", "soup.json", "config.json", "scores.png"}
    for path in files:
        content = path.read_bytes()
        for secret in (str(family), str(tmp_path), str(Path.home()) + "/", online.token):
            assert secret.encode() not in content, f"{secret} in {path.name}"
    resolved = Recipe.load(pushed / "soup.yaml")
    assert [ingredient.model for ingredient in resolved.ingredients] == ["local:a", "local:b"]
    assert resolved.base_model is None
    (score,) = resolved.validation
    assert score.dataset == "local:rows.csv"
    card = (pushed / "README.md").read_text()
    assert "\n# mine\n" in card
    assert "--base" not in card, "what to type is for the one who cooked"
    assert "local:a, local:b were folders on the cook's machine: put their paths there first." in card
    assert "local:rows.csv, local:report.csv were files on the cook's machine: put their paths in the place" in card
    assert "base_model" not in front_matter(card)


def test_private_stays_private(cli: Cli, api: HfApi, family: Path) -> None:
    assert cli("cook", family / "a", family / "b", "-o", "soup").code == 0
    assert cli("push", "soup", "acme/hidden", "--private").code == 0
    assert api.model_info("acme/hidden").private
    assert not api.repo_exists("acme/hidden", token=False)


def test_a_repo_that_holds_something_else_is_kept(
    cli: Cli, publish: Publish, api: HfApi, family: Path, tmp_path: Path
) -> None:
    """Unless it is to be replaced."""
    publish("a")
    assert cli("cook", family / "a", family / "b", "-o", "soup").code == 0
    refused = cli("push", "soup", "acme/a")
    assert refused.code == 1
    assert "'acme/a' is taken: it holds something else" in refused.err
    assert "--replace" in refused.err
    assert "soup.json" not in api.list_repo_files("acme/a")
    api.upload_file(repo_id="acme/a", path_in_repo="model-00001-of-00002.safetensors", path_or_fileobj=b"old")
    assert cli("push", "soup", "acme/a", "--replace").code == 0
    pushed = set(api.list_repo_files("acme/a")) - {".gitattributes"}
    assert pushed == {path.relative_to(tmp_path / "soup").as_posix() for path in (tmp_path / "soup").rglob("*")}
    # Old weights of another layout would be loaded beside the new ones.
    api.upload_file(repo_id="acme/a", path_in_repo="model-00001-of-00002.safetensors", path_or_fileobj=b"old")
    assert "not of this soup: model-00001-of-00002.safetensors" in cli("push", "soup", "acme/a").err


def test_a_soup_is_pushed_from_python(online: LocalHub, api: HfApi, family: Path, tmp_path: Path) -> None:
    """And is an ingredient again."""
    soup = cook([str(family / "a"), str(family / "b")], tmp_path / "soup")
    done = soup.push("acme/soup", commit_message="First", token=online.token)
    assert commits(api, "acme/soup")[0] == "First"
    assert done.commit == api.model_info("acme/soup").sha
    assert Soup.open(tmp_path / "soup").digest == soup.digest
    again = cook(["acme/soup", str(family / "c")], tmp_path / "again")
    mixed = load_file(tmp_path / "again" / "model.safetensors")["classifier.weight"]
    parts = [load_file(path / "model.safetensors")["classifier.weight"] for path in (soup.folder, family / "c")]
    torch.testing.assert_close(mixed, (parts[0].double() + parts[1].double()).div(2).float(), rtol=0, atol=0)
    assert again.weights == {"acme/soup": 1.0, "local:c": 1.0}
