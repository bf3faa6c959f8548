"""Rows that belong together: intervals and tests that draw them together, from the recipe to the sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import LlamaForCausalLM

from hf_soup import Recipe, RecipeError, ScoringError, cook
from hf_soup.evaluation import Candidates, statistics
from hf_soup.evaluation.candidates import _halved
from hf_soup.evaluation.choices import ChoiceDataset
from hf_soup.evaluation.clusters import in_clusters
from hf_soup.evaluation.formulas import CLASS_METRICS
from hf_soup.evaluation.harness import harness_datasets
from hf_soup.evaluation.looks import by_chance
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.evaluation.template import ModelTemplate
from hf_soup.recipe import HarnessScoring, Scoring

RNG = np.random.default_rng(0)
#: 60 documents of five rows each, all of which are alike: there is no more to know than of 60 rows.
ONE, OTHER = RNG.random(60), RNG.random(60)
DOCUMENTS = np.repeat(np.arange(60), 5)
NOTHING = np.zeros(300)


def test_five_rows_that_are_alike_say_what_one_says() -> None:
    """The intervals are as wide as those of documents, to the noise of 500 draws; without clusters they are not."""
    alone = statistics.bootstrap(np.zeros(60), ONE, statistics.mean)
    together = statistics.bootstrap(NOTHING, ONE[DOCUMENTS], statistics.mean, DOCUMENTS)
    ignored = statistics.bootstrap(NOTHING, ONE[DOCUMENTS], statistics.mean)
    width = float(np.diff(alone)[0])
    assert float(np.diff(together)[0]) == pytest.approx(width, rel=0.15)
    assert float(np.diff(ignored)[0]) == pytest.approx(width / 5**0.5, rel=0.15)
    low, high, _ = statistics.paired_bootstrap(NOTHING, ONE[DOCUMENTS], OTHER[DOCUMENTS], statistics.mean, DOCUMENTS)
    first, last, _ = statistics.paired_bootstrap(np.zeros(60), ONE, OTHER, statistics.mean)
    assert high - low == pytest.approx(last - first, rel=0.15)
    spread = statistics.resampled(NOTHING, ONE[DOCUMENTS], statistics.mean, DOCUMENTS).std()
    assert spread == pytest.approx(statistics.resampled(np.zeros(60), ONE, statistics.mean).std(), rel=0.15)


def test_p_by_hand() -> None:
    """Three documents, in all of which the first model is better: neither or all are exchanged in two of eight."""
    first, second, clusters = np.ones(6), np.zeros(6), np.array([0, 0, 1, 1, 2, 2])
    *_, p = statistics.paired_bootstrap(np.zeros(6), first, second, statistics.mean, clusters)
    assert p == pytest.approx(2 / 8, abs=0.05)
    *_, alone = statistics.paired_bootstrap(np.zeros(6), first, second, statistics.mean)
    assert alone == pytest.approx(2 / 64, abs=0.02)


def test_whole_documents_are_drawn_of_several_sizes() -> None:
    """Rows that are alike are not one kind of row: a draw has all rows of a document, or none."""
    clusters = np.array([0, 1, 1, 1, 2, 2])
    draws: list[Any] = []

    def spy(labels: Any, answers: Any, rows: Any) -> Any:
        draws.append(rows)
        return statistics.mean(labels, answers, rows)

    values = statistics.resampled(np.zeros(6), np.array([1.0, 0, 0, 0, 0, 0]), spy, clusters)
    drawn = np.concatenate(draws)
    assert drawn.shape == (500, 6)
    assert (drawn[:, 1] == drawn[:, 3]).all()
    assert (drawn[:, [0, 1, 4]].sum(axis=1) == 3).all()
    assert set(values) == {a / (a + 3 * b + 2 * (3 - a - b)) for a in range(4) for b in range(4 - a)}


@pytest.mark.parametrize("name", ["accuracy", "f1_macro"])
def test_shares_of_rows_right(name: str) -> None:
    """Neither Wilson nor McNemar know of documents."""
    right = (ONE > 0.3)[DOCUMENTS]
    other = (OTHER > 0.5)[DOCUMENTS]
    if name == "accuracy":
        score = statistics.accuracy_of(right, clusters=DOCUMENTS)
        comparison = statistics.compare_accuracies(name, right, other, DOCUMENTS)
        alone = statistics.compare_accuracies(name, ONE > 0.3, OTHER > 0.5)
        assert comparison.p == pytest.approx(alone.p, abs=0.05)
        assert comparison.p > 10 * statistics.compare_accuracies(name, right, other).p
        assert comparison.difference == pytest.approx(right.mean() - other.mean())
        few = statistics.accuracy_of(ONE > 0.3)
        assert score.high - score.low == pytest.approx(few.high - few.low, rel=0.2)
    else:
        labels, answers = np.ones(300, dtype=np.int64), right.astype(np.int64)
        wide = statistics.bootstrap(labels, answers, CLASS_METRICS[name], DOCUMENTS)
        narrow = statistics.bootstrap(labels, answers, CLASS_METRICS[name])
        assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


def test_many_looks_at_few_documents_gain_more_by_chance() -> None:
    values = RNG.random((60, 8))
    (few,) = by_chance([values], [1.0], 2, [0.05])
    (ignored,) = by_chance([values[DOCUMENTS]], [1.0], 2, [0.05])
    (same,) = by_chance([values[DOCUMENTS]], [1.0], 2, [0.05], [DOCUMENTS])
    assert same.gain == pytest.approx(few.gain, rel=0.1)
    assert ignored.gain < few.gain / 1.7
    assert ignored.p < same.p


QUESTIONS = [
    {"question": f"Page {number}: what", "choices": ["is", "was"], "answer": number % 2, "page": f"page {number // 4}"}
    for number in range(24)
]


def bench_of(folder: Path, place: Path, rows: list[dict[str, Any]], **keys: Any) -> Any:
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scoring = Scoring.model_validate(
        {"task": "multiple-choice-lm", "dataset": str(place / "rows.jsonl"), "cluster_column": "page", **keys}
    )
    config = json.loads((folder / "config.json").read_text())
    (bench,) = prepare_datasets([("validation", scoring)], folder=folder, config=config, quiet=True)
    return bench


def test_the_column_says_which_rows_belong_together(language_family: Path, tmp_path: Path) -> None:
    bench = bench_of(language_family / "base", tmp_path, QUESTIONS)
    assert isinstance(bench, ChoiceDataset)
    assert bench.clusters is not None
    assert bench.clusters.tolist() == [number // 4 for number in range(24)]
    (note,) = bench.notes
    assert note == "of 6 clusters, the rows with equal 'page', intervals are too narrow"
    many = bench_of(language_family / "base", tmp_path, [{**row, "page": n % 12} for n, row in enumerate(QUESTIONS)])
    assert many.notes == (), "which was asked for"
    one, other = (RNG.random((24, 2)) for _ in range(2))
    plain = replace(bench, clusters=None)
    assert bench.compare(one, other) != plain.compare(one, other)
    assert bench.score(one) != plain.score(one)
    assert bench.score(one).value == plain.score(one).value
    assert not np.array_equal(bench.resampled(one), plain.resampled(one))
    assert bench.compare(one, one).sentence == "no difference can be seen with n = 24 in 6 clusters"
    # Lists and numbers tell rows apart as well.
    lists = [{**row, "page": [1, number % 3]} for number, row in enumerate(QUESTIONS)]
    assert bench_of(language_family / "base", tmp_path, lists).clusters.tolist() == [0, 1, 2] * 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**row, "page": "one"} for row in QUESTIONS], r"rows.jsonl has one value in 'page' \(24 rows\)\."),
        ([{**row, "page": None} if row is QUESTIONS[5] else row for row in QUESTIONS], "Row 5 of .* has nothing in"),
        ([{**row, "page": ""} if row is QUESTIONS[5] else row for row in QUESTIONS], "Row 5 of .* has nothing in"),
        ([{**row, "page": float("nan")} for row in QUESTIONS], "Row 0 of .* has nothing in"),
        (
            [{key: row[key] for key in ("question", "choices", "answer")} for row in QUESTIONS],
            r"The rows of rows.jsonl have no 'page'; they have 'question', 'choices', 'answer'\.",
        ),
    ],
)
def test_columns_that_tell_nothing(
    language_family: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ScoringError, match=message):
        bench_of(language_family / "base", tmp_path, rows)


def test_tasks_of_the_harness_have_clusters_too(language_family: Path, tmp_path: Path) -> None:
    """By a key of their rows; those that are left out of the validation data do not count."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[:3])))
    task = {
        "task": "pages", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    folder = language_family / "base"
    template = ModelTemplate(json.loads((folder / "config.json").read_text()), "float32", folder)

    def asked(file: str, **keys: Any) -> HarnessScoring:
        config = {**task, "dataset_kwargs": {"data_files": {"test": str(tmp_path / file)}}}
        return HarnessScoring(task="lm-eval", config=config, **keys)

    both = [("validation", asked("rows.jsonl", cluster_column="page")), ("test", asked("test.jsonl"))]
    bench, test = harness_datasets(both, template, quiet=True)
    assert bench.clusters is not None
    assert bench.clusters.tolist() == [number // 4 for number in range(3, 24)]
    assert test.clusters is None
    outputs = bench.outputs(LlamaForCausalLM.from_pretrained(folder))
    assert bench.score(outputs) != replace(bench, clusters=None).score(outputs)
    assert bench.score(outputs).value == replace(bench, clusters=None).score(outputs).value
    with pytest.raises(ScoringError, match="have no 'article'; they have 'question'"):
        harness_datasets([("test", asked("rows.jsonl", cluster_column="article"))], template, quiet=True)


def test_pictures_tell_no_rows_apart() -> None:
    """By what they are in memory, which would be another number every time."""
    data = bench_like(3)
    with pytest.raises(ScoringError, match="Row 0 of data has a Image in 'image', and no text or number"):
        in_clusters(data, "image", [{"image": Image.new("L", (2, 2))} for _ in range(3)])


def test_what_two_tasks_call_alike_is_not_one_thing() -> None:
    rows = [{"page": 0}, {"page": 1}, {"page": 0}]
    assert in_clusters(bench_like(3), "page", rows).clusters.tolist() == [0, 1, 0]
    assert in_clusters(bench_like(3), "page", rows, [0, 0, 1]).clusters.tolist() == [0, 1, 2]


def bench_like(rows: int) -> Any:
    scoring = Scoring(task="multiple-choice-lm", dataset="data")
    stored: Any = None
    lengths = np.ones((rows, 2), dtype=np.int64)
    return ChoiceDataset(
        "t", scoring, (), "f", "data", stored, np.arange(rows), 8, 8, np.zeros(rows, np.int64), lengths
    )


@pytest.mark.parametrize("sizes", [[3, 27], [5, 5, 5, 5], [1] * 20, [7, 2, 9, 1, 4]])
def test_halves_cut_through_no_cluster(sizes: list[int]) -> None:
    """As near to halves as that goes; every row is in one of them."""
    clusters = RNG.permutation(np.repeat(np.arange(len(sizes)), sizes))
    for seed in range(6):
        first, second = _halved(clusters, np.random.default_rng(seed))
        assert not {*clusters[first].tolist()} & {*clusters[second].tolist()}
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(len(clusters)))
        assert min(len(first), len(second)) > 0
        if len(set(sizes)) == 1:
            assert len(first) == len(second)


def test_a_soup_on_documents(
    language_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    """What is claimed of it is claimed of documents, and readers see so; halves of rows are halves of documents."""
    pages = [f"Page {number} of the manual of an old machine says that it" for number in range(8)]
    rows = [{"text": f"{page} does this.", "page": page} for page in pages for _ in range(6)]
    Dataset.from_list(rows).to_parquet(tmp_path / "texts.parquet")
    test = {"task": "causal-lm", "dataset": str(tmp_path / "texts.parquet")}
    models = [str(language_family / name) for name in ("one", "two", "poor")]
    documents = cook(Recipe(ingredients=models, test={**test, "cluster_column": "page"}), "documents")
    lines = cook(Recipe(ingredients=models, test=test), "lines")
    (title,) = documents.report.comparisons
    one, other = (soup.report.comparisons[title] for soup in (documents, lines))
    assert one.difference == other.difference
    assert one.high - one.low > 1.5 * (other.high - other.low)
    assert "8 clusters, the rows with equal 'page'" in " ".join(documents.report.notes)
    assert Recipe.load(Path("documents", "soup.yaml")).test[0].cluster_column == "page"
    halves: list[Any] = []
    through = Candidates.random_halves

    def watched(self: Candidates, seed: int) -> Any:
        halves.append(through(self, seed))
        return halves[-1]

    monkeypatch.setattr(Candidates, "random_halves", watched)
    # Beside the same rows in another metric, for which nobody names clusters.
    looks = [{**test, "cluster_column": "page"}, {**test, "metric": "nll"}]
    cook(Recipe(ingredients=models, validation=looks, select="greedy", stability_repeats=1), "greedy")
    (((first, same), (second, _)),) = halves
    assert np.array_equal(first, same)
    assert len(first) == len(second) == 24
    assert not {*(first // 6).tolist()} & {*(second // 6).tolist()}
    with pytest.raises(RecipeError, match="'cluster_column' is for `validation` and `test`"):
        Recipe(ingredients=models, calibration={**test, "cluster_column": "page"})
