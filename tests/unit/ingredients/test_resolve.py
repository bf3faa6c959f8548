"""Soups of soups: what goes in, with which shares, and what stays whole; with the real client and real models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from starlette.responses import Response

import hf_soup
from hf_soup import Recipe, RecipeError, ResolveError, Soup, check
from hf_soup.checkpoint import open_all
from hf_soup.hub import download as transfer, repo as hub
from hf_soup.ingredients import ResolvedIngredients, resolve as second_order, resolve_ingredients
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Publish = Callable[..., str]


def cook(recipe: Recipe | list[str], out: Path) -> Soup:
    """A soup of the leaves of a recipe."""
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(ingredients=recipe)
    return hf_soup.cook(resolve_ingredients(recipe).recipe, out)


def commit(model: str) -> str:
    return hub.resolve(model).revision


def edited(soup: Soup, target: Path, **changes: Any) -> Path:
    """A copy of a soup with other words in its recipe; what is None is left out."""
    shutil.copytree(soup.folder, target)
    said = yaml.safe_load((target / "soup.yaml").read_text()) | changes
    (target / "soup.yaml").write_text(yaml.safe_dump({key: each for key, each in said.items() if each is not None}))
    return target


def stays(soup: Path | str, **recipe: Any) -> str:
    """The one note about a soup that stays one ingredient beside acme/c."""
    asked = Recipe(ingredients=[str(soup), "acme/c"], **recipe)
    found = resolve_ingredients(asked)
    assert found.recipe is asked
    assert [dict(each) for each in found.groups.values()] == [{0: 1}, {1: 1}]
    assert len(found.checkpoints) == 2
    (note,) = found.notes
    start, found_, reason = note.partition(" is a soup and stays one ingredient: ")
    assert found_
    assert start in (str(soup), f"local:{Path(soup).name}")
    return reason


@pytest.fixture
def zoo(publish: Publish) -> None:
    for name in ("base", "a", "b", "c"):
        publish(name)


@pytest.fixture
def pair(zoo: None, publish: Publish, tmp_path: Path) -> Soup:
    """A soup of a and b in a folder, which is acme/pair too."""
    soup = cook(["acme/a", "acme/b"], tmp_path / "pair")
    publish("pair", soup.folder)
    return soup


@pytest.mark.usefixtures("zoo")
def test_where_nothing_is_a_soup_nothing_changes(online: LocalHub, tmp_path: Path) -> None:
    """Neither the recipe nor what is asked of the Hub."""
    recipe = Recipe(ingredients=["acme/a", "acme/b", {"model": "acme/b@main", "weight": 2}])
    open_all(recipe.ingredients)  # for the addresses that the Hub redirects to, which are used again
    before = len(online.requests)
    opened = open_all(recipe.ingredients)
    asked = [(each.method, each.path, each.range) for each in online.requests[before:]]
    before = len(online.requests)
    found = resolve_ingredients(recipe)
    assert sorted((each.method, each.path, each.range) for each in online.requests[before:]) == sorted(asked)
    assert found.recipe is recipe
    assert [str(each) for each in found.checkpoints] == [str(each) for each in opened]
    short = commit("acme/b")[:7]
    assert found.groups == {"acme/a": {0: 1}, f"acme/b@{short}#1": {1: 1}, f"acme/b@{short}#2": {2: 1}}
    assert found.flatten({"acme/a": 0.3, f"acme/b@{short}#2": 2}) == {0: 0.3, 2: 2.0}
    assert found.notes == ()


def test_shares_are_whole_numbers_only_where_they_are_small() -> None:
    """Products of 16-bit numbers with those are exact in float32, and with larger ones they are not."""
    halves = {0: Fraction(1, 2), 1: Fraction(1, 2)}
    groups = {"x": halves, "y": {0: Fraction(1, 3), 2: Fraction(2, 3)}}
    found = ResolvedIngredients(Recipe(ingredients=["a", "b", "c"]), (), groups)
    assert found.flatten({"x": 1.0, "y": 1.0}) == {0: 5.0, 1: 3.0, 2: 4.0}
    assert found.flatten({"x": 0.1, "y": 1.0})[1] == 0.05


def test_leaves_go_in_once_with_the_sum_of_their_shares(
    pair: Soup, publish: Publish, online: LocalHub, tmp_path: Path
) -> None:
    weighted = Recipe(ingredients=["acme/b", {"model": "acme/c", "weight": 3}])
    publish("heavy", cook(weighted, tmp_path / "heavy").folder)
    recipe = Recipe(
        ingredients=["acme/pair@main", {"model": "acme/heavy", "weight": 2}, {"model": "acme/a", "weight": 0.5}],
        seed=3,
    )
    before = len(online.requests)
    found = resolve_ingredients(recipe)
    # Each model is asked for once, though leaves are in several soups.
    asked = [each.path for each in online.requests[before:] if each.path.startswith("/api/models/")]
    assert sorted(path.split("/")[4] for path in asked) == ["a", "b", "c", "heavy", "pair"]
    assert [(each.model, each.revision, each.weight) for each in found.recipe.ingredients] == [
        ("acme/a", commit("acme/a"), 2.0),  # 1/2 + 1/2, doubled
        ("acme/b", commit("acme/b"), 2.0),  # 1/2 + 2/4, doubled
        ("acme/c", commit("acme/c"), 3.0),  # 2 * 3/4, doubled
    ]
    assert found.recipe.model_copy(update={"ingredients": recipe.ingredients}) == recipe
    assert found.groups == {
        "acme/pair": {0: Fraction(1, 2), 1: Fraction(1, 2)},
        "acme/heavy": {1: Fraction(1, 4), 2: Fraction(3, 4)},
        "acme/a": {0: 1},
    }
    assert found.flatten({"acme/heavy": 2.0}) == {1: 1.0, 2: 3.0}
    assert [str(each) for each in found.checkpoints] == [f"acme/{n}@{commit(f'acme/{n}')[:7]}" for n in "abc"]
    a, b, c = (str(each) for each in found.checkpoints)
    assert found.notes == (
        f"acme/pair is a soup; its leaves go in: {a}, {b}.",
        f"acme/heavy is a soup; its leaves go in: {b}, {c}.",
        "acme/a is in it 2 times: in acme/pair and itself; its shares are added.",
        f"{b} is in it 2 times: in acme/pair and in acme/heavy; its shares are added.",
    )


def is_nearest(found: torch.Tensor, parts: list[torch.Tensor], weights: list[int]) -> bool:
    """Whether no 16-bit number is nearer to the exact mean of 16-bit numbers, whose sums are exact in float64."""
    total = sum(weight * each.double() for weight, each in zip(weights, parts, strict=True))
    less, more = (torch.nextafter(found, torch.tensor(end, dtype=found.dtype)) for end in (-torch.inf, torch.inf))
    here, down, up = ((each.double() * sum(weights) - total).abs() for each in (found, less, more))
    return bool(((here <= down) & (here <= up)).all())


@pytest.fixture
def halves(zoo: None, publish: Publish, family: Path, tmp_path: Path) -> list[str]:
    """The fine-tunes in bfloat16."""
    for name in "abc":
        shutil.copytree(family / name, tmp_path / name)
        tensors = {key: each.bfloat16() for key, each in load_file(family / name / "model.safetensors").items()}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        publish(f"{name}16", tmp_path / name)
    return ["acme/a16", "acme/b16", "acme/c16"]


def test_what_is_flattened_is_rounded_once(halves: list[str], publish: Publish, tmp_path: Path) -> None:
    """A mean of rounded means is often another number in bfloat16; the mean of the leaves is the nearest there is."""
    first = cook(halves[:2], tmp_path / "first")
    published = publish("first", first.folder)
    parts = [load_file(tmp_path / name / "model.safetensors") for name in "abc"]
    for kind, second, weights in (("quarters", [1, 1, 2], [3, 3, 2]), ("thirds", [1, 1, 1], [5, 5, 2])):
        given = [{"model": model, "weight": weight} for model, weight in zip(halves, second, strict=True)]
        other_soup = cook(Recipe(ingredients=given), tmp_path / kind)
        whole = cook([published, publish(kind, other_soup.folder)], tmp_path / f"{kind} whole")
        shares = {name: weight / weights[2] for name, weight in whole.weights.items()}
        assert [shares[name] / shares["acme/c16"] for name in halves] == [weight / weights[2] for weight in weights]
        rounded = [load_file(soup.folder / "model.safetensors") for soup in (first, other_soup)]
        other = entries = 0
        for name, tensor in load_file(whole.folder / "model.safetensors").items():
            assert tensor.dtype == torch.bfloat16
            assert is_nearest(tensor, [part[name] for part in parts], weights), name
            twice = ((rounded[0][name].float() + rounded[1][name].float()) / 2).bfloat16()
            other += int((twice != tensor).sum())
            entries += tensor.numel()
        assert other > 0.05 * entries
        # The resolved recipe holds the leaves, and gives the same bytes; so does the linear soup of the summed weights.
        assert [each.model for each in whole.recipe.ingredients] == halves
        summed = [{"model": model, "weight": weight} for model, weight in zip(halves, weights, strict=True)]
        for number, again in enumerate((whole.recipe, Recipe(ingredients=summed))):
            copy = cook(again, tmp_path / f"{kind} again {number}").folder / "model.safetensors"
            assert copy.read_bytes() == (whole.folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("pair")
def test_a_soup_in_a_soup_is_flattened_too(publish: Publish, pair: Soup, tmp_path: Path) -> None:
    """Where it stood there whole, as when its leaves could not be had then."""
    three = cook(["acme/pair", {"model": "acme/c", "weight": 2}], tmp_path / "three")
    assert three.weights == {"acme/a": 1.0, "acme/b": 1.0, "acme/c": 4.0}
    inner = {"model": "acme/pair", "revision": commit("acme/pair")}
    nested = {"model": "acme/c", "revision": commit("acme/c"), "weight": 2.0}
    folder = edited(three, tmp_path / "nested", ingredients=[inner, nested])
    found = resolve_ingredients(Recipe(ingredients=[publish("nested", folder), "acme/pair"]))
    a, b, c = (str(each) for each in found.checkpoints)
    assert found.groups == {
        "acme/nested": {0: Fraction(1, 6), 1: Fraction(1, 6), 2: Fraction(2, 3)},
        "acme/pair": {0: Fraction(1, 2), 1: Fraction(1, 2)},
    }
    assert [each.weight for each in found.recipe.ingredients] == [2.0, 2.0, 2.0]
    assert found.notes[0] == f"acme/pair is a soup; its leaves go in: {a}, {b}."
    assert found.notes[1] == f"acme/nested is a soup; its leaves go in: acme/pair@{inner['revision'][:7]}, {c}."


#: What a soup's recipe says → why that is no plain mean.
NO_MEAN: list[tuple[dict[str, Any], str]] = [
    ({"method": "ties"}, "its recipe has `method`, which"),
    ({"method": {"name": "linear", "normalize": False}}, "its recipe has `method`, which"),
    ({"heads": "body"}, "its recipe has `heads`, which"),
    ({"vocabulary": "union"}, "its recipe has `vocabulary`, which"),
    ({"select": "greedy"}, "its recipe has `select`, which"),
    ({"tensor_weights": {"classifier.*": [1, 2]}}, "its recipe has `tensor_weights`, which"),
    ({"dtype": "bfloat16"}, "its recipe has `dtype: bfloat16`, its leaves are stored as F32, and"),
    ({"ingredients": ["acme/a", "acme/b"]}, "its soup.yaml does not say which commits its leaves were"),
    ({"ingredients": ["local:a"]}, "'local:a', which is in it, is not on the Hub"),
    ({"ingredients": [f"acme/gone@{'0' * 40}"]}, "a leaf of it cannot be had. 'acme/gone@"),
    ({"ingredients": [f"/etc@{'0' * 40}"]}, "'/etc', which is in it, is not on the Hub"),
    ({"ingredients": None}, "Cannot read its soup.yaml: ingredients: Field required"),
    ({"seed": "x" * (1 << 20)}, "its soup.yaml has 1,048,"),
]


def test_what_is_no_plain_mean_stays_one_ingredient(pair: Soup, tmp_path: Path) -> None:
    """And is averaged as any other model is."""
    below_zero = [{**each, "weight": -1} for each in map(dict, pair.recipe.model_dump()["ingredients"])]
    for number, (changes, reason) in enumerate(
        [*NO_MEAN, ({"ingredients": below_zero}, "its recipe has weights below zero")]
    ):
        soup = edited(pair, tmp_path / f"other-{number}", **changes)
        assert stays(soup).startswith(reason), changes
    weights = cook([str(tmp_path / "other-0"), "acme/c"], tmp_path / "out").weights
    assert weights == {"local:other-0": 1.0, "acme/c": 1.0}
    # A head that was trained on makes it another model: two tensors of forty, one of them a bias.
    for name in ("classifier.weight", "classifier.bias"):
        other = edited(pair, tmp_path / name)
        tensors = load_file(other / "model.safetensors")
        tensors[name] = tensors[name] + 0.5
        save_file(tensors, other / "model.safetensors", {"format": "pt"})
        assert stays(other).startswith("its weights are not the mean of those that its soup.yaml names")


def test_the_recipe_that_it_goes_into_may_need_it_whole(pair: Soup, tmp_path: Path) -> None:
    """Task vectors of two soups are not those of their leaves; and a head is kept as it is."""
    assert stays("acme/pair", method="ties").startswith("with this `method` the recipe makes no")
    assert stays("acme/pair", heads="acme/pair") == "its head is the one that is kept."
    whole = edited(pair, tmp_path / "whole", dtype="bfloat16")
    assert len(resolve_ingredients(Recipe(ingredients=[str(whole), "acme/c"], dtype="float32")).checkpoints) == 3
    # Where only bodies are averaged, what was done with heads does not matter; the kept one is named by its commit.
    headless = edited(pair, tmp_path / "headless", heads="body")
    found = resolve_ingredients(Recipe(ingredients=[str(headless), "acme/c"], heads="acme/c"))
    assert [each.model for each in found.recipe.ingredients] == ["acme/a", "acme/b", "acme/c"]
    assert found.recipe.heads == f"acme/c@{commit('acme/c')}"
    assert found.recipe.head == 2
    assert len(resolve_ingredients(Recipe(ingredients=[str(headless), "acme/c"], heads="body")).checkpoints) == 3
    # What it says of its base is not what the recipe says: that proves nothing, the leaves speak for themselves.
    other = str(edited(pair, tmp_path / "based", base_model="acme/c"))
    assert resolve_ingredients(Recipe(ingredients=[other])).recipe.base_model is None
    assert resolve_ingredients(Recipe(ingredients=[other], base_model="acme/base")).recipe.base_model == "acme/base"


def test_data_that_a_soup_was_selected_on_are_no_test_of_it(zoo: None, family: Path, tmp_path: Path) -> None:
    data = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    soup = cook(Recipe(ingredients=["acme/a", "acme/b"], validation=data, select="best"), tmp_path / "soup")
    for report, count in ((data, 1), ({**data, "dataset": str(family / "report.csv")}, 0)):
        lineage = check(Recipe(ingredients=[str(soup.folder), "acme/c"], test=report))
        assert [reason.code for reason in lineage.reasons].count("selected-on-test") == count


@pytest.mark.usefixtures("zoo")
def test_a_soup_that_was_trained_further_stays_what_it_is(tmp_path: Path) -> None:
    """Its soup.yaml lies beside weights that are no mean any more; one that was only rounded is one."""
    for dtype in ("float32", "bfloat16"):
        soup = cook(Recipe(ingredients=["acme/a", "acme/b"], dtype=dtype), tmp_path / dtype)
        recipe = Recipe(ingredients=[str(soup.folder), "acme/c"], dtype="float32")
        assert len(resolve_ingredients(recipe).checkpoints) == 3
        model = soup.load().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        for _ in range(2):
            ids = torch.arange(5, 15)[None]
            model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
            optimizer.step()
        model.to(getattr(torch, dtype)).save_pretrained(soup.folder)
        reason = stays(soup.folder, dtype="float32")
        assert reason == "its weights are not the mean of those that its soup.yaml names, as after more training."


@pytest.mark.usefixtures("pair")
def test_a_leaf_that_cannot_be_had_leaves_the_soup_whole(
    online: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is gated. But where nobody can say, as without a network, that is the error."""
    HfApi().update_repo_settings("acme/b", gated="auto")
    monkeypatch.setattr(transfer, "_signed", {})
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    said = stays("acme/pair")
    assert said.startswith("a leaf of it cannot be had. 'acme/b@")
    assert "Accept the terms at" in said
    monkeypatch.setenv("HF_TOKEN", online.token)
    recipe = Recipe(ingredients=[str(tmp_path / "pair"), str(tmp_path / "pair")])
    online.intercept = lambda request: Response("busy", 503, {"Retry-After": "0"})
    with pytest.raises(ResolveError, match=r"'acme/a@.*the Hub answered 503"):
        resolve_ingredients(recipe)
    online.intercept = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [each.model for each in resolve_ingredients(recipe).recipe.ingredients] == [
        "acme/a",
        "acme/b",
    ]  # out of the cache
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ResolveError, match=r"'acme/[ab]@.* is not in the cache, and offline mode is on"):
        resolve_ingredients(recipe)


@pytest.mark.usefixtures("zoo")
def test_outputs_without_names_keep_their_order(publish: Publish, family: Path, tmp_path: Path) -> None:
    """Leaves without names of labels have the order that the soup got from its recipe; what comes first decides not."""
    for name in "abc":
        config = json.loads((family / name / "config.json").read_text())
        labels = ["positive", "negative"] if name == "c" else ["LABEL_0", "LABEL_1"]
        config |= {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        shutil.copytree(family / name, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        publish(f"{name}-labels", tmp_path / name)
    named = Recipe(ingredients=["acme/a-labels", "acme/b-labels"], labels=["negative", "positive"])
    soup = str(cook(named, tmp_path / "soup").folder)
    last = resolve_ingredients(Recipe(ingredients=["acme/c-labels", soup]))
    assert last.notes == (
        "local:soup is a soup and stays one ingredient: leaves of it name no labels, and the labels stand in another "
        "order here.",
    )
    first = resolve_ingredients(Recipe(ingredients=[soup, "acme/c-labels"]))
    assert first.recipe.labels == ("negative", "positive")
    assert [each.model for each in first.recipe.ingredients] == ["acme/a-labels", "acme/b-labels", "acme/c-labels"]
    whole = hf_soup.cook(first.recipe, tmp_path / "whole")
    heads = [load_file(tmp_path / name / "model.safetensors")["classifier.bias"] for name in "abc"]
    torch.testing.assert_close(
        load_file(whole.folder / "model.safetensors")["classifier.bias"],
        (heads[0] + heads[1]) / 4 + heads[2].flip(0) / 2,
    )


@pytest.mark.usefixtures("pair")
def test_a_soup_in_itself_is_an_error_and_so_are_too_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No honest Hub has one, as a commit cannot name itself, and no other file passes for the Hub's.

    And a stranger's soup does not have this one ask for a million.
    """
    with monkeypatch.context() as patch:
        patch.setattr(second_order, "MAX_INGREDIENTS", 1)
        with pytest.raises(RecipeError, match="come from more than 1 models"):
            resolve_ingredients(Recipe(ingredients=["acme/pair", "acme/c"]))
    path = tmp_path / "soup.yaml"
    path.write_text(f"ingredients: [{{model: acme/pair, revision: {commit('acme/pair')}}}]\n")
    monkeypatch.setattr("hf_soup.hub.fetch_one", lambda *_: path)
    with pytest.raises(ResolveError, match=r"A soup is in itself, .*: acme/pair → acme/pair\.\nLeave it out"):
        resolve_ingredients(Recipe(ingredients=["acme/pair", "acme/c"]))
