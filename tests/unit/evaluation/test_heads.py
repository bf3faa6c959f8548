"""Labels of every kind of head, as data sets have them, and what is measured of a model's outputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, List as ListOf, Value
from huggingface_hub import constants
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from hf_soup.errors import ScoringError
from hf_soup.evaluation import metrics
from hf_soup.evaluation.heads import HeadDataset
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.recipe import Scoring

NAMES = ("joy", "anger", "Fear")
SEVERAL: dict[str, Any] = {"problem_type": "multi_label_classification", "id2label": dict(enumerate(NAMES))}
TEXTS = ("a b", "b", "c a b", "d", "a", "c d", "b b b", "d a")
NUMBERS = (0.5, 3, -1.25, 4.0, 2, 0, 5, 3.5)
SETS = ([0], [], [0, 2], [1], [2], [2, 1], [0, 1, 2], [0])
MATRIX = np.array([[int(number in each) for number in range(3)] for each in SETS])
TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for every test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("donor")
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def bench_of(donor: Path, rows: Sequence[dict[str, Any]] | Path, config: dict[str, Any], **said: Any) -> Any:
    """Rows as a file, and the data that a model with such a config makes of them."""
    path = rows if isinstance(rows, Path) else donor / "d.jsonl"
    if not isinstance(rows, Path):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scoring = Scoring(task="text-classification", dataset=str(path), **{"metric": "loss", **said})
    (bench,) = prepare_datasets([("validation", scoring)], folder=donor, config=config)
    assert isinstance(bench, HeadDataset)
    return bench


def rows_with(**columns: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"text": text, **dict(zip(columns, each, strict=True))}
        for text, *each in zip(TEXTS, *columns.values(), strict=True)
    ]


HEADS = {
    "one class a row": ({"id2label": dict(enumerate(NAMES))}, [0, 1, 2, 2, 1, 0, 0, 1]),
    "regression": ({"id2label": {0: "LABEL_0"}}, NUMBERS),
    "multi-label": (SEVERAL, MATRIX.tolist()),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_is_what_transformers_trains_with(donor: Path, kind: str) -> None:
    """In value and gradient; the metric is its mean, and less is better in choices, intervals and comparisons."""
    config, labels = HEADS[kind]
    bench = bench_of(donor, rows_with(labels=labels), config)
    assert bench.kind == kind
    torch.manual_seed(0)
    model, other = (
        BertForSequenceClassification(
            BertConfig(
                vocab_size=len(TOKENS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                initializer_range=0.5, **config,
            )
        ).eval()
        for _ in range(2)
    )  # fmt: skip
    given = BertTokenizer.from_pretrained(donor)(list(TEXTS), return_tensors="pt", padding=True)
    target = torch.tensor(labels, dtype=torch.long if kind == "one class a row" else torch.float32)
    answered = model(**given, labels=target)
    answered.loss.backward()
    expected = model.classifier.weight.grad.clone()
    model.zero_grad()
    order = np.array([5, 0, 1, 7, 6, 2, 4, 3])
    losses = bench.row_losses(model(**given).logits[order], order)
    assert losses.shape == (8,)
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), answered.loss)
    torch.testing.assert_close(model.classifier.weight.grad, expected)
    half = bench.row_losses(answered.logits[order[:3]].bfloat16(), order[:3])
    torch.testing.assert_close(half.float(), losses[:3], rtol=0.1, atol=0.1)

    outputs = bench.outputs(model)
    assert bench.fits(outputs)
    assert not bench.fits(outputs[:, :0])
    score = bench.score(outputs)
    assert score.value == pytest.approx(answered.loss.item(), rel=1e-5)
    assert (score.metric, score.n, score.share, score.less_is_better) == ("loss", 8, False, True)
    assert bench.judge(bench.answers(outputs)) == -score.value
    values = losses.detach().numpy()[np.argsort(order)]
    assert bench.judge(bench.answers(outputs), order[:3]) == pytest.approx(-values[order[:3]].mean(), rel=1e-5)
    drawn = bench.resampled(outputs)
    assert drawn.mean() == pytest.approx(-score.value, rel=0.1)
    assert drawn.max() < 0
    worse = bench.score(bench.outputs(other)).value - score.value
    assert bench.compare(outputs, bench.outputs(other)).difference == pytest.approx(worse)


@pytest.mark.parametrize(
    "labels",
    [
        [[NAMES[number].upper() for number in each] for each in SETS],
        SETS,
        MATRIX.tolist(),
        MATRIX.astype(float).tolist(),
        MATRIX.astype(bool).tolist(),
    ],
    ids=["names", "numbers", "vectors", "floats", "booleans"],
)
def test_several_labels_as_data_sets_have_them(donor: Path, labels: Sequence[Any]) -> None:
    bench = bench_of(donor, rows_with(labels=labels), SEVERAL)
    assert bench.references.tolist() == MATRIX.tolist()
    assert bench.class_names == NAMES
    by_number = "labels matched by number, because the data names no classes"
    assert bench.notes == (() if isinstance(labels[0][0], str) else (by_number,))
    assert bench.looked_at_as == (32, "text-classification")


def test_several_labels_in_columns_of_their_own(donor: Path) -> None:
    """By name, in any order; the model's or, where it names none, the recipe's."""
    columns = {NAMES[place].lower(): MATRIX[:, place].tolist() for place in (2, 0, 1)}
    columns["anger"] = MATRIX[:, 1].astype(bool).tolist()
    bench = bench_of(donor, rows_with(**columns, other=[7] * 8), SEVERAL)
    assert bench.references.tolist() == MATRIX.tolist()
    assert bench.notes == ()
    nameless = {**SEVERAL, "id2label": {number: f"LABEL_{number}" for number in range(3)}}
    bench = bench_of(donor, rows_with(**columns), nameless, labels=("Fear", "anger", "joy"))
    assert bench.references.tolist() == MATRIX[:, ::-1].tolist()
    assert bench.class_names == ("Fear", "anger", "joy")
    with pytest.raises(ScoringError, match=r"nor one for each of the model's 3 classes \(not for LABEL_0, LABEL_1"):
        bench_of(donor, rows_with(**columns), nameless)
    with pytest.raises(ScoringError, match=r"classes \(not for all\)"):
        bench_of(donor, rows_with(**columns), nameless, labels=("joy", "anger"))


def test_classes_that_a_data_set_declares_for_lists(donor: Path, tmp_path: Path) -> None:
    """As go_emotions has them, by the data's names; and no and yes for each class of the model."""
    path = tmp_path / "d.parquet"
    names = ["Fear", "anger", "joy"]
    features = datasets.Features({"text": Value("string"), "labels": ListOf(ClassLabel(names=names))})
    declared = [[0, 1], [0, 1, 2], [1], [], [2, 0], [2], [1], [0]]
    datasets.Dataset.from_dict({"text": TEXTS, "labels": declared}, features=features).to_parquet(path)
    bench = bench_of(donor, path, SEVERAL)
    assert bench.references.tolist() == [[int(2 - number in each) for number in range(3)] for each in declared]
    assert bench.notes == ()
    features["labels"] = ListOf(ClassLabel(names=["no", "yes"]))
    datasets.Dataset.from_dict({"text": TEXTS, "labels": MATRIX.tolist()}, features=features).to_parquet(path)
    assert bench_of(donor, path, SEVERAL).references.tolist() == MATRIX.tolist()


def test_yes_is_a_logit_above_zero(donor: Path) -> None:
    bench = bench_of(donor, rows_with(labels=SETS), SEVERAL, metric="accuracy")
    outputs = np.where(MATRIX, 0.01, -3).astype(np.float32)
    assert bench.answers(outputs).tolist() == MATRIX.tolist()
    assert bench.score(outputs).value == 1
    wrong = outputs.copy()
    wrong[[0, 3], [1, 1]] = 0.0  # which is no yes
    assert bench.score(wrong).value == 7 / 8
    found = bench.compare(outputs, wrong)
    assert (found.difference, found.p) == (1 / 8, 1.0)  # McNemar's, of one row
    assert bench.judge(bench.answers(wrong), np.array([3, 4])) == 0.5


@pytest.mark.parametrize("key", ["label", "labels", "score", "similar"])
def test_numbers_as_data_sets_have_them(donor: Path, key: str) -> None:
    said = {"label_column": key} if key == "similar" else {}
    bench = bench_of(donor, rows_with(**{key: NUMBERS}), {"id2label": {0: "LABEL_0"}}, metric="spearmanr", **said)
    assert bench.references.tolist() == list(NUMBERS)
    outputs = np.array([[1.0], [2], [-3], [2.5], [2], [1], [9], [0]], dtype=np.float32)
    expected = spearmanr(NUMBERS, outputs[:, 0]).statistic
    score = bench.score(outputs)
    assert (score.metric, score.share) == ("spearmanr", False)
    assert score.value == bench.judge(bench.answers(outputs)) == pytest.approx(expected)
    assert score.low < score.value <= score.high
    assert bench.compare(outputs, -outputs).difference == pytest.approx(2 * expected)
    right = np.array(NUMBERS, dtype=np.float32)[:, None]
    assert bench.compare(right, -right).sentence.startswith("better by 2 (")
    assert bench.score(np.full((8, 1), 0.3, dtype=np.float32)).value == 0  # who always says the same knows no order


def test_how_sure_a_classifier_is(donor: Path) -> None:
    """Two classes by the odds of the second, as long as a float tells them apart; more by their probabilities."""
    two = bench_of(donor, rows_with(label=[0, 1] * 4), {"id2label": {0: "no", 1: "yes"}}, metric="roc_auc")
    outputs = np.array([[0, 80 + place] for place in (0, 3, 1, 2, 4, 5, 6, 7)], dtype=np.float32)
    assert two.score(outputs).value == roc_auc_score([0, 1] * 4, outputs[:, 1])
    more = bench_of(donor, rows_with(label=HEADS["one class a row"][1]), HEADS["one class a row"][0], metric="roc_auc")
    logits = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    shares = torch.tensor(logits).double().softmax(1).numpy()
    assert more.score(logits).value == pytest.approx(roc_auc_score(more.references, shares, multi_class="ovr"))
    assert more.doubt_of_order("acme/a", logits) is None
    assert more.better_than_chance(logits)[0] == np.mean(logits.argmax(1) == more.references)


def test_functions_of_ones_own_see_what_rows_have(donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("own_of_heads.py").write_text(
        "import numpy, scipy\n"
        "def near(r, p):\n    return numpy.mean(abs(r - p) < 1)\n"
        "def jaccard(r, p):\n"
        "    assert r.dtype == p.dtype == numpy.int64\n    return (r & p).sum() / (r | p).sum()\n"
    )
    metrics.forget()
    numbers = bench_of(
        donor, rows_with(score=NUMBERS), {"problem_type": "regression", "num_labels": 1}, metric="own_of_heads:near"
    )
    score = numbers.score(np.array([[number + 0.2 * place] for place, number in enumerate(NUMBERS)], dtype=np.float32))
    assert (score.value, score.share) == (5 / 8, True)
    several = bench_of(donor, rows_with(labels=SETS), SEVERAL, metric="own_of_heads:jaccard")
    score = several.score(np.where(MATRIX, 1, -1)[::-1].astype(np.float32))
    assert score.value == (MATRIX & MATRIX[::-1]).sum() / (MATRIX | MATRIX[::-1]).sum()
    assert score.low < score.value < score.high
    sys.modules.pop("own_of_heads")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [*NUMBERS[:7], None]}, "Row 7 of d.jsonl has None as 'label', where a number should be"),
        ({"label": [*NUMBERS[:7], float("nan")]}, "Row 7 of d.jsonl has nan as 'label'"),
        ({"label": [*NUMBERS[:7], float("inf")]}, "Row 7 of d.jsonl has inf as 'label'"),
        ({"label": [*NUMBERS[:7], -1e300]}, r"Row 7 of d.jsonl has -1e\+300 as 'label'"),
        ({"label": ["3.5", *["2"] * 7]}, "Row 0 of d.jsonl has '3.5' as 'label'"),
        ({"label": [[1.0]] * 8}, r"Row 0 of d.jsonl has \[1.0\] as 'label'"),
        ({"score": [-1] * 8}, "All 8 rows of d.jsonl have the label -1; a score would mean nothing"),
        ({"grade": NUMBERS}, r"none of the columns that can be `label_column` \(label, labels, score\)"),
    ],
)
def test_numbers_that_cannot_be_scored(donor: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoringError, match=message) as raised:
        bench_of(donor, rows_with(**columns), {"problem_type": "regression", "id2label": {0: "x"}}, metric="mse")
    assert raised.value.hint


@pytest.mark.parametrize(
    ("columns", "said", "message"),
    [
        ({"labels": [0] * 8}, {}, "Row 0 of d.jsonl has 0 as 'labels', and the model's head is multi-label"),
        ({"labels": [*SETS[:5], None, *SETS[6:]]}, {}, "Row 5 of d.jsonl has None as 'labels'"),
        ({"labels": [[1, 0], [0, 0], *SETS[2:]]}, {}, r"Row 1 of d.jsonl has \[0, 0\] as 'labels'.* for each of its 3"),
        ({"labels": [*MATRIX.tolist()[:7], [0, -1, 0]]}, {}, r"Row 7 of d.jsonl has \[0, -1, 0\] as 'labels'"),
        ({"labels": [*MATRIX.tolist()[:6], [0, 2], [1]]}, {}, r"Row 6 of d.jsonl has \[0, 2\] as 'labels'"),
        ({"labels": [[0, 0, 1, 0]] * 8}, {}, r"Row 0 of d.jsonl has \[0, 0, 1, 0\]"),
        ({"labels": [*SETS[:7], [3]]}, {}, "d.jsonl has 4 classes and the model has 3 outputs"),
        ({"labels": [*SETS[:7], [3]]}, {"labels": NAMES}, "Row 7 of d.jsonl has the label 3, which is none of joy"),
        ({"labels": [*SETS[:7], [-1]]}, {}, "Row 7 of d.jsonl has the label -1: the labels of this split are hidden"),
        ({"labels": [[], [], ["joy"], ["rage"], *[[]] * 4]}, {}, "The classes of d.jsonl are not the model's"),
        ({"labels": [[0.5, 1]] * 8}, {}, "Row 0 of d.jsonl has no usable label: 'labels' is 0.5"),
        ({"labels": [[]] * 8}, {}, "No row of d.jsonl has a label"),
        ({"labels": [[0, 2]] * 8}, {}, r"All 8 rows of d.jsonl have the same labels \(joy, Fear\)"),
        ({"joy": [0] * 8, "anger": [0, 1] * 4}, {}, r"neither a column with lists of labels .* \(not for Fear\)"),
        ({"joy": [0] * 8, "anger": [0, 1] * 4, "fear": [-1] * 8}, {}, "Row 0 of d.jsonl has -1 as 'Fear', where"),
        ({"joy": [0] * 8, "anger": [0, 1] * 4, "fear": [1, None] * 4}, {}, "Row 1 of d.jsonl has None as 'Fear'"),
        ({"joy": SETS}, {"label_column": "moods"}, "none of the columns that can be `label_column`"),
    ],
)  # fmt: skip
def test_several_labels_that_cannot_be_scored(
    donor: Path, columns: dict[str, Any], said: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScoringError, match=message) as raised:
        bench_of(donor, rows_with(**columns), SEVERAL, **said)
    assert "d.jsonl" in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize(
    ("config", "said", "message", "hint"),
    [
        ({"num_labels": 1}, {"metric": "accuracy"}, "regression, for .* no metric 'accuracy'", "spearmanr, pear"),
        ({"num_labels": 1}, {"metric": "roc_auc", "trust_remote_code": True}, "no metric 'roc_auc'", "spearmanr"),
        ({"num_labels": 1}, {"labels": ("a",), "metric": "mse"}, "`labels` cannot name", "Leave it out"),
        ({"problem_type": "regression"}, {"metric": "mse"}, "regression, with 2 outputs", "function of your own"),
        (SEVERAL, {"metric": "f1"}, "head is multi-label, for which there is no metric 'f1'", "f1_micro, f1_macro"),
        ({"num_labels": 2}, {"metric": "f1_micro"}, "head is one class a row, for .* 'f1_micro'", "f1, precision"),
        ({"num_labels": 3}, {"metric": "f1"}, "'f1' is of two classes, and the model has 3", "'f1_macro' is its mean"),
        ({"num_labels": 3}, {"metric": "recall"}, "'recall' is of two classes", "'recall_macro'"),
        (SEVERAL, {"metric": "hamming"}, "There is no built-in metric 'hamming'", "accuracy, f1_micro"),
    ],
)  # fmt: skip
def test_metrics_that_a_head_does_not_have(
    donor: Path, config: dict[str, Any], said: dict[str, Any], message: str, hint: str
) -> None:
    """Told before the data are looked for."""
    with pytest.raises(ScoringError, match=message) as raised:
        bench_of(donor, Path("/nowhere.csv"), config, **said)
    assert hint in raised.value.hint


def test_a_config_with_another_head_than_the_weights(donor: Path) -> None:
    bench = bench_of(donor, rows_with(score=NUMBERS), {"num_labels": 1})
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    with pytest.raises(ScoringError, match="has 2 outputs, and the config names 1 of them"):
        bench.outputs(BertForSequenceClassification(config))
