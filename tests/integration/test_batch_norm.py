"""Statistics of batch normalisation, collected again for the soup, from a recipe to a published soup."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import update_bn
from transformers import ResNetForImageClassification

import hf_soup
from hf_soup import Recipe
from hf_soup.demo.digits_data import splits_of
from hf_soup.merging import digest_of_folder, uniform

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: Rows of the train split, batches of 32, the last of 8.
ROWS, BATCH = 200, 32


@pytest.fixture
def recipe(resnets: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of a run of ResNets and the digits that they were trained on, with changes."""

    def write(select: object = "run_average", **changes: object) -> Path:
        values = {
            "ingredients": [str(resnets / "run")],
            "select": select,
            "calibration": data(resnets / "train.parquet", batch_size=BATCH),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return write


def data(path: Path, **changes: object) -> dict[str, object]:
    return {"task": "image-classification", "dataset": str(path), **changes}


def statistics(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in tensors.items() if name.endswith(STATISTICS)}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def summary(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "soup.json").read_text())
    return found


def batches(size: int = BATCH, seed: int = 0) -> list[torch.Tensor]:
    """The rows in the order that the seed gives, as the processor makes them."""
    images = splits_of(0)["train"][0].sub(0.5).div(0.5)
    order = np.argsort(uniform(seed, "examples", 0, 0, ROWS).numpy(), kind="stable")
    return list(images[torch.from_numpy(order)].split(size))


def updated(folder: str | Path, size: int = BATCH, seed: int = 0) -> dict[str, torch.Tensor]:
    """The statistics that torch's own pass gives a soup."""
    model = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32)
    update_bn(batches(size, seed), model)
    return statistics(model.state_dict())


def require_updated(folder: str | Path, rtol: float = 1e-5, size: int = BATCH, seed: int = 0) -> None:
    ours, theirs = statistics(weights(folder)), updated(folder, size, seed)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 * 6
    for name, each in theirs.items():
        torch.testing.assert_close(ours[name].to(each.dtype), each, rtol=rtol, atol=rtol / 10)


@pytest.fixture
def training() -> Iterator[set[type]]:
    """The types of the layers that ran in train mode."""
    seen: set[type] = set()

    def note(module: torch.nn.Module, *_: object) -> None:
        if module.training:
            seen.add(type(module))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


# ---- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["uniform", {"name": "run_average", "last": 2}])
def test_the_soup_has_the_statistics_of_its_own_weights(
    cli: Cli, recipe: Callable[..., Path], training: set[type], select: object
) -> None:
    done = cli("cook", recipe(select, seed=3), "-o", "soup", "--json")
    assert done.code == 0, done.err
    assert training == {torch.nn.BatchNorm2d}
    require_updated("soup", seed=3)
    assert "note: The running statistics of 6 layers of batch normalisation were collected again" in done.err
    assert "num_batches_tracked" not in done.err
    assert summary("soup")["batch_norm"] == {
        "data": "train.parquet", "layers": 6, "rows": ROWS, "batches": 7, "batch_size": BATCH, "unreached": [],
    }  # fmt: skip
    assert "in one pass over 200 rows of train.parquet" in Path("soup/README.md").read_text()
    assert digest_of_folder(Path("soup")) == done.json["digest"]
    assert Recipe.load("soup/soup.yaml").calibration is not None
    if select == "uniform":  # all else is as without
        assert cli("cook", recipe("uniform", calibration=None, seed=3), "-o", "mean", "--quiet").code == 0
        mean, soup = weights("mean"), weights("soup")
        assert {name for name in mean if not torch.equal(mean[name], soup[name])} == statistics(mean).keys()


def test_its_accuracy_is_better_than_with_the_mean_of_statistics(
    cli: Cli, recipe: Callable[..., Path], resnets: Path
) -> None:
    report = [data(resnets / "test.parquet", name="test", split="train[:300]")]
    again = cli("cook", recipe("uniform", test=report), "-o", "again", "--json")
    mean = cli("cook", recipe("uniform", test=report, calibration=None), "-o", "mean", "--json")
    assert (again.code, mean.code) == (0, 0), again.err
    found = [each.json["scores"]["soup"]["test accuracy"]["value"] for each in (again, mean)]
    assert found[0] > found[1] + 0.03


def test_sixteen_bits_are_rounded_once(cli: Cli, recipe: Callable[..., Path]) -> None:
    method = {"name": "fisher", "examples": 16}
    done = cli("cook", recipe("uniform", method=method, dtype="bfloat16"), "-o", "soup", "--quiet")
    assert done.code == 0, done.err
    soup = weights("soup")
    assert {each.dtype for name, each in soup.items() if not name.endswith(STATISTICS[2])} == {torch.bfloat16}
    # Half a unit in the last place.
    require_updated("soup", rtol=2.0**-8)


def test_neither_shards_nor_threads_nor_interruptions_show(
    cli: Cli, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_soup.evaluation import model
    from hf_soup.merging import layout

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "usable_cores", lambda: 1)
        whole = cli("cook", recipe(), "-o", "whole", "--json", "--quiet").json
    with monkeypatch.context() as patch:
        patch.setattr(model, "usable_cores", lambda: 5)
        patch.setattr(layout, "MAX_FILE_BYTES", 10_000)
        several = cli("cook", recipe(), "-o", "several", "--json", "--quiet").json
    assert len(list(Path("several").glob("*.safetensors"))) > 2
    assert whole["digest"] == several["digest"] == digest_of_folder(Path("several"))
    for where in ("write_folder", "recalibrate_batch_norm"):
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_soup.workflows.cook.{where}", killed)
            with pytest.raises(KeyboardInterrupt):
                hf_soup.cook(Recipe.load(recipe()), tmp_path / where)
        assert not Path(where).exists()
        done = cli("cook", recipe(), "-o", where, "--quiet", "--json").json
        assert done["digest"] == whole["digest"]
        # What was merged is kept; what was written over is merged again.
        assert (done["resumed"] > 0) == (where == "recalibrate_batch_norm")
        assert Path(where, "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_a_layer_that_no_example_reaches_keeps_the_mean(
    cli: Cli, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.resnet.modeling_resnet import ResNetShortCut

    monkeypatch.setattr(ResNetShortCut, "forward", lambda self, hidden: self.convolution(hidden))
    done = cli("cook", recipe(), "-o", "soup", "--json")
    assert done.code == 0, done.err
    assert len(summary("soup")["batch_norm"]["unreached"]) == 1
    assert "note: No example went through resnet.encoder.stages.1.layers.0.shortcut.normalization" in done.err


def test_frozen_statistics_are_constants(cli: Cli, resnets: Path, tmp_path: Path) -> None:
    assert "[batch-norm]" in cli("check", resnets / "run").out
    run = shutil.copytree(resnets / "run", tmp_path / "run")
    for path in run.glob("*/model.safetensors"):
        kept = {name: each for name, each in load_file(path).items() if not name.endswith(STATISTICS[2])}
        save_file(kept, path, {"format": "pt"})
    assert "[batch-norm]" not in cli("check", run).out


def test_frozen_statistics_are_left_alone(
    cli: Cli, recipe: Callable[..., Path], resnets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer without a count of batches, as detectors have them, among others that have one."""
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
    from transformers.models.resnet.modeling_resnet import ResNetShortCut

    make = ResNetShortCut.__init__

    def with_frozen(self: Any, inward: int, outward: int, stride: int = 2) -> None:
        make(self, inward, outward, stride)
        self.normalization = DetrFrozenBatchNorm2d(outward)

    monkeypatch.setattr(ResNetShortCut, "__init__", with_frozen)
    run = shutil.copytree(resnets / "run", tmp_path / "run")
    frozen = "resnet.encoder.stages.1.layers.0.shortcut.normalization."
    for path in run.glob("*/model.safetensors"):
        tensors = load_file(path)
        del tensors[frozen + STATISTICS[2]]
        save_file(tensors, path, {"format": "pt"})
    done = cli("cook", recipe("uniform", ingredients=[str(run)]), "-o", "soup", "--json")
    assert done.code == 0, done.err
    assert summary("soup")["batch_norm"]["layers"] == 5
    assert cli("cook", recipe("uniform", ingredients=[str(run)], calibration=None), "-o", "mean").code == 0
    mean, soup = weights("mean"), weights("soup")
    assert all(torch.equal(mean[name], soup[name]) for name in mean if name.startswith(frozen))


# ---- chosen on validation data -------------------------------------------------------------------------------------


def test_candidates_have_statistics_of_their_own_too(
    cli: Cli, recipe: Callable[..., Path], resnets: Path, training: set[type]
) -> None:
    validation = data(resnets / "validation.parquet", name="validation", split="train[:200]")
    options = {"select": "greedy", "validation": validation, "dtype": "bfloat16"}
    done = cli("cook", recipe(**options), "-o", "soup", "--json")
    assert done.code == 0, done.err
    kept = [step for step in done.json["trace"] if step["kept"]]
    assert len(kept) > 1
    assert done.json["scores"]["soup"]["validation accuracy"]["value"] == pytest.approx(kept[-1]["score"])
    require_updated("soup", rtol=2.0**-8)
    # Again, from what models answered, and without examples: other numbers are not mixed up.
    training.clear()
    again = cli("cook", recipe(**options), "-o", "again", "--json")
    assert again.json["trace"] == done.json["trace"]
    plain = cli("cook", recipe(**options, calibration=None), "-o", "plain", "--json")
    assert plain.json["trace"] != done.json["trace"]
    # Ingredients have the statistics that they were published with.
    assert plain.json["scores"]["local:run/checkpoint-60"] == done.json["scores"]["local:run/checkpoint-60"]


def test_coefficients_are_learned_with_the_mean_of_statistics(
    cli: Cli, recipe: Callable[..., Path], resnets: Path, tmp_path: Path
) -> None:
    """A sum of task vectors would have a variance below zero here, and answers that are no numbers."""
    base = shutil.copytree(resnets / "run" / "checkpoint-40", tmp_path / "base")
    wide = {name: each * (30 if name.endswith("running_var") else 1) for name, each in weights(base).items()}
    save_file(wide, base / "model.safetensors", {"format": "pt"})
    models = [str(resnets / "run" / f"checkpoint-{step}") for step in (45, 50, 60)]
    path = recipe({"name": "entropy", "steps": 2, "init": 0.4}, base_model=str(base), ingredients=models)
    done = cli("cook", path, "-o", "soup", "--quiet")
    assert done.code == 0, done.err
    require_updated("soup")
    resolved = Recipe.load("soup/soup.yaml")
    assert resolved.method.model_dump() == {"name": "task_arithmetic", "scale": 1.0}
    assert {each.tensors for each in resolved.overrides} == {"*.running_mean", "*.running_var"}
    assert not any(name.endswith(("running_mean", "running_var")) for name in resolved.tensor_weights)


def test_a_soup_of_one_model_is_that_model(cli: Cli, recipe: Callable[..., Path], resnets: Path) -> None:
    validation = data(resnets / "validation.parquet", name="validation", split="train[:50]")
    done = cli("cook", recipe("best", validation=validation), "-o", "soup", "--json")
    assert done.code == 0, done.err
    (name,) = done.json["weights"]
    assert summary("soup")["batch_norm"] is None
    theirs = weights(resnets / name.removeprefix("local:"))
    assert all(torch.equal(each, theirs[key]) for key, each in weights("soup").items())


# ---- around it ---------------------------------------------------------------------------------------------------


def test_a_published_soup_is_verified(cli: Cli, recipe: Callable[..., Path], resnets: Path, tmp_path: Path) -> None:
    assert cli("cook", recipe({"name": "run_average", "last": 2}), "-o", "soup", "--quiet").code == 0
    maps = [f"--map=run/checkpoint-{step}={resnets / 'run' / f'checkpoint-{step}'}" for step in (50, 60)]
    maps.append(f"--map=train.parquet={resnets / 'train.parquet'}")
    done = cli("verify", "soup", *maps, "--json")
    assert (done.code, done.json["verdict"], done.json["reasons"]) == (0, "identical", []), done.out
    assert cli("verify", "soup", *maps[:-1], "--json").json["verdict"] == "unverifiable"
    # Another processor's last bits are equivalent, other statistics are not.
    tensors = weights("soup")
    name = "resnet.embedder.embedder.normalization.running_var"
    for change, verdict in ((1e-6, "equivalent"), (1e-2, "different")):
        save_file(
            {**tensors, name: tensors[name] * (1 + change)}, tmp_path / "soup/model.safetensors", {"format": "pt"}
        )
        told = {**summary("soup"), "digest": digest_of_folder(Path("soup"))}
        Path("soup/soup.json").write_text(json.dumps(told))
        done = cli("verify", "soup", *maps, "--json").json
        assert ([each["name"] for each in done["differences"]], done["verdict"]) == ([name], verdict)


def test_streamed_from_the_hub(
    cli: Cli, recipe: Callable[..., Path], publish: Callable[..., str], resnets: Path
) -> None:
    names = [publish(f"step-{step}", resnets / "run" / f"checkpoint-{step}") for step in (50, 60)]
    done = cli("cook", recipe("uniform", ingredients=names), "--stream", "-o", "soup", "--json")
    assert done.code == 0, done.err
    require_updated("soup")


def test_what_would_be_done_is_said(cli: Cli, recipe: Callable[..., Path]) -> None:
    said = "collect   statistics of 6 layers of batch normalisation again, with train.parquet"
    done = cli("cook", recipe(), "--dry-run", "-o", "soup")
    assert (done.code, said in done.out) == (0, True), done.out
    assert "[batch-norm]" not in done.err
    plain = cli("cook", recipe("uniform", calibration=None), "--dry-run", "-o", "soup")
    assert (plain.code, "collect " in plain.out) == (0, False)
    assert "warning: [batch-norm] The model has 6 layers of batch normalisation, such as 'resnet." in plain.err
    assert "docs/lineage.md#batch-norm" in plain.err


def test_barriers_are_measured_with_them(cli: Cli, recipe: Callable[..., Path], resnets: Path) -> None:
    validation = data(resnets / "validation.parquet", name="validation", split="train[:200]")
    steps = [str(resnets / "run" / f"checkpoint-{step}") for step in (40, 60)]
    found = []
    for examples in ({}, {"calibration": None}):
        path = recipe("uniform", ingredients=steps, validation=validation, **examples)
        (pair,) = hf_soup.connectivity(path).pairs
        found.append(pair.height)
    assert found[0] < found[1]


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_averages_of_a_run_need_examples(cli: Cli, recipe: Callable[..., Path], resnets: Path) -> None:
    for done in (
        cli("cook", resnets / "run", "--select", "run_average", "-o", "soup", "--quiet"),
        cli("cook", recipe(calibration=None), "-o", "soup", "--dry-run"),
    ):
        assert (done.code, Path("soup").exists()) == (1, False)
        assert "of batch normalisation, such as 'resnet." in done.err
        assert "run_average is defined with a pass over training data that collects them again: add `cal" in done.err


def test_one_example_has_no_variance(cli: Cli, recipe: Callable[..., Path], resnets: Path) -> None:
    done = cli("cook", recipe(calibration=data(resnets / "train.parquet", split="train[:1]")), "-o", "soup")
    assert done.code == 1
    assert "The examples 'train.parquet train[:1]' are one row, which has no variance" in done.err
    assert not Path(".soup.cooking").exists()  # nothing was begun


def test_a_batch_of_one_row_and_one_place(cli: Cli, recipe: Callable[..., Path], resnets: Path) -> None:
    for rows, size, alone in (("[:33]", 32, "1 of 2"), ("[:5]", 1, "5 of 5")):
        examples = data(resnets / "train.parquet", split=f"train{rows}", batch_size=size)
        done = cli("cook", recipe(calibration=examples), "-o", "soup")
        assert (done.code, Path("soup").exists()) == (1, False)
        assert f"{alone} batches of the examples" in done.err
        assert "Set a `batch_size` of the examples that leaves no row alone." in done.err
    # The merge is kept.
    done = cli("cook", recipe(), "-o", "soup", "--json")
    assert done.json["resumed"] > 0


def test_statistics_that_are_not_finite(cli: Cli, recipe: Callable[..., Path], resnets: Path, tmp_path: Path) -> None:
    run = shutil.copytree(resnets / "run", tmp_path / "run")
    for path in run.glob("*/model.safetensors"):
        tensors = load_file(path)
        tensors["resnet.embedder.embedder.convolution.weight"] *= 1e37
        save_file(tensors, path, {"format": "pt"})
    done = cli("cook", recipe(ingredients=[str(run)]), "-o", "soup")
    assert (done.code, Path("soup").exists()) == (1, False)
    assert "'resnet.embedder.embedder.normalization' is not finite on the examples 'train.parquet'" in done.err


def test_a_type_that_cannot_hold_them(cli: Cli, recipe: Callable[..., Path], resnets: Path, tmp_path: Path) -> None:
    run = shutil.copytree(resnets / "run", tmp_path / "run")
    for path in run.glob("*/model.safetensors"):
        tensors = load_file(path)
        tensors["resnet.embedder.embedder.convolution.weight"] *= 1e4
        save_file(tensors, path, {"format": "pt"})
    done = cli("cook", recipe(ingredients=[str(run)], dtype="float16"), "-o", "soup")
    assert (done.code, Path("soup").exists()) == (1, False)
    assert "normalization.running_var' would be " in done.err
    assert "which float16 cannot hold" in done.err


def test_a_soup_that_fails_on_the_examples(
    cli: Cli, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(ResNetForImageClassification, "forward", fails)
    done = cli("cook", recipe(), "-o", "soup")
    assert (done.code, Path("soup").exists()) == (1, False)
    assert "Error: The soup fails on the examples 'train.parquet': out of memory" in done.err


def test_examples_that_a_report_looks_at(cli: Cli, recipe: Callable[..., Path], resnets: Path) -> None:
    done = cli("cook", recipe(test=[data(resnets / "train.parquet")]), "-o", "soup")
    assert done.code == 1
    assert "`calibration` are the rows of the test data 'train.parquet accuracy'" in done.err
