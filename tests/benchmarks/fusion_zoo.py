"""Zoos for `evidence_methods.py` beside those of `evidence_zoo.py`: one fine-tune for each task, and one run.

tasks   one fine-tune of one start for each of four tasks that share their labels, and one on all of them together
        (``joint``). Digits: the pictures as they are, turned by a quarter, mirrored, and as negatives, the same 200
        for training in each. Texts: sentences about films and products, from newspapers and tweets, 480 each. The
        head of the start was fitted on all tasks.
run     ten checkpoints of one run at a constant rate, as a Trainer names them.

A zoo is a folder with ``start``, the fine-tunes or ``run``, and ``data`` with a file for each split and task.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import evidence_zoo
import torch
from evidence_zoo import Course, sentences, write_rows

from hf_soup.demo import DigitsZoo, digits as demo
from hf_soup.demo.digits_data import DIGITS, Split, splits_of, warp, write_split

#: Task → what is done to pictures, or the file of sentences.
TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "upright": lambda images: images,
        "turned": lambda images: images.rot90(1, (2, 3)),
        "mirrored": lambda images: images.flip(3),
        "negative": lambda images: 1 - images,
    },
    "texts": {
        "films": "movieReviewSnippets",
        "products": "amazonReviewSnippets",
        "news": "nytEditorialSnippets",
        "tweets": "tweets",
    },
}
#: Sentences of each task.
ROWS = {"train": 480, "validation": 300, "test": 800}
CHECKPOINTS, JOINT = 10, "joint"
_EPOCHS, _RATE = {"digits": 30, "texts": 4}, {"digits": 8e-4, "texts": 1e-4}
_Run = Callable[[int, Any], object]


def make(kind: str, layout: str, folder: Path, seed: int) -> Path:
    """The folder of a zoo, trained on one thread if it is not there."""
    place = folder / f"{kind}-{layout}-{seed}"
    return evidence_zoo.made(place, lambda staged: {"digits": _digits, "texts": _texts}[kind](staged, layout, seed))


def _digits(out: Path, layout: str, seed: int) -> None:
    splits = {name.replace("validation", "validation"): split for name, split in splits_of(seed).items()}
    views = TASKS["digits"] if layout == "tasks" else {"upright": TASKS["digits"]["upright"]}
    (out / "data").mkdir()
    of: dict[str, dict[str, Split]] = {
        task: {name: (view(images), labels) for name, (images, labels) in splits.items()}
        for task, view in views.items()
    }
    for task, mine in of.items():
        for name, split in mine.items():
            write_split(out / "data" / f"{name}{f'-{task}' if layout == 'tasks' else ''}.parquet", split)
    images, labels = (torch.cat(each) for each in zip(*(mine["train"] for mine in of.values()), strict=True))
    if layout == "tasks":
        write_split(out / "data" / "train.parquet", (images, labels))
        validation = [torch.cat(each) for each in zip(*(mine["validation"] for mine in of.values()), strict=True)]
        write_split(out / "data" / "validation.parquet", (validation[0], validation[1]))
    start = demo._new_model(DIGITS, seed)
    start.vit.load_state_dict(demo._ancestor(DigitsZoo(seed=seed)).vit.state_dict())
    demo._probe(start, images, labels)
    _keep(start, out / "start")
    if layout == "run":
        _train_digits(
            start, (images, labels), seed, 1.6e-3, 40, _checkpoints(out, 40 * math.ceil(len(labels) / 32), _keep)
        )
        return
    for number, (task, mine) in enumerate(of.items()):
        model = _train_digits(start, mine["train"], 10 * seed + number, _RATE["digits"], _EPOCHS["digits"])
        _keep(model, out / f"{number + 1}-{task}")
    _keep(_train_digits(start, (images, labels), 10 * seed + 9, _RATE["digits"], _EPOCHS["digits"]), out / JOINT)


def _keep(model: Any, folder: Path) -> None:
    demo._save(model, folder, {}, "")


def _train_digits(start: Any, split: Split, seed: int, rate: float, epochs: int, at: _Run = lambda *_: None) -> Any:
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(split[1]) / 32)

    def batches() -> Iterator[Split]:
        for step, (images, labels) in enumerate(islice(demo.batches(*split, 32, generator), steps)):
            at(step, model)  # what the steps before have made
            yield warp(images, generator, degrees=8, pixels=0.5, scale=(0.9, 1.1)), labels

    demo.train(model, demo._losses(model, batches()), rate, 1e-2, demo.warm_up(steps))
    at(steps, model)
    return model


def _checkpoints(out: Path, steps: int, save: Callable[[Any, Path], object]) -> _Run:
    """Saves a run's model ten times, at equal distances, last at its end."""
    every = steps // CHECKPOINTS

    def at(step: int, model: Any) -> None:
        if step and not (steps - step) % every:
            save(model, out / "run" / f"checkpoint-{step}")

    return at


def _texts(out: Path, layout: str, seed: int) -> None:
    downloads, drawn = out.parent / "downloads", random.Random(seed)
    if layout == "run":
        films = sentences(TASKS["texts"]["films"], downloads)
        drawn.shuffle(films)
        counts = evidence_zoo.ROWS
        splits = _parts(films, counts)
        splits["shifted"] = drawn.sample(sentences(TASKS["texts"]["products"], downloads), counts["test"])
        write_rows(out / "data", splits)
        course = Course(downloads, splits["train"], seed)
        course.save(course.start, out / "start")
        course.fine_tune(seed, 2e-4, 5, at=_checkpoints(out, 5 * math.ceil(counts["train"] / 16), course.save))
        return
    rows = {}
    for task, source in TASKS["texts"].items():
        rows[task] = sentences(source, downloads)
        drawn.shuffle(rows[task])
    of = {task: _parts(mine, ROWS) for task, mine in rows.items()}
    every = {name: [row for mine in of.values() for row in mine[name]] for name in ("train", "validation")}
    named = {f"{name}-{task}": mine for task, splits in of.items() for name, mine in splits.items()}
    write_rows(out / "data", {**named, **every})
    course = Course(downloads, every["train"], seed)
    course.save(course.start, out / "start")
    for number, task in enumerate(of):
        mine = slice(number * ROWS["train"], (number + 1) * ROWS["train"])
        course.save(
            course.fine_tune(10 * seed + number, _RATE["texts"], _EPOCHS["texts"], mine=mine),
            out / f"{number + 1}-{task}",
        )
    course.save(course.fine_tune(10 * seed + 9, _RATE["texts"], _EPOCHS["texts"]), out / JOINT)


def _parts(rows: list[tuple[str, int]], counts: dict[str, int]) -> dict[str, list[tuple[str, int]]]:
    found, at = {}, 0
    for name, count in counts.items():
        found[name], at = rows[at : at + count], at + count
    return found
