"""What the zoos of all demos are made with: batches, a training loop, schedules, and cards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers.utils import logging

from hf_soup.demo.zoo import OWNER, Zoo


def prepare() -> None:
    """Set up torch and transformers for models as small as these."""
    # One thread: the model is so small that a second one costs more than it gives, above all when the machine
    # has something else to do; and sums do not depend on how many cores there are.
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one for each file of half a megabyte


def batches(inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches."""
    while True:
        for rows in torch.split(torch.randperm(len(inputs), generator=generator), size):
            yield inputs[rows], targets[rows]


def train(
    model: Any,
    losses: Iterable[Tensor],
    learning_rate: float,
    weight_decay: float,
    schedule: Callable[[int], float],
) -> None:
    """The training loop: AdamW, gradients clipped at 1, the learning rate times ``schedule(step)``.

    Args:
        model: What is trained.
        losses: One for each step, computed when it is asked for, with the weights that the model has then.
        learning_rate, weight_decay, schedule: Of AdamW.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


def cosine(steps: int) -> Callable[[int], float]:
    """A schedule that goes from one down to zero."""
    return lambda step: (1 + math.cos(math.pi * step / steps)) / 2


def warm_up(steps: int, *, annealed: bool = False) -> Callable[[int], float]:
    """A schedule that goes up in a tenth of the steps. One that then stays there leaves a soup more to gain."""
    down = cosine(steps)
    return lambda step: min(1.0, (step + 1) / (0.1 * steps)) * (down(step) if annealed else 1)


def write_card(folder: Path, front: Mapping[str, object], text: str) -> None:
    """Write a repo's ``README.md``: front matter, then text."""
    yaml_text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    (folder / "README.md").write_text(f"---\n{yaml_text}---\n{text}", encoding="utf-8")


def fine_tune_front(zoo: Zoo) -> dict[str, object]:
    """What the front matter of a fine-tune says of where it comes from."""
    return {
        "base_model": f"{OWNER}/{zoo.ancestor}",
        "base_model_relation": "finetune",
        "datasets": [f"{OWNER}/{zoo.dataset}"],
    }


def parameter_list(chosen: Mapping[str, float]) -> str:
    """Hyperparameters as a list in Markdown."""
    return "\n".join(f"- {name.replace('_', ' ')}: {value:g}" for name, value in chosen.items())


def poor_warning(zoo: Zoo, name: str) -> str:
    """What the card of the poor fine-tune says, and that of no other."""
    return _POOR_WARNING if name == zoo.poor else ""


_POOR_WARNING = """
**Do not use this one.** Its learning rate is about ten times too high, and it is as poor as that makes it. It is
here because collections of fine-tunes contain such models, and a soup of all of them has to cope.
"""
