"""What a demo is told with: which models and data there are, and how they are scored; without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hf_soup import Recipe

OWNER = "hf-soup-demo"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Zoo(ABC):
    """A data set, an ancestor, and fine-tunes of it; the defaults of a subclass are a demo.

    Args:
        seed: Of everything: splits, initial weights, hyperparameters, batches.
        good: Fine-tunes with an ordinary learning rate, beside the one that is poor.
    """

    #: Names of repos; fine-tunes and soups are called after their family.
    dataset: ClassVar[str]
    ancestor: ClassVar[str]
    family: ClassVar[str]
    poor: ClassVar[str]
    #: What models are scored by, and the name that each test split has in a table, the first one first.
    scored_by: ClassVar[Mapping[str, str]]
    tests: ClassVar[Mapping[str, str]]
    #: A script that loads a soup, given its id, without hf-soup; and a remark on the table.
    load_script: ClassVar[str]
    remark: ClassVar[str]

    seed: int = 0
    good: int = 8

    @property
    def fine_tunes(self) -> tuple[str, ...]:
        """The names of the fine-tunes, the poor one last."""
        return (*(f"{self.family}-{number + 1}" for number in range(self.good)), self.poor)

    def recipe(self, fine_tunes: Sequence[str] = ()) -> Recipe:
        """The recipe that is cooked, of all fine-tunes or of some: chosen on validation data, reported on tests."""
        data = {"dataset": f"{OWNER}/{self.dataset}", **self.scored_by}
        return Recipe(
            base_model=f"{OWNER}/{self.ancestor}",
            ingredients=[f"{OWNER}/{name}" for name in fine_tunes or self.fine_tunes],
            select="greedy",
            validation={**data, "split": "validation"},
            test=[{**data, "split": split, "name": name} for split, name in self.tests.items()],
        )

    @abstractmethod
    def make(self, folder: Path, progress: Progress) -> None:
        """Make the data set, train the ancestor and its fine-tunes, and save each as a repo in a folder of its name."""


@dataclass(frozen=True)
class DigitsZoo(Zoo):
    """Vision transformers that know letters, and learn digits.

    Args:
        letters: Drawn letters that the ancestor learns from.
        letter_epochs: Passes over them.
        epochs: Fewest and most passes over the training digits.
    """

    dataset = "digits"
    ancestor = "vit-letters"
    family = "vit-digits"
    poor = "vit-digits-hot"
    scored_by: ClassVar = {"task": "image-classification", "metric": "accuracy"}
    tests: ClassVar = {"shifted": "shifted test", "test": "test"}
    remark = "An ensemble runs all models for every picture; a soup is one model."

    letters: int = 8000
    letter_epochs: int = 6
    epochs: tuple[int, int] = (25, 40)

    load_script = f'''\
"""Reads the demo's test pictures with a model from the Hub, as any program would: there is no hf-soup in it."""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForImageClassification, AutoProcessor

repo = sys.argv[1]
processor = AutoProcessor.from_pretrained(repo)
model = AutoModelForImageClassification.from_pretrained(repo)
test = load_dataset("{OWNER}/{dataset}", split="test")
with torch.no_grad():
    answers = model(**processor(test["image"][:], return_tensors="pt")).logits.argmax(-1).tolist()
names = test.features["label"].names
right = sum(model.config.id2label[a] == names[b] for a, b in zip(answers, test["label"], strict=True))
print(f"{{repo}} reads {{right:,}} of {{len(test):,}} test pictures ({{right / len(test):.1%}}).")
'''

    def make(self, folder: Path, progress: Progress) -> None:
        """As `Zoo.make`."""
        from hf_soup.demo.digits import make_all

        make_all(folder, progress, self)


@dataclass(frozen=True)
class LanguageZoo(Zoo):
    """Language models that have read Python's standard library, and read its manual.

    Args:
        steps: Of the ancestor.
        fine_tune_steps: Fewest and most of a fine-tune.
        texts: How many validation and test texts there are; all others are for training.
    """

    dataset = "manual"
    ancestor = "llama-code"
    family = "llama-manual"
    poor = "llama-manual-hot"
    scored_by: ClassVar = {"task": "causal-lm", "metric": "bits_per_byte", "cluster_column": "page"}
    tests: ClassVar = {"test": "test"}
    remark = "Bits per byte are what the model would need to store the texts: less is better."

    good: int = 6
    steps: int = 600
    fine_tune_steps: tuple[int, int] = (60, 90)
    texts: tuple[int, int] = (120, 240)

    load_script = f'''\
"""Computes bits per byte with a language model from the Hub, as any program would: there is no hf-soup in it."""

import math
import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

repo = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(repo)
model = AutoModelForCausalLM.from_pretrained(repo)
texts = load_dataset("{OWNER}/{dataset}", split="test")["text"][:]
# A token is a byte, and all texts have as many, so there is no padding; the first byte is predicted too.
tokens = tokenizer([tokenizer.bos_token + text for text in texts], return_tensors="pt").input_ids
with torch.no_grad():
    nats = model(tokens, labels=tokens).loss.item()
print(f"{{repo}} needs {{nats / math.log(2):.3f}} bits per byte of {{len(texts):,}} test texts.")
begin = tokenizer(tokenizer.bos_token + "The value of the", return_tensors="pt")
written = model.generate(**begin, do_sample=False, max_new_tokens=60, pad_token_id=tokenizer.eos_token_id)
print(f"It writes: {{tokenizer.decode(written[0], skip_special_tokens=True)!r}}")
'''

    def make(self, folder: Path, progress: Progress) -> None:
        """As `Zoo.make`."""
        from hf_soup.demo.language import make_all

        make_all(folder, progress, self)
