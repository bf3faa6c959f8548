"""Averages over one run: what a real Trainer wrote, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_soup
from hf_soup import Recipe, RecipeError, ResolveError, Update
from hf_soup.ingredients import expand_runs

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Cli = Callable[..., Any]
STEPS = [2, 4, 6, 8, 10, 12]


@pytest.fixture(scope="session")
def trainer_folder(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of transformers' Trainer, with optimizer, scheduler and random states, and a tokenizer."""
    from transformers import BertForSequenceClassification, BertTokenizer, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("runs") / "exp1"
    tokenizer = BertTokenizer.from_pretrained(family / "base")
    lines = [line.rsplit(",", 1) for line in (family / "rows.csv").read_text().splitlines()[1:]]
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS[-1], save_steps=2, per_device_train_batch_size=8, learning_rate=1e-3,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    model = BertForSequenceClassification.from_pretrained(family / "base")
    rows = [{**tokenizer(text), "labels": int(label)} for text, label in lines]
    Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"):
        assert (folder / "checkpoint-2" / name).is_file()
    return folder


@pytest.fixture
def run(trainer_folder: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(trainer_folder, tmp_path / "runs" / "exp1")


def mean(run: Path, steps: Sequence[int], shares: Mapping[int, float] | None = None) -> dict[str, torch.Tensor]:
    """The mean of checkpoints in float64, rounded once."""
    total: dict[str, torch.Tensor] = {}
    each = dict.fromkeys(steps, 1.0) | dict(shares or {})
    for step in steps:
        for name, tensor in load_file(run / f"checkpoint-{step}" / "model.safetensors").items():
            total[name] = total.get(name, 0.0) + each[step] * tensor.double()
    return {name: (tensor / sum(each.values())).float() for name, tensor in total.items()}


def require_mean(soup: Path, run: Path, steps: Sequence[int], shares: Mapping[int, float] | None = None) -> None:
    found, expected = load_file(soup / "model.safetensors"), mean(run, steps, shares)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9)


def steps_in(recipe: Recipe) -> list[int]:
    return [int(each.model.rpartition("-")[2]) for each in recipe.ingredients]


def picked(run: Path, **method: Any) -> list[int]:
    return steps_in(expand_runs(Recipe(ingredients=[str(run)], select={"name": "run_average", **method}))[0])


# ---- which checkpoints -------------------------------------------------------------------------------------------


def test_the_last_checkpoints_in_the_order_of_their_steps(cli: Cli, run: Path, tmp_path: Path) -> None:
    done = cli("cook", run, "--select", "run_average", "--set", "last=5", "-o", "soup", "--quiet")
    assert done.code == 0
    assert (
        "exp1 is a run: 5 of its 6 checkpoints go in, exp1/checkpoint-4, exp1/checkpoint-6, exp1/checkpoint-8"
        in done.err
    )
    assert "base-unknown" not in done.err
    require_mean(tmp_path / "soup", run, STEPS[1:])
    recipe = Recipe.load(tmp_path / "soup" / "soup.yaml")
    assert [each.model for each in recipe.ingredients] == [f"local:exp1/checkpoint-{step}" for step in STEPS[1:]]
    assert all((each.revision or "").startswith("sha256:") for each in recipe.ingredients)
    assert (recipe.method.name, recipe.select.name) == ("linear", "uniform")
    said = "".join(path.read_text() for path in (tmp_path / "soup").glob("*.[jym]*") if path.suffix != ".safetensors")
    assert str(tmp_path) not in said, "paths are nobody's business"
    names = {path.name for path in (tmp_path / "soup").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= names
    assert not names & {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    ema = ("--select", "run_average", "--set", "schedule=ema", "--set", "decay=0.5")
    assert cli("cook", run, *ema, "-o", "moving", "--quiet").code == 0
    require_mean(tmp_path / "moving", run, STEPS, {step: 2.0**place for place, step in enumerate(STEPS)})


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, STEPS),
        ({"last": 2}, [10, 12]),
        ({"stride": 2}, [4, 8, 12]),
        ({"last": 2, "stride": 3}, [6, 12]),
        ({"last": 0, "schedule": "ema", "decay": 0.9}, STEPS),
        ({"last": [2, 4]}, [6, 8, 10, 12]),
        ({"last": [2, 0], "stride": 2}, [4, 8, 12]),
        ({"last": 2, "stride": [1, 2]}, [8, 10, 12]),
    ],
    ids=str,
)
def test_which_ones(trainer_folder: Path, method: dict[str, Any], expected: list[int]) -> None:
    assert picked(trainer_folder, **method) == expected


def test_only_folders_of_checkpoints_count(run: Path) -> None:
    """By number, not by letters; whatever else lies there is not looked at."""
    (run / "checkpoint-4").rename(run / "checkpoint-1000")
    (run / "checkpoint-99999").write_text("a file")
    (run / "checkpoint-best").mkdir()
    (run / "tmp-checkpoint-7").mkdir()
    (run / "checkpoint-٣").mkdir()
    assert picked(run) == [2, 6, 8, 10, 12, 1000]


@pytest.mark.parametrize(
    "selection", [{"last": 2}, {"last": [2, 2]}, {"schedule": "ema", "decay": 0.5, "last": 2}], ids=str
)
def test_named_checkpoints_are_taken_by_their_steps_and_one_of_weight_zero_is_none(
    trainer_folder: Path, selection: dict[str, Any]
) -> None:
    """A shell puts 10 before 2."""
    models = [{"model": str(trainer_folder / f"checkpoint-{step}"), "weight": step != 10} for step in (10, 12, 2, 8)]
    recipe, _ = expand_runs(Recipe(ingredients=models, select={"name": "run_average", **selection}))
    assert steps_in(recipe) == [8, 12]
    ratio = 0.5 if "decay" in selection else 1.0
    assert [each.weight for each in recipe.ingredients] == [ratio, 1.0]


# ---- half-written ------------------------------------------------------------------------------------------------


def _cut(last: Path) -> None:
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _cut_early(last: Path) -> None:
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5])


def _shards(last: Path) -> None:
    (last / "model.safetensors").unlink()
    index = {"weight_map": {"bert.pooler.dense.bias": "model-00002-of-00002.safetensors"}}
    (last / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda last: (last / "config.json").unlink(), "it has no config.json"),
        (lambda last: (last / "config.json").write_text('{"model_type'), "config.json is not valid JSON"),
        (lambda last: (last / "model.safetensors").unlink(), "it has no weights"),
        (_cut, "model.safetensors is not a valid safetensors file"),
        (_cut_early, "it has 5 bytes"),
        (_shards, "names 1 files that are not there"),
        (lambda last: [each.unlink() for each in last.iterdir()], "it has no config.json"),
        (lambda last: (last / "trainer_state.json").unlink(), "trainer_state.json, which is written last"),
    ],
    ids=["config", "half a config", "weights", "cut", "cut in the header", "shards", "empty", "state"],
)
def test_a_half_written_last_one_is_left_out(run: Path, spoil: Callable[[Path], Any], why: str) -> None:
    spoil(run / "checkpoint-12")
    recipe, notes = expand_runs(Recipe(ingredients=[str(run)], select={"name": "run_average", "last": 2}))
    assert steps_in(recipe) == [8, 10]
    said = next(note.message for note in notes if note.code == "half-written")
    assert said.startswith("Left out as half-written: exp1/checkpoint-12: ")
    assert why in said
    assert str(run.parent) not in said


def test_the_command_line_says_what_it_leaves_out(cli: Cli, run: Path, tmp_path: Path) -> None:
    _cut(run / "checkpoint-12")
    done = cli("cook", run, "--select", "run_average", "--set", "last=2", "-o", "soup", "--quiet")
    assert done.code == 0
    assert "note: [half-written] Left out as half-written: exp1/checkpoint-12: model.safetensors is not" in done.err
    require_mean(tmp_path / "soup", run, [8, 10])
    assert "[half-written]" in cli("check", run).out


def test_one_that_is_broken_elsewhere_is_an_error(cli: Cli, run: Path) -> None:
    """Nobody is writing to it any more, so something else is wrong; unless it does not go in."""
    _cut(run / "checkpoint-8")
    done = cli("cook", run, "--select", "run_average", "-o", "soup", "--quiet")
    assert done.code == 1
    assert "checkpoint-8': model.safetensors is not a valid safetensors file" in done.err
    assert cli("cook", run, "--select", "run_average", "--set", "last=2", "-o", "soup", "--quiet").code == 0


def test_what_all_have_is_no_sign_of_being_half_written(cli: Cli, run: Path) -> None:
    for each in run.iterdir():
        (each / "model.safetensors").rename(each / "pytorch_model.bin")
    done = cli("cook", run, "--select", "run_average", "-o", "soup", "--quiet")
    assert done.code == 1
    assert "half-written" not in done.err
    assert "a pickle can run code" in done.err


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["last=-1"], "run_average: 'last' is -1; it is in [0, inf)."),
        (["last=2.5"], "run_average: 'last' is 2.5; it is of type int"),
        (["last=all"], "run_average: 'last' is 'all'; it is of type int"),
        (["stride=0"], "run_average: 'stride' is 0; it is in [1, inf)."),
        (["newest=5"], "linear has no parameter 'newest'."),
        (["last={depth: [1, 2]}"], "run_average: 'last' is {'depth': [1, 2]}"),
        (["last=1"], "run_average averages checkpoints, and one goes in: "),
        (["stride=6"], "run_average averages checkpoints, and one goes in: "),
        (["decay=0.5"], "`decay` is 0.5, which only `schedule: ema` has; `schedule` is uniform."),
        (["last=[2, 3]"], "the recipe has no `validation` to choose by"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_said(cli: Cli, run: Path, settings: list[str], said: str) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    done = cli("cook", run, "--select", "run_average", *options, "-o", "soup", "--quiet")
    assert done.code == 1
    assert said in done.err


def test_no_checkpoint_and_one(cli: Cli, run: Path, family: Path) -> None:
    done = cli("cook", family / "a", "--select", "run_average", "-o", "soup", "--quiet")
    assert done.code == 1
    assert "has no `checkpoint-…` folders, and run_average averages the checkpoints in one" in done.err
    for name in ("exp11", "./exp11", "acme/a"):  # a mistyped path, and one model of the Hub
        done = cli("cook", name, "--select", "run_average", "-o", "soup", "--quiet")
        assert done.code == 1
        assert f"'{name}' is no folder here, and run_average averages the checkpoints in one" in done.err
    for step in STEPS[2:]:
        shutil.rmtree(run / f"checkpoint-{step}")
    _cut(run / "checkpoint-4")
    done = cli("cook", run, "--select", "run_average", "-o", "soup", "--quiet")
    assert done.code == 1
    assert "checkpoint-2. Left out as half-written: exp1/checkpoint-4:" in done.err
    shutil.rmtree(run / "checkpoint-4")
    assert "one goes in" in cli("cook", run, "--select", "run_average", "-o", "soup", "--quiet").err
    done = cli("cook", run, "-o", "soup", "--quiet")
    assert done.code == 1
    assert "exp1 is a run: its checkpoints go in, exp1/checkpoint-2." in done.err
    assert "A soup needs two models or more" in done.err


def test_more_than_there_are_is_all_of_them(cli: Cli, run: Path, tmp_path: Path) -> None:
    done = cli("cook", run, "--select", "run_average", "--set", "last=50", "-o", "soup", "--quiet")
    assert done.code == 0
    assert "exp1 is a run: its checkpoints go in" in done.err
    require_mean(tmp_path / "soup", run, STEPS)


def test_shares_by_ingredient_do_not_fit_a_run(trainer_folder: Path, family: Path) -> None:
    layers = {"*": (1.0, 2.0)}
    with pytest.raises(RecipeError, match="`tensor_weights` gives each ingredient its weights"):
        expand_runs(Recipe(ingredients=[str(trainer_folder)], tensor_weights={"*": (1.0,)}))
    for models in ([str(trainer_folder), str(family / "a")], [str(family / "a"), str(family / "b")]):
        with pytest.raises(RecipeError, match="`select: run_average` chooses weights, and the recipe has"):
            expand_runs(Recipe(ingredients=models, tensor_weights=layers, select="run_average"))


def test_a_run_of_weight_zero_is_left_out(trainer_folder: Path, family: Path, run: Path) -> None:
    models = [{"model": str(run), "weight": 0}, str(family / "a"), str(family / "b")]
    found, _ = expand_runs(Recipe(ingredients=models, select={"name": "run_average", "last": 2}))
    assert [Path(each.model).name for each in found.ingredients] == ["a", "b"]


# ---- what a folder stands for ------------------------------------------------------------------------------------


def test_a_model_at_the_top_is_one_unless_a_run_is_averaged(cli: Cli, run: Path, family: Path, tmp_path: Path) -> None:
    """As after `save_model`."""
    for each in (run / "checkpoint-12").glob("*.json"):
        shutil.copy(each, run)
    shutil.copy(run / "checkpoint-12" / "model.safetensors", run)
    done = cli("cook", run, family / "a", "-o", "soup", "--quiet")
    assert done.code == 0
    assert "local:exp1 1, local:a 1" in done.out
    assert "training-run" not in done.err
    done = cli("cook", run, "-o", "no", "--quiet")
    assert done.code == 1
    assert "exp1 has a model and 6 checkpoints of a run; `--select run_average` averages those." in done.err
    done = cli("check", run, "-o", "recipe.yaml")
    assert done.code == 0
    assert steps_in(Recipe.load(tmp_path / "recipe.yaml")) == STEPS
    done = cli("cook", run, "--select", "run_average", "--set", "last=2", "-o", "lawa", "--quiet")
    assert done.code == 0
    require_mean(tmp_path / "lawa", run, [10, 12])


def test_without_a_model_at_the_top_any_method_takes_the_checkpoints(cli: Cli, run: Path, tmp_path: Path) -> None:
    done = cli("cook", run, "-o", "soup", "--quiet")
    assert done.code == 0
    assert "note: [training-run] exp1 is a run: its checkpoints go in" in done.err
    require_mean(tmp_path / "soup", run, STEPS)
    for step in STEPS[2:]:
        shutil.rmtree(run / f"checkpoint-{step}")
    assert cli("cook", run, "--method", "slerp", "-o", "between", "--quiet").code == 0


def test_a_check_needs_no_base(cli: Cli, run: Path) -> None:
    done = cli("check", run, "--json")
    assert done.code == 0
    assert done.json["verdict"] == "likely"
    assert [each["model"] for each in done.json["ingredients"]] == [f"local:exp1/checkpoint-{step}" for step in STEPS]
    assert {each["code"] for each in done.json["reasons"]} == {"training-run"}


def test_what_training_moved_far_is_said_and_strangers_are_refused(cli: Cli, run: Path) -> None:
    """As in a run from scratch; or in a folder that was used for two."""

    def spoil(parts: str) -> None:
        path = run / "checkpoint-2" / "model.safetensors"
        tensors = load_file(path)
        generator = torch.Generator().manual_seed(7)
        for name in sorted(name for name in tensors if parts in name and tensors[name].ndim == 2):
            tensors[name] = 0.02 * torch.randn(tensors[name].shape, generator=generator)
        save_file(tensors, path, {"format": "pt"})

    spoil("attention.self.key")
    done = cli("check", run, "--json")
    assert done.json["verdict"] == "likely"
    (found,) = (each for each in done.json["reasons"] if each["code"] == "tensors-unrelated")
    assert found["message"].startswith(
        "local:exp1/checkpoint-2: parts have nothing in common with the other checkpoints'"
    )
    spoil("")
    done = cli("check", run, "--json")
    assert done.json["verdict"] == "refused"
    assert done.json["reasons"][0]["code"] == "unrelated"
    assert cli("cook", run, "--select", "run_average", "--set", "last=5", "-o", "soup", "--quiet").code == 0


def test_what_the_chosen_window_leaves_out_is_not_in_the_soup(cli: Cli, family: Path, run: Path) -> None:
    """Nor on its card: with four checkpoints to choose from, the chosen two have all the shares."""
    score = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    select = {"name": "run_average", "last": [2], "stride": [2, 2]}
    recipe = {"ingredients": [str(run)], "select": select, "validation": score}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert cli("cook", "recipe.yaml", "-o", "soup", "--quiet").code == 0
    require_mean(Path("soup"), run, [8, 12])
    resolved, summary = Recipe.load("soup/soup.yaml"), json.loads(Path("soup/soup.json").read_text())
    assert steps_in(resolved) == [8, 12]
    assert [each.weight for each in resolved.ingredients] == [1.0, 1.0]
    assert list(summary["weights"]) == summary["selected"] == ["local:exp1/checkpoint-8", "local:exp1/checkpoint-12"]
    assert (summary["select"], summary["method"]) == ("run_average", "linear")
    assert [point["parameters"] for point in summary["curve"]] == 2 * [{"last": 2, "stride": 2}]
    page = Path("soup/README.md").read_text()
    assert "the average of the weights of 2 fine-tuned models" in page
    assert "Chosen on the validation data from 2 points: last = 2, stride = 2." in page
    assert page.count("| 50 % |") == 2
    maps = [each for step in (8, 12) for each in ("--map", f"exp1/checkpoint-{step}={run}/checkpoint-{step}")]
    assert cli("verify", "./soup", *maps, "--quiet").code == 0


def test_two_runs_stay_apart(cli: Cli, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "runs" / "exp2")
    for folder in other.iterdir():
        tensors = {name: tensor * 1.01 for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = cli("cook", run, other, "--select", "run_average", "--set", "last=2", "-o", "soup", "--quiet", "--json")
    assert done.code == 0
    assert len(done.json["weights"]) == 4
    assert list(done.json["weights"]) == [f"local:{name}/checkpoint-{n}" for name in ("exp1", "exp2") for n in (10, 12)]
    found, (one, two) = (
        load_file(tmp_path / "soup" / "model.safetensors"),
        (mean(each, [10, 12]) for each in (run, other)),
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-7)
    done = cli("cook", run, other, "--select", "run_average", "--set", "last=[2, 3]", "-o", "no", "--quiet")
    assert "has values to choose from, for one run; there are 2 ingredients" in done.err


def test_models_in_their_order_are_a_run_too(cli: Cli, run: Path, tmp_path: Path) -> None:
    models = [run / f"checkpoint-{step}" for step in STEPS]
    done = cli("cook", *models, "--select", "run_average", "--set", "last=2", "-o", "soup", "--quiet")
    assert done.code == 0
    require_mean(tmp_path / "soup", run, [10, 12])
    assert "2 of the 6 models go in, checkpoint-10, checkpoint-12 (run_average, last 2)." in done.err
    assert len(Recipe.load(tmp_path / "soup" / "soup.yaml").ingredients) == 2


def test_the_weight_of_a_run_is_that_of_each_checkpoint(run: Path, family: Path) -> None:
    models = [{"model": str(run), "weight": 3}, str(family / "a")]
    recipe = Recipe(ingredients=models, heads=str(run), select="run_average")
    found, _ = expand_runs(recipe)
    assert [each.weight for each in found.ingredients] == [3.0] * 6 + [1.0]
    assert found.head == 5, "the head is that of the last checkpoint"


# ---- several runs ------------------------------------------------------------------------------------------------


def _best(run: Path, named: str | None) -> None:
    """As with `load_best_model_at_end`: the Trainer names the best checkpoint by its path, on its own machine."""
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": named}))


@pytest.fixture
def sweep(run: Path) -> Path:
    """Three runs in a folder, beside what else lies there; two name a best checkpoint."""
    for name in ("exp2", "exp10"):
        shutil.copytree(run, run.parent / name)
    _best(run, "/mnt/elsewhere/exp1/checkpoint-6")
    _best(run.parent / "exp2", r"D:\runs\exp2\checkpoint-8")
    (run.parent / "logs").mkdir()
    (run.parent / "notes.txt").write_text("none of them")
    return run.parent


def test_of_several_runs_each_stands_for_its_best_checkpoint(cli: Cli, sweep: Path, tmp_path: Path) -> None:
    runs = [sweep / name for name in ("exp1", "exp2", "exp10")]
    done = cli("cook", *runs, "-o", "soup", "--quiet", "--json")
    assert done.code == 0
    names = ["local:exp1/checkpoint-6", "local:exp2/checkpoint-8", "local:exp10/checkpoint-12"]
    assert list(done.json["weights"]) == names
    assert (
        "Each run stands for one of its checkpoints: exp1/checkpoint-6 (its best), exp2/checkpoint-8 (its best), "
        "exp10/checkpoint-12 (its last, as it names no best one). Others go in where they are named."
    ) in done.err
    assert cli("verify", "./soup", *(f"--map={run.name}={run}" for run in runs), "--quiet").code == 0
    # The folder that holds them stands for them, in the order of their numbers.
    whole = cli("cook", sweep, "-o", "sweep", "--quiet", "--json")
    assert whole.json["digest"] == done.json["digest"]
    assert "runs is a folder of 3: exp1, exp2, exp10." in whole.err
    checked = cli("check", sweep, "--json")
    assert [each["model"] for each in checked.json["ingredients"]] == names
    # Named, a checkpoint is itself.
    both = cli("check", sweep / "exp1" / "checkpoint-2", sweep / "exp2", "--json")
    assert [each["model"] for each in both.json["ingredients"]] == ["local:exp1/checkpoint-2", names[1]]


def test_a_best_checkpoint_that_is_gone_is_said(sweep: Path) -> None:
    shutil.rmtree(sweep / "exp1" / "checkpoint-6")
    found, notes = expand_runs(Recipe(ingredients=[str(sweep)], heads=None))
    assert [Path(each.model).name for each in found.ingredients] == ["checkpoint-12", "checkpoint-8", "checkpoint-12"]
    assert "exp1/checkpoint-12 (its last, as its best, checkpoint-6, is not there)" in notes[-1].message


def test_runs_beside_models_and_with_shares(sweep: Path, family: Path) -> None:
    run = str(sweep / "exp2")
    recipe = Recipe(
        ingredients=[{"model": run, "weight": 3}, str(family / "a")], heads=run, tensor_weights={"*": (1.0, 2.0)}
    )
    found, _ = expand_runs(recipe)
    assert [Path(each.model).name for each in found.ingredients] == ["checkpoint-8", "a"]
    assert [each.weight for each in found.ingredients] == [3.0, 1.0]
    assert found.head == 0
    with pytest.raises(RecipeError, match="name the runs in the place of their folder"):
        expand_runs(Recipe(ingredients=[str(sweep), str(family / "a")], tensor_weights={"*": (1.0, 2.0)}))


def test_a_folder_of_models_stands_for_them(cli: Cli, family: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(family / name, tmp_path / "models" / name)
    done = cli("check", tmp_path / "models", "--json")
    assert [each["model"] for each in done.json["ingredients"]] == ["local:a", "local:b"]


@pytest.mark.parametrize("file", ["text_encoder/model.safetensors", "run3/output/best/pytorch_model.bin"])
def test_folders_with_weights_that_are_no_runs_are_refused(file: str, sweep: Path) -> None:
    """Who names a folder means all that is in it."""
    recipe = Recipe(ingredients=[str(sweep)], heads=None)
    (sweep / "logs" / "events.out.tfevents.1").write_text("a log, beside the runs")
    assert len(expand_runs(recipe)[0].ingredients) == 3
    (sweep / file).parent.mkdir(parents=True)
    (sweep / file).write_bytes(b"weights")
    name = file.partition("/")[0]
    with pytest.raises(ResolveError, match=rf"folders with weights that are no runs: {name}\.") as raised:
        expand_runs(recipe)
    assert raised.value.hint == "Name the runs, or move the others away."


def test_a_head_that_does_not_go_in_is_not_kept(run: Path) -> None:
    models = [str(run / f"checkpoint-{step}") for step in STEPS]
    select = {"name": "run_average", "last": 2}
    assert expand_runs(Recipe(ingredients=models, heads=models[-1], select=select))[0].head == 1
    with pytest.raises(RecipeError, match="checkpoint-2', which does not go in"):
        expand_runs(Recipe(ingredients=models, heads=models[0], select=select))


def test_a_run_of_too_many_checkpoints(run: Path) -> None:
    for step in range(100, 1101):
        (run / f"checkpoint-{step}").mkdir()
    shutil.copytree(run / "checkpoint-12", run / "checkpoint-2000")
    with pytest.raises(RecipeError, match="With their checkpoints there are 1,008 ingredients"):
        expand_runs(Recipe(ingredients=[str(run)]))
    assert picked(run, last=3) == [1099, 1100, 2000]


# ---- again -------------------------------------------------------------------------------------------------------


def test_it_is_cooked_again_and_verified(cli: Cli, run: Path, tmp_path: Path) -> None:
    ema = ("--select", "run_average", "--set", "schedule=ema", "--set", "last=3")
    first = cli("cook", run, *ema, "-o", "soup", "--quiet", "--json")
    text = (tmp_path / "soup" / "soup.yaml").read_text()
    (tmp_path / "again.yaml").write_text(text.replace("local:exp1", str(run)))
    shutil.copytree(run / "checkpoint-12", run / "checkpoint-14")  # the run went on, and the recipe does not
    again = cli("cook", "again.yaml", "-o", "again", "--quiet", "--json")
    assert again.json["digest"] == first.json["digest"]
    maps = [part for step in (8, 10, 12) for part in ("--map", f"exp1/checkpoint-{step}={run}/checkpoint-{step}")]
    done = cli("verify", "soup", "--map", f"exp1={run}", "--json", "--quiet")
    assert done.code == 0
    assert done.json["verdict"] == "identical"
    done = cli("verify", "soup", *maps[:-1], f"exp1/checkpoint-12={run}/checkpoint-2", "--json", "--quiet")
    assert done.json["reasons"][0]["code"] == "other-weights"


def test_an_interrupted_cook_continues_and_notices_that_the_run_went_on(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_soup.workflows import cook as kitchen

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    cook = ("cook", run, "--select", "run_average", "--set", "last=2", "-o", "soup", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(kitchen, "write_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            hf_soup.cook(Recipe(ingredients=[str(run)], select={"name": "run_average", "last": 2}), tmp_path / "soup")
    kept = shutil.copytree(tmp_path / ".soup.cooking", tmp_path / "kept")
    assert cli(*cook, "--json").json["resumed"] > 0
    require_mean(tmp_path / "soup", run, [10, 12])
    shutil.rmtree(tmp_path / "soup")
    kept.rename(tmp_path / ".soup.cooking")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-14")
    done = cli(*cook, "--json")
    assert done.json["resumed"] == 0
    require_mean(tmp_path / "soup", run, [12, 14])


# ---- chosen on validation data -------------------------------------------------------------------------------------


def test_greedy_chooses_among_the_checkpoints(cli: Cli, run: Path, family: Path, tmp_path: Path) -> None:
    data = ("--data", family / "rows.csv", "--task", "text-classification")
    done = cli("cook", run, "--select", "greedy", *data, "-o", "soup", "--quiet", "--json")
    assert done.code == 0
    assert {f"local:exp1/checkpoint-{step}" for step in STEPS} <= done.json["scores"].keys()
    assert 1 <= len(done.json["weights"]) <= 6
    text = (tmp_path / "soup" / "soup.yaml").read_text().replace("local:exp1", str(run))
    recipe = Recipe.parse(text.replace("local:rows.csv", str(family / "rows.csv")))
    assert hf_soup.cook(recipe, tmp_path / "again").digest == done.json["digest"]


def test_how_many_is_chosen_on_validation_data(cli: Cli, run: Path, family: Path, tmp_path: Path) -> None:
    data = ("--data", family / "rows.csv", "--task", "text-classification")
    options = ("--select", "run_average", "--set", "last=[2, 4]")
    done = cli("cook", run, *options, *data, "-o", "soup", "--quiet", "--json")
    assert done.code == 0
    assert [point["parameters"]["last"] for point in done.json["curve"]] == [2, 4]
    best = max(done.json["curve"], key=lambda point: point["score"])
    require_mean(tmp_path / "soup", run, STEPS[-best["parameters"]["last"] :])


def test_of_several_runs_each_is_weighed_by_its_own_steps(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "exp2")
    select = {"name": "run_average", "last": 3, "schedule": "ema", "decay": 0.5}
    recipe, _ = expand_runs(Recipe(ingredients=[str(run), {"model": str(other), "weight": 2}], select=select))
    assert [each.weight for each in recipe.ingredients] == [0.25, 0.5, 1.0, 0.5, 1.0, 2.0]


def test_only_those_that_go_in_are_opened(run: Path, tmp_path: Path) -> None:
    """What lies in the others does not matter, and nobody looks."""
    for step in STEPS[:-2]:
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    soup = hf_soup.cook(Recipe(ingredients=[str(run)], select={"name": "run_average", "last": 2}), tmp_path / "soup")
    assert list(soup.weights) == ["local:exp1/checkpoint-10", "local:exp1/checkpoint-12"]


def test_a_run_joins_a_published_soup(publish: Callable[..., str], run: Path, tmp_path: Path) -> None:
    publish("base")
    soup = hf_soup.cook(Recipe(ingredients=[publish("a"), publish("b")]), tmp_path / "pair")
    soup.push("acme/pair")
    _cut(run / "checkpoint-12")
    update = Update.of("acme/pair", [str(run)])
    assert [Path(each.model).name for each in update.recipe.ingredients][2:] == ["checkpoint-10"]
    assert any("half-written" in said for said in update.left_out)


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResolveError, match="has no `checkpoint-…` folders"):
        expand_runs(Recipe(ingredients=[str(tmp_path / "empty")], select="run_average"))
