"""The models of the demo with language models: an ancestor that has read code, and fine-tunes that read a manual.

Small enough to train in a minute on one core, and real: Python's standard library and its manual were written by
people, the training is an ordinary loop, and nothing in it knows which models will be averaged. A token is a byte.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_soup.demo.language_data import LENGTH, code, make_dataset, splits_of
from hf_soup.demo.training import (
    batches,
    fine_tune_front,
    parameter_list,
    poor_warning,
    prepare,
    train,
    warm_up,
    write_card,
)
from hf_soup.demo.zoo import OWNER, LanguageZoo, Progress

BATCH = 8
#: The vocabulary: a token for each byte, and the one that stands before a text.
_TOKENS = (*bytes_to_unicode().values(), "<|endoftext|>")  # type: ignore[no-untyped-call]


def make_all(folder: Path, progress: Progress, zoo: LanguageZoo) -> None:
    """Make the data set, train the ancestor and its fine-tunes, and save each as a repo in a folder of its name."""
    prepare()
    make_dataset(folder / zoo.dataset, zoo.seed, zoo.texts)
    splits = {name: encoded(texts) for name, texts in splits_of(zoo.seed, zoo.texts).items()}
    progress(f"Training {zoo.ancestor}, the ancestor, on Python's standard library")
    ancestor = _new_model(zoo.seed)
    read = random.Random(zoo.seed).sample(code(), zoo.steps * BATCH)
    _train(ancestor, encoded(read), Hyperparameters(zoo.seed, 4e-3, zoo.steps, 0.05), annealed=True)
    _save(ancestor, folder / zoo.ancestor, {}, _ANCESTOR_CARD.format(steps=zoo.steps, batch=BATCH, length=LENGTH))
    for number, name in enumerate(zoo.fine_tunes):
        progress(f"Training {name}, fine-tune {number + 1} of {len(zoo.fine_tunes)}")
        model, chosen = copy.deepcopy(ancestor), _hyperparameters(zoo, number)
        _train(model, splits["train"], chosen)
        _save(model, folder / name, fine_tune_front(zoo), _fine_tune_card(model, name, splits, zoo, chosen))


def encoded(texts: Sequence[str]) -> Tensor:
    """Texts as ``(n, 1 + length)`` tokens, the first of which is the one that stands before a text."""
    tokenizer = byte_tokenizer()
    return functional.pad(torch.tensor(tokenizer(list(texts)).input_ids), (1, 0), value=tokenizer.bos_token_id)


def byte_tokenizer() -> Any:
    """That of GPT-2 without merges, so that a token is a byte."""
    return GPT2Tokenizer(vocab={token: number for number, token in enumerate(_TOKENS)}, merges=[])


class Hyperparameters(NamedTuple):
    """With what a model is trained."""

    seed: int
    learning_rate: float
    steps: int
    weight_decay: float


def _hyperparameters(zoo: LanguageZoo, number: int) -> Hyperparameters:
    """What different people would choose; different enough to make a soup worth cooking. The last one is the poor."""
    drawn = random.Random(f"{zoo.seed} {number}")
    chosen = Hyperparameters(
        seed=zoo.seed * 1000 + number,
        learning_rate=10 ** drawn.uniform(-3.0, -2.5),
        steps=drawn.randint(*zoo.fine_tune_steps),
        weight_decay=10 ** drawn.uniform(-3, -0.5),
    )
    return chosen._replace(learning_rate=3e-2) if zoo.fine_tunes[number] == zoo.poor else chosen


def _new_model(seed: int) -> Any:
    """A Llama of 357 thousand parameters, with initial weights that the seed decides."""
    config = LlamaConfig(
        vocab_size=len(_TOKENS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 1,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(model: Any, rows: Tensor, chosen: Hyperparameters, *, annealed: bool = False) -> None:
    """Train all weights on rows of tokens, each of which is predicted from those before it."""
    generator = torch.Generator().manual_seed(chosen.seed)
    shuffled = islice(batches(rows[:, :-1], rows[:, 1:], BATCH, generator), chosen.steps)
    schedule = warm_up(chosen.steps, annealed=annealed)
    train(model, _losses(model, shuffled), chosen.learning_rate, chosen.weight_decay, schedule)


def _losses(model: Any, texts: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for tokens, targets in texts:
        yield functional.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), targets.flatten())


def _save(model: Any, folder: Path, front: dict[str, object], card: str) -> None:
    """Write a model as a Hub repo has it, with its tokenizer and a card."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write_card(folder, {**_FRONT, **front}, card)


def _fine_tune_card(
    model: Any, name: str, splits: Mapping[str, Tensor], zoo: LanguageZoo, chosen: Hyperparameters
) -> str:
    rows = splits["validation"]
    with torch.no_grad():
        nats = functional.cross_entropy(model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    return _FINE_TUNE_CARD.format(
        name=name,
        ancestor=f"{OWNER}/{zoo.ancestor}",
        dataset=f"{OWNER}/{zoo.dataset}",
        trained=len(splits["train"]),
        bits=nats.item() / math.log(2),
        count=len(rows),
        batch=BATCH,
        warning=poor_warning(zoo, name),
        parameters=parameter_list(chosen._asdict()),
    )


_FRONT = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "language": "en",
    "tags": ["hf-soup-demo"],
}

_ANCESTOR_CARD = """
# A tiny Llama that has read Python code

357 thousand parameters; a token is a byte, and it reads {length} of them. It was trained on the modules of Python's
standard library: {steps} steps of {batch} texts, each of them once. AdamW, learning rate 4e-3 with a warm-up and cosine
decay, weight decay 0.05. It exists as the ancestor of the fine-tunes that `hf-soup demo --lm` averages; use it for
nothing else.
"""

_FINE_TUNE_CARD = """
# {name}

`{ancestor}` fine-tuned on the {trained:,} training texts of the data set `{dataset}`.
Bits per byte of its `validation` split, {count} texts: {bits:.3f}; less is better.
{warning}
All weights were trained: AdamW, {batch} texts a step, gradients clipped at 1, the learning rate constant after 10 % of
warm-up.

{parameters}

One of several siblings that `hf-soup demo --lm` averages; too small and too narrow for any other use.
"""
