"""Methods of every kind through the engine: on disk and in memory, however the work is cut; overrides and depth."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from plans import files_here, make_plan
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_soup.checkpoint import RowRange, TensorInfo, read_header
from hf_soup.errors import MergeError, RecipeError
from hf_soup.merging import (
    BLOCK_BYTES,
    Materializer,
    Plan,
    StatisticsStore,
    Workspace,
    engine,
    merge,
    plan as plan_module,
    uniform,
)
from hf_soup.merging.arithmetic import Aids, combine
from hf_soup.methods import METHODS, Method, Within
from hf_soup.methods._ranks import cutoff
from hf_soup.methods.linear import linear
from hf_soup.recipe import MethodCall, Mixture, Recipe, require_methods
from hf_soup.recipe.mixture import depths, methods_by_tensor
from hf_soup.workflows.validate import validate

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (1300, 900),  # more than one unit
    "layers.0.weight": (37, 41),
    "layers.0.bias": (41,),
    "layers.1.weight": (37, 41),
    "scale": (),
    "empty": (0, 5),
}


def _whole(tensors: Sequence[Tensor], weights: Sequence[float], *, power: float = 1.0) -> Tensor:
    """The mean, over the norm of the whole tensor."""
    mean = linear(tensors, weights)
    return mean / (1 + mean.double().norm() * power).to(mean.dtype)


def _masked(deltas: Sequence[Tensor], weights: Sequence[float], *, random: Sequence[Tensor]) -> Tensor:
    """Half of the entries of each task vector."""
    return linear([torch.where(r < 0.5, d, 0 * d) for d, r in zip(deltas, random, strict=True)], weights)


def _trimmed(
    deltas: Sequence[Tensor], weights: Sequence[float], *, cutoffs: Sequence[float], density: float = 0.5,
    scope: str = "model",
) -> Tensor:  # fmt: skip
    """The largest entries of each task vector."""
    kept = [torch.where(d.abs().float() >= c, d, 0 * d) for d, c in zip(deltas, cutoffs, strict=True)]
    return linear(kept, weights)


OWN = {
    "whole": Method("whole", _whole, False, None),
    "masked": Method("masked", _masked, True, None, needs_base=True),
    "trimmed": Method("trimmed", _trimmed, True, None, needs_base=True),
}


#: Registered methods of three models and nothing beside them.
ALONE = [name for name, method in METHODS.items() if method.most is None and not method.statistics]
#: Those that look at whole tensors before they get slices.
MEASURED = [name for name in ALONE if METHODS[name].measure]


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in OWN.items():
        monkeypatch.setitem(METHODS.loaded, name, method)
    monkeypatch.setattr(plan_module, "UNIT_BYTES", BLOCK_BYTES)


class Shelf:
    """Three ingredients and their ancestor in files."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **changed: tuple[int, ...]) -> None:
        self.folder, shapes = folder, SHAPES | {f"{name}.weight": shape for name, shape in changed.items()}
        generator = torch.Generator().manual_seed(0)
        self.models: list[dict[str, Tensor]] = []
        self.paths: list[dict[str, Path]] = []
        self.headers: list[dict[str, TensorInfo]] = []
        for number in range(4):
            self.models.append(
                {name: (0.05 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
            )
            self.add(number)

    def add(self, number: int) -> None:
        path = self.folder / f"{number}.safetensors"
        save_file(self.models[number], path)
        data = path.read_bytes()
        header = read_header(lambda _, start, stop: data[start:stop], "m", len(data), "m")
        self.headers[number : number + 1] = [{info.name: info for info in header}]
        self.paths[number : number + 1] = [{"m": path}]

    def plan(self, method: str, weights: Sequence[float] = (0.5, 1.25, 3.0), **options: Any) -> Plan:
        base = METHODS[method].needs_base or any(
            METHODS[m.method].needs_base for m in options.get("overrides", {}).values()
        )
        count = 3 + base
        given = [*weights, *([0.0] if base else [])]
        return make_plan(list("0123")[:count], self.headers[:count], given, method=method, with_base=base, **options)

    def cook(self, plan: Plan, name: str = "soup", threads: int = 2) -> dict[str, Tensor]:
        paths = self.paths[: len(plan.layout.labels)]
        with Workspace(self.folder / name) as staging:
            staging.open(plan.fingerprint, plan.outline())
            merge(
                pickle.loads(pickle.dumps(plan)),
                files_here(paths),
                staging,
                threads=threads,
                quiet=True,
            )
            return load_file(staging.publish() / "model.safetensors")

    def blend(self, plan: Plan) -> dict[str, Tensor]:
        with closing(Materializer(plan.layout, self.paths[: len(plan.layout.labels)])) as materializer:
            return materializer.materialize(plan)

    def deltas(self, name: str) -> list[Tensor]:
        return [self.models[number][name].double() - self.models[3][name].double() for number in range(3)]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Shelf:
    """For methods of whole tensors, some of which decompose them."""
    return Shelf(tmp_path, embed=(13, 17))


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((name, torch.float32) for name in (*OWN, *MEASURED)), ("trimmed", torch.bfloat16), ("sce", torch.bfloat16)],
    ids=str,
)
def test_files_and_memory_hold_the_same_however_the_work_is_cut(
    tmp_path: Path, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path, dtype)
    plan = shelf.plan(method, seed=7)
    once = shelf.cook(plan, "once", threads=1)
    monkeypatch.setattr(engine, "SLICE_ELEMENTS", 10_007)
    monkeypatch.setattr(engine, "_TENSORS_BYTES", 1 << 16)  # so that tensors wait for each other
    assert same(shelf.cook(plan, "again", threads=3), once)
    assert same(shelf.blend(plan), once)


def test_a_method_of_tensors_gets_them_whole(shelf: Shelf) -> None:
    weights = (0.5, 1.25, 3.0)
    for name, tensor in shelf.cook(shelf.plan("whole", parameters={"power": 2.0})).items():
        expected = _whole([model[name] for model in shelf.models[:3]], weights, power=2.0)
        assert torch.equal(tensor, expected.float()), name


def test_rows_that_stand_elsewhere_are_put_together(shelf: Shelf) -> None:
    """And where some are lacking, the tensor is the mean."""
    name = "layers.0.weight"
    info = shelf.headers[0][name]
    shelf.headers[0][name] = info.moved([RowRange(20, 0, 17), RowRange(0, 17, 20)], 37)
    moved = torch.cat([shelf.models[0][name][20:], shelf.models[0][name][:20]])
    tensors = [moved, shelf.models[1][name], shelf.models[2][name]]
    plan = shelf.plan("whole", patched=[name])
    expected = _whole(tensors, (0.5, 1.25, 3.0)).float()
    assert torch.equal(shelf.cook(plan)[name], expected)
    assert torch.equal(shelf.blend(plan)[name], expected)
    shelf.headers[0][name] = info.moved([RowRange(0, 0, 30)], 37)
    plan = shelf.plan("whole", patched=[name])
    written = shelf.cook(plan, "lacking")
    assert same(shelf.blend(plan), written)
    others = linear(tensors[1:], [1.25, 3.0]).float()
    assert torch.equal(written[name][30:], others[30:])


@pytest.mark.parametrize("method", MEASURED)
def test_what_is_measured_is_of_the_rows_in_their_places(tmp_path: Path, method: str) -> None:
    """And of a tensor that some lack rows of, nothing is measured: it is the mean."""
    shelf, name = Shelf(tmp_path), "embed.weight"
    info, rows = shelf.headers[0][name], SHAPES["embed.weight"][0]
    shelf.headers[0][name] = info.moved([RowRange(500, 0, rows - 500), RowRange(0, rows - 500, 500)], rows)
    plan = shelf.plan(method, patched=[name])
    written = shelf.cook(plan, "moved")
    assert same(shelf.blend(plan), written)
    stored = shelf.models[0][name]
    shelf.models[0][name] = torch.cat([stored[500:], stored[:500]])
    shelf.add(0)
    assert same(shelf.cook(shelf.plan(method), "in place"), written)
    shelf.headers[0][name] = info.moved([RowRange(0, 0, 900)], rows)
    lacking = shelf.cook(shelf.plan(method, patched=[name]), "lacking")[name]
    assert torch.equal(lacking[900:], linear([model[name][900:] for model in shelf.models[1:3]], [1.25, 3.0]).float())


def test_random_numbers_depend_on_seed_tensor_and_ingredient_alone(shelf: Shelf) -> None:
    made = {seed: shelf.cook(shelf.plan("masked", seed=seed), str(seed)) for seed in (0, 1)}
    name = "layers.0.weight"
    deltas, masks = shelf.deltas(name), []
    for position in range(3):
        masks.append(uniform(1, name, position, 0, 37 * 41).reshape(37, 41))
    expected = _masked(deltas, (0.5, 1.25, 3.0), random=masks) + shelf.models[3][name].double()
    assert torch.equal(made[1][name], expected.float())
    assert not torch.equal(made[0][name], made[1][name])
    seen = [uniform(s, n, p, 0, 1000) for s in (0, 1) for n in SHAPES for p in range(3)]
    for number, one in enumerate(seen):
        assert 0 <= one.min() < 0.02
        assert 0.98 < one.max() < 1
        # Of a thousand pairs half agree in which half they are; seven deviations are allowed for.
        assert all(abs(((one < 0.5) == (other < 0.5)).sum().item() - 500) < 111 for other in seen[:number])


@pytest.mark.parametrize("begin", [0, 1, 7, 8, 9, 1023])
@pytest.mark.parametrize("count", [0, 1, 8, 100])
def test_random_numbers_may_be_asked_for_in_any_pieces(begin: int, count: int) -> None:
    whole = uniform(3, "w", 2, 0, 2000)
    assert torch.equal(uniform(3, "w", 2, begin, count), whole[begin : begin + count])


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.001, 0.2, 1.0])
def test_cutoffs_are_those_of_all_or_of_each(shelf: Shelf, scope: str, density: float) -> None:
    written = shelf.cook(shelf.plan("trimmed", parameters={"density": density, "scope": scope}))
    every = [torch.cat([shelf.deltas(name)[number].reshape(-1) for name in SHAPES]) for number in range(3)]
    for name, tensor in written.items():
        deltas = shelf.deltas(name)
        found = [cutoff(each, density) for each in (every if scope == "model" else deltas)]
        expected = _trimmed(deltas, (0.5, 1.25, 3.0), cutoffs=found) + shelf.models[3][name].double()
        assert torch.equal(tensor, expected.float()), name


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.29, 0.999, 1.0])
def test_a_cutoff_is_the_kth_largest(density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (1, 2, 100, 10_000):
        values = torch.randn(size, generator=generator, dtype=torch.float64) ** 3
        k = max(1, int(density * size + 1e-9))
        assert cutoff(values, density) == values.abs().float().sort(descending=True).values[k - 1].item()
    equal = torch.tensor([1.0, -1.0, 0.0, 0.0])
    assert [cutoff(equal, each) for each in (0.25, 0.5, 0.75)] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("method", [*OWN, *ALONE])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_the_method_would_hide_is_found(small: Shelf, method: str, bad: float) -> None:
    small.models[1]["layers.1.weight"][3, 5] = bad
    small.add(1)
    with pytest.raises(MergeError, match=r"'layers.1.weight' of 1 holds (nan|inf) at"):
        small.cook(small.plan(method))


@pytest.mark.parametrize("method", [*OWN, *ALONE])
def test_an_infinity_that_all_have_stays(small: Shelf, method: str) -> None:
    for number, model in enumerate(small.models):
        model["layers.1.weight"][3, 5] = -float("inf")
        path = small.paths[number]["m"]
        save_file(model, path)
    written = small.cook(small.plan(method))["layers.1.weight"]
    assert written[3, 5] == -float("inf")
    assert written.isfinite().sum() == written.numel() - 1


def test_tensors_are_combined_in_their_own_ways(shelf: Shelf) -> None:
    """One method needs the ancestor, another does not."""
    own = {
        "embed.weight": MethodCall("task_arithmetic", {"scale": 0.5}),
        "layers.0.weight": MethodCall("whole", {"power": 3.0}),
        "scale": MethodCall("masked", {}),
    }
    plan = shelf.plan("linear", overrides=own, seed=2)
    written = shelf.cook(plan)
    assert same(shelf.blend(plan), written)
    weights = (0.5, 1.25, 3.0)
    tensors = {name: [model[name] for model in shelf.models[:3]] for name in SHAPES}
    assert torch.equal(written["layers.1.weight"], linear(tensors["layers.1.weight"], weights).float())
    assert torch.equal(written["layers.0.weight"], _whole(tensors["layers.0.weight"], weights, power=3.0).float())
    moved = 0.5 * sum(w * d for w, d in zip(weights, shelf.deltas("embed.weight"), strict=True))
    torch.testing.assert_close(
        written["embed.weight"].double() - shelf.models[3]["embed.weight"], moved, rtol=1e-5, atol=1e-8
    )
    assert (
        plan.fingerprint
        != shelf.plan("linear", overrides={**own, "scale": MethodCall("linear", {})}, seed=2).fingerprint
    )


# ---- what recipes say ---------------------------------------------------------------------------------------------


def recipe(**values: Any) -> Recipe:
    return Recipe(ingredients=["acme/a", "acme/b"], **values)


def test_the_first_override_that_matches_counts() -> None:
    asked = recipe(
        overrides=[
            {"tensors": "layers.0.*", "method": {"name": "wise_ft", "alpha": 0.25}},
            {"tensors": "layers.*", "method": "task_arithmetic"},
        ]
    )
    assert Recipe.parse(asked.to_yaml()) == asked
    found = methods_by_tensor(asked, SHAPES)
    assert found["layers.0.bias"] == MethodCall("wise_ft", {"alpha": 0.25})
    assert found["layers.1.weight"] == MethodCall("task_arithmetic", {})
    assert found.keys() == {name for name in SHAPES if name.startswith("layers")}
    with pytest.raises(RecipeError, match=r"`overrides` names 'heads\.\*', and no tensor matches it") as error:
        methods_by_tensor(recipe(overrides=[{"tensors": "heads.*", "method": "wise_ft"}]), SHAPES)
    assert "embed.weight" in str(error.value)


def test_a_parameter_changes_over_the_layers() -> None:
    asked = recipe(method={"name": "wise_ft", "alpha": {"depth": [0.0, 1.0]}})
    require_methods(asked)
    assert Recipe.parse(asked.to_yaml()) == asked
    found = {name: mixing.parameters["alpha"] for name, mixing in methods_by_tensor(asked, SHAPES).items()}
    assert found["embed.weight"] == found["layers.0.weight"] == 0.0
    assert found["layers.1.weight"] == found["scale"] == 1.0
    names = [f"encoder.block.{layer}.w" for layer in range(5)] + [f"decoder.block.{layer}.w" for layer in range(3)]
    assert [depths(names)[name] for name in names] == [0, 0.25, 0.5, 0.75, 1, 0, 0.5, 1]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "tis"}, "`method` is 'tis'"),
        ({"name": "wise_ft", "alfa": 1.0}, "wise_ft has no parameter 'alfa'"),
        ({"name": "wise_ft", "seed": 1}, "wise_ft has no parameter 'seed'"),
        ({"name": "wise_ft", "alpha": float("inf")}, "'alpha' is inf; it is a finite number"),
        ({"name": "wise_ft", "alpha": "x"}, "'alpha' is 'x'; it is of type float"),
        ({"name": "wise_ft", "alpha": True}, "'alpha' is True"),
        ({"name": "wise_ft", "alpha": {"deep": [0, 1]}}, "{depth: [first, …, last]}"),
        ({"name": "wise_ft", "alpha": {"depth": [0.5]}}, "{depth: [first, …, last]}"),
        ({"name": "wise_ft", "alpha": {"depth": [0.5, "x"]}}, "'alpha' is 'x'"),
        ({"name": "bounded", "share": 0.0}, "bounded: 'share' is 0.0; it is in (0, 1]"),
        ({"name": "bounded", "share": [0.5, 1.5]}, "bounded: 'share' is 1.5; it is in (0, 1]"),
        ({"name": "bounded", "how": ["round", "square"]}, "'how' is ['round', 'square']; it is one of round, square"),
        ({"name": "bounded", "how": "up"}, "bounded: 'how' is 'up'; it is one of round, square"),
        ({"name": "pair"}, "pair is defined for 3 ingredients, and there are 2"),
    ],
)
def test_what_is_wrong_with_a_method_is_said(method: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS.loaded, "bounded", Method("bounded", bounded, True, None))
    monkeypatch.setitem(METHODS.loaded, "pair", Method("pair", _whole, False, None, least=3, most=3))
    with pytest.raises(RecipeError) as error:
        require_methods(recipe(method=method))
    assert said in str(error.value)
    assert ("A recipe has 'seed' beside `method`" in str(error.value)) == ("seed" in method)
    with pytest.raises(RecipeError) as error:
        require_methods(recipe(overrides=[{"tensors": "*", "method": method}]))
    assert said.replace("`method`", "`overrides: '*'`") in str(error.value) or isinstance(method.get("share"), list)


def test_an_ingredient_without_a_weight_does_not_count() -> None:
    given = ["acme/a", {"model": "acme/b", "weight": 0}]
    with pytest.raises(RecipeError, match="slerp is defined for 2 ingredients, and there is 1 that has a weight"):
        require_methods(Recipe(ingredients=given, method="slerp"))


@pytest.mark.parametrize("shares", [(-1.0, 2.0), (0.0, 0.0)], ids=str)
def test_shares_of_a_tensor_fit_the_method_that_combines_it(shares: tuple[float, float]) -> None:
    """An override may divide where the method of all others sums, and the other way round."""
    parts = {"tensor_weights": {"a": shares}, "overrides": [{"tensors": "a", "method": "linear"}]}
    asked = recipe(method="task_arithmetic", **parts)
    validate(asked)
    with pytest.raises(RecipeError, match=rf"gives 'a' {shares[0]:g}, {shares[1]:g}, and linear, which combines it,"):
        Mixture.of(asked, {"acme/a": 1.0, "acme/b": 1.0}, ["a", "b"])
    sums = recipe(method="linear", **parts | {"overrides": [{"tensors": "a", "method": "task_arithmetic"}]})
    validate(sums)
    assert Mixture.of(sums, {"acme/a": 1.0, "acme/b": 1.0}, ["a", "b"]).tensor_weights == {"a": shares}


def test_no_recipe_has_methods_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a stranger's may ask for: not more than a thousand combinations are tried."""
    tried: list[float] = []

    def counting(tensors: Sequence[Tensor], weights: Sequence[float], *, share: float = 1.0) -> Tensor:
        tried.append(share)
        return linear(tensors, weights)

    monkeypatch.setitem(METHODS.loaded, "counting", Method("counting", counting, True, None))

    def asked(values: Sequence[Sequence[float]]) -> Recipe:
        methods = [{"name": "counting", "share": {"depth": list(each)}} for each in values]
        return recipe(overrides=[{"tensors": "*", "method": method} for method in methods])

    require_methods(asked([[float(100 * row + each) for each in range(100)] for row in range(50)]))
    assert 900 < len(tried) <= 1000


def bounded(
    tensors: Sequence[Tensor], weights: Sequence[float], *, share: Annotated[float, Within("(0, 1]")] = 1.0,
    how: Literal["round", "square"] = "round",
) -> Tensor:  # fmt: skip
    """Nothing."""
    return linear(tensors, weights)


@pytest.mark.parametrize("method", ["iso_c", "karcher"])
def test_what_a_method_of_tensors_is_done_with_is_let_go(shelf: Shelf, method: str) -> None:
    """So that an ingredient's tensor and its task vector are not held both."""
    plan = shelf.plan(method)
    run = plan.runs[[tensor.name for tensor in plan.layout.tensors].index("layers.0.weight")]
    assert plan.is_whole(run)
    parts = {number: model["layers.0.weight"].reshape(-1) for number, model in enumerate(shelf.models)}
    parts = {number: parts[number] for number in range(len(plan.layout.labels))}
    aids = Aids({}, StatisticsStore(plan))
    kept = combine(plan, run, dict(parts), aids)
    assert torch.equal(combine(plan, run, parts, aids, release=True), kept)
    assert not parts


def test_rows_that_are_not_numbers_are_named_before_anything_is_decomposed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.models[1]["embed.weight"][700, 5] = float("nan")
    shelf.add(1)
    with pytest.raises(MergeError, match=r"'embed.weight' of 1 holds nan at \[700, 5\]"):
        shelf.cook(shelf.plan("iso_c"))
