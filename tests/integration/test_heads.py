"""Models that answer with a number, or with several labels: chosen, measured, told, verified and updated."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

from hf_soup import Recipe, RecipeError, ScoringError, Soup, connectivity, cook

Cli = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("cli")  # in a folder of its own

WORTH = {"awful": -2.0, "bad": -1.0, "dull": -0.5, "fine": 0.5, "good": 1.0, "great": 2.0}
THINGS = ("film", "book", "day", "song")
LABELS = ("praise", "blame", "art")
SPLITS = {"validation": slice(48), "test": slice(48, 96), "train": slice(96, None)}


def rows() -> list[tuple[str, float, list[str]]]:
    """Texts, how much praise is in them, and what they are about."""
    found = []
    for first, second, thing in itertools.product(WORTH, WORTH, THINGS):
        is_so = (WORTH[first] + WORTH[second] > 0, min(WORTH[first], WORTH[second]) < -0.5, thing in ("film", "song"))
        labels = [label for label, yes in zip(LABELS, is_so, strict=True) if yes]
        found.append((f"{first} {second} {thing}", WORTH[first] + WORTH[second], labels))
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


@pytest.fixture(scope="module")
def heads(module_path: Path) -> Path:
    """Folders ``number`` and ``sets``: tiny BERTs ``base``, ``one``, ``two``, ``poor`` with such a head, and data."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORTH, *THINGS]
    texts, numbers, sets = zip(*rows(), strict=True)
    tokens = torch.tensor([[2, *(words.index(word) for word in text.split()), 3] for text in texts])
    train = np.arange(len(texts))[SPLITS["train"]]
    kinds: dict[str, tuple[dict[str, Any], torch.Tensor, list[dict[str, Any]]]] = {
        "number": ({"num_labels": 1}, torch.tensor(numbers), [{"score": number} for number in numbers]),
        "sets": (
            {"problem_type": "multi_label_classification", "id2label": dict(enumerate(LABELS)),
             "label2id": {label: number for number, label in enumerate(LABELS)}},
            torch.tensor([[float(label in each) for label in LABELS] for each in sets]),
            [{label: int(label in each) for label in LABELS} for each in sets],
        ),
    }  # fmt: skip
    for kind, (more, labels, columns) in kinds.items():
        for split, part in SPLITS.items():
            lines = [json.dumps({"text": text, **each}) for text, each in zip(texts[part], columns[part], strict=True)]
            (module_path / kind).mkdir(exist_ok=True)
            (module_path / kind / f"{split}.jsonl").write_text("\n".join(lines))
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=8, initializer_range=0.1, **more,
        )  # fmt: skip
        torch.manual_seed(0)
        base = BertForSequenceClassification(config)
        for name, steps, rate in (("base", 60, 1e-2), ("one", 20, 5e-3), ("two", 20, 5e-3), ("poor", 3, 3e-2)):
            model = base if name == "base" else BertForSequenceClassification(config)
            model.load_state_dict(base.state_dict())
            model.eval()
            optimizer = torch.optim.Adam(model.parameters(), lr=rate)
            for _ in range(steps):
                batch = train[torch.randint(len(train), (8,))]
                model(tokens[batch], labels=labels[batch]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            folder = module_path / kind / name
            model.save_pretrained(folder)
            (folder / "vocab.txt").write_text("\n".join(words))
            (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
            parent = "" if name == "base" else "base_model: acme/base\n"
            (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n{parent}---\n# {name}\n")
    return module_path


def data(folder: Path, split: str, **more: Any) -> dict[str, Any]:
    return {"task": "text-classification", "dataset": str(folder / f"{split}.jsonl"), **more}


def answers(folder: Path, split: str) -> np.ndarray:
    """``(n, outputs)``: what a model answers, by transformers alone."""
    texts = [text for text, _, _ in rows()[SPLITS[split]]]
    tokens = BertTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits: np.ndarray = BertForSequenceClassification.from_pretrained(folder).eval()(**tokens).logits.numpy()
    return logits


def test_a_soup_of_regression_models(cli: Cli, heads: Path, publish: Callable[..., str], tmp_path: Path) -> None:
    """From the Hub and back: chosen by rank correlation, told, cooked again with the same scores, and taken further."""
    folder = heads / "number"
    for name in ("base", "one", "two", "poor"):
        publish(name, folder / name)
    looks = ("--data", folder / "validation.jsonl", "--task", "text-classification", "--quiet")
    said = ("--select", "greedy", "--test", folder / "test.jsonl", "--metric", "spearmanr")
    done = cli("cook", "acme/one", "acme/two", "-o", "soup", *looks, *said)
    assert done.code == 0, done.err
    report = Soup.open(tmp_path / "soup").report
    numbers = np.array([number for _, number, _ in rows()])
    paths = {"soup": tmp_path / "soup", "acme/one": folder / "one", "acme/two": folder / "two"}
    assert set(report.scores) == set(paths)  # and no ensembles
    for split in ("validation", "test"):
        for name, path in paths.items():
            expected = stats.spearmanr(numbers[SPLITS[split]], answers(path, split)[:, 0]).statistic
            assert report.scores[name][f"{split}.jsonl spearmanr"].value == pytest.approx(expected, abs=1e-6)
    validation = {name: each["validation.jsonl spearmanr"].value for name, each in report.scores.items()}
    assert validation["soup"] >= validation[report.best["test.jsonl spearmanr"]] == max(list(validation.values())[1:])
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "type: spearmanr" in card
    assert f"| **this soup** | {report.scores['soup']['validation.jsonl spearmanr'].text} |" in card
    assert "### Calibration" not in card

    maps = [f"--map={split}.jsonl={folder / split}.jsonl" for split in ("validation", "test")]
    found = cli("verify", "soup", "--score", *maps, "--json").json
    assert found["verdict"] == "identical"
    assert [score["agrees"] for score in found["scores"]] == [True, True]

    done = cli("cook", "soup", "--add", "acme/poor", "-o", "next", *looks, "--metric", "loss")
    assert done.code == 0, done.err
    report = Soup.open(tmp_path / "next").report
    assert report.update.added == ("acme/poor",)
    loss = report.scores["last version"]["validation.jsonl loss"]
    assert (loss.share, loss.less_is_better) == (False, True)
    assert loss.value == pytest.approx(
        np.mean((numbers[:48] - answers(tmp_path / "soup", "validation")[:, 0]) ** 2), rel=1e-5
    )
    worse = report.scores["soup"]["validation.jsonl loss"].value - loss.value
    assert report.update.comparisons["validation.jsonl loss"].difference == pytest.approx(-worse)
    assert "validation.jsonl loss, less is better" in done.out


def test_a_soup_of_models_with_several_labels_a_row(heads: Path, tmp_path: Path) -> None:
    """Two metrics with weights, a number of the method to choose, and the choice made again on halves."""
    folder = heads / "sets"
    recipe = Recipe(
        ingredients=[str(folder / name) for name in ("poor", "one", "two")], base_model=str(folder / "base"),
        select="pruned", method={"name": "wise_ft", "alpha": [0.5, 1.0]}, stability_repeats=2,
        validation=[data(folder, "validation", metric="f1_micro"), data(folder, "validation", metric="loss", weight=2)],
        test=[data(folder, "test", metric=metric) for metric in ("accuracy", "roc_auc", "f1_macro")],
    )  # fmt: skip
    report = cook(recipe, "soup").report
    sets = np.array([[label in each for label in LABELS] for _, _, each in rows()]).astype(int)
    for name, path in (("soup", tmp_path / "soup"), ("local:one", folder / "one")):
        by_title = report.scores[name]
        found, right = answers(path, "validation"), sets[SPLITS["validation"]]
        f1 = sklearn.metrics.f1_score(right, found > 0, average="micro")
        assert by_title["validation.jsonl f1_micro"].value == pytest.approx(f1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(found), torch.tensor(right).float())
        assert by_title["validation.jsonl loss"].value == pytest.approx(loss.item(), rel=1e-5)
        found, right = answers(path, "test"), sets[SPLITS["test"]]
        for metric, expected in {
            "accuracy": sklearn.metrics.accuracy_score(right, found > 0),
            "roc_auc": sklearn.metrics.roc_auc_score(right, found, average="macro"),
            "f1_macro": sklearn.metrics.f1_score(right, found > 0, average="macro"),
        }.items():
            assert by_title[f"test.jsonl {metric}"].value == pytest.approx(expected)
    assert set(report.scores) == {"soup", "local:poor", "local:one", "local:two"}
    assert report.diversity == {}
    point = next(each for each in report.curve if each.parameters == report.parameters)
    values = [point.scores[title].value for title in ("validation.jsonl f1_micro", "validation.jsonl loss")]
    assert values == [report.scores["soup"][title].value for title in report.validation]
    objective = [(f - 2 * loss) / 3 for f, loss in (
        [each.scores[title].value for title in report.validation] for each in report.curve
    )]  # fmt: skip
    assert (values[0] - 2 * values[1]) / 3 == max(objective)
    assert report.stability.sentence.startswith("chosen again on 2 random halves")
    (first,) = pipeline("text-classification", model="soup", tokenizer=BertTokenizer.from_pretrained("soup"))("great")
    assert first["label"] in LABELS  # the config of the soup still says what kind of head it is


@pytest.mark.parametrize("kind", ["number", "sets"])
def test_weights_are_learned_by_the_heads_own_loss(heads: Path, kind: str) -> None:
    """It falls on the rows that are kept apart, and no ingredient has a lower one than the soup."""
    folder = heads / kind
    names = [str(folder / name) for name in ("poor", "one", "two")]
    recipe = {
        "ingredients": names, "base_model": str(folder / "base"), "allow": ["drifted"],
        "validation": data(folder, "validation", metric="loss"),
    }  # fmt: skip
    learned = cook(Recipe(**recipe, select={"name": "learned", "by": "tensor", "epochs": 15}), "soup").report
    losses = [entry.inner_loss for entry in learned.history]
    assert losses.index(min(losses)) > 2
    assert {entry.scale == 1.0 for entry in learned.history} == {kind == "number"}
    values = {name: by_title["validation.jsonl loss"].value for name, by_title in learned.scores.items()}
    assert values["soup"] <= 1.01 * min(values.values())


def test_what_heads_do_not_have(heads: Path) -> None:
    """Found when the config is read, before any weight is."""
    for kind, metric, usual in (("number", "mse", "spearmanr"), ("sets", "loss", "accuracy")):
        folder = heads / kind
        recipe = Recipe(
            ingredients=[str(folder / name) for name in ("one", "two")], base_model=str(folder / "base"),
            validation=data(folder, "validation", metric=metric),
        )  # fmt: skip
        with pytest.raises(
            RecipeError, match=f"measured in points, which 'validation.jsonl {metric}' is not"
        ) as raised:
            connectivity(recipe)
        assert usual in raised.value.hint
        with pytest.raises(ScoringError, match=r"no one label to draw"):
            cook(Recipe(**{**recipe.to_dict(), "calibration": data(folder, "train"), "method": "fisher"}), "soup")
