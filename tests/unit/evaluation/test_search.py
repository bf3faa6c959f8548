"""Methods with an ancestor, parameters that are chosen, shares of tensors, several validation data: cooked as asked."""

from __future__ import annotations

import gc
import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hf_soup import Recipe, RecipeError, Soup, SoupError, cook
from hf_soup.evaluation import Candidates
from hf_soup.evaluation.gradients import ValidationLoss
from hf_soup.evaluation.model import ReusableModel
from hf_soup.evaluation.statistics import comparison_of
from hf_soup.merging import Materializer, Plan
from hf_soup.recipe import grid, settled

pytestmark = pytest.mark.usefixtures("online")

TITLE = "rows.csv accuracy"


def quietly(recipe: Recipe, out: Path) -> Soup:
    return cook(recipe, out)


@pytest.fixture
def recipe(family: Path, trained: Path) -> Recipe:
    """Without test data, which the picture of scores would have two more panels of."""
    data = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    return Recipe(
        ingredients=[str(trained / name) for name in ("good", "fair", "poor")],
        base_model=str(family / "base"),
        validation=data,
    )


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe(**{**recipe.to_dict(), **changes})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each.double() for name, each in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_wise_ft_lies_between_the_ancestor_and_the_soup(
    alpha: float, expected: float, recipe: Recipe, family: Path, trained: Path, tmp_path: Path
) -> None:
    method = {"name": "wise_ft", "alpha": alpha}
    soup = quietly(changed(recipe, method=method, validation=None), tmp_path / "soup")
    base, mixed = tensors(family / "base"), tensors(soup.folder)
    each = [tensors(trained / name) for name in ("good", "fair", "poor")]
    for name, tensor in mixed.items():
        mean = sum(one[name] for one in each) / 3
        want = (1 - expected) * base[name] + expected * mean
        torch.testing.assert_close(tensor, want, rtol=1e-6, atol=1e-8)


def test_task_arithmetic_adds_and_takes_away(recipe: Recipe, family: Path, trained: Path, tmp_path: Path) -> None:
    given = [{"model": str(trained / "good"), "weight": 1.0}, {"model": str(trained / "fair"), "weight": -0.5}]
    asked = changed(recipe, ingredients=given, method={"name": "task_arithmetic", "scale": 0.4}, validation=None)
    soup = quietly(asked, tmp_path / "soup")
    base, good, fair = (tensors(folder) for folder in (family / "base", trained / "good", trained / "fair"))
    for name, tensor in tensors(soup.folder).items():
        want = base[name] + 0.4 * ((good[name] - base[name]) - 0.5 * (fair[name] - base[name]))
        torch.testing.assert_close(tensor, want, rtol=1e-6, atol=1e-8)
    assert soup.weights == {"local:good": 1.0, "local:fair": -0.5}


def test_a_parameter_is_chosen_on_validation_data(
    recipe: Recipe, family: Path, tmp_path: Path, asked: list[str]
) -> None:
    """All values are tried and told; reports are looked at afterwards; what was chosen is in soup.yaml."""
    values = [0.0, 0.3, 1.0]
    test = {"task": "text-classification", "dataset": str(family / "report.csv"), "name": "test"}
    tried = changed(recipe, method={"name": "wise_ft", "alpha": values}, select="best", test=[test])
    soup = quietly(tried, tmp_path / "soup")
    assert Soup.open(soup.folder).report == soup.report
    curve = soup.report.curve
    assert [point.parameters for point in curve] == [{"alpha": value} for value in values]
    assert curve[2].score == curve[2].scores[TITLE].value == soup.scores["local:good"][TITLE]["value"] == 1.0
    chosen = max(curve, key=lambda point: point.score)
    assert soup.recipe.method.parameters == chosen.parameters
    assert soup.report.scores["soup"] == chosen.scores
    first = asked.index("test accuracy")
    assert set(asked[:first]) == {TITLE}
    assert soup.recipe.base_model == "local:base"
    assert (soup.folder / "plots" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    again = changed(
        soup.recipe, base_model=recipe.base_model, ingredients=[recipe.ingredients[0].model], validation=None, test=[]
    )
    assert quietly(again, tmp_path / "again").digest == soup.digest


def test_while_ingredients_are_selected_the_method_is_an_average(recipe: Recipe, tmp_path: Path) -> None:
    """So greedy's trace is that of the plain soup, whatever is searched afterwards.

    The neutral scale is that of the shares: twice the shares are the same soup, so the same ones are chosen.
    """
    plain = quietly(changed(recipe, select="greedy"), tmp_path / "plain")
    doubled = [{"model": each.model, "weight": 2.0} for each in recipe.ingredients]
    scales = {"name": "task_arithmetic", "scale": [0.1, 0.9]}
    for number, changes in enumerate(
        (
            {"method": {"name": "wise_ft", "alpha": [0.1, 0.9]}},
            {"method": scales},
            {"method": scales, "ingredients": doubled},
        )
    ):
        soup = quietly(changed(recipe, select="greedy", **changes), tmp_path / str(number))
        assert soup.report.trace == plain.report.trace


def test_every_combination_is_a_point(recipe: Recipe) -> None:
    asked = recipe.model_copy(
        update={"method": Recipe(ingredients=["a/b"], method={"name": "x", "a": [1, 2], "b": 3, "c": [4, 5]}).method}
    )
    assert grid(asked.method) == [{"a": a, "b": 3, "c": c} for a in (1, 2) for c in (4, 5)]
    assert settled(asked).method.parameters == {"a": 1, "b": 3, "c": 4}


def test_tensors_have_shares_of_their_own(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    """The first pattern that matches wins; soup.yaml gives the same bytes again."""
    layers = {"classifier.bias": [1, 0, 0], "classifier.*": [0, 3, 1], "*.layer.1.*": [0.25, 0.5, 0.25]}
    asked = changed(recipe, tensor_weights=layers, validation=None)
    soup = quietly(asked, tmp_path / "soup")
    each = [tensors(trained / name) for name in ("good", "fair", "poor")]
    for name, tensor in tensors(soup.folder).items():
        shares = [1.0, 1.0, 1.0]
        if ".layer.1." in name:
            shares = [0.25, 0.5, 0.25]
        if name.startswith("classifier."):
            shares = [1.0, 0.0, 0.0] if name.endswith("bias") else [0.0, 3.0, 1.0]
        want = sum(share * one[name] for share, one in zip(shares, each, strict=True)) / sum(shares)
        torch.testing.assert_close(tensor, want, rtol=1e-6, atol=1e-8)
    folders = [each.model for each in recipe.ingredients]
    again = changed(soup.recipe, ingredients=folders, base_model=recipe.base_model)
    assert quietly(again, tmp_path / "again").digest == soup.digest
    with pytest.raises(RecipeError, match=r"`tensor_weights` names 'clasifier.\*', and no tensor matches it"):
        quietly(changed(asked, tensor_weights={"clasifier.*": [1, 1, 1]}), tmp_path / "wrong")


@pytest.fixture
def astray(recipe: Recipe, trained: Path, tmp_path: Path) -> Recipe:
    """Of three models that went astray and whose mean is the good one, so that none alone is as good as a soup."""
    good, fair = (load_file(trained / name / "model.safetensors") for name in ("good", "fair"))
    shift = fair["classifier.bias"] - good["classifier.bias"]
    ways = {"east": 2.0, "south": -1.0, "north-west": -1.0}
    for name, way in ways.items():
        shutil.copytree(trained / "good", tmp_path / name)
        bias = good["classifier.bias"] + way * shift
        save_file({**good, "classifier.bias": bias}, tmp_path / name / "model.safetensors", {"format": "pt"})
    return changed(recipe, ingredients=[str(tmp_path / name) for name in ways])


@pytest.mark.parametrize("by", ["ingredient", "tensor"])
def test_learned_shares_are_written_and_cooked_again(by: str, astray: Recipe, tmp_path: Path) -> None:
    recipe = astray
    asked = changed(recipe, select={"name": "learned", "by": by, "epochs": 2, "batch_size": 8})
    soup = quietly(asked, tmp_path / "soup")
    history = soup.report.history
    assert [entry.epoch for entry in history] == list(range(len(history)))
    assert sum(history[-1].weights.values()) == pytest.approx(1)
    assert bool(soup.recipe.tensor_weights) == (by == "tensor")
    assert soup.recipe.select.name == "uniform"
    again = changed(soup.recipe, ingredients=[
        {"model": each.model, "weight": mine.weight}
        for each, mine in zip(recipe.ingredients, soup.recipe.ingredients, strict=True)
    ], base_model=recipe.base_model, validation=None)  # fmt: skip
    assert quietly(again, tmp_path / "again").digest == soup.digest
    assert (soup.folder / "plots" / "learned.png").read_bytes()[:4] == b"\x89PNG"


def test_free_shares_are_a_plain_sum(astray: Recipe, tmp_path: Path) -> None:
    select = {"name": "learned", "constrain": "none", "epochs": 2, "batch_size": 8}
    soup = quietly(changed(astray, select=select), tmp_path / "soup")
    assert soup.recipe.method.parameters == {"normalize": False}
    each = [tensors(Path(ingredient.model)) for ingredient in astray.ingredients]
    for name, tensor in tensors(soup.folder).items():
        want = sum(weight * one[name] for weight, one in zip(soup.weights.values(), each, strict=True))
        torch.testing.assert_close(tensor, want, rtol=1e-5, atol=1e-7)


def test_several_validation_data_are_weighed(recipe: Recipe, family: Path, tmp_path: Path) -> None:
    """By the weights that the recipe gives them, each in its own metric."""
    data = recipe.validation[0].model_dump(exclude_defaults=True)
    two = [{**data, "weight": 3}, {**data, "metric": "f1_macro", "name": "again"}]
    soup = quietly(changed(recipe, validation=two, select="best"), tmp_path / "soup")
    assert soup.report.validation == (TITLE, "again f1_macro")
    for step in soup.report.trace:
        scores = soup.scores[step.ingredients[0]]
        assert step.score == pytest.approx((3 * scores[TITLE]["value"] + scores["again f1_macro"]["value"]) / 4)
    assert len(soup.recipe.validation) == 2
    assert Soup.open(soup.folder).report.best.keys() == soup.scores["soup"].keys()


def test_one_model_lies_between_itself_and_its_ancestor(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    """WiSE-FT of a single fine-tune, as it was published."""
    asked = changed(
        recipe, ingredients=[str(trained / "good")], method={"name": "wise_ft", "alpha": 0.5}, validation=None
    )
    soup = quietly(asked, tmp_path / "soup")
    base, good = tensors(Path(str(recipe.base_model))), tensors(trained / "good")
    for name, tensor in tensors(soup.folder).items():
        torch.testing.assert_close(tensor, (base[name] + good[name]) / 2, rtol=1e-6, atol=1e-8)
    with pytest.raises(SoupError, match="two models or more"):
        quietly(changed(asked, method="linear"), tmp_path / "none")


def test_what_is_tried_alone_is_tried_as_it_would_be_written(recipe: Recipe, trained: Path, tmp_path: Path) -> None:
    """A fixed parameter changes a soup of one too, so the trace and the score of the soup agree."""
    for number, method in enumerate(
        ({"name": "task_arithmetic", "scale": 0.01}, {"name": "linear", "normalize": False}, {"name": "wise_ft"})
    ):
        halves = [{"model": each.model, "weight": 0.5} for each in recipe.ingredients]
        soup = quietly(changed(recipe, method=method, select="greedy", ingredients=halves), tmp_path / str(number))
        kept = [step.score for step in soup.report.trace if step.kept]
        assert soup.scores["soup"][TITLE]["value"] == kept[-1]


@pytest.mark.parametrize("method", ["dare_ties", "della", {"name": "slerp", "t": 0.2}], ids=str)
def test_what_is_tried_is_what_would_be_written(
    method: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy tries the best first and recipes have an order of their own, by which masks and ends are given."""
    first = recipe.ingredients[:2] if "slerp" in str(method) else recipe.ingredients
    asked = changed(recipe, method=method, select={"name": "top_k", "k": 2}, ingredients=[*reversed(first)])
    tried: list[dict[str, torch.Tensor]] = []
    original = Materializer.materialize

    def noting(self: Materializer, plan: Plan) -> Any:
        weights = dict(reversed(plan.mixture.weights.items()))
        made = original(self, replace(plan, mixture=replace(plan.mixture, weights=weights)))
        tried.extend([made] if len(weights) > 1 else [])
        return made

    monkeypatch.setattr(Materializer, "materialize", noting)
    soup = quietly(changed(asked, select="greedy"), tmp_path / "soup")
    if len(soup.weights) == 1:
        soup = quietly(changed(asked, select="uniform"), tmp_path / "both")
    written = load_file(soup.folder / "model.safetensors")
    assert any(all(torch.equal(made[name], written[name]) for name in written) for made in tried)


@pytest.mark.parametrize("method", ["model_stock", {"name": "slerp", "t": [0.2, 0.5]}], ids=str)
def test_one_that_is_left_of_those_that_a_method_needs_is_itself(
    method: Any, recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    asked = changed(recipe, method=method, select="best", stability_repeats=2, ingredients=recipe.ingredients[:2])
    soup = quietly(asked, tmp_path / "soup")
    assert soup.weights == {"local:good": 1.0}
    best = load_file(trained / "good" / "model.safetensors")
    assert all(torch.equal(each, best[name]) for name, each in load_file(soup.folder / "model.safetensors").items())
    assert soup.recipe.method.name == "linear"
    ingredient = {"model": str(trained / "good"), "revision": soup.recipe.ingredients[0].revision}
    again = changed(soup.recipe, ingredients=[ingredient], base_model=None, validation=None)
    assert quietly(again, tmp_path / "again").digest == soup.digest


def test_the_same_rows_in_two_metrics_are_one_data_set(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    """Answered once, in the same half, and on the same side of the inner split."""
    data = recipe.validation[0].model_dump(exclude_defaults=True)
    two = [data, {**data, "metric": "f1_macro", "name": "again"}]
    rows: list[int] = []

    @contextmanager
    def watched(self: Candidates, names: Any, some: Any = None) -> Iterator[Any]:
        with through(self, names, some) as descent:
            rows.append(len(descent.strata))
            some_rows = np.array([3, 20, 7, 11])
            for one, loss in zip(np.eye(3), descent.alone(some_rows), strict=True):
                assert descent.loss(one[np.newaxis], some_rows)[0] == pytest.approx(loss, rel=1e-4, abs=1e-6)
            yield descent
        first, second = self.random_halves(3)
        assert [each.tolist() for each in first] == [first[0].tolist()] * 2
        assert sorted([*first[0].tolist(), *second[0].tolist()]) == list(range(24))

    through = Candidates.descent
    monkeypatch.setattr(Candidates, "descent", watched)
    select = {"name": "learned", "epochs": 1, "batch_size": 8}
    quietly(changed(recipe, validation=two, select=select), tmp_path / "soup")
    assert rows == [24]
    assert len(asked) == 4  # three ingredients, and the soup


def test_learning_holds_one_model(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that answered for the ingredients is let go, and the running sum of soups, of halves too.

    And an ingredient that beats what was learned is taken alone.
    """
    built: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load, through = ReusableModel.load, ValidationLoss.gradient

    def watched(self: ReusableModel, given: Any) -> Any:
        model = load(self, given)
        built.append(weakref.ref(model))
        return model

    def gradient(self: ValidationLoss, *arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(each() is not None for each in built))
        return through(self, *arguments)

    monkeypatch.setattr(ReusableModel, "load", watched)
    monkeypatch.setattr(ValidationLoss, "gradient", gradient)
    select = {"name": "learned", "epochs": 1, "lr": 1e-6}
    mean = {"name": "linear", "normalize": True}  # as by default
    soup = quietly(changed(recipe, select=select, method=mean, stability_repeats=2), tmp_path / "soup")
    assert soup.weights == {"local:good": 1.0}
    assert built
    assert set(alive) == {0}


def test_selections_refuse_models_that_know_nothing(
    recipe: Recipe, trained: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Whatever the method, and whoever else is named."""
    poor = str(trained / "poor")
    shutil.copytree(poor, tmp_path / "poor-2")
    asked = changed(recipe, ingredients=[poor, str(tmp_path / "poor-2")])
    unused = [*asked.to_dict()["ingredients"], {"model": str(trained / "good"), "weight": 0}]
    for changes in (
        {"select": "learned"},
        {"select": "greedy"},
        {"select": "pruned", "ingredients": unused},
        {"select": "greedy", "method": {"name": "linear", "normalize": False}},
        {"select": "greedy", "method": {"name": "wise_ft", "alpha": [0.5, 1.0]}},
    ):
        with pytest.raises(SoupError, match=r"No ingredient is better than chance on 'rows\.csv accuracy'"):
            quietly(changed(asked, **changes), tmp_path / "soup")
    cook(changed(asked, select="uniform"), tmp_path / "uniform")
    assert any("No ingredient can be told from chance" in each for each in log.messages)


def test_a_soup_that_loses_to_its_best_ingredient_says_so(
    recipe: Recipe, trained: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """On the data that it was chosen on; selections that keep what helps have nothing to say."""
    poor, good = ({"model": str(trained / name), "weight": w} for name, w in (("poor", 20), ("good", 1)))
    soup = cook(changed(recipe, ingredients=[poor, good], select="uniform"), tmp_path / "soup")
    (doubt,) = [each for each in log.messages if "is worse on" in each]
    assert re.search(r"The soup is worse on 'rows\.csv accuracy' than local:good alone: worse by [\d.]+ points", doubt)
    assert doubt in soup.report.notes
    log.clear()
    assert "Use that one" in doubt
    cook(changed(recipe, ingredients=[poor, good], select="greedy"), tmp_path / "greedy")
    assert not any("is worse on" in each for each in log.messages)


def test_a_loss_that_the_weights_of_the_data_outweigh_is_no_reason_to_leave_the_soup() -> None:
    """What is advised follows the score that was selected by; the loss is said all the same."""
    worse = comparison_of("accuracy", -0.2, -0.3, -0.1, 0.001, 100)
    for soup, advice in (
        (0.9, "Its weighted mean over all validation data is not lower."),
        (0.7, "Use that one"),
    ):
        scores = {"soup": soup, "one": 0.8}
        seen = SimpleNamespace(
            _data=SimpleNamespace(validation=[SimpleNamespace(title="small")]),
            outputs_alone=lambda name: name,
            objective=scores.__getitem__,
        )
        (doubt,) = Candidates._losses(seen, {"small": "one"}, {"small": worse})  # type: ignore[arg-type]
        assert f"worse on 'small' than one alone: {worse.sentence}. {advice}" in doubt


@pytest.mark.parametrize("select", ["greedy", {"name": "learned", "epochs": 1, "batch_size": 8}], ids=str)
def test_the_choice_is_made_again_on_halves(select: Any, recipe: Recipe, tmp_path: Path) -> None:
    """And scored on the other halves; the soup is the one without repeats."""
    plain = quietly(changed(recipe, select=select), tmp_path / "plain")
    soup = quietly(changed(recipe, select=select, stability_repeats=2), tmp_path / "soup")
    assert Soup.open(soup.folder).report == soup.report
    found = soup.report.stability
    assert soup.digest == plain.digest
    assert plain.report.stability is None
    assert found.repeats == len(found.gains) == 2
    assert found.mean == pytest.approx(sum(found.gains) / 2)
    # One is always right, and one hardly ever: in every half.
    assert found.chosen["local:good"] == 2
    assert all(gain <= 0 for gain in found.gains)
    assert soup.recipe.stability_repeats == 0
    assert quietly(changed(recipe, select=select, stability_repeats=2), tmp_path / "again").report.stability == found
    with pytest.raises(RecipeError, match="`stability_repeats` chooses again"):
        quietly(changed(recipe, select="uniform", stability_repeats=2, validation=None), tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "wise_ft", "alpha": [0, "x"]}}, "'alpha' is 'x'; it is of type float, such as 0.5, or"),
        ({"method": {"name": "wise_ft", "alpha": []}}, r"'alpha' is \[\]"),
        (
            {"method": {"name": "wise_ft", "alpha": [0, 1]}, "validation": None},
            "several values, and the recipe has no `val",
        ),
        (
            {"method": {"name": "wise_ft", "alpha": [0, 1]}, "select": {"name": "top_k", "k": [1, 2]}},
            "`select` and `method` both have values to choose from",
        ),
        ({"method": {"name": "wise_ft", "alpha": list(range(1001))}}, "asks to try 1,001 combinations"),
        ({"method": "wise_ft", "base_model": None}, "none is known"),
        ({"ingredients": [{"model": "x/y", "weight": -1}, "x/z"]}, "'weight' is -1, and linear divides by the sum"),
        ({"ingredients": [{"model": "x/y", "weight": -1}, "x/z"], "method": "knots"}, "and knots divides by the sum"),
        ({"tensor_weights": {"a": [-1, 1, 1]}}, "'a' is -1, and linear divides"),
        (
            {"tensor_weights": {"a": [1, 1, 1]}, "select": "greedy"},
            "chooses weights, and the recipe has `tensor_weights`",
        ),
        ({"select": "learned", "method": "wise_ft"}, "`select: learned` learns the weights of an average"),
        ({"select": "learned", "method": {"name": "linear", "normalize": False}}, "here `method` is a plain sum"),
        ({"select": {"name": "learned", "by": "row"}}, "'by' is 'row'; it is one of ingredient, tensor."),
        ({"method": {"name": "wise_ft", "alpha": float("nan")}}, "'alpha' is nan; it is a finite number"),
        ({"method": {"name": "task_arithmetic", "scale": 10**400}}, "it is a finite number"),
        (
            {"select": "greedy", "ingredients": [{"model": "x/y", "weight": -1}, "x/z"], "method": "task_arithmetic"},
            "tries ingredients alone, and one has a weight below zero",
        ),
        (
            {"tensor_weights": {"a": [1, 1, 1]}, "stability_repeats": 3},
            "the recipe has `tensor_weights`, which nobody chooses",
        ),
        ({"select": {"name": "greedy", "accept": "better"}}, "'accept' is 'better'"),
        ({"select": {"name": "top_k", "k": 9}}, "`k` is 9, and there are 3 ingredients"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_contradicts_itself_is_refused(
    changes: dict[str, Any], said: str, recipe: Recipe, tmp_path: Path, trained: Path
) -> None:
    asked = changed(recipe, **changes)
    if "base_model" in changes:
        nameless = tmp_path / "nameless"
        for name in ("good", "fair"):
            (nameless / name).mkdir(parents=True)
            for file in (trained / name).iterdir():
                if file.name != "README.md":
                    (nameless / name / file.name).write_bytes(file.read_bytes())
        asked = changed(asked, ingredients=[str(nameless / "good"), str(nameless / "fair")], validation=None)
    with pytest.raises(SoupError, match=said):
        quietly(asked, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_rows_that_will_not_do_are_refused_before_the_download(
    recipe: Recipe, family: Path, publish: Any, tmp_path: Path
) -> None:
    models = {"ingredients": [publish(name) for name in ("a", "b")], "base_model": publish("base")}
    lines = (family / "rows.csv").read_text().splitlines()
    halves = "`stability_repeats` chooses on halves of the validation rows, and 'few accuracy' has 15"
    for rows, changes, said in (
        (15, {"stability_repeats": 3}, halves),
        (8, {"select": "learned"}, "learned: there are 8 validation rows, and it takes ten at least"),
    ):
        chosen = [*lines[1:][:: len(lines) // rows or 1], *lines[1:]][:rows]
        (tmp_path / f"{rows}.csv").write_text("\n".join(["text,label", *chosen]) + "\n")
        data = {"task": "text-classification", "dataset": str(tmp_path / f"{rows}.csv"), "name": "few"}
        asked = changed(recipe, **models, validation=data, **changes)
        with pytest.raises(SoupError, match=re.escape(said)):
            quietly(asked, tmp_path / "soup")
        assert not list(Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))
