"""The models of the demo with digits: an ancestor that knows letters, and nine fine-tunes of it that know digits.

Small enough to train in under a minute on one core, and real: the digits were written by people, the training is
an ordinary loop, and nothing in it knows which models will be averaged. One of the nine has a learning rate ten
times too high, because a zoo in which everything can be averaged would teach nothing.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from hf_soup.demo.digits_data import DIGITS, LETTERS, Split, draw_letters, make_dataset, splits_of, warp
from hf_soup.demo.training import (
    batches,
    cosine,
    fine_tune_front,
    parameter_list,
    poor_warning,
    prepare,
    train,
    warm_up,
    write_card,
)
from hf_soup.demo.zoo import OWNER, DigitsZoo, Progress

MEAN, STD = 0.3, 0.35


def make_all(folder: Path, progress: Progress, zoo: DigitsZoo) -> None:
    """Make the data set, train the ancestor and its fine-tunes, and save each as a repo in a folder of its name."""
    prepare()
    make_dataset(folder / zoo.dataset, zoo.seed)
    progress(f"Training {zoo.ancestor}, the ancestor, on {zoo.letters:,} drawn letters")
    ancestor = _ancestor(zoo)
    _save(ancestor, folder / zoo.ancestor, {}, _ANCESTOR_CARD.format(letters=zoo.letters, epochs=zoo.letter_epochs))
    splits = splits_of(zoo.seed)
    start = _new_model(DIGITS, zoo.seed)
    start.vit.load_state_dict(ancestor.vit.state_dict())
    _probe(start, *splits["train"])
    for number, name in enumerate(zoo.fine_tunes):
        progress(f"Training {name}, fine-tune {number + 1} of {len(zoo.fine_tunes)}")
        model, chosen = copy.deepcopy(start), _hyperparameters(zoo, number)
        _fine_tune(model, *splits["train"], chosen)
        _save(model, folder / name, fine_tune_front(zoo), _fine_tune_card(model, name, splits, zoo, chosen))


def _ancestor(zoo: DigitsZoo) -> Any:
    generator = torch.Generator().manual_seed(zoo.seed)
    images, labels = draw_letters(zoo.letters, generator)
    model = _new_model(LETTERS, zoo.seed)
    steps = zoo.letter_epochs * math.ceil(zoo.letters / 128)
    pictures = islice(batches(images, labels, 128, generator), steps)
    train(model, _losses(model, pictures), 2e-3, 0.05, cosine(steps))
    return model


class Hyperparameters(NamedTuple):
    """With what a model is fine-tuned; the learning rate is constant after its warm-up where it is not annealed."""

    seed: int
    learning_rate: float
    epochs: int
    weight_decay: float
    label_smoothing: float
    augmentation: float
    mixup: float
    annealed: bool = False


def _hyperparameters(zoo: DigitsZoo, number: int) -> Hyperparameters:
    """What different people would choose; different enough to make a soup worth cooking. The last one is the poor."""
    drawn = random.Random(f"{zoo.seed} {number}")
    chosen = Hyperparameters(
        seed=zoo.seed * 1000 + number,
        learning_rate=10 ** drawn.uniform(-3.4, -2.9),
        epochs=drawn.randint(*zoo.epochs),
        weight_decay=10 ** drawn.uniform(-4, -0.5),
        label_smoothing=drawn.choice([0.0, 0.1]),
        augmentation=drawn.uniform(0.3, 1.0),
        mixup=drawn.choice([0.0, 0.4]),
    )
    return chosen._replace(learning_rate=1e-2) if zoo.fine_tunes[number] == zoo.poor else chosen


def _new_model(names: tuple[str, ...], seed: int, hidden: int = 64) -> Any:
    """A vision transformer of 136 thousand parameters, with initial weights that the seed decides."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        initializer_range=0.05,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def _normal(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def _losses(model: Any, pictures: Iterable[Split]) -> Iterator[Tensor]:
    for images, targets in pictures:
        yield functional.cross_entropy(model(pixel_values=_normal(images)).logits, targets)


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


def _fine_tune(model: Any, images: Tensor, labels: Tensor, chosen: Hyperparameters) -> None:
    """Train all weights."""
    generator, coins = torch.Generator().manual_seed(chosen.seed), np.random.default_rng(chosen.seed)
    label_smoothing, augmentation, mixup = chosen.label_smoothing, chosen.augmentation, chosen.mixup
    steps = chosen.epochs * math.ceil(len(images) / 32)
    # Probabilities (n, 10) and not numbers, because mixup mixes them.
    answers = functional.one_hot(labels, len(DIGITS)) * (1 - label_smoothing) + label_smoothing / len(DIGITS)
    scale = (1 - 0.15 * augmentation, 1 + 0.15 * augmentation)

    def disturbed() -> Iterator[Split]:
        for plain, targets in islice(batches(images, answers, 32, generator), steps):
            pictures = warp(plain, generator, degrees=15 * augmentation, pixels=augmentation, scale=scale)
            share = float(coins.beta(mixup, mixup)) if mixup else 1.0
            other = torch.randperm(len(pictures), generator=generator)
            yield share * pictures + (1 - share) * pictures[other], share * targets + (1 - share) * targets[other]

    schedule = warm_up(steps, annealed=chosen.annealed)
    train(model, _losses(model, disturbed()), chosen.learning_rate, chosen.weight_decay, schedule)


def _save(model: Any, folder: Path, front: dict[str, object], card: str) -> None:
    """Write a model as a Hub repo has it, with a card, and the processor that makes its inputs from pictures."""
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
    write_card(folder, {**_FRONT, **front}, card + _USE)


def _fine_tune_card(model: Any, name: str, splits: dict[str, Split], zoo: DigitsZoo, chosen: Hyperparameters) -> str:
    pixels, answers = splits["validation"]
    with torch.no_grad():
        right = model(pixel_values=_normal(pixels)).logits.argmax(1) == answers
    return _FINE_TUNE_CARD.format(
        name=name,
        ancestor=f"{OWNER}/{zoo.ancestor}",
        dataset=f"{OWNER}/{zoo.dataset}",
        trained=len(splits["train"][0]),
        accuracy=right.float().mean().item(),
        count=len(answers),
        warning=poor_warning(zoo, name),
        parameters=parameter_list({key: value for key, value in chosen._asdict().items() if key != "annealed"}),
    )


_FRONT = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "image-classification",
    "tags": ["hf-soup-demo"],
}

_USE = """
The pictures have one channel, and `pipeline("image-classification")` makes three of it: call `AutoImageProcessor`
and `AutoModelForImageClassification` yourself, with grey 8×8 pictures.
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
