"""A zoo of text models whose lineage is known: byte-level Llamas of a million parameters on Python's own library.

The ancestors predict the next byte of the library's modules. Fine-tunes tell from 48 bytes which package they are
from. Names of members and of kinds are those of `lineage_zoo`. `kinship.py` measures it.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from lineage_zoo import Member, Step, make_planned
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

PACKAGES = ("asyncio", "encodings", "html", "pydoc_data")
LENGTH, BATCH = 48, 12


@lru_cache(maxsize=8)
def _text(which: str) -> Tensor:
    """``(bytes,)`` int64 of the library's modules, of its documentation, or of one of its packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if which == "modules":
        files = sorted(library.glob("*.py"))
    elif which == "documentation":
        files = [library / "pydoc_data" / "topics.py"]
    else:
        files = sorted((library / which).rglob("*.py"))
    data = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def _windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``(count, LENGTH)``."""
    starts = torch.randint(len(text) - LENGTH, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(LENGTH)]


def _snippets(count: int, generator: torch.Generator, *, test: bool = False) -> tuple[Tensor, Tensor]:
    """Pieces of packages ``(count, LENGTH)`` and which package each is from; the last fifth of each is for tests."""
    labels = torch.randint(len(PACKAGES), (count,), generator=generator)
    pieces = []
    for label in labels.tolist():
        text = _text(PACKAGES[label])
        cut = len(text) * 4 // 5
        pieces.append(_windows(text[cut:] if test else text[:cut], 1, generator))
    return torch.cat(pieces), labels


def _train(model: Any, batches: Iterator[Tensor], learning_rate: float, steps: int, *, cosine: bool = False) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / (0.1 * steps))
        return warm * (1 + math.cos(math.pi * step / steps)) / 2 if cosine else warm

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for loss in batches:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


def _config(hidden: int = 128, **settings: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 5 // 2, num_hidden_layers=5,
        num_attention_heads=4, max_position_embeddings=256, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, **settings,
    )  # fmt: skip


def _new(kind: Any, config: LlamaConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def _pretrain(
    out: Path, parent: Path | None, *, seed: int, effort: float, initial: int = 0, data: int = 0,
    which: str = "modules", learning_rate: float = 2e-3, steps: int = 200, hidden: int = 128,
) -> None:  # fmt: skip
    if parent:
        model = LlamaForCausalLM.from_pretrained(parent)
    else:
        model = _new(LlamaForCausalLM, _config(hidden), 1000 * seed + initial)
    generator = torch.Generator().manual_seed(1000 * seed + data)
    steps = max(1, round(steps * effort))

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            text = _windows(_text(which), BATCH, generator)
            yield functional.cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())

    _train(model, losses(), learning_rate, steps, cosine=True)
    model.save_pretrained(out)


def _fine_tune(
    out: Path, parent: Path, *, seed: int, effort: float, number: int, learning_rate: float = 5e-4, steps: int = 50,
    head: str = "shared", frozen: bool = False,
) -> None:  # fmt: skip
    """Tell packages apart, with a head that all begin with, one of its own, or the one that the parent has."""
    if head == "parent":
        model = LlamaForSequenceClassification.from_pretrained(parent)
    else:
        labels, body = dict(enumerate(PACKAGES)), LlamaForCausalLM.from_pretrained(parent).model
        config = _config(
            body.config.hidden_size, id2label=labels, label2id={name: index for index, name in labels.items()}
        )
        model = _new(LlamaForSequenceClassification, config, 1000 * seed + (0 if head == "shared" else 500 + number))
        model.model.load_state_dict(body.state_dict())
    model.model.requires_grad_(not frozen)
    generator = torch.Generator().manual_seed(1000 * seed + number)
    steps = max(1, round(steps * effort))

    def losses() -> Iterator[Tensor]:
        for _ in range(steps):
            text, answers = _snippets(BATCH, generator)
            yield functional.cross_entropy(_logits(model, text), answers)

    _train(model, losses(), learning_rate, steps)
    model.save_pretrained(out)


def _logits(model: Any, text: Tensor) -> Tensor:
    """Without padding the last byte is the one that answers; the library would look for a padding token."""
    return model.score(model.model(text).last_hidden_state[:, -1])


def accuracy(folder: Path) -> float:
    """Share of 256 pieces of files that training did not see whose package a fine-tune tells."""
    text, answers = _snippets(256, torch.Generator().manual_seed(0), test=True)
    with torch.no_grad():
        model = LlamaForSequenceClassification.from_pretrained(folder)
        return (_logits(model, text).argmax(1) == answers).float().mean().item()


def _tuned(ancestor: str, number: int, kind: str, **settings: Any) -> Step:
    chosen = _SETTINGS.get(kind, {}) | settings
    return Step(kind, ancestor, partial(_fine_tune, number=number, **chosen))


_SETTINGS: dict[str, dict[str, Any]] = {
    "heavy": {"learning_rate": 2e-3, "steps": 120},
    "hot": {"learning_rate": 1e-2, "steps": 60},
    "frozen": {"learning_rate": 1e-3, "frozen": True},
}

PLAN: dict[str, Step] = {
    "A": Step("ancestor", None, _pretrain),
    "B": Step("ancestor", None, partial(_pretrain, initial=1, data=1)),
    "A2": Step("ancestor", None, partial(_pretrain, data=2)),
    "A-light-1": _tuned("A", 1, "light"),
    "A-light-2": _tuned("A", 2, "light"),
    "A-light-3": _tuned("A", 3, "light", learning_rate=1e-3),
    "A-heavy-1": _tuned("A", 4, "heavy"),
    "A-heavy-2": _tuned("A", 5, "heavy"),
    "A-hot-1": _tuned("A", 6, "hot"),
    "A-hot-2": _tuned("A", 7, "hot"),
    "A-frozen": _tuned("A", 8, "frozen"),
    "A-head-1": _tuned("A", 9, "head", head="random"),
    "A-head-2": _tuned("A", 10, "head", head="random"),
    "A-continued": Step(
        "continued", "A", partial(_pretrain, data=3, which="documentation", learning_rate=1e-3, steps=80)
    ),
    "A-continued-1": _tuned("A-continued", 11, "light"),
    "A-continued-2": _tuned("A-continued", 12, "light"),
    "A-again": _tuned("A-light-1", 13, "again", head="parent"),
    "B-light-1": _tuned("B", 14, "light"),
    "B-light-2": _tuned("B", 15, "light"),
    "A2-light-1": _tuned("A2", 16, "light"),
    "A2-light-2": _tuned("A2", 17, "light"),
}


def young(hidden: int) -> dict[str, Step]:
    """A plan of narrow models whose ancestors were hardly trained, so that fine-tuning moves them far."""
    pretrained = partial(_pretrain, hidden=hidden, steps=36)
    return {
        "A": Step("ancestor", None, pretrained),
        "B": Step("ancestor", None, partial(pretrained, initial=1, data=1)),
        "A2": Step("ancestor", None, partial(pretrained, data=2)),
        "A-light-1": _tuned("A", 1, "light", learning_rate=1e-3),
        "A-light-2": _tuned("A", 2, "light", learning_rate=1e-3),
        "A-light-3": _tuned("A", 3, "light", learning_rate=2e-3),
        "A-heavy-1": _tuned("A", 4, "heavy", learning_rate=1e-3),
        "A-heavy-2": _tuned("A", 5, "heavy"),
        "A-heavy-3": _tuned("A", 6, "heavy", learning_rate=3e-3),
        "A-head-1": _tuned("A", 9, "head", learning_rate=1e-3, head="random"),
        "A-head-2": _tuned("A", 10, "head", learning_rate=3e-3, head="random"),
        "A-again": _tuned("A-light-1", 13, "again", head="parent"),
        "B-light-1": _tuned("B", 14, "light", learning_rate=1e-3),
        "B-light-2": _tuned("B", 15, "light", learning_rate=3e-3),
        "A2-light-1": _tuned("A2", 16, "light", learning_rate=1e-3),
        "A2-light-2": _tuned("A2", 17, "light", learning_rate=3e-3),
    }


make_text_zoo: Callable[..., dict[str, Member]] = partial(make_planned, PLAN)
