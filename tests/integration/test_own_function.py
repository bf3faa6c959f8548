"""A function of the user's own measures models: every selection works on it, with intervals and paired tests."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_soup import Recipe, RecipeError, ScoringError, Soup, connectivity, cook

Cli = Callable[..., Any]

#: What is measured: the logarithm of the probability of the right label, row by row, by one's own loop.
MODULE = """
import csv, pathlib
import torch

ROWS = list(csv.DictReader(pathlib.Path(__file__).with_name("rows.csv").read_text().splitlines()))
CALLS = []

def rows(model, tokenizer):
    CALLS.append((model, tokenizer))
    tokens = tokenizer([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    logs = model(**tokens).logits.log_softmax(-1)
    return logs[range(len(ROWS)), [int(row["label"]) for row in ROWS]]

def mean(model, tokenizer):
    return rows(model, tokenizer).mean()

def in_folder(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    CALLS.append(sorted(path.name for path in folder.iterdir()))
    return rows(AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

def sampled(model):
    return torch.rand(30).tolist()

def shuffles(model):
    CALLS.append(model)
    return [1.0] * (20 + len(CALLS))

def fails(model): raise KeyError("no such word")
def leaves(model): raise SystemExit(3)
def nothing(model): return None
def text(model): return "0.9"
def table(model): return [[1.0, 2.0], [3.0, 4.0]]
def empty(model): return []
def gap(model): return [1.0, None]
def nan(model): return [0.5, float("nan"), 0.1]
def infinite(model): return float("inf")
def three(model, processor, more): return 1.0
number = 3

class Own(BaseException):
    def __str__(self): raise RuntimeError("no text")
class Broken:
    def __getattr__(self, name): raise Own()
    def __str__(self): raise Own()
class Deaf:
    def __call__(self, model): return Broken()
def own(model): raise Own()
def broken(model): return Broken()
deaf = Deaf()
def huge(model): return 1e308
def huge_rows(model): return [0.0, 1e308, -1e308]

def prints(model):
    print("of the function")
    return 1.0

def length(model):
    start = torch.zeros(1, 3, dtype=torch.long)
    written = model.generate(start).shape[1]
    model.generation_config.max_new_tokens = 30  # which the next model does not have
    return float(written)
print("of the module")
"""


@pytest.fixture
def own(family: Path, cli: Cli, tmp_path: Path) -> Iterator[Any]:
    """The module `my_eval`, in the current folder, where the command line and Python find it."""
    (tmp_path / "my_eval.py").write_text(MODULE)
    (tmp_path / "rows.csv").write_bytes((family / "rows.csv").read_bytes())
    yield lambda: sys.modules["my_eval"]
    sys.modules.pop("my_eval", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def expected(folder: Path, family: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The same of a folder, by transformers alone."""
    lines = [line.rpartition(",") for line in (family / "rows.csv").read_text().splitlines()[1:]]
    tokens = AutoTokenizer.from_pretrained(folder)([text for text, _, _ in lines], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logs = AutoModelForSequenceClassification.from_pretrained(folder)(**tokens).logits.log_softmax(-1)
    return logs[range(len(lines)), [int(label) for _, _, label in lines]].numpy().astype(np.float64)


def test_greedy_by_the_rows_of_a_function(cli: Cli, own: Any, family: Path, tmp_path: Path) -> None:
    """From the command line: the values are those of transformers, and they come with an interval."""
    models = [family / name for name in "abc"]
    done = cli("cook", *models, "-o", "soup", "--select", "greedy", "--validation", "my_eval:rows", "--quiet")
    assert done.code == 0, done.err
    soup = Soup.open(tmp_path / "soup")
    scores = {name: by_title["my_eval:rows"] for name, by_title in soup.report.scores.items()}
    assert set(scores) == {"soup", "local:a", "local:b", "local:c"}, "there are no probabilities to make an ensemble of"
    for name, folder in [("soup", tmp_path / "soup"), *((f"local:{name}", family / name) for name in "abc")]:
        values = expected(folder, family)
        assert scores[name].value == pytest.approx(values.mean(), abs=1e-6)
        assert scores[name].low < scores[name].value < scores[name].high
        assert (scores[name].n, scores[name].share) == (len(values), False)
    best = max("abc", key=lambda name: scores[f"local:{name}"].value)
    assert soup.report.trace[0].ingredients == (f"local:{best}",)
    assert f"The selection kept one model, local:{best}: the soup is a copy of it." in done.out
    assert soup.report.comparisons == {}, "a copy is not compared with what it is a copy of"
    assert f"{scores['soup'].value:.4g} ({scores['soup'].low:.4g} to {scores['soup'].high:.4g})" in done.out
    card = (tmp_path / "soup" / "README.md").read_text()
    assert f"| **this soup** | {scores['soup'].text} |" in card
    assert "### Calibration" not in card
    assert "model-index" not in card, "a function's score has no data set that a reader could look at"
    assert not own().CALLS[0][0].training
    assert len(own().CALLS) == 3 + 2 + 1, "each ingredient, each candidate and the soup that was written are asked once"
    assert len({id(model) for model, _ in own().CALLS[:5]}) == 1, "one model, whose weights change in place"


def test_soup_and_best_ingredient_are_compared_row_by_row(cli: Cli, own: Any, family: Path, tmp_path: Path) -> None:
    models = [family / name for name in "abc"]
    done = cli("cook", *models, "-o", "soup", "--select", "uniform", "--validation", "my_eval:rows", "--quiet")
    assert done.code == 0, done.err
    best = max("abc", key=lambda name: expected(family / name, family).mean())
    comparison = Soup.open(tmp_path / "soup").report.comparisons["my_eval:rows"]
    assert comparison.against == f"local:{best}"
    difference = expected(tmp_path / "soup", family) - expected(family / best, family)
    assert comparison.difference == pytest.approx(difference.mean(), abs=1e-6)
    assert comparison.low <= comparison.difference <= comparison.high
    assert f"my_eval:rows: soup against local:{best}: " in done.out


def test_its_recipe_names_the_function_and_does_not_call_it(cli: Cli, own: Any, family: Path, tmp_path: Path) -> None:
    """Whoever cooks a published recipe again has no such function, or another one of the same name."""
    cook(Recipe(ingredients=[str(family / "a"), str(family / "b")], validation={"function": "my_eval:mean"}), "soup")
    recipe = Recipe.load("soup/soup.yaml")
    assert recipe.validation[0].function == "local:my_eval:mean"
    local = [
        each.model_copy(update={"model": str(family / name)})
        for each, name in zip(recipe.ingredients, "ab", strict=True)
    ]
    with pytest.raises(RecipeError, match="'local:my_eval:mean' was on the machine where the recipe was resolved"):
        cook(recipe.model_copy(update={"ingredients": tuple(local)}), "again")
    card = Path("soup/README.md").read_text()
    assert "my\\_eval:mean was a function of the cook's own" in card
    assert "in validation data and in test data, as far as these are data sets." in card
    assert "- Which rows my\\_eval:mean looked at." in card
    done = cli("verify", "soup", "--score", "--json")
    assert done.json["reasons"][0]["code"] == "data"
    assert "a stranger's function is never called" in done.json["reasons"][0]["message"]


def test_one_number_has_no_interval_and_claims_nothing(cli: Cli, own: Any, family: Path, tmp_path: Path) -> None:
    models = [family / name for name in "ab"]
    done = cli(
        "cook", *models, "-o", "soup", "--select", "uniform", "--validation", "my_eval:mean", "--quiet", "--json"
    )
    assert done.code == 0, done.err
    score = done.json["scores"]["soup"]["my_eval:mean"]
    assert score == {
        "metric": "mean", "value": pytest.approx(expected(tmp_path / "soup", family).mean(), abs=1e-6),
        "low": None, "high": None, "n": None, "share": False, "less_is_better": False,
    }  # fmt: skip
    assert "a number without rows tells nothing of luck" in done.json["comparisons"]["my_eval:mean"]
    assert (tmp_path / "soup" / "plots" / "scores.png").exists()


def test_a_function_beside_data(cli: Cli, own: Any, family: Path, tmp_path: Path) -> None:
    """The weighted mean of both is what counts; what needs probabilities is there for the data alone."""
    data = {"task": "text-classification", "dataset": str(family / "rows.csv")}
    recipe = Recipe(
        ingredients=[str(family / name) for name in "abc"],
        select="greedy",
        validation=[data, {"function": "my_eval:rows", "name": "log-probability", "weight": 3}],
        test={"task": "text-classification", "dataset": str(family / "report.csv")},
    )
    soup = cook(recipe, "soup")
    report = soup.report
    first = report.trace[0]
    scores = report.scores[first.ingredients[0]]
    assert first.score == pytest.approx((scores["rows.csv accuracy"].value + 3 * scores["log-probability"].value) / 4)
    assert set(report.scores["ensemble"]) == {"rows.csv accuracy", "report.csv accuracy"}
    assert report.greedy_ensemble == ()
    assert set(report.diversity) == {"rows.csv accuracy", "report.csv accuracy"}
    uniform = cook(Recipe(**{**recipe.to_dict(), "select": "uniform"}), "uniform").report
    assert set(uniform.comparisons) == {"rows.csv accuracy", "log-probability", "report.csv accuracy"}
    assert [each.title for each in report.test] == ["report.csv accuracy"]
    assert any("log-probability: its rows are the function's own" in note for note in report.notes)
    assert "With 95 % intervals where rows have values" in Path("soup/README.md").read_text()


def test_labels_in_another_order_are_found_beside_a_function(own: Any, family: Path, tmp_path: Path) -> None:
    """Whether it comes first or last."""
    wrong = tmp_path / "wrong.csv"
    lines = (family / "rows.csv").read_text().splitlines()
    wrong.write_text("\n".join([lines[0], *(f"{line[:-1]}{1 - int(line[-1])}" for line in lines[1:])]))
    looks = [{"task": "text-classification", "dataset": str(wrong)}, {"function": "my_eval:rows"}]
    for validation in (looks, looks[::-1]):
        recipe = Recipe(ingredients=[str(family / "a"), str(family / "b")], validation=validation, select="greedy")
        with pytest.raises(ScoringError, match="With its outputs in another order it would get"):
            cook(recipe, "soup")


def test_numbers_are_tried_and_the_choice_is_made_again(own: Any, family: Path) -> None:
    """A search over a method's parameter, and stability on halves of the function's rows."""
    recipe = Recipe(
        ingredients=[str(family / name) for name in "ab"], base_model=str(family / "base"),
        method={"name": "wise_ft", "alpha": [0.0, 0.5, 1.0]}, validation={"function": "my_eval:rows"},
        stability_repeats=3,
    )  # fmt: skip
    report = cook(recipe, "soup").report
    values = {point.parameters["alpha"]: point.score for point in report.curve}
    assert values[0.0] == pytest.approx(expected(family / "base", family).mean(), abs=1e-6)
    assert report.parameters["alpha"] == max(values, key=lambda alpha: values[alpha])
    assert "points" not in report.stability.sentence
    assert report.stability.repeats == 3


def test_a_folder_where_one_is_asked_for(cli: Cli, own: Any, family: Path) -> None:
    done = cli("score", family / "a", "--validation", "my_eval:in_folder", "--validation", "my_eval:rows", "--json")
    assert done.code == 0, done.err
    (scores,) = done.json["scores"].values()
    assert scores["my_eval:in_folder"]["value"] == scores["my_eval:rows"]["value"]
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= set(own().CALLS[0])


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "BertTokenizer", "fast_tokenizer_files": []}',
            "names other files",
        ),
        ("tokenizer.json", "{", "Cannot read the models' processor: "),
    ],
)
def test_a_processor_is_read_where_it_is_asked_for_and_within_bounds(
    own: Any, family: Path, tmp_path: Path, file: str, text: str, said: str
) -> None:
    """A stranger's may be broken, or ask for more than is taken."""
    for name in "ab":
        shutil.copytree(family / name, tmp_path / name)
        Path(name, file).write_text(text)
    values: dict[str, Any] = {"ingredients": ["a", "b"], "allow": ["processing", "processing-not-compared"]}
    with pytest.raises(ScoringError) as raised:
        cook(Recipe(**values, validation={"function": "my_eval:rows"}), "soup")
    assert said in str(raised.value)
    assert cook(Recipe(**values, validation={"function": "my_eval:sampled"}), "alone").scores


def test_what_is_drawn_at_random_is_the_same_for_every_model(own: Any, family: Path) -> None:
    recipe = Recipe(ingredients=[str(family / name) for name in "ab"], validation={"function": "my_eval:sampled"})
    state = torch.random.get_rng_state()
    report = cook(recipe, "soup").report
    assert len({by_title["my_eval:sampled"].value for by_title in report.scores.values()}) == 1
    assert torch.equal(torch.random.get_rng_state(), state), "what the caller draws next is as if nothing had been here"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("my_eval:fails", "The function 'my_eval:fails' fails: KeyError: 'no such word'"),
        ("my_eval:leaves", "The function 'my_eval:leaves' fails: SystemExit: it ends the process, by sys.exit(3)"),
        ("my_eval:three", "The function 'my_eval:three' fails: TypeError: three() missing 1 required"),
        ("my_eval:nothing", "gives NoneType 'None', and not a number or a number for each row"),
        ("my_eval:text", "gives str '0.9', and not a number"),
        ("my_eval:table", "gives list '[[1.0, 2.0], [3.0, 4.0]]', and not a number"),
        ("my_eval:empty", "gives list '[]', and not a number"),
        ("my_eval:gap", "gives list '[1.0, None]', and not a number"),
        ("my_eval:nan", "The function 'my_eval:nan' gives nan for row 1."),
        ("my_eval:infinite", "The function 'my_eval:infinite' gives inf."),
        ("my_eval:huge", "The function 'my_eval:huge' gives 1e+308."),
        ("my_eval:huge_rows", "The function 'my_eval:huge_rows' gives 1e+308 for row 1."),
        ("my_eval:own", "The function 'my_eval:own' fails: Own: Own"),
        ("my_eval:broken", "The function 'my_eval:broken' fails: Own: Own"),
        ("my_eval:deaf", "The function 'my_eval:deaf' fails: Own: Own"),
        ("my_eval:absent", "Cannot import the function 'my_eval:absent'"),
        ("my_eval:number", "The function 'my_eval:number' is no function but 3."),
        ("nowhere:score", "Cannot import the function 'nowhere:score': ModuleNotFoundError: No module named 'nowhere'"),
        ("no function", "validation.function: 'no function' is no `module:function`"),
        ("my_eval:shuffles", "'my_eval:shuffles' gives models 21 rows and 22 rows; local:b has the latter."),
    ],
)
def test_functions_that_cannot_be_used(cli: Cli, own: Any, family: Path, function: str, said: str) -> None:
    models = [family / name for name in "ab"]
    done = cli("cook", *models, "-o", "soup", "--validation", function, "--quiet")
    assert (done.code, Path("soup").exists()) == (1, False)
    assert said in done.err


def test_what_a_function_prints_leaves_stdout_to_the_result(cli: Cli, own: Any, family: Path) -> None:
    """`--json` is one object, also where the module prints when it is imported."""
    done = cli("score", family / "a", "--validation", "my_eval:prints", "--json")
    assert [each["my_eval:prints"]["value"] for each in done.json["scores"].values()] == [1.0]
    assert {"of the module", "of the function"} <= set(done.err.splitlines())


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_models_write_as_their_generation_config_says(own: Any, tmp_path: Path, kind: str) -> None:
    """As the same folder does when `from_pretrained` reads it: how much, and what a decoder begins with."""
    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=64))
        settings = {"max_new_tokens": 5, "pad_token_id": 0}
    else:
        shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=None, **shape))
        settings = {"max_new_tokens": 5, "decoder_start_token_id": 0}
    for name in "ab":
        model.save_pretrained(name)
        Path(name, "generation_config.json").write_text(json.dumps(settings))
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.001)
    alone = getattr(transformers, type(model).__name__).from_pretrained("a")
    written = alone.generate(torch.zeros(1, 3, dtype=torch.long)).shape[1]
    report = cook(Recipe(ingredients=["a", "b"], validation={"function": "my_eval:length"}), "soup").report
    assert {by_title["my_eval:length"].value for by_title in report.scores.values()} == {float(written)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select": "learned"}, "learns from the gradient of a loss, and 'my_eval:rows' has none"),
        ({"test": {"function": "my_eval:rows"}}, "'my_eval:rows' is validation data and test data"),
        (
            {"validation": {"function": "my_eval:rows", "metric": "f1"}},
            "unknown key; known here: at_least, function, name, weight",
        ),
        ({"stability_repeats": 3, "validation": {"function": "my_eval:mean"}}, "'my_eval:mean' has 1."),
    ],
)
def test_recipes_that_ask_too_much_of_it(own: Any, family: Path, changes: dict[str, Any], said: str) -> None:
    values = {"ingredients": [str(family / name) for name in "ab"], "validation": {"function": "my_eval:rows"}}
    with pytest.raises((RecipeError, ScoringError)) as raised:
        cook(Recipe(**{**values, **changes}), "soup")
    assert said in str(raised.value)
    assert not Path("soup").exists()


def test_barriers_are_not_measured_by_it(own: Any, family: Path) -> None:
    recipe = Recipe(ingredients=[str(family / name) for name in "ab"], validation={"function": "my_eval:rows"})
    with pytest.raises(RecipeError, match="Barriers are measured in points, which 'my_eval:rows' is not in"):
        connectivity(recipe)
