"""The demo's repos before there is anything in them: their names, and how the models in them are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OWNER = "hf-soup-demo"
DATASET = "digits"
ANCESTOR = "vit-letters"
POOR = "vit-digits-hot"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Zoo:
    """How the zoo is made; the defaults are the demo.

    Args:
        seed: Of everything: splits, letters, initial weights, hyperparameters, batches.
        letters: Drawn letters that the ancestor learns from.
        letter_epochs: Passes over them.
        good: Fine-tunes with an ordinary learning rate, beside the one that is poor.
        epochs: Fewest and most passes over the training digits.
    """

    seed: int = 0
    letters: int = 8000
    letter_epochs: int = 6
    good: int = 8
    epochs: tuple[int, int] = (25, 40)

    @property
    def fine_tunes(self) -> tuple[str, ...]:
        """The names of the fine-tunes, the poor one last."""
        return (*(f"vit-digits-{number + 1}" for number in range(self.good)), POOR)
