"""Tasks of lm-evaluation-harness: its numbers, on models in memory; its traps; and what is built on its rows."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any
from unittest.mock import patch

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import ByT5Tokenizer, LlamaForCausalLM

from hf_soup import Recipe, RecipeError, ScoringError, Soup, cook, score, verify
from hf_soup.evaluation.harness import HarnessDataset, harness_datasets
from hf_soup.evaluation.template import ModelTemplate
from hf_soup.local_hub import LocalHub
from hf_soup.recipe import HarnessScoring

Cli = Callable[..., Any]
PAGES = [" ".join(text.split()) for text in topics.topics.values()]
#: What the harness makes of the rows below, in each of its four ways.
SHARED: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "validation_split": "validation"}
KINDS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "fewshot_split": "validation", "num_fewshot": 1, "metadata": {"version": 2.5},
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "next": {
        "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": "{{text[:12]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{text[:1]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "filter_list": [
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip
METRICS = {
    "choices": ["acc,none", "acc_norm,none"], "rolling": ["bits_per_byte,none", "byte_perplexity,none"],
    "next": ["perplexity,none", "acc,none"], "written": ["exact_match,first", "exact_match,whole"],
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("cli")  # in a folder of its own


def rows(pages: list[str]) -> list[dict[str, Any]]:
    others = reversed(PAGES)
    return [
        {
            "question": page[:40], "choices": [page[41:55] or "so", next(others)[:30], "Other"], "answer": number % 3,
            "text": page[41:160] or "it",
        }
        for number, page in enumerate(pages)
    ]  # fmt: skip


@pytest.fixture
def data() -> dict[str, Any]:
    """The keys of a task that say where its rows are: two files in the current folder."""
    for name, pages in (("validation", PAGES[:12]), ("test", PAGES[12:30])):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(pages))))
    files = {name: str(Path(f"{name}.jsonl").resolve()) for name in ("validation", "test")}
    return {**SHARED, "dataset_kwargs": {"data_files": files}}


@pytest.fixture
def tasks(data: dict[str, Any]) -> Path:
    """A folder with a file for each, and a group of two."""
    folder = Path("tasks")
    folder.mkdir()
    for name, kind in KINDS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **kind}))
    group = {
        "group": "both", "task": ["choices", "next"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    }  # fmt: skip
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


def template_of(folder: Path) -> ModelTemplate:
    return ModelTemplate(json.loads((folder / "config.json").read_text()), "float32", folder)


def asked(folder: Path, **keys: Any) -> HarnessDataset:
    scoring = HarnessScoring.model_validate({"task": "lm-eval", **keys})
    (bench,) = harness_datasets([("validation", scoring)], template_of(folder), quiet=True)
    return bench


def theirs(folder: Path, names: list[str], tasks: Path, tokenizer: Any = None, **more: Any) -> dict[str, Any]:
    """The harness's own results, from a folder."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    lm = HFLM(pretrained=model, tokenizer=tokenizer or ByT5Tokenizer(), backend="causal")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with patch("lm_eval.evaluator.add_env_info"), patch("lm_eval.evaluator.get_git_commit_hash"):  # which take a second
        given = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **more)
    random.setstate(seeds[0])
    np.random.set_state(seeds[1])
    torch.set_rng_state(seeds[2])
    assert given is not None
    return dict(given)


@pytest.mark.parametrize("name", KINDS)
def test_values_are_the_harnesss(language_family: Path, tasks: Path, name: str) -> None:
    """All four kinds of requests, by each of their metrics and filters: of all rows, and of each."""
    folder = language_family / "one"
    given = theirs(folder, [name], tasks)
    model = LlamaForCausalLM.from_pretrained(folder)
    for metric in METRICS[name]:
        bench = asked(folder, name=name, include_path="tasks", metric=metric)
        found = bench.outputs(model)
        assert bench.rows == 18
        assert bench.fits(found)
        assert bench.score(found).value == pytest.approx(given["results"][name][metric], rel=1e-6)
        by_row = [
            sample[metric.split(",")[0]]
            for sample in given["samples"][name]
            if sample["filter"] == metric.split(",")[1]
        ]
        np.testing.assert_allclose(found, np.array(by_row, dtype=float), rtol=1e-5, atol=1e-6)
        score = bench.score(found)
        assert score.low <= score.value <= score.high
        assert score.less_is_better == (name == "rolling" or metric.startswith("perplexity"))
        assert bench.judge(found) == (-score.value if score.less_is_better else score.value)


def test_weights_that_change_in_place_are_asked_anew(language_family: Path, tasks: Path) -> None:
    """The trap of its cache, which is keyed by requests: the same data set, the same model, other weights."""
    model = LlamaForCausalLM.from_pretrained(language_family / "one")
    bench = asked(language_family / "one", name="rolling", include_path="tasks")
    before = bench.outputs(model)
    model.load_state_dict(LlamaForCausalLM.from_pretrained(language_family / "poor").state_dict())
    expected = theirs(language_family / "poor", ["rolling"], tasks)["results"]["rolling"]["bits_per_byte,none"]
    after = bench.outputs(model)
    assert bench.score(after).value == pytest.approx(expected, rel=1e-6)
    assert bench.score(before).value != bench.score(after).value
    comparison = bench.compare(before, after)
    assert comparison.difference == pytest.approx(bench.score(after).value - bench.score(before).value)


def test_nothing_of_the_process_is_reseeded(language_family: Path, tasks: Path) -> None:
    """`simple_evaluate` would set the seeds of random, numpy and torch."""
    random.seed(7)
    torch.manual_seed(7)
    before = random.random(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # type: ignore[index]
    bench = asked(language_family / "one", name="written", include_path="tasks", limit=4)
    bench.outputs(LlamaForCausalLM.from_pretrained(language_family / "one"))
    after = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert before[1:] == after
    assert random.random() != random.Random(0).random()


def test_examples_before_questions_and_the_first_rows(language_family: Path, tasks: Path) -> None:
    """The same examples as at the harness's command line, by its seed."""
    folder = language_family / "two"
    given = theirs(folder, ["choices"], tasks, num_fewshot=2, limit=7)
    bench = asked(folder, name="choices", include_path="tasks", num_fewshot=2, limit=7, metric="acc_norm")
    arguments = [tuple(each) for sample in given["samples"]["choices"] for each in sample["arguments"]]
    assert [request.arguments for request in bench.requests] == arguments
    value = bench.score(bench.outputs(LlamaForCausalLM.from_pretrained(folder))).value
    assert value == given["results"]["choices"]["acc_norm,none"]


def test_the_chat_template(language_family: Path, tasks: Path, tmp_path: Path) -> None:
    """As the harness renders it; and an error where there is none."""
    folder = language_family / "one"
    with pytest.raises(ScoringError, match="the donor's tokenizer has no chat template"):
        asked(folder, name="written", include_path="tasks", apply_chat_template=True)
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    given = theirs(folder, ["choices"], tasks, tokenizer, apply_chat_template=True, num_fewshot=1)
    bench = asked(tmp_path / "model", name="choices", include_path="tasks", apply_chat_template=True)
    assert bench.requests[0].arguments[0].startswith("[user]")
    assert bench.requests[0].arguments[0].count("[assistant]") == 2
    model = LlamaForCausalLM.from_pretrained(folder)
    assert bench.score(bench.outputs(model)).value == given["results"]["choices"]["acc,none"]


def test_a_group_is_the_mean_of_its_tasks(language_family: Path, tasks: Path) -> None:
    """Of tasks alike where the group says so, else of rows."""
    folder = language_family / "one"
    given = theirs(folder, ["both"], tasks)
    model = LlamaForCausalLM.from_pretrained(folder)
    bench = asked(folder, name="both", include_path="tasks", metric="acc")
    found = bench.outputs(model)
    assert (bench.rows, bench.equally) == (36, True)
    assert bench.score(found).value == pytest.approx(given["groups"]["both"]["acc,none"])
    (tasks / "both.yaml").write_text((tasks / "both.yaml").read_text().replace("false", "true"))
    (tasks / "next.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load((tasks / "next.yaml").read_text()), "test_split": "validation"})
    )
    given = theirs(folder, ["both"], tasks)
    bench = asked(folder, name="both", include_path="tasks", metric="acc")
    found = bench.outputs(model)
    assert (bench.rows, bench.equally) == (30, False)
    assert bench.score(found).value == pytest.approx(given["groups"]["both"]["acc,none"])
    assert bench.score(found).share


def test_a_soup_is_chosen_by_tasks(cli: Cli, language_family: Path, tasks: Path, data: dict[str, Any]) -> None:
    """A file, and a whole task as data, with weights; another split for the test; twice the same; and published."""
    inline = {"task": "mine", **data, **KINDS["rolling"], "test_split": "validation"}
    recipe = {
        "base_model": str(language_family / "base"),
        "ingredients": [str(language_family / name) for name in ("one", "two", "poor")],
        "select": "greedy",
        "validation": [
            {"task": "lm-eval", "config": inline, "weight": 3},
            {"task": "lm-eval", "name": "choices", "include_path": "tasks", "split": "validation"},
        ],
        "test": [{"task": "lm-eval", "name": "choices", "include_path": "tasks", "metric": "acc_norm"}],
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = cli("cook", "recipe.yaml", "-o", "soup", "--quiet", "--json")
    assert done.code == 0, done.err
    report = Soup.open("soup").report
    assert report.validation == ("mine", "choices validation")
    titles = [*report.validation, "choices acc_norm"]
    assert list(report.scores["soup"]) == titles
    expected = theirs(Path("soup"), ["choices"], tasks)["results"]["choices"]["acc_norm,none"]
    assert report.scores["soup"]["choices acc_norm"].value == expected
    values = {name: scores["mine"].value for name, scores in report.scores.items()}
    assert values["soup"] <= min(values.values()) + 1e-9
    best = report.trace[0].ingredients[0]
    assert report.trace[0].score == pytest.approx(
        (-3 * values[best] + report.scores[best]["choices validation"].value) / 4
    )
    assert report.comparisons["choices acc_norm"].n == 18
    assert report.harness.keys() == set(titles)
    assert report.harness["choices acc_norm"].startswith(f"lm-eval {lm_eval.__version__}; choices version 2.5; sha256:")
    written = Recipe.load("soup/soup.yaml")
    assert written.validation[0].config["dataset_path"] == "json"  # type: ignore[union-attr,index]
    assert written.test[0].include_path == "local:tasks"  # type: ignore[union-attr]
    assert str(Path.cwd()) not in Path("soup/soup.json").read_text()
    # What answers were is known the next time, where nothing changed.
    again = cook(Recipe(**recipe), "again", quiet=True).report
    assert again.scores == report.scores
    assert again.digest == report.digest
    scored = score(["soup"], Recipe(**{**recipe, "select": "uniform"}), quiet=True)
    assert next(iter(scored.values()))["choices acc_norm"]["value"] == expected


def test_rows_that_are_test_rows_too_are_left_out(language_family: Path, tasks: Path, data: dict[str, Any]) -> None:
    folder = language_family / "one"
    lines = Path("validation.jsonl").read_text().splitlines()
    Path("validation.jsonl").write_text("\n".join([*lines, *Path("test.jsonl").read_text().splitlines()[:5]]))
    both = [
        ("validation", HarnessScoring(task="lm-eval", name="choices", include_path="tasks", split="validation")),
        ("test", HarnessScoring(task="lm-eval", name="choices", include_path="tasks")),
    ]
    validation, test = harness_datasets(both, template_of(folder), quiet=True)
    assert (validation.rows, test.rows) == (12, 18)
    assert validation.notes == ("5 of 17 rows equal a test row in content and were dropped",)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert len(validation.outputs(model)) == 12
    same = [(role, scoring.model_copy(update={"split": "test"})) for role, scoring in both]
    with pytest.raises(ScoringError, match="Every row of the validation data 'choices test' is in the test data too"):
        harness_datasets(same, template_of(folder), quiet=True)
    recipe = Recipe(
        ingredients=[str(folder)],
        validation=both[1][1].model_dump(),
        test=[{**both[1][1].model_dump(), "metric": "acc"}],
    )
    with pytest.raises(RecipeError, match="'choices acc' is validation data and test data"):
        cook(recipe, "soup")


def test_requests_that_do_not_fit_the_memory(
    language_family: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = LlamaForCausalLM.from_pretrained(language_family / "one")
    bench, forward = asked(language_family / "one", name="choices", include_path="tasks"), model.forward
    found = bench.outputs(model)

    def narrow(input_ids: Any, **more: Any) -> Any:
        if len(input_ids) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids, **more)

    monkeypatch.setattr(model, "forward", narrow)
    assert np.array_equal(bench.outputs(model), found)
    assert caplog.text.count("choices: 32 rows together do not fit the memory; fewer are taken.") == 1


def test_what_is_remembered_goes_by_the_tokenizer_and_the_settings_too(
    language_family: Path, tasks: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(language_family / "one", folder)
    seen = [asked(folder, name="written", include_path="tasks").fingerprint]
    for name, text in (("generation_config.json", '{"repetition_penalty": 1.5}'), ("tokenizer_config.json", None)):
        settings = json.loads((folder / name).read_text()) if text is None else json.loads(text)
        (folder / name).write_text(json.dumps({**settings, "unk_token": "</s>"}))
        seen.append(asked(folder, name="written", include_path="tasks").fingerprint)
    assert len(set(seen)) == 3
    for text in ("{", "[1]", '{"max_new_tokens": -3}'):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(ScoringError, match=r"Cannot read the donor's generation_config\.json"):
            asked(folder, name="written", include_path="tasks")


def test_processes_divide_rows(language_family: Path, tasks: Path) -> None:
    """Each answers its share, from what it was sent; only the first has tasks."""
    import pickle

    class World:
        size = 2

        def __init__(self, rank: int, others: list[Any]) -> None:
            self.rank, self.others = rank, others

        def gather(self, own: Any) -> list[Any]:
            return [own, *self.others] if self.rank == 0 else [*self.others, own]

    folder = language_family / "one"
    model = LlamaForCausalLM.from_pretrained(folder)
    bench = asked(folder, name="choices", include_path="tasks")
    alone = bench.outputs(model)
    sent = pickle.loads(pickle.dumps(bench))
    shares: list[Any] = []
    world = World(1, [[]])
    world.gather = lambda own: shares.append(own) or [[None] * sum(r.row % 2 == 0 for r in sent.requests), own]  # type: ignore[method-assign]
    sent.outputs(model, world=world)
    assert len(shares[0]) == sum(request.row % 2 for request in bench.requests)
    assert np.array_equal(bench.outputs(model, world=World(0, shares)), alone)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "said", "hint"),
    [
        ({"name": "choicess"}, "has no task 'choicess'", "choices"),
        ({"name": "choices", "include_path": "nowhere"}, "There is no folder 'nowhere' with tasks", "include_path"),
        ({"name": "choices", "metric": "bleu"}, "has no metric 'bleu'", "It has acc,none, acc_norm,none."),
        ({"name": "choices", "split": "train"}, "have no split 'train'", "They have test, validation."),
        ({"config": {"task": "x", "dataset_path": "json"}}, "The task 'x' cannot be loaded", "Is its data set there"),
        ({"name": "pictures"}, "has pictures or sounds", ""),
        ({"name": "unsafe"}, "The task 'unsafe' runs code that models write", "trust_remote_code"),
        ({"name": "python"}, "runs Python: 'own.words' of a task file in 'tasks'", "trust_remote_code"),
        ({"name": "grouped"}, "runs Python: 'own.words' of a task file in 'tasks'", "trust_remote_code"),
        ({"name": "classed"}, "runs Python: 'own.Words' of a task file in 'tasks'", "trust_remote_code"),
        ({"name": "tagged"}, "runs Python: 'own.words' of a task file in 'tasks'", "trust_remote_code"),
        ({"name": "spelled"}, "runs Python: 'own.words' of a task file in 'tasks'", "trust_remote_code"),
        ({"name": "three", "metric": "f1"}, "The metric 'f1' of 'three f1' fails", "Name another `metric`"),
        ({"name": "through"}, "runs Python: 'own.words' of a task file in 'tasks'", "trust_remote_code"),
        ({"name": "zero", "num_fewshot": 3}, "The task 'zero' says `num_fewshot: 0`", "Leave `num_fewshot` out"),
        ({"name": "words"}, "keeps", "Name another `metric`"),
    ],
    ids=lambda value: value.get("name", "config") if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_asked(
    language_family: Path, tasks: Path, data: dict[str, Any], keys: dict[str, Any], said: str, hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = {**data, **KINDS["choices"]}
    more: dict[str, dict[str, Any]] = {
        "pictures": {**whole, "doc_to_image": "{{text}}"},
        "unsafe": {**whole, "unsafe_code": True},
        "through": {"include": "python.yaml", "task": "through"},
        "zero": {**whole, "num_fewshot": 0},
        "three": {**whole, "metric_list": [{"metric": "f1"}]},
        "words": {**data, **KINDS["written"], "metric_list": [{"metric": "bleu"}]},
    }
    for name, values in more.items():
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **values}))
    (tasks / "own.py").write_text("raise SystemExit('it ran')")
    python = yaml.safe_dump({"task": "python", **whole, "doc_to_text": "TAG"})
    (tasks / "python.yaml").write_text(python.replace("TAG", "!function own.words"))
    spelled = yaml.safe_dump({"task": "spelled", **whole, "doc_to_text": "TAG"})
    (tasks / "spelled.yaml").write_text(spelled.replace("TAG", "!%66unction own.words"))
    (tasks / "classed.yaml").write_text("task: classed\nclass: !function own.Words\n")
    (tasks / "grouped.yaml").write_text(yaml.safe_dump({"group": "grouped", "task": ["choices", "python"]}))
    tagged = yaml.safe_dump({"task": "with_tag", "tag": ["tagged"], **whole, "doc_to_text": "TAG"})
    (tasks / "with_tag.yaml").write_text(tagged.replace("TAG", "!function own.words"))
    if keys.get("name") == "choicess":  # the index of all tasks takes ten seconds
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, include_defaults: TaskManager(
            include_path="tasks", include_defaults=False
        ))  # fmt: skip
    keys = keys if "config" in keys else {"include_path": "tasks", **keys}
    model = LlamaForCausalLM.from_pretrained(language_family / "one")
    with pytest.raises(ScoringError) as raised:
        (bench := asked(language_family / "one", **keys)).score(bench.outputs(model))
    assert said in raised.value.message
    assert hint in (raised.value.hint or "")


def test_python_of_ones_own_runs_where_it_is_allowed(language_family: Path, tasks: Path, data: dict[str, Any]) -> None:
    (tasks / "own.py").write_text("def words(doc):\n    return doc['question'].upper()\n")
    python = yaml.safe_dump({"task": "python", **data, **KINDS["choices"], "doc_to_text": "TAG", "num_fewshot": 0})
    (tasks / "python.yaml").write_text(python.replace("TAG", "!function own.words"))
    bench = asked(language_family / "one", name="python", include_path="tasks", trust_remote_code=True)
    assert bench.requests[0].arguments[0] == PAGES[12][:40].upper()


def test_another_version_of_a_task_is_another_task(language_family: Path, tasks: Path) -> None:
    """A resolved recipe names versions and the hash of rows, and what is measured is that or an error."""
    folder = language_family / "one"
    first = asked(folder, name="choices", include_path="tasks")
    pinned = asked(folder, **first.scoring.model_dump(exclude_defaults=True))
    assert (pinned.title, pinned.metric_filter, pinned.fingerprint) == (first.title, "acc,none", first.fingerprint)
    revision = first.scoring.revision
    assert asked(folder, name="choices", include_path="tasks", revision=revision).scoring.revision == revision
    lines = Path("test.jsonl").read_text().splitlines()
    Path("test.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ScoringError, match="'choices' is another task here"):
        asked(folder, name="choices", include_path="tasks", revision=revision)


def test_without_the_extra(language_family: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says what to install, before a weight is read."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    recipe = Recipe(
        ingredients=[str(language_family / name) for name in ("one", "two")], base_model=str(language_family / "base"),
        validation={"task": "lm-eval", "name": "choices", "include_path": "tasks"},
    )  # fmt: skip
    with pytest.raises(ScoringError, match="needs lm-evaluation-harness, which cannot be imported") as raised:
        cook(recipe, "soup")
    assert raised.value.hint == "Install it: pip install 'hf-soup[lm]'."
    assert not Path("soup").exists()


def test_a_task_of_the_harness_itself(cli: Cli, online: LocalHub, language_family: Path, tmp_path: Path) -> None:
    """`arc_easy`, whose data set is on the Hub, without the index of all tasks; a stranger's recipe may name it."""
    store, repo = online.store, online.store.create("dataset", "allenai/ai2_arc", private=False, author="allenai")
    splits = [{"split": split, "path": f"ARC-Easy/{split}-*"} for split in ("train", "validation", "test")]
    card = yaml.safe_dump({"configs": [{"config_name": "ARC-Easy", "data_files": splits}]})
    changes = [store.put("README.md", f"---\n{card}---\n".encode())]
    for split, pages in (("train", PAGES[:4]), ("validation", PAGES[4:16]), ("test", PAGES[16:30])):
        questions = [
            {
                "id": str(number), "question": page[:40], "answerKey": "ABC"[number % 3],
                "choices": {"text": [page[41:55] or "so", page[2:20], "Other"], "label": ["A", "B", "C"]},
            }
            for number, page in enumerate(pages)
        ]  # fmt: skip
        Dataset.from_list(questions).to_parquet(tmp_path / "rows.parquet")
        name = f"ARC-Easy/{split}-00000-of-00001.parquet"
        changes.append(store.put(name, (tmp_path / "rows.parquet").read_bytes()))
    store.commit(repo, "main", changes, ("Upload", "", "allenai"), None)
    recipe = Recipe(
        ingredients=[str(language_family / name) for name in ("one", "two")], base_model=str(language_family / "base"),
        select="greedy", validation={"task": "lm-eval", "name": "arc_easy", "split": "validation"},
        test={"task": "lm-eval", "name": "arc_easy", "limit": 10, "metric": "acc_norm"},
    )  # fmt: skip
    report = cook(recipe, "soup", quiet=True).report
    assert {title: each.n for title, each in report.scores["soup"].items()} == {
        "arc_easy validation": 12,
        "arc_easy acc_norm": 10,
    }
    assert report.harness["arc_easy validation"].startswith(
        f"lm-eval {lm_eval.__version__}; arc_easy version 1.0; sha256"
    )
    done = cli(
        "score", "soup", language_family / "base", "--data", "arc_easy:test", "--task", "lm-eval", "--json", "--quiet"
    )
    assert done.code == 0, done.err
    assert [each["arc_easy test"]["n"] for each in done.json["scores"].values()] == [14, 14]
    mapped = {name: str(language_family / name) for name in ("base", "one", "two")}
    checked = verify("soup", score=True, map=mapped, quiet=True)
    assert [each.measured for each in checked.scores] == [each.value for each in report.scores["soup"].values()]
