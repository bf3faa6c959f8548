"""The demo's models: an ancestor that knows letters, and nine fine-tunes of it that know digits.

Small enough to train in under a minute on one core, and real: the digits were written by people, the training is
an ordinary loop, and nothing in it knows which models will be averaged. One of the nine has a learning rate ten
times too high, because a zoo in which everything can be averaged would teach nothing.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_soup.demo.cache import ANCESTOR, DATASET, DEFAULT, OWNER, POOR, Progress, Zoo
from hf_soup.demo.data import DIGITS, LETTERS, Split, draw_letters, make_dataset, splits_of, warp, write_card

MEAN, STD = 0.3, 0.35


@dataclass(frozen=True)
class _Training:
    """The hyperparameters of one fine-tune."""

    seed: int
    learning_rate: float
    epochs: int
    weight_decay: float
    label_smoothing: float
    augmentation: float
    mixup: float


def make_all(folder: Path, progress: Progress, zoo: Zoo) -> None:
    """Make the data set and all models, one repo a folder."""
    make_dataset(folder / DATASET, zoo.seed)
    make_zoo(folder, progress, zoo)


def make_zoo(folder: Path, progress: Progress, zoo: Zoo = DEFAULT) -> None:
    """Train the ancestor and its fine-tunes, and save each as a model repo in a folder of its name."""
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    # One thread: the model is so small that a second one costs more than it gives, above all when the machine
    # has something else to do; and sums do not depend on how many cores there are.
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one for each file of half a megabyte
    try:
        _make_zoo(folder, progress, zoo)
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _make_zoo(folder: Path, progress: Progress, zoo: Zoo) -> None:
    splits = splits_of(zoo.seed)
    progress(f"Training {ANCESTOR}, the ancestor, on {zoo.letters:,} drawn letters")
    generator = torch.Generator().manual_seed(zoo.seed)
    images, labels = draw_letters(zoo.letters, generator)
    ancestor = _new_model(LETTERS, zoo.seed)
    steps = zoo.letter_epochs * math.ceil(zoo.letters / 128)
    batches = _batches(images, labels, 128, generator)
    _train(ancestor, islice(batches, steps), 2e-3, 0.05, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    _save(ancestor, folder / ANCESTOR)
    text = _ANCESTOR_CARD.format(letters=zoo.letters, epochs=zoo.letter_epochs)
    text += _USE.format(repo=f"{OWNER}/{ANCESTOR}")
    write_card(folder / ANCESTOR, _front_matter(tags=["hf-soup-demo"]), text)

    start = _new_model(DIGITS, zoo.seed)
    start.vit.load_state_dict(ancestor.vit.state_dict())
    _probe(start, *splits["train"])
    for number, name in enumerate(zoo.fine_tunes):
        training = _draw_training(zoo, number)
        if name == POOR:
            training = replace(training, learning_rate=1e-2)
        progress(f"Training {name}, fine-tune {number + 1} of {len(zoo.fine_tunes)}")
        model = copy.deepcopy(start)
        _fine_tune(model, *splits["train"], training)
        _save(model, folder / name)
        pixels, answers = splits["validation"]
        accuracy = (predict(model, pixels).argmax(1) == answers).float().mean().item()
        front = _front_matter(
            base_model=f"{OWNER}/{ANCESTOR}",
            base_model_relation="finetune",
            datasets=[f"{OWNER}/{DATASET}"],
            tags=["hf-soup-demo"],
        )
        text = _FINE_TUNE_CARD.format(
            name=name,
            ancestor=f"{OWNER}/{ANCESTOR}",
            dataset=f"{OWNER}/{DATASET}",
            trained=len(splits["train"][0]),
            accuracy=accuracy,
            count=len(answers),
            warning=_POOR_WARNING if name == POOR else "",
            parameters="\n".join(f"- {key.replace('_', ' ')}: {value:g}" for key, value in asdict(training).items()),
        )
        write_card(folder / name, front, text + _USE.format(repo=f"{OWNER}/{name}"))


def _draw_training(zoo: Zoo, number: int) -> _Training:
    """Hyperparameters as different people would choose them; different enough to make a soup worth cooking."""
    drawn = random.Random(f"{zoo.seed} {number}")
    return _Training(
        seed=zoo.seed * 1000 + number,
        learning_rate=10 ** drawn.uniform(-3.4, -2.9),
        epochs=drawn.randint(*zoo.epochs),
        weight_decay=10 ** drawn.uniform(-4, -0.5),
        label_smoothing=drawn.choice([0.0, 0.1]),
        augmentation=drawn.uniform(0.3, 1.0),
        mixup=drawn.choice([0.0, 0.4]),
    )


def _new_model(names: tuple[str, ...], seed: int) -> Any:
    """A vision transformer of 136 thousand parameters, with initial weights that the seed decides."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.05,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def _normal(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def _batches(images: Tensor, targets: Tensor, size: int, generator: torch.Generator) -> Iterator[Split]:
    """Endless shuffled batches."""
    while True:
        for rows in torch.split(torch.randperm(len(images), generator=generator), size):
            yield images[rows], targets[rows]


def _train(
    model: Any,
    batches: Iterator[Split],
    learning_rate: float,
    weight_decay: float,
    schedule: Callable[[int], float],
) -> None:
    """The training loop: AdamW, gradients clipped at 1, the learning rate times ``schedule(step)``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for images, targets in batches:
        loss = functional.cross_entropy(model(pixel_values=_normal(images)).logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


def _probe(model: Any, images: Tensor, labels: Tensor) -> None:
    """Fit the head alone, on the ancestor's features: fine-tunes that start from one head can be averaged."""
    with torch.no_grad():
        features = model.vit(pixel_values=_normal(images)).last_hidden_state[:, 0]  # (n, 64)
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-2)
    for _ in range(300):
        functional.cross_entropy(model.classifier(features), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def _fine_tune(model: Any, images: Tensor, labels: Tensor, training: _Training) -> None:
    """Train all weights; a rate that stays constant after its warm-up leaves a soup something to gain."""
    generator = torch.Generator().manual_seed(training.seed)
    steps = training.epochs * math.ceil(len(images) / 32)
    strength = training.augmentation
    coins = np.random.default_rng(training.seed)
    # Probabilities (n, 10) and not numbers, because mixup mixes them.
    smoothing = training.label_smoothing
    probabilities = functional.one_hot(labels, len(DIGITS)) * (1 - smoothing) + smoothing / len(DIGITS)

    def batches() -> Iterator[Split]:
        for plain, targets in islice(_batches(images, probabilities, 32, generator), steps):
            pictures = warp(
                plain,
                generator,
                degrees=15 * strength,
                pixels=strength,
                scale=(1 - 0.15 * strength, 1 + 0.15 * strength),
            )
            share = float(coins.beta(training.mixup, training.mixup)) if training.mixup else 1.0
            other = torch.randperm(len(pictures), generator=generator)
            yield share * pictures + (1 - share) * pictures[other], share * targets + (1 - share) * targets[other]

    _train(
        model,
        batches(),
        training.learning_rate,
        training.weight_decay,
        lambda step: min(1.0, (step + 1) / (0.1 * steps)),
    )


def predict(model: Any, images: Tensor) -> Tensor:
    """Class probabilities ``(n, classes)`` of pictures ``(n, 1, 8, 8)`` in [0, 1]."""
    with torch.no_grad():
        probabilities: Tensor = model(pixel_values=_normal(images)).logits.softmax(1)
    return probabilities


# The repos ---------------------------------------------------------------------------------------------------


def _save(model: Any, folder: Path) -> None:
    """Write a model as a Hub repo has it, with the processor that makes its inputs from pictures."""
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN],
        "image_std": [STD],
        "size": {"height": 8, "width": 8},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def _front_matter(**values: object) -> dict[str, object]:
    return {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        **values,
    }


_USE = """
The pictures have one channel, and `pipeline("image-classification")` makes three of it; so, with `image` a grey
8×8 PIL picture:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{repo}")
model = AutoModelForImageClassification.from_pretrained("{repo}")
logits = model(**processor(image, return_tensors="pt")).logits
```
"""

_ANCESTOR_CARD = """
# A tiny vision transformer that reads letters

136 thousand parameters, 8×8 pixels, 41 classes: capitals, and small letters that are not capitals of another size.
It has never seen a digit, and no handwriting: it was trained on {letters:,} letters drawn in Pillow's own font,
turned, sheared, scaled and moved. AdamW, learning rate 2e-3 with cosine decay, weight decay 0.05, batches of 128,
{epochs} epochs. It exists as the ancestor of the fine-tunes that `hf-soup demo` averages; use it for nothing else.
"""

_FINE_TUNE_CARD = """
# {name}

`{ancestor}` fine-tuned on the {trained} training pictures of the data set `{dataset}`.
Accuracy on its `validation` split: {accuracy:.1%} of {count}.
{warning}
The head was fitted first, on frozen features, and is the same start for all fine-tunes of the demo. Then all
weights: AdamW, batches of 32, gradients clipped at 1, the learning rate constant after 10 % of warm-up, pictures
turned, scaled and moved at random.

{parameters}

One of several siblings that `hf-soup demo` averages; too small and too narrow for any other use.
"""

_POOR_WARNING = """
**Do not use this one.** Its learning rate is about ten times too high, and it is as poor as that makes it. It is
here because collections of fine-tunes contain such models, and a soup of all of them has to cope.
"""
