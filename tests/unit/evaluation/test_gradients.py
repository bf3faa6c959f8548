"""The streamed gradient against autograd, on models whose tensors transformers renames, stacks and ties."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from plans import config_of, make_plan
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from transformers.utils import logging

from hf_soup.checkpoint import RowRange, TensorInfo, read_header
from hf_soup.errors import MergeError, ScoringError
from hf_soup.evaluation import ClassificationDataset, gradients as descent, loaded_parameters
from hf_soup.evaluation.gradients import ValidationLoss, needed_bytes
from hf_soup.evaluation.model import build_model
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.merging import Plan, Reading
from hf_soup.recipe import Scoring

N = 3
#: Ingredients that are sources.
ALONE = {name: {name: 1.0} for name in "abc"}
TEXT: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE: dict[str, Any] = {"num_channels": 1, "id2label": {n: str(n) for n in range(10)}, "initializer_range": 0.3}
MADE: dict[str, Callable[[], Any]] = {
    "ViT": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**IMAGE, image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=2,
                               num_attention_heads=2, intermediate_size=16)),
    "ResNet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**IMAGE, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    "BERT": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, intermediate_size=16, max_position_embeddings=16, initializer_range=0.3)),
    "Mixtral": lambda: transformers.MixtralForSequenceClassification(
        transformers.MixtralConfig(**TEXT, intermediate_size=8, num_key_value_heads=1, num_local_experts=4,
                                   max_position_embeddings=16, pad_token_id=0, initializer_range=0.3)),
    "T5": lambda: transformers.T5ForSequenceClassification(
        transformers.T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, eos_token_id=3,
                              decoder_start_token_id=0)),
}  # fmt: skip


def old_names(name: str) -> str:
    """Those that BERTs were published under."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


class Kitchen:
    """Ingredients of one family in files, and what they are to be by the simplest arithmetic there is."""

    def __init__(self, folder: Path, family: str, rows: Path, dtype: torch.dtype = torch.float32) -> None:
        logging.disable_progress_bar()
        self.folder, self.paths, self.full, headers = folder, [], [], []
        tokens = transformers.BertTokenizer.from_pretrained(rows.parent / "base")
        tokens.save_pretrained(folder)
        text = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
                "pad_token": "[PAD]"}  # fmt: skip
        image = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": False,
            "image_mean": [0.5],
            "image_std": [0.5],
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(text))
        (folder / "preprocessor_config.json").write_text(json.dumps(image))
        for number in range(N):
            torch.manual_seed(number)
            model = MADE[family]()
            model.save_pretrained(folder)
            path = folder / f"{number}.safetensors"
            tensors = {name: self._varied(each).to(dtype) if each.is_floating_point() else each
                       for name, each in load_file(folder / "model.safetensors").items()}  # fmt: skip
            old = family == "BERT" and number == 1
            save_file({old_names(name) if old else name: each for name, each in tensors.items()}, path)
            data = path.read_bytes()
            found = {t.name: t for t in read_header(lambda _, i, j, d=data: d[i:j], "m", len(data), "m")}
            headers.append({name: found[old_names(name) if old else name] for name in tensors})
            self.full.append({name: each.float() for name, each in tensors.items()})
            self.paths.append({"m": path})
        self.having = {name: torch.ones((N, *[1] * each.ndim)) for name, each in self.full[0].items()}
        self.headers: list[dict[str, TensorInfo]] = headers
        self.patched: set[str] = set()
        self.task = "image-classification" if family in ("ViT", "ResNet") else "text-classification"
        if self.task == "image-classification":
            rows = folder / "digits.parquet"
            digits = load_digits()
            pictures = [Image.fromarray(np.rint(each * 15.9).astype(np.uint8)) for each in digits.images[:24]]
            datasets.Dataset.from_dict(
                {"image": pictures, "label": digits.target[:24].tolist()},
                features=datasets.Features(
                    {"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])}
                ),
            ).to_parquet(rows)
        config = json.loads((folder / "config.json").read_text())
        scoring = Scoring(task=self.task, dataset=str(rows), batch_size=10)
        self.bench: ClassificationDataset = prepare_datasets([("validation", scoring)], folder=folder, config=config)[0]

    @staticmethod
    def _varied(tensor: Tensor) -> Tensor:
        """Ones and zeros tell nothing apart."""
        return tensor + 0.1 * torch.rand(tensor.shape) if tensor.is_floating_point() else tensor

    def lose(self, name: str, places: Mapping[int, list[RowRange]]) -> None:
        """A tensor whose rows lie elsewhere in some ingredients, or are not there."""
        self.patched.add(name)
        length = self.headers[0][name].shape[0]
        having = torch.zeros(N, length)
        for number in range(N):
            rows = places.get(number, [RowRange(0, 0, length)])
            laid = torch.zeros_like(self.full[number][name])
            for each in rows:
                laid[each.target : each.target + each.count] = self.full[number][name][each.source :][: each.count]
                having[number, each.target : each.target + each.count] = 1
            self.full[number][name] = laid
            if number in places:
                self.headers[number][name] = self.headers[number][name].moved(rows, length)
        self.having[name] = having.reshape(N, length, *[1] * (self.full[0][name].ndim - 1))

    def plan(self) -> Plan:
        return make_plan(["a", "b", "c"], self.headers, [1.0] * N, patched=self.patched)

    def mixture(self, **more: Any) -> ValidationLoss:
        return ValidationLoss(self.plan().layout, self.paths, ALONE, config_of(self.folder), [self.bench], **more)

    def mixed(self, name: str, shares: Tensor) -> Tensor:
        """``shares`` are (n,): the plain sum, but the mean of those who have it where not all have."""
        every, having = torch.stack([each[name] for each in self.full]), self.having[name]
        given = shares.reshape(N, *[1] * (every.ndim - 1)) * having
        total = (given * every).sum(0)
        return torch.where(having.all(0), total, total / given.sum(0))

    def expected(self, shares: NDArray[np.float64], scale: float) -> tuple[float, NDArray[np.float64], float]:
        """The loss by transformers' own loading, and its derivatives: autograd's, along what each share moves."""
        floats = self.floats
        given = {name: torch.tensor(shares[row % len(shares)]).float() for row, name in enumerate(floats)}
        ints = {name: each for name, each in self.full[0].items() if name not in given}
        ints = {name: load_file(self.paths[0]["m"])[name] for name in ints}
        model = self.model({name: self.mixed(name, each) for name, each in given.items()} | ints)
        beta = torch.tensor(scale, requires_grad=True)
        everything = np.arange(self.bench.n)
        logits = model(**self.bench.inputs.batch(everything)).logits
        loss = torch.nn.functional.cross_entropy(beta * logits, torch.from_numpy(self.bench.references))
        loss.backward()
        # Loading moves entries and changes none, so numbers in their places say which tensor each entry came from.
        origins = self.model({name: torch.full_like(self.full[0][name], row) for row, name in enumerate(floats)} | ints)
        slopes = np.zeros((len(floats), N))
        moved = {name: torch.autograd.functional.jacobian(partial(self.mixed, name), each, vectorize=True)
                 for name, each in given.items()}  # fmt: skip
        for column in range(N):
            direction = self.model({name: each[..., column].contiguous() for name, each in moved.items()} | ints)
            for ours, theirs, origin in zip(
                model.parameters(), direction.parameters(), origins.parameters(), strict=True
            ):
                if ours.grad is not None:
                    terms = (ours.grad.double() * theirs.detach().double()).flatten().numpy()
                    slopes[:, column] += np.bincount(origin.detach().flatten().int(), terms, len(floats))
        assert beta.grad is not None
        return loss.item(), slopes if len(shares) > 1 else slopes.sum(0, keepdims=True), float(beta.grad)

    @property
    def floats(self) -> list[str]:
        return [tensor.name for tensor in self.plan().layout.tensors if tensor.averaged]

    def model(self, tensors: Mapping[str, Tensor]) -> Any:
        return build_model(config_of(self.folder), tensors, self.task, torch.float32)


@pytest.fixture(scope="module")
def kitchens(tmp_path_factory: pytest.TempPathFactory, family: Path) -> Callable[[str], Kitchen]:
    """One of each family, for tests that change nothing."""
    return cache(lambda name: Kitchen(tmp_path_factory.mktemp(name), name, family / "rows.csv"))


def some_shares(kitchen: Kitchen, by: str, constrain: str) -> NDArray[np.float64]:
    """Not equal; with ``none`` one is negative."""
    raw = np.random.default_rng(0).normal(size=(len(kitchen.floats) if by == "tensor" else 1, N))
    shares: NDArray[np.float64] = np.exp(raw) / np.exp(raw).sum(1, keepdims=True)
    return shares if constrain == "softmax" else 1.3 * shares - np.array([0.0, 0.0, 0.4])


def far(found: Any, expected: Any) -> float:
    """Relative distance."""
    return float(np.linalg.norm(np.subtract(found, expected)) / np.linalg.norm(expected))


@pytest.mark.parametrize("family_name", MADE)
def test_the_gradient_is_autograds(kitchens: Callable[[str], Kitchen], family_name: str) -> None:
    kitchen = kitchens(family_name)
    mixture = kitchen.mixture()
    assert list(mixture.tensors) == kitchen.floats
    everything = np.arange(kitchen.bench.n)
    mixture.gradient(some_shares(kitchen, "ingredient", "softmax"), 1.0, everything[:5])  # leaves nothing behind
    for by, constrain in (("tensor", "softmax"), ("ingredient", "none")):
        shares = some_shares(kitchen, by, constrain)
        loss, slopes, slope = mixture.gradient(shares, 1.5, everything)
        expected = kitchen.expected(shares, 1.5)
        assert slopes.shape == shares.shape
        assert far(loss, expected[0]) < 1e-5
        assert far(slopes, expected[1]) < 1e-5
        assert far(slope, expected[2]) < 1e-5
        least, scale = mixture.loss(shares, everything)
        at = [mixture.gradient(shares, scale * factor, everything)[0] for factor in (0.9, 1.0, 1.1)]
        assert least == pytest.approx(at[1], rel=1e-6)
        assert at[1] <= loss
        assert at[1] == min(at) or not -4.99 < math.log(scale) < 4.99  # where it is best to say nothing
    mixture.close()


@pytest.mark.parametrize(
    ("family_name", "dtype"), [("BERT", torch.bfloat16), ("Mixtral", torch.float16), ("BERT", torch.float64)], ids=str
)
def test_ingredients_of_other_types(tmp_path: Path, family: Path, family_name: str, dtype: torch.dtype) -> None:
    """Widened before they are mixed, and the mix is not rounded back."""
    kitchen = Kitchen(tmp_path, family_name, family / "rows.csv", dtype)
    shares = some_shares(kitchen, "tensor", "softmax")
    loss, slopes, _ = kitchen.mixture().gradient(shares, 1.0, np.arange(kitchen.bench.n))
    expected = kitchen.expected(shares, 1.0)
    assert far(loss, expected[0]) < 1e-6
    assert far(slopes, expected[1]) < 1e-5


@pytest.mark.parametrize("by", ["ingredient", "tensor"])
def test_rows_that_not_all_have(tmp_path: Path, family: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mean is over those who have them, and who has them alone moves nothing; slices cut across rows."""
    monkeypatch.setattr(descent, "SLICE_ELEMENTS", 137)
    kitchen = Kitchen(tmp_path, "BERT", family / "rows.csv")
    words = "bert.embeddings.word_embeddings.weight"
    kitchen.lose(
        words, {0: [RowRange(0, 0, 7)], 1: [RowRange(3, 0, 9), RowRange(0, 10, 3)]}
    )  # row 13 and more: the third's alone
    kitchen.lose("classifier.weight", {1: [RowRange(1, 0, 1), RowRange(0, 1, 1)]})
    shares = some_shares(kitchen, by, "none")
    loss, slopes, _ = kitchen.mixture().gradient(shares, 1.0, np.arange(kitchen.bench.n))
    expected = kitchen.expected(shares, 1.0)
    assert far(loss, expected[0]) < 1e-5
    assert far(slopes, expected[1]) < 1e-5
    # With the first one alone in play, the rows that it does not have are the mean of those who have them.
    first = ValidationLoss(
        kitchen.plan().layout, kitchen.paths, {"a": {"a": 1.0}}, config_of(tmp_path), [kitchen.bench]
    )
    having = kitchen.having[words][1:]
    lent = (torch.stack([each[words] for each in kitchen.full[1:]]) * having).sum(0) / having.sum(0)
    kitchen.full[0][words][7:], kitchen.having[words][:] = lent[7:], 1.0
    alone = np.array([[1.0, 0.0, 0.0]])
    expected = kitchen.expected(alone, 1.0)
    loss, slopes, _ = first.gradient(alone[:, :1], 1.0, np.arange(kitchen.bench.n))
    assert far(loss, expected[0]) < 1e-6
    assert slopes.shape == (1, 1)


def weighing(bench: ClassificationDataset, weight: float) -> ClassificationDataset:
    return replace(bench, scoring=bench.scoring.model_copy(update={"weight": weight}))


def test_ingredients_may_be_means_of_sources(kitchens: Callable[[str], Kitchen]) -> None:
    """And rows may be looked at in part; what ingredients answer alone is not asked again."""
    kitchen = kitchens("BERT")
    rows = np.arange(1, kitchen.bench.n, 2)
    made_of = {"of two": {"a": 0.5, "c": 0.5}, "b": {"b": 1.0}}
    answers = [[np.random.default_rng(n).normal(size=(kitchen.bench.n, 2)).astype(np.float32)] for n in range(2)]
    layout, config = kitchen.plan().layout, config_of(kitchen.folder)
    objective = ValidationLoss(layout, kitchen.paths, made_of, config, [kitchen.bench], answers, [rows])
    assert (list(objective.names), objective.strata.tolist()) == (
        list(made_of),
        kitchen.bench.references[rows].tolist(),
    )
    shares, some = np.array([[0.6, 0.4]]), np.array([0, 3])
    loss, slopes, slope = objective.gradient(shares, 1.5, some)
    expected = kitchen.mixture().gradient(np.array([[0.3, 0.4, 0.3]]), 1.5, rows[some])
    assert far([loss, slope], [expected[0], expected[2]]) < 1e-6
    assert far(slopes, [[expected[1][0, [0, 2]].mean(), expected[1][0, 1]]]) < 1e-6
    every = kitchen.mixture(outputs=answers)
    assert objective.alone(some) == every.alone(rows[some])


def test_benches_have_weights_whatever_their_size(tmp_path: Path, family: Path) -> None:
    kitchen = Kitchen(tmp_path, "BERT", family / "rows.csv")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "few.csv").write_text("text,label\ngood day,1\nsad sad film,0\nawful awful awful book,0\n")
    few = prepare_datasets(
        [("validation", Scoring(task="text-classification", dataset=str(tmp_path / "few.csv")))],
        folder=tmp_path,
        config=config,
    )[0]
    shares = np.full((1, N), 1 / N)

    def mixture(benches: list[ClassificationDataset]) -> ValidationLoss:
        return ValidationLoss(kitchen.plan().layout, kitchen.paths, ALONE, config_of(tmp_path), benches)

    one = mixture([kitchen.bench]).gradient(shares, 1.0, np.arange(kitchen.bench.n))
    other = mixture([few]).gradient(shares, 1.0, np.arange(3))
    # Of the same rows in another metric the weight counts, and not the place.
    both = mixture([kitchen.bench, weighing(few, 1.0), weighing(few, 2.0)])
    assert np.bincount(both.strata).tolist() == [12, 12, 2, 1]
    every = np.random.default_rng(0).permutation(kitchen.bench.n + 3)
    for found, first, second in zip(both.gradient(shares, 1.0, every), one, other, strict=True):
        assert far(found, 0.25 * first + 0.75 * second) < 1e-5
    apart = mixture([few]).gradient(shares, 1.0, np.array([2]))[0]
    assert both.gradient(shares, 1.0, np.array([26]))[0] == pytest.approx(apart)


@pytest.mark.parametrize(("family_name", "built"), [("ViT", 1), ("BERT", 1), ("T5", 1), ("Mixtral", 3)])
def test_the_model_is_built_once_where_tensors_are_only_renamed(
    kitchens: Callable[[str], Kitchen], family_name: str, built: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at all where the shares are those of the call before."""
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return build_model(*arguments)

    for module in (descent, loaded_parameters):
        monkeypatch.setattr(module, "build_model", counted)
    mixture = kitchens(family_name).mixture()
    for shares in ([[0.5, 0.25, 0.25]], [[0.5, 0.25, 0.25]], [[0.2, 0.5, 0.3]]):
        mixture.loss(np.array(shares), np.arange(4))
    assert calls == built


def test_one_model_is_held_at_a_time(kitchens: Callable[[str], Kitchen]) -> None:
    """Also where it is built anew in every step."""
    mixture = kitchens("Mixtral").mixture()
    first = [weakref.ref(each) for each in mixture._model.parameters()]
    mixture.gradient(np.full((1, N), 1 / N), 1.0, np.arange(4))
    gc.collect()
    assert not any(each() is not None for each in first)


def test_memory_does_not_grow_with_the_ingredients(kitchens: Callable[[str], Kitchen]) -> None:
    """Beside the model no tensor is alive after a step, and slices come one at a time."""
    kitchen = kitchens("BERT")
    assert needed_bytes(kitchen.plan()) == 12 * sum(each.numel() for each in kitchen.full[0].values())
    mixture = kitchen.mixture()
    read: list[int] = []
    alive: list[Any] = []
    through = Reading.read

    def watched(self: Reading, *arguments: Any) -> Tensor:
        values = through(self, *arguments)
        alive[:] = [each for each in alive if each() is not None]
        read.append(len(alive))
        alive.append(weakref.ref(values))
        return values

    Reading.read = watched  # type: ignore[method-assign]
    try:
        mixture.gradient(np.full((1, N), 1 / N), 1.0, np.arange(4))
    finally:
        Reading.read = through  # type: ignore[method-assign]
    assert len(read) == 2 * N * len(kitchen.floats)
    assert max(read) <= 1


def test_what_breaks_is_named(tmp_path: Path, family: Path) -> None:
    kitchen = Kitchen(tmp_path, "BERT", family / "rows.csv")
    tensors = load_file(kitchen.paths[2]["m"])
    tensors["classifier.bias"][1] = math.nan
    save_file(tensors, kitchen.paths[2]["m"])
    shares, rows = np.full((1, N), 1 / N), np.arange(4)
    with pytest.raises(MergeError, match=r"'classifier.bias' of c holds nan at \[1\]"):
        kitchen.mixture().loss(shares, rows)
    mixture = kitchen.mixture()
    os.truncate(kitchen.paths[0]["m"], 2000)
    with pytest.raises(MergeError, match="a: m ended in the middle of"):
        mixture.loss(shares, rows)


def test_a_batch_that_the_model_cannot_read_is_named(tmp_path: Path, family: Path) -> None:
    kitchen = Kitchen(tmp_path, "BERT", family / "rows.csv")
    mixture = kitchen.mixture()
    kitchen.bench.references[1] = 7
    with pytest.raises(ScoringError, match=r"The model cannot learn from 'rows.csv accuracy' \(.*input_ids"):
        mixture.gradient(np.full((1, N), 1 / N), 1.0, np.arange(4))


def test_closed_is_closed(kitchens: Callable[[str], Kitchen]) -> None:
    kitchen = kitchens("ViT")
    before = len(list(Path("/proc/self/fd").iterdir()))
    kitchen.mixture().close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
