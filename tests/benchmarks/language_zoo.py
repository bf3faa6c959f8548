"""Zoos for `evidence_language.py`: byte-level language models of a million parameters, and real texts of four domains.

python  modules of Python's standard library
cpp     C++ headers that come with torch
manual  the pages of Python's manual that come with ``pydoc``
films   sentences about films, from PyPI's ``vaderSentiment`` (Hutto & Gilbert, ICWSM 2014)

What stands in several documents, as a licence or what two pages of the manual share, stays in the first of them alone.
With every seed the documents are divided anew: modules, headers, pages or sentences of the test or validation data are
in no other. A zoo is a folder:

data                the rows of every split and domain: texts, and questions with four choices
start               the ancestor, which was trained on all domains
domains             eight fine-tunes on one domain each, two for each; their rate goes down to zero
constant, annealed  six fine-tunes on two domains, ``ENGLISH``, at rates of either kind, the last one poor
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from evidence_zoo import made, snippets
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from hf_soup.demo.language import byte_tokenizer

DOMAINS = ("python", "cpp", "manual", "films")
#: Those of the runs of one task.
ENGLISH = ("manual", "films")
RUNS, POOR = 6, "6-poor"
SCHEDULES = ("constant", "annealed")
#: Of each domain: the share of its letters in the split, its texts and its questions.
SPLITS = {"test": (0.15, 96, 64), "validation": (0.15, 72, 0), "train": (0.7, 0, 0)}
#: Bytes that a model reads; letters of a question at least, and words of a choice.
CONTEXT, QUESTION, WORDS = 128, 32, 4
_STEPS, _FINE_TUNE_STEPS, _BATCH, _RATE, _POOR_RATE = 1500, 100, 8, 4e-3, 3e-2
#: Letters of a paragraph that is looked for in other documents.
_LONG = 64


def make(folder: Path, seed: int, *, domains: bool) -> Path:
    """The folder of a zoo, with fine-tunes of single domains or without, trained on one thread where they are not."""
    zoo = folder / f"language-{seed}"
    texts = divided(folder / "downloads", seed)
    made(zoo / "data", partial(_write_rows, texts=texts, seed=seed))
    streams = {domain: _tokens(splits["train"]) for domain, splits in texts.items()}
    made(zoo / "start", partial(_ancestor, streams=streams, seed=seed))
    if domains:
        made(zoo / "domains", partial(_of_domains, start=zoo / "start", streams=streams, seed=seed))
    english = [streams[domain] for domain in ENGLISH]
    for schedule in SCHEDULES:
        annealed = schedule == "annealed"
        made(zoo / schedule, partial(_runs, start=zoo / "start", streams=english, seed=seed, annealed=annealed))
    return zoo


# ---- texts ---------------------------------------------------------------------------------------------------


def divided(downloads: Path, seed: int) -> dict[str, dict[str, str]]:
    """Domain → split → its text: whole documents."""
    found, seen = {}, set[str]()
    for domain in DOMAINS:
        documents = [_new(document, seen) for document in _DOCUMENTS[domain](downloads)]
        random.Random(f"{seed} {domain}").shuffle(documents)
        total, done = sum(map(len, documents)), 0
        ends = dict(zip(SPLITS, accumulate(share for share, _, _ in SPLITS.values()), strict=True))
        parts: dict[str, list[str]] = {name: [] for name in SPLITS}
        for document in documents:
            parts[next(name for name, end in ends.items() if done <= end * total)].append(document)
            done += len(document)
        found[domain] = {name: "\n".join(part) for name, part in parts.items()}
    return found


def _new(document: str, seen: set[str]) -> str:
    """What stands in no document before, by paragraphs."""
    kept = []
    for paragraph in document.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(words) < _LONG or words not in seen:
            kept.append(paragraph)
            seen.add(words)
    return "\n\n".join(kept)


def _modules(downloads: Path) -> list[str]:
    return _files(Path(sysconfig.get_paths()["stdlib"]), "*.py")


def _headers(downloads: Path) -> list[str]:
    return _files(Path(torch.__file__).parent / "include" / "c10", "**/*.h")


def _files(folder: Path, pattern: str) -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob(pattern))]


#: Domain → its documents, always in the same order.
_DOCUMENTS: Mapping[str, Callable[[Path], list[str]]] = {
    "python": _modules,
    "cpp": _headers,
    "manual": lambda downloads: [text for _, text in sorted(topics.items())],
    "films": lambda downloads: [text for _, text in snippets("movieReviewSnippets", downloads)],
}


def _write_rows(out: Path, texts: Mapping[str, Mapping[str, str]], seed: int) -> None:
    for domain, splits in texts.items():
        for name, (_, count, asked) in SPLITS.items():
            text, drawn = splits[name], random.Random(f"{seed} {domain} {name}")
            pieces = [text[at : at + CONTEXT] for at in range(0, len(text) - CONTEXT, CONTEXT)]
            drawn.shuffle(pieces)
            _write(out / f"{name}-{domain}.jsonl", [{"text": piece} for piece in pieces[:count]])
            _write(out / f"{name}-{domain}-choices.jsonl", _questions(pieces, asked, drawn))


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def _questions(pieces: Sequence[str], count: int, drawn: random.Random) -> list[dict[str, Any]]:
    """The beginning of a piece, and the words that come next, as they stand there and in three other orders."""
    rows: list[dict[str, Any]] = []
    for piece in pieces:
        text = " ".join(piece.split())
        end = text.find(" ", QUESTION)
        words = text[end + 1 :].split()[:WORDS]
        if len(rows) == count or end < 0 or len(set(words)) < WORDS:
            continue
        right, others = " ".join(words), set[str]()
        while len(others) < 3:
            order = " ".join(drawn.sample(words, WORDS))
            others |= {order} - {right}
        choices = drawn.sample([right, *sorted(others)], 4)
        rows.append({"question": text[:end], "choices": choices, "answer": choices.index(right)})
    return rows


# ---- models --------------------------------------------------------------------------------------------------


def _tokens(text: str) -> Tensor:
    return torch.tensor(byte_tokenizer()(text, verbose=False).input_ids)


def _train(
    model: Any, streams: Sequence[Tensor], seed: int, steps: int, rate: float, *, annealed: bool, decay: float = 0.05
) -> Any:
    """Train on windows drawn from each stream in turn, each behind the token that scored texts begin with."""
    generator, begins = torch.Generator().manual_seed(seed), byte_tokenizer().bos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    for step in range(steps):
        warm, left = min(1.0, (step + 1) / (0.1 * steps)), (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * warm * (left if annealed else 1)
        rows = torch.full((_BATCH, CONTEXT + 1), begins)  # (batch, 1 + context)
        for place in range(_BATCH):
            stream = streams[(step * _BATCH + place) % len(streams)]
            begin = int(torch.randint(len(stream) - CONTEXT, (1,), generator=generator))
            rows[place, 1:] = stream[begin : begin + CONTEXT]
        logits = model(input_ids=rows[:, :-1]).logits  # (batch, context, vocabulary)
        functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _ancestor(out: Path, streams: Mapping[str, Tensor], seed: int) -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    _save(_train(model, list(streams.values()), seed, _STEPS, _RATE, annealed=True), out)


def _of_domains(out: Path, start: Path, streams: Mapping[str, Tensor], seed: int) -> None:
    for number in range(2 * len(DOMAINS)):
        domain = DOMAINS[number % len(DOMAINS)]
        _save(_fine_tune(start, [streams[domain]], f"{seed} {number}", annealed=True), out / f"{number + 1}-{domain}")


def _runs(out: Path, start: Path, streams: Sequence[Tensor], seed: int, annealed: bool) -> None:
    for number in range(RUNS):
        poor = number == RUNS - 1
        model = _fine_tune(start, streams, f"{seed} run {number}", annealed=annealed, poor=poor)
        _save(model, out / (POOR if poor else str(number + 1)))


def _fine_tune(start: Path, streams: Sequence[Tensor], name: str, *, annealed: bool, poor: bool = False) -> Any:
    drawn = random.Random(name)
    seed, rate, decay = drawn.getrandbits(32), 10 ** drawn.uniform(-3.2, -2.6), 10 ** drawn.uniform(-3, -0.5)
    steps = round(_FINE_TUNE_STEPS * drawn.choice([0.8, 1, 1.2]))
    model = LlamaForCausalLM.from_pretrained(start)
    return _train(model, streams, seed, steps, _POOR_RATE if poor else rate, annealed=annealed, decay=decay)
