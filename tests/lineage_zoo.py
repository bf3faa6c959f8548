"""Models whose lineage is known: ancestors, fine-tunes of all kinds, and the same weights in another guise.

A vision transformer of 136 thousand parameters learns drawn letters, several times, and each of these ancestors is
fine-tuned on real handwritten digits with the demo's own training loop. `make_zoo` trains what is asked for and keeps
it in a folder; the functions below it turn a model folder into another one without training.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils import logging

from hf_soup.demo import digits as demo
from hf_soup.demo.digits_data import DIGITS, LETTERS, Split, draw_letters, splits_of

WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Member:
    """A saved model and where it comes from.

    Args:
        name: Its key in the zoo.
        folder: Config, weights and processor.
        ancestor: The member whose weights it started from; None where it started from random numbers.
        kind: How it was made, such as ``light`` or ``ancestor``.
    """

    name: str
    folder: Path
    ancestor: str | None
    kind: str


def make_zoo(folder: Path, *names: str, seed: int = 0, effort: float = 1.0) -> dict[str, Member]:
    """Train members and what they descend from; what the folder has already is not made again.

    Args:
        folder: Where each gets a folder of its name.
        names: Which; all of `PLAN` where none is named (40 seconds on one core).
        seed: Of everything.
        effort: Share of the ordinary number of steps, for tests that need no well trained model.
    """
    return make_planned(PLAN, folder, *names, seed=seed, effort=effort)


def make_planned(
    plan: Mapping[str, Step], folder: Path, *names: str, seed: int = 0, effort: float = 1.0
) -> dict[str, Member]:
    """`make_zoo` for another plan."""
    wanted = set(names or plan)
    for name in reversed(plan):  # ancestors come first in a plan, so everything is seen before what it needs
        if name in wanted and (ancestor := plan[name].ancestor):
            wanted.add(ancestor)
    folder.mkdir(parents=True, exist_ok=True)
    members = {}
    with quiet_and_alone():
        for name in (name for name in plan if name in wanted):
            step, place = plan[name], folder / name
            if not place.exists():
                with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as staged:
                    parent = folder / step.ancestor if step.ancestor else None
                    step.make(Path(staged) / name, parent, seed=seed, effort=effort)
                    (Path(staged) / name).rename(place)
            members[name] = Member(name, place, step.ancestor, step.kind)
    return {name: members[name] for name in (names or plan)} | members


def first_base(zoo: dict[str, Member], name: str) -> str:
    """The first of a member's line, which was initialised at random.

    >>> PLAN["A-continued-1"].ancestor
    'A-continued'
    """
    ancestor = zoo[name].ancestor
    return name if ancestor is None else first_base(zoo, ancestor)


def write_card(folder: Path, base_model: str | Sequence[str] | None = None, **front: object) -> None:
    """A ``README.md`` that names the ancestor, as the Hub's cards do."""
    named = {} if base_model is None else {"base_model": base_model if isinstance(base_model, str) else [*base_model]}
    text = yaml.safe_dump({"license": "apache-2.0", **named, **front}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{text}---\n# {folder.name}\n", encoding="utf-8")


def outputs(folder: Path, model: Any = None) -> Tensor:
    """``(64, labels)``, what a model folder says about the first test digits."""
    with quiet_and_alone(), torch.no_grad():
        kind = model or AutoModelForImageClassification
        loaded = kind.from_pretrained(folder, dtype=torch.float32)
        return loaded(pixel_values=_digits(0)["test"][0][:64].sub(demo.MEAN).div(demo.STD)).logits


def accuracy(folder: Path, seed: int = 0) -> float:
    """Share of the test digits that a fine-tune reads."""
    images, labels = _digits(seed)["test"]
    with quiet_and_alone(), torch.no_grad():
        model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
        said = model(pixel_values=images.sub(demo.MEAN).div(demo.STD)).logits.argmax(1)
    return (said == labels).float().mean().item()


# ---- the same model in another guise ------------------------------------------------------------------------


def permuted_neurons(folder: Path, out: Path, layers: str | int = "all", seed: int = 0) -> Path:
    """Put the hidden units of the MLPs in another order, of every layer or of one; the function stays the same."""
    changed = 0

    def change(name: str, tensor: Tensor) -> Tensor:
        nonlocal changed
        rows, columns = _UNIT_ROWS.fullmatch(name), _UNIT_COLUMNS.fullmatch(name)
        found = rows or columns
        if not found or layers not in ("all", int(found[1])):
            return tensor
        changed += 1
        dim = 0 if rows else 1
        return tensor.index_select(dim, _order(tensor.shape[dim], f"{seed} {found[1]}"))

    written = _changed(folder, out, change)
    assert changed, f"no layer {layers} in {folder.name}"
    return written


def permuted_heads(folder: Path, out: Path, order: Sequence[int]) -> Path:
    """Put the attention heads of a ViT in another order; the function stays the same."""
    size = _config(folder)["hidden_size"] // len(order)
    rows = torch.cat([torch.arange(head * size, (head + 1) * size) for head in order])

    def change(name: str, tensor: Tensor) -> Tensor:
        if re.search(r"attention\.(?:query|key|value)\.", name):
            return tensor[rows]
        return tensor[:, rows] if name.endswith("attention.output.dense.weight") else tensor

    return _changed(folder, out, change)


def some_neurons(folder: Path, out: Path, share: float) -> Path:
    """Move a share of the hidden units of every MLP by one place; the function stays the same."""

    def change(name: str, tensor: Tensor) -> Tensor:
        rows, columns = _UNIT_ROWS.fullmatch(name), _UNIT_COLUMNS.fullmatch(name)
        if not rows and not columns:
            return tensor
        dim = 0 if rows else 1
        order = torch.arange(tensor.shape[dim])
        moved = _order(tensor.shape[dim], "some")[: int(tensor.shape[dim] * share)]
        order[moved] = moved.roll(1)
        return tensor.index_select(dim, order)

    return _changed(folder, out, change)


def permuted_hidden(folder: Path, out: Path, seed: int = 0) -> Path:
    """Put the whole hidden dimension in another order, in every tensor that reads it or writes into it."""

    def change(name: str, tensor: Tensor) -> Tensor:
        writes = bool(_WRITES.search(name))
        assert writes or _READS.search(name) or _INSIDE.search(name), name
        if not writes and not _READS.search(name):
            return tensor
        dim = 0 if writes else tensor.dim() - 1
        return tensor.index_select(dim, _order(tensor.shape[dim], f"{seed}"))

    return _changed(folder, out, change)


def permuted_labels(folder: Path, out: Path, order: Sequence[int]) -> Path:
    """Put the labels in another order, in the head and in the config: label ``i`` is now the old ``order[i]``."""
    rows = torch.tensor(list(order))
    _changed(folder, out, lambda name, tensor: tensor[rows] if _HEAD.search(name) else tensor)
    old = _config(out)["id2label"]
    labels = {str(new): old[str(was)] for new, was in enumerate(order)}
    _config(out, id2label=labels, label2id={label: int(index) for index, label in labels.items()})
    return out


def other_dtype(folder: Path, out: Path, dtype: str) -> Path:
    """Store the weights as ``bfloat16`` or ``float16``, and say so in the config."""
    _changed(folder, out, lambda name, tensor: tensor.to(getattr(torch, dtype)))
    _config(out, dtype=dtype)
    return out


def sharded(folder: Path, out: Path, max_shard_size: int | str = 100_000) -> Path:
    """Store the weights in several files with an index, each of at most so many bytes."""
    tensors = _copied(folder, out)
    save_torch_state_dict(tensors, out, max_shard_size=max_shard_size, metadata={"format": "pt"})
    return out


def shuffled_layout(folder: Path, out: Path, seed: int = 0) -> Path:
    """Store the tensors in another order within the file: the library always sorts them, other writers do not."""
    tensors = _copied(folder, out)
    names = [list(tensors)[place] for place in _order(len(tensors), f"layout {seed}")]
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in names:
        tensor = tensors[name].contiguous()
        content = tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (out / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return out


def memory_names(folder: Path, out: Path) -> Path:
    """Store the tensors of a ViT under the names that the library uses in memory; it loads both."""
    return _renamed(folder, out, lambda name: _applied(name, _IN_MEMORY))


def without_prefix(folder: Path, out: Path) -> Path:
    """Leave ``vit.`` out of the body's names, as where the body was saved alone; the library puts it back."""
    return _renamed(folder, out, lambda name: name.removeprefix("vit."))


def with_prefix(folder: Path, out: Path) -> Path:
    """Put ``vit.`` before the body's names twice, as where a wrapped model was saved; the library takes one off."""
    return _renamed(folder, out, lambda name: f"vit.{name}" if name.startswith("vit.") else name)


def body_only(folder: Path, out: Path) -> Path:
    """Save the body alone, as `ViTModel` or `CLIPVisionModel` does: without head, and a ViT without its prefix."""
    with quiet_and_alone():
        if _config(folder)["model_type"] == "clip":
            CLIPVisionModel.from_pretrained(folder).save_pretrained(out)
        else:
            ViTModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(out)
    return out


#: What makes the hidden units of an MLP, and what takes them, in ViT, CLIP and Llama; the group is the layer.
_UNIT_ROWS = re.compile(
    r".*\.?layers?\.(\d+)\.(?:intermediate\.dense|mlp\.fc1|mlp\.gate_proj|mlp\.up_proj)\.(?:weight|bias)"
)
_UNIT_COLUMNS = re.compile(r".*\.?layers?\.(\d+)\.(?:output\.dense|mlp\.fc2|mlp\.down_proj)\.weight")
#: What writes into the hidden dimension (first axis), what reads it (last axis), and what knows it in neither way.
_WRITES = re.compile(
    r"(?:output\.dense|out_proj|o_proj|fc2|down_proj|patch_embeddings?(?:\.projection)?|norm\w*)\.(?:weight|bias)$"
)
_READS = re.compile(
    r"(?:query|key|value|[qkv]_proj|intermediate\.dense|fc1|gate_proj|up_proj|classifier|score|lm_head"
    r"|embed_tokens|position_embedding)\.weight$|(?:cls_token|position_embeddings|class_embedding)$"
)
_INSIDE = re.compile(r"(?:query|key|value|[qkv]_proj|intermediate\.dense|fc1|classifier)\.bias$")
_HEAD = re.compile(r"^(?:classifier|score)\.")
_IN_MEMORY = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def _applied(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for old, new in rules:
        name = name.replace(old, new)
    return name


def _order(count: int, seed: str) -> Tensor:
    """A permutation of so many, the same for the same words on every machine."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def _copied(folder: Path, out: Path) -> Tensors:
    """Copy all but the weights, which are returned."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    return load_file(folder / WEIGHTS)


def _changed(folder: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    tensors = {name: change(name, tensor).contiguous() for name, tensor in _copied(folder, out).items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def _renamed(folder: Path, out: Path, rename: Callable[[str], str]) -> Path:
    tensors = {rename(name): tensor for name, tensor in _copied(folder, out).items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def _config(folder: Path, **changes: object) -> dict[str, Any]:
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if changes:
        config |= changes
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


# ---- training -----------------------------------------------------------------------------------------------


@contextmanager
def quiet_and_alone() -> Iterator[None]:
    """No bars and reports, and one thread: on models so small a second one costs more than it gives."""
    threads, bars, verbosity = torch.get_num_threads(), logging.is_progress_bar_enabled(), logging.get_verbosity()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a body that is loaded without its head is no news here
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@lru_cache(maxsize=4)
def _digits(seed: int) -> dict[str, Split]:
    return splits_of(seed)


def _save(model: Any, out: Path) -> None:
    """As the demo does, without its card."""
    demo._save(model, out, {}, "")
    (out / "README.md").unlink()


def _pretrain(
    out: Path, parent: Path | None, *, seed: int, effort: float, initial: int = 0, letters: int = 0,
    learning_rate: float = 2e-3, steps: int = 240, hidden: int = 64,
) -> None:  # fmt: skip
    """Letters, for a new model with the initial weights of a number, or for one that knows some already."""
    generator = torch.Generator().manual_seed(1000 * seed + letters)
    images, labels = draw_letters(4000, generator)
    if parent:
        model = ViTForImageClassification.from_pretrained(parent)
    else:
        model = demo._new_model(LETTERS, 1000 * seed + initial, hidden)
    steps = max(1, round(steps * effort))
    batches = islice(demo.batches(images, labels, 64, generator), steps)
    demo.train(model, demo._losses(model, batches), learning_rate, 0.05, demo.cosine(steps))
    _save(model, out)


def _fine_tune(
    out: Path, parent: Path, *, seed: int, effort: float, number: int, learning_rate: float, epochs: int,
    head: str = "probe", **settings: float,
) -> None:  # fmt: skip
    """Digits, with the head of a linear probe, one drawn at random, or the one that the parent has."""
    known = ViTForImageClassification.from_pretrained(parent)
    if head == "parent":
        model = known
    else:
        start = 1000 * seed + (0 if head == "probe" else 500 + number)
        model = demo._new_model(DIGITS, start, known.config.hidden_size)
        model.vit.load_state_dict(known.vit.state_dict())
    images, labels = _digits(seed)["train"]
    if head == "probe":
        model.classifier.load_state_dict(_probed(parent, seed))
    # Each has its own two thirds, as different people have different data.
    own = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + number))[:134]
    chosen = {"weight_decay": 0.05, "label_smoothing": 0.0, "augmentation": 0.6, "mixup": 0.0} | settings
    epochs = max(1, round(epochs * effort))
    seeded = {"seed": 1000 * seed + number, "learning_rate": learning_rate, "epochs": epochs}
    demo._fine_tune(model, images[own], labels[own], demo.Hyperparameters(**seeded, **chosen))
    _save(model, out)


@lru_cache(maxsize=8)
def _probed(parent: Path, seed: int) -> Tensors:
    """The head that all fine-tunes of an ancestor start from."""
    known = ViTForImageClassification.from_pretrained(parent)
    model = demo._new_model(DIGITS, 1000 * seed, known.config.hidden_size)
    model.vit.load_state_dict(known.vit.state_dict())
    demo._probe(model, *_digits(seed)["train"])
    return dict(model.classifier.state_dict())


def _frozen(out: Path, parent: Path, *, seed: int, effort: float) -> None:
    """The body as it was, and a head that was fitted to other digits than the others' was."""
    known = ViTForImageClassification.from_pretrained(parent)
    model = demo._new_model(DIGITS, 1000 * seed, known.config.hidden_size)
    model.vit.load_state_dict(known.vit.state_dict())
    demo._probe(model, *_digits(seed)["validation"])
    _save(model, out)


def _clip(out: Path, parent: None, *, seed: int, effort: float) -> None:
    """A whole CLIP that knows drawn letters by name; its vision tower is a part of it."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    words = {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 61, "eos_token_id": 62, "pad_token_id": 60}
    sight = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    config = CLIPConfig(
        text_config=tower | words, vision_config=tower | sight, projection_dim=32, initializer_factor=2.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    generator = torch.Generator().manual_seed(1000 * seed)
    images, labels = draw_letters(4000, generator)
    texts = torch.tensor([[61, letter, 62] for letter in range(len(LETTERS))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for pictures, letters in islice(demo.batches(images, labels, 64, generator), max(1, round(80 * effort))):
        shown = model(pixel_values=pictures.sub(demo.MEAN).div(demo.STD), input_ids=texts)
        torch.nn.functional.cross_entropy(shown.logits_per_image, letters).backward()
        optimizer.step()
        optimizer.zero_grad()
    _save(model, out)


def _clip_fine_tune(out: Path, parent: Path, *, seed: int, effort: float, number: int) -> None:
    """Digits for the vision tower alone; both heads start at the same place."""
    config = CLIPConfig.from_pretrained(parent)
    config.id2label = dict(enumerate(DIGITS))
    config.label2id = {name: index for index, name in enumerate(DIGITS)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPForImageClassification.from_pretrained(parent, config=config)
    images, labels = _digits(seed)["train"]
    generator = torch.Generator().manual_seed(1000 * seed + number)
    batches = islice(demo.batches(images, labels, 32, generator), max(1, round(80 * effort)))
    demo.train(model, demo._losses(model, batches), 5e-4, 0.05, lambda step: 1.0)
    _save(model, out)


@dataclass(frozen=True)
class Step:
    """How a member is made: its kind, whose weights it starts from, and the training."""

    kind: str
    ancestor: str | None
    make: Callable[..., None] = field(repr=False)


def tuned(ancestor: str, number: int, kind: str, **settings: Any) -> Step:
    """A fine-tune in the way of a kind, or in one's own; the number decides its data and their order."""
    chosen = _SETTINGS.get(kind, _SETTINGS["light"]) | settings
    return Step(kind, ancestor, partial(_fine_tune, number=number, **chosen))


_SETTINGS: dict[str, dict[str, Any]] = {
    "light": {"learning_rate": 5e-4, "epochs": 16},
    "heavy": {"learning_rate": 2e-3, "epochs": 40, "weight_decay": 0.1},
    "hot": {"learning_rate": 1e-2, "epochs": 24},
}

#: Every member, ancestors before those that descend from them.
PLAN: dict[str, Step] = {
    "A": Step("ancestor", None, _pretrain),
    "B": Step("ancestor", None, partial(_pretrain, initial=1, letters=1)),
    "A2": Step("ancestor", None, partial(_pretrain, initial=0, letters=2)),  # A's initial weights, other letters
    "A-light-1": tuned("A", 1, "light"),
    "A-light-2": tuned("A", 2, "light", label_smoothing=0.1),
    "A-light-3": tuned("A", 3, "light", learning_rate=1e-3),
    "A-heavy-1": tuned("A", 4, "heavy"),
    "A-heavy-2": tuned("A", 5, "heavy", mixup=0.4),
    "A-hot-1": tuned("A", 6, "hot"),
    "A-hot-2": tuned("A", 7, "hot"),
    "A-frozen": Step("frozen", "A", _frozen),
    "A-head-1": tuned("A", 8, "head", head="random"),
    "A-head-2": tuned("A", 9, "head", head="random"),
    "A-continued": Step(
        "continued", "A", partial(_pretrain, letters=3, learning_rate=1e-3, steps=120)
    ),
    "A-continued-1": tuned("A-continued", 10, "light"),
    "A-continued-2": tuned("A-continued", 11, "light"),
    "A-again": tuned("A-light-1", 12, "again", head="parent"),
    "B-light-1": tuned("B", 13, "light"),
    "B-light-2": tuned("B", 14, "light"),
    "A2-light-1": tuned("A2", 15, "light"),
    "A2-light-2": tuned("A2", 16, "light"),
    "CLIP": Step("ancestor", None, _clip),
    "CLIP-1": Step("tower", "CLIP", partial(_clip_fine_tune, number=17)),
    "CLIP-2": Step("tower", "CLIP", partial(_clip_fine_tune, number=18)),
}  # fmt: skip

#: The same lines for tests: with a little effort these ancestors are as far from their random numbers, and each other.
FAST = PLAN | {
    "A": Step("ancestor", None, partial(_pretrain, learning_rate=8e-3)),
    "B": Step("ancestor", None, partial(_pretrain, initial=1, letters=1, learning_rate=8e-3)),
    "A2": Step("ancestor", None, partial(_pretrain, letters=2, learning_rate=8e-3)),
}


def young(hidden: int) -> dict[str, Step]:
    """A plan of narrow models whose ancestors were hardly trained, so that fine-tuning moves them far."""
    pretrained = partial(_pretrain, hidden=hidden, steps=36)
    return {
        "A": Step("ancestor", None, pretrained),
        "B": Step("ancestor", None, partial(pretrained, initial=1, letters=1)),
        "A2": Step("ancestor", None, partial(pretrained, letters=2)),
        "A-light-1": tuned("A", 1, "light", learning_rate=1e-3),
        "A-light-2": tuned("A", 2, "light", learning_rate=1e-3, label_smoothing=0.1),
        "A-light-3": tuned("A", 3, "light", learning_rate=2e-3),
        "A-heavy-1": tuned("A", 4, "heavy"),
        "A-heavy-2": tuned("A", 5, "heavy", learning_rate=3e-3, mixup=0.4),
        "A-heavy-3": tuned("A", 6, "heavy", learning_rate=3e-3),
        "A-head-1": tuned("A", 8, "head", learning_rate=1e-3, head="random"),
        "A-head-2": tuned("A", 9, "head", learning_rate=3e-3, head="random"),
        "A-again": tuned("A-light-1", 12, "again", head="parent"),
        "B-light-1": tuned("B", 13, "light", learning_rate=1e-3),
        "B-light-2": tuned("B", 14, "light", learning_rate=3e-3),
        "A2-light-1": tuned("A2", 15, "light", learning_rate=1e-3),
        "A2-light-2": tuned("A2", 16, "light", learning_rate=3e-3),
    }
