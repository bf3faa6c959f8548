"""Barriers between models that were really trained: siblings, and fine-tunes of twins: two ancestors of one start."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_soup
from hf_soup import ConnectivityReport, Recipe, SoupError
from hf_soup.demo import digits as zoo
from hf_soup.demo.digits_data import DIGITS, LETTERS, draw_letters, make_dataset, splits_of
from hf_soup.errors import IncompatibleError

# The cards name no ancestor, and the Hub that is asked must not be the real one.
pytestmark = [
    pytest.mark.usefixtures("online"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``a-1`` and ``a-2``, ``b-1`` of the mirrored letters' ancestor, ``stranger``, and the data set."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("digits")
    make_dataset(folder / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train = splits_of(0)["train"]
    card = "# A model for tests\n"
    for name, mirrored, count in (("a", False, 2), ("b", True, 1)):
        generator = torch.Generator().manual_seed(int(mirrored))
        images, labels = draw_letters(800, generator)
        images = images.flip(-1) if mirrored else images
        ancestor = zoo._new_model(LETTERS, 0)  # the same for both
        pictures = islice(zoo.batches(images, labels, 32, generator), 30)
        zoo.train(ancestor, zoo._losses(ancestor, pictures), 3e-3, 0.05, lambda step: 1.0)
        start = zoo._new_model(DIGITS, 0)
        start.vit.load_state_dict(ancestor.vit.state_dict())
        zoo._probe(start, *train)
        for number in range(1, count + 1):
            model = copy.deepcopy(start)
            chosen = zoo.Hyperparameters(
                seed=number + 10 * mirrored, learning_rate=1.2e-3, epochs=4, weight_decay=0.01, label_smoothing=0.0,
                augmentation=0.6, mixup=0.0,
            )  # fmt: skip
            zoo._fine_tune(model, *train, chosen)
            zoo._save(model, folder / f"{name}-{number}", {}, card)
    zoo._save(zoo._new_model(DIGITS, 1), folder / "stranger", {}, card)
    torch.set_num_threads(threads)
    return folder


def recipe_of(folder: Path, *names: str, **score: Any) -> Recipe:
    data = {"task": "image-classification", "dataset": str(parquet(folder)), "name": "digits", **score}
    return Recipe(ingredients=[str(folder / name) for name in names], validation=data)


def parquet(folder: Path) -> Path:
    return folder / "data" / "data" / "validation-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def measured(digits: Path) -> ConnectivityReport:
    """The two siblings and the twin's fine-tune."""
    return hf_soup.connectivity(recipe_of(digits, "a-1", "a-2", "b-1"))


def test_only_the_barrier_tells_a_twins_child(digits: Path, measured: ConnectivityReport) -> None:
    """To every statistic of weights it is a sibling; on the way to it the score breaks down."""
    lineage = hf_soup.check(recipe_of(digits, "a-1", "a-2", "b-1"))
    assert lineage.verdict == "likely"
    siblings, *others = measured.pairs
    assert (siblings.first, siblings.second) == ("local:a-1", "local:a-2")
    assert not siblings.barrier
    assert siblings.height < 0
    for pair in others:
        assert pair.barrier
        assert pair.low > 0.05
    assert measured.outsiders == ("local:b-1",)
    assert measured.groups == (("local:a-1", "local:a-2"), ("local:b-1",))
    assert [reason.ingredients for reason in measured.reasons] == [("local:b-1",)]
    assert re.match("local:b-1 does not (seem to )?belong: a barrier in both pairs, the highest ", measured.text)


def test_the_figures_are_those_of_plain_transformers(digits: Path, measured: ConnectivityReport) -> None:
    """Load two models, average their state dicts, let them answer, count: every score that was measured."""
    rows = pq.read_table(parquet(digits))
    pictures = [Image.open(io.BytesIO(row["bytes"])) for row in rows["image"].to_pylist()]
    labels = np.array(rows["label"].to_pylist())
    models = {f"local:{name}": AutoModelForImageClassification.from_pretrained(digits / name) for name in
              ("a-1", "a-2", "b-1")}  # fmt: skip
    inputs = AutoImageProcessor.from_pretrained(digits / "a-1")(pictures, return_tensors="pt")["pixel_values"]

    def right(*mixed: tuple[str, float]) -> np.ndarray:
        states = [(models[name].state_dict(), share) for name, share in mixed]
        model = copy.deepcopy(models[mixed[0][0]])
        model.load_state_dict({key: sum(share * state[key] for state, share in states) for key in states[0][0]})
        with torch.no_grad():
            return model(pixel_values=inputs).logits.argmax(-1).numpy() == labels

    for name, score in measured.scores.items():
        assert right((name, 1.0)).mean() == pytest.approx(score, abs=1.01 / len(labels))
    for pair in measured.pairs:
        found = {}
        assert sorted(pair.line) == [0, 0.25, 0.5, 0.75, 1]
        for alpha, score in pair.line.items():
            found[alpha] = right((pair.first, 1 - alpha), (pair.second, alpha))
            assert found[alpha].mean() == pytest.approx(score, abs=1.01 / len(labels))
        below = {a: (1 - a) * found[0] + a * found[1] - found[a] for a in (0.25, 0.5, 0.75)}
        assert max(each.mean() for each in below.values()) == pytest.approx(pair.height, abs=2.01 / len(labels))
        # The bootstrap of a mean is close to the normal interval of the differences, row by row.
        half = 1.96 * below[pair.at].std() / np.sqrt(len(labels))
        assert pair.high - pair.low == pytest.approx(2 * half, rel=0.15)


def test_it_is_the_same_every_time(digits: Path, measured: ConnectivityReport) -> None:
    again = hf_soup.connectivity(recipe_of(digits, "a-1", "b-1"))
    assert again.pairs == measured.pairs[1:2]


def test_strangers_are_refused_and_not_scored(digits: Path, cli: Cli, tmp_path: Path) -> None:
    """On the command line with the whole report and exit code 3."""
    recipe = recipe_of(digits, "a-1", "stranger")
    with pytest.raises(IncompatibleError):
        hf_soup.connectivity(recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = cli("check", "--recipe", "recipe.yaml", "--barrier", "--json")
    assert done.code == 3
    assert done.json["verdict"] == "refused"
    assert done.json["barrier"] is None
    assert "have no barrier measured between them" in done.err


def test_the_command_line_over_the_hub(digits: Path, cli: Cli, publish: Callable[..., str], tmp_path: Path) -> None:
    """Models named beside the recipe replace its own; the barrier is a warning and leaves the verdict alone."""
    models = [publish(name, digits / name) for name in ("a-1", "b-1")]
    (tmp_path / "recipe.yaml").write_text(recipe_of(digits, "a-1", "stranger").to_yaml())
    done = cli("check", *models, "--recipe", "recipe.yaml", "--barrier", "-o", "new.yaml", "--json")
    assert done.code == 0, done
    report = done.json
    assert report["verdict"] == "likely"
    (reason,) = [reason for reason in report["reasons"] if reason["code"] == "barrier"]
    assert reason["severity"] == "warning"
    assert reason["ingredients"] == models
    found = report["barrier"]
    assert found["names"] == models
    assert found["barriers"] == [models]
    height = found["heights"][0][1]
    (line,) = found["lines"]
    scores = dict(map(tuple, line["line"]))
    assert found["matrix"] == [[scores[0], scores[0.5]], [scores[0.5], scores[1]]]
    assert height == pytest.approx(max((1 - a) * scores[0] + a * scores[1] - scores[a] for a in (0.25, 0.5, 0.75)))
    low, high = found["intervals"][0][1]
    assert 0 < low < height < high
    assert found["text"] in reason["message"]
    assert "note: 2 models, 1 pair: 5 scorings of 450 rows" in done.err
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["validation"]["name"] == "digits"


def test_data_that_cannot_be_used_is_said_before_the_download(digits: Path) -> None:
    """A metric that there is not; the weights would have been asked for later."""
    with pytest.raises(SoupError, match="no built-in metric 'beauty'"):
        hf_soup.connectivity(recipe_of(digits, "a-1", "a-2", metric="beauty"))


def test_other_metrics_have_barriers_too(digits: Path, measured: ConnectivityReport) -> None:
    found = hf_soup.connectivity(recipe_of(digits, "a-1", "b-1", metric="f1_macro"), least=0.01)
    assert found.title == "digits f1_macro"
    assert found.least == 0.01
    (pair,) = found.pairs
    assert pair.low < pair.height < pair.high
    assert pair.height == pytest.approx(measured.pairs[1].height, abs=0.1)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
