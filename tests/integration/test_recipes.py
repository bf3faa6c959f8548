"""The recipes that come with the package, as they are, from stand-ins of the models and data that they name."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from drawn_data import EMOTIONS, LEAVES, draw_leaf
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from stand_ins import DISTILBERT, JUNK, VIT
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline

from hf_soup import Recipe
from hf_soup.checkpoint import open_checkpoint
from hf_soup.demo import DigitsZoo
from hf_soup.hub import ASSETS
from hf_soup.ingredients import resolve_ingredients
from hf_soup.local_hub import LocalHub
from hf_soup.merging import fetch_weights

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]

RECIPES = Path(__file__).parents[2] / "recipes"
EMOTION = "distilbert-base-uncased-finetuned-emotion"


@dataclass(frozen=True)
class Case:
    """What is expected of a recipe."""

    name: str
    ancestor: str
    labels: tuple[str, ...]
    nameless: tuple[str, ...]
    task: str
    auto: Any
    processing: frozenset[str]
    titles: tuple[str, str]
    path: Path = Path()


CASES = (
    Case(
        name="beans",
        ancestor=VIT,
        labels=LEAVES,
        nameless=("johnnydevriese/vit_beans", "cyanjing/vit-base-beans"),
        task="image-classification",
        auto=AutoModelForImageClassification,
        processing=frozenset({"preprocessor_config.json"}),
        titles=("AI-Lab-Makerere/beans validation accuracy", "AI-Lab-Makerere/beans test accuracy"),
    ),
    Case(
        name="emotion",
        ancestor=DISTILBERT,
        labels=EMOTIONS,
        nameless=(f"rgao/{EMOTION}", f"ffalcao/{EMOTION}"),
        task="text-classification",
        auto=AutoModelForSequenceClassification,
        processing=frozenset({"tokenizer.json", "tokenizer_config.json"}),
        titles=("dair-ai/emotion split validation accuracy", "dair-ai/emotion split test accuracy"),
    ),
)


@dataclass(frozen=True)
class Cooked:
    """A soup of a recipe, and what the command line reported."""

    case: Case
    report: dict[str, Any]
    folder: Path


def plain(name: str) -> str:
    """A label without the case and spaces that the leaf which names it may have."""
    return name.strip().casefold()


@pytest.fixture
def local_hub(zoo: LocalHub) -> LocalHub:
    """The Hub of the whole session."""
    return zoo


@pytest.fixture(scope="module")
def soups() -> dict[str, Cooked]:
    """Those that were cooked so far."""
    return {}


@pytest.fixture
def cook(cli: Cli, soups: dict[str, Cooked], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Cooked]:
    """A recipe, cooked and pushed by the command line for the first test that looks at it."""

    def cook(case: Case) -> Cooked:
        if case.name not in soups:
            folder = tmp_path_factory.mktemp(case.name) / "soup"
            arguments = ["cook", RECIPES / f"{case.name}.yaml", "-o", folder, "--json"]
            soups[case.name] = Cooked(case, cli(*arguments, "--push", f"cooks/{case.name}-soup").json, folder)
        return soups[case.name]

    return cook


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def cooked(request: pytest.FixtureRequest, cook: Callable[[Case], Cooked]) -> Cooked:
    return cook(request.param)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_verdict_is_the_one_that_the_recipe_expects(cli: Cli, case: Case) -> None:
    path = RECIPES / f"{case.name}.yaml"
    assert "proven" in path.read_text().partition("base:")[0]
    assert "ot run against the Hub yet" in path.read_text()
    done = cli("check", path, "--json")
    assert done.code == 0
    assert (done.json["verdict"], done.json["ancestor"]["model"]) == ("proven", case.ancestor)
    assert {reason["code"]: tuple(reason["ingredients"]) for reason in done.json["reasons"]} == {
        "labels-unknown": case.nameless
    }
    assert done.json["alignments"] == []
    assert 0 < done.json["transferred_bytes"] < 3e6


def test_cook_says_what_scripts_rely_on(cooked: Cooked) -> None:
    report, recipe = cooked.report, Recipe.load(RECIPES / f"{cooked.case.name}.yaml")
    models = [ingredient.model for ingredient in recipe.ingredients]
    assert report.keys() >= {"folder", "weights", "scores", "selected", "digest", "seconds", "resumed", "pushed"}
    assert list(report["scores"]) == ["soup", *models, "ensemble", "logit ensemble", "greedy ensemble"]
    for scores in report["scores"].values():
        assert tuple(scores) == cooked.case.titles
        for score in scores.values():
            assert score["metric"] == "accuracy"
            assert score["low"] <= score["value"] <= score["high"]
            assert score["n"] in (48, 96)
    validation = {name: scores[cooked.case.titles[0]]["value"] for name, scores in report["scores"].items()}
    assert min(validation[name] for name in models) > 1.5 / len(cooked.case.labels)
    # Greedy soups are never worse than the best single one where they were chosen.
    assert validation["soup"] >= max(validation[name] for name in models)
    assert set(report["weights"]) == set(report["selected"]) <= set(models)
    assert re.fullmatch("[0-9a-f]{64}", report["digest"])
    assert report["pushed"]["repo"] == f"cooks/{cooked.case.name}-soup"


def test_nothing_of_the_junk_is_in_the_soup(cooked: Cooked, zoo: LocalHub) -> None:
    files = {path.relative_to(cooked.folder).as_posix() for path in cooked.folder.rglob("*") if path.is_file()}
    assert not files & JUNK.keys()
    own = {
        "README.md",
        "config.json",
        "model.safetensors",
        "plots/scores.png",
        "plots/scores-dark.png",
        "soup.json",
        "soup.yaml",
    }
    # What the first leaf has, whichever that is: the choice hangs on the last bits of how the stand-ins were trained.
    listed = HfApi(endpoint=zoo.endpoint).list_repo_files(cooked.report["selected"][0])
    processing = {file for file in listed if ASSETS.fullmatch(file)} - {"config.json"}
    assert processing & cooked.case.processing
    assert files - own == processing


def test_the_soup_names_its_labels(cooked: Cooked) -> None:
    config = json.loads((cooked.folder / "config.json").read_text())
    named = {number: plain(name) for number, name in config["id2label"].items()}
    assert named == {str(number): name for number, name in enumerate(cooked.case.labels)}
    assert config["label2id"] == {name: int(number) for number, name in config["id2label"].items()}
    assert not {"_name_or_path", "torch_dtype", "id2labl"} & config.keys()


def test_the_soup_loads_without_this_package(cooked: Cooked) -> None:
    model, info = cooked.case.auto.from_pretrained(cooked.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    head = load_file(cooked.folder / "model.safetensors")["classifier.weight"]
    assert torch.equal(model.classifier.weight, head)


def test_the_card_says_what_it_is_made_of(cooked: Cooked) -> None:
    text = (cooked.folder / "README.md").read_text()
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    front = yaml.safe_load(found[1])
    assert front["base_model"] == cooked.report["selected"]
    assert front["base_model_relation"] == "merge"
    assert {"model-soup", "merge", "hf-soup"} <= set(front["tags"])
    assert front["pipeline_tag"] == cooked.case.task
    (index,) = front["model-index"]
    (result,) = index["results"]
    assert result["task"] == {"type": cooked.case.task}
    assert result["dataset"]["split"] == "test"
    assert re.fullmatch("[0-9a-f]{40}", result["dataset"]["revision"])
    accuracy = cooked.report["scores"]["soup"][cooked.case.titles[1]]["value"]
    assert result["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": pytest.approx(accuracy, abs=1e-6)}]
    assert cooked.report["digest"] in text
    for model in cooked.report["selected"]:
        assert f"https://huggingface.co/{model}/tree/" in text


@pytest.mark.parametrize("cooked", CASES[:1], ids=lambda case: case.name, indirect=True)
def test_soup_yaml_gives_the_same_bytes(cli: Cli, cooked: Cooked, tmp_path: Path) -> None:
    resolved = Recipe.load(cooked.folder / "soup.yaml")
    assert [ingredient.model for ingredient in resolved.ingredients] == cooked.report["selected"]
    assert all(re.fullmatch("[0-9a-f]{40}", ingredient.revision or "") for ingredient in resolved.ingredients)
    assert (resolved.base_model or "").partition("@")[0] == cooked.case.ancestor
    (score,) = resolved.validation
    assert re.fullmatch("[0-9a-f]{40}", score.revision or "")
    again = cli("cook", cooked.folder / "soup.yaml", "-o", "again", "--json").json
    assert again["digest"] == cooked.report["digest"]
    assert again["scores"]["soup"] == cooked.report["scores"]["soup"]
    both = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "again", cooked.folder)]
    assert both[0] == both[1]


def test_what_was_pushed_loads_by_its_name(cook: Callable[[Case], Cooked], zoo: LocalHub, tmp_path: Path) -> None:
    """And its card is one that the Hub takes."""
    api = HfApi(endpoint=zoo.endpoint, token=zoo.token)
    images = [str(tmp_path / f"{label}.png") for label in (0, 2)]
    for label, path in zip((0, 2), images, strict=True):
        draw_leaf(random.Random(f"new {label}"), label).save(path)
    inputs = {"beans": images, "emotion": ["i feel so happy today", "i am really furious about the news"]}
    found = []
    for soup in map(cook, CASES):
        repo = soup.report["pushed"]["repo"]
        assert api.model_info(repo).sha == soup.report["pushed"]["commit"]
        local = {path.relative_to(soup.folder).as_posix() for path in soup.folder.rglob("*") if path.is_file()}
        assert set(api.list_repo_files(repo)) == local | {".gitattributes"}
        ModelCard.load(repo).validate()
        answers = pipeline(soup.case.task, model=repo)(inputs[soup.case.name], top_k=None)
        found.append([{plain(each["label"]): each["score"] for each in answer} for answer in answers])
    leaves, feelings = found
    assert all(set(answer) == set(LEAVES) for answer in leaves)
    assert all(set(answer) == set(EMOTIONS) for answer in feelings)
    assert [max(answer, key=answer.get) for answer in feelings] == ["joy", "anger"]


def test_a_soup_of_soups_is_one_of_their_leaves(cli: Cli, tmp_path: Path) -> None:
    """The soups are of fine-tunes in `beans.yaml`, of which both have one."""
    beans = Recipe.load(RECIPES / "beans.yaml")
    shares = dict.fromkeys(("hanyp/vit-base-beans",), 1.0)

    def cooked(name: str, recipe: Recipe, *options: str) -> dict[str, Any]:
        (tmp_path / f"{name}.yaml").write_text(recipe.to_yaml())
        report: dict[str, Any] = cli("cook", f"{name}.yaml", "-o", name, "--json", *options).json
        return report

    for name, some in (("vit-beans-soup-1", beans.ingredients[:3]), ("vit-beans-soup-2", beans.ingredients[2:4])):
        soup = Recipe(ingredients=some, base_model=beans.base_model)
        weights = cooked(name, soup, "--push", f"me/{name}")["weights"]
        shares |= {leaf: shares.get(leaf, 0.0) + 2 / len(weights) for leaf in weights}
    found = resolve_ingredients(Recipe.load(RECIPES / "soup-of-soups.yaml"))
    report = cooked("whole", found.recipe)
    unit = report["weights"]["hanyp/vit-base-beans"]
    assert {name: weight / unit for name, weight in report["weights"].items()} == pytest.approx(shares)
    summary = json.loads((tmp_path / "whole" / "soup.json").read_text())
    assert (summary["lineage"]["verdict"], summary["lineage"]["ancestor"]["model"]) == ("proven", VIT)
    assert {each.model for each in Recipe.load(tmp_path / "whole" / "soup.yaml").ingredients} == set(shares)
    parts = [
        {key: each.double() for path in paths.values() for key, each in load_file(path).items()}
        for paths in fetch_weights(found.checkpoints, quiet=True)
    ]
    given = [shares[leaf.model] / sum(shares.values()) for leaf in found.checkpoints]
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        mean = sum(share * part[name] for share, part in zip(given, parts, strict=True))
        torch.testing.assert_close(tensor.double(), mean, rtol=2.0**-23, atol=1e-12)


def test_layers_are_combined_each_in_its_way(cli: Cli, tmp_path: Path) -> None:
    """The stand-in has two: the first goes a third of the way, the second all of it; norms and head are the mean."""
    path = RECIPES / "beans-by-layer.yaml"
    assert "ot run against the Hub yet" in path.read_text()
    assert cli("cook", path, "-o", "soup", "--json").code == 0
    summary = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert (summary["lineage"]["verdict"], summary["lineage"]["ancestor"]["model"]) == ("proven", VIT)
    checkpoints = [*resolve_ingredients(Recipe.load(path)).checkpoints, open_checkpoint(VIT)]
    *parts, origin = [
        {key: each.double() for file in files.values() for key, each in load_file(file).items()}
        for files in fetch_weights(checkpoints, quiet=True)
    ]
    shares = []
    for name, tensor in load_file(tmp_path / "soup" / "model.safetensors").items():
        mean = sum(part[name] for part in parts) / len(parts)
        own = name if name in origin else name.removeprefix("vit.")
        base = mean if name.startswith("classifier") else origin[own]
        share = 1.0 if "layernorm" in name or not ("embeddings" in name or ".layer.0." in name) else 0.33
        shares.append(share)
        torch.testing.assert_close(tensor.double(), base + share * (mean - base), rtol=2.0**-23, atol=1e-7)
    assert {0.33, 1.0} == set(shares)


def test_the_demos_recipe_is_what_the_demo_cooks() -> None:
    assert Recipe.load(RECIPES / "demo-digits.yaml") == DigitsZoo().recipe()
