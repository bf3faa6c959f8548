"""Tiny models, data and runs in a folder, the same bytes on every machine.

Weights are numbers of a Philox generator that is keyed by the tensor's name, and files are written here: neither
torch's random numbers nor training have a part in them. What a model knows is planted: a pattern in the hidden units
that the head looks for, so scores differ by far more than rounding.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]

HIDDEN, INTERMEDIATE, LAYERS = 16, 32, 2
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ["good", "great", "fine", "happy"], ["bad", "poor", "sad", "awful"]
THINGS = ["film", "book", "day"]
VOCABULARY = [*SPECIAL, *GOOD, *BAD, *THINGS]
MOODS, COLOURS = ("negative", "positive"), ("red", "green", "blue")


def numbers(key: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """Numbers of float32 that belong to a key, distributed as a triangle, with this standard deviation."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    drawn = np.random.Generator(np.random.Philox(key=seed)).random((2, *shape))
    # By sums and products alone, as a logarithm may differ in its last bit between versions of numpy.
    spread: np.ndarray = (drawn[0] + drawn[1] - 1) * 2.449 * scale
    return spread.astype(np.float32)


def pattern(number: int) -> np.ndarray:
    """One of fifteen orthogonal patterns of ±1 over the hidden units, each of sum zero."""
    return np.array([(-1) ** (unit & number).bit_count() for unit in range(HIDDEN)], np.float32)


# ---- files --------------------------------------------------------------------------------------------------------

_TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64}


def as_bytes(tensor: np.ndarray, dtype: str) -> bytes:
    """A tensor's bytes in a type of safetensors; bfloat16 is the upper half of float32, rounded to even."""
    if tensor.dtype == np.int64:
        return tensor.tobytes()
    if dtype != "BF16":
        return tensor.astype(_TYPES[dtype]).tobytes()
    bits = tensor.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def write_tensors(path: Path, tensors: Tensors, dtype: str | Mapping[str, str] = "F32") -> None:
    """A safetensors file of these tensors, all of one type or each of its own."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(tensors):
        kind = dtype if isinstance(dtype, str) else dtype[name]
        content = as_bytes(tensors[name], kind)
        kind = "I64" if tensors[name].dtype == np.int64 else kind
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": offsets}
        data += content
    write_raw(path, header, data)


def write_raw(path: Path, header: Mapping[str, Any], data: bytes) -> None:
    """A safetensors file of any header, right or wrong."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_model(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    dtype: str | Mapping[str, str] = "F32",
    shards: int = 1,
    base: str | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """A folder as transformers writes it, with a card that names its base."""
    folder.mkdir(parents=True)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    written = {**config, "dtype": names[dtype if isinstance(dtype, str) else "F32"]}
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    said = f"base_model: {base}\n" if base else ""
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n{said}---\n# {folder.name}\n")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors, dtype)
        return
    ordered, where, total = sorted(tensors), dict[str, str](), 0
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in ordered[number::shards]}
        write_tensors(folder / file, part, dtype)
        where |= dict.fromkeys(part, file)
        total += sum(each.nbytes for each in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


# ---- what models are made of --------------------------------------------------------------------------------------


def _dense(tensors: Tensors, name: str, rows: int, columns: int, *, unit: bool = False, scale: float = 0.08) -> None:
    """A linear layer of small numbers, beside the identity where what comes in shall come out."""
    weight = numbers(f"{name}.weight", (rows, columns), scale)
    tensors[f"{name}.weight"] = weight + np.eye(rows, columns, dtype=np.float32) if unit else weight
    tensors[f"{name}.bias"] = numbers(f"{name}.bias", (rows,), scale / 4)


def _norm(tensors: Tensors, name: str, size: int = HIDDEN) -> None:
    tensors[f"{name}.weight"] = 1 + numbers(f"{name}.weight", (size,), 0.02)
    tensors[f"{name}.bias"] = numbers(f"{name}.bias", (size,), 0.02)


def bert(vocabulary: Sequence[str] = VOCABULARY) -> tuple[dict[str, Any], Tensors]:
    """A classifier of moods: words of feeling bear a pattern, which attention carries to the first token."""
    config = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "intermediate_size": INTERMEDIATE, "max_position_embeddings": 16, "type_vocab_size": 2, "pad_token_id": 0,
        "id2label": dict(enumerate(MOODS)), "label2id": {name: number for number, name in enumerate(MOODS)},
    }  # fmt: skip
    found: Tensors = {}
    names = "bert.embeddings."
    words = numbers(f"{names}word_embeddings.weight", (len(vocabulary), HIDDEN), 0.15)
    for number, word in enumerate(vocabulary):
        sign = (word in GOOD) - (word in BAD)
        words[number] += sign * pattern(1) if sign else pattern(2 + number % 6) * 0.6
    found[f"{names}word_embeddings.weight"] = words
    found[f"{names}position_embeddings.weight"] = numbers(f"{names}position_embeddings.weight", (16, HIDDEN), 0.05)
    found[f"{names}token_type_embeddings.weight"] = numbers(f"{names}token_type_embeddings.weight", (2, HIDDEN), 0.05)
    _norm(found, f"{names}LayerNorm")
    for layer in range(LAYERS):
        names = f"bert.encoder.layer.{layer}."
        for part in ("query", "key", "value"):
            _dense(found, f"{names}attention.self.{part}", HIDDEN, HIDDEN, unit=part == "value")
        _dense(found, f"{names}attention.output.dense", HIDDEN, HIDDEN, unit=True)
        _norm(found, f"{names}attention.output.LayerNorm")
        _dense(found, f"{names}intermediate.dense", INTERMEDIATE, HIDDEN)
        _dense(found, f"{names}output.dense", HIDDEN, INTERMEDIATE)
        _norm(found, f"{names}output.LayerNorm")
    _dense(found, "bert.pooler.dense", HIDDEN, HIDDEN, unit=True)
    _dense(found, "classifier", 2, HIDDEN, scale=0.02)
    found["classifier.weight"] += np.outer([-1, 1], pattern(1)).astype(np.float32) / 4
    return config, found


def vit() -> tuple[dict[str, Any], Tensors]:
    """A classifier of colours: each channel bears a pattern."""
    config = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": INTERMEDIATE, "image_size": 16,
        "patch_size": 8, "num_channels": 3, "qkv_bias": True, "id2label": dict(enumerate(COLOURS)),
        "label2id": {name: number for number, name in enumerate(COLOURS)},
    }  # fmt: skip
    found: Tensors = {}
    names = "vit.embeddings."
    found[f"{names}cls_token"] = pattern(8).reshape(1, 1, -1) + numbers(f"{names}cls_token", (1, 1, HIDDEN), 0.1)
    places = numbers(f"{names}position_embeddings", (1, 5, HIDDEN), 0.1)
    found[f"{names}position_embeddings"] = places + pattern(9) * np.array([0, 1, 1, 1, 1], np.float32)[:, None]
    kernel = numbers(f"{names}patch_embeddings.projection.weight", (HIDDEN, 3, 8, 8), 0.01)
    for channel in range(3):
        kernel[:, channel] += pattern(1 + channel)[:, None, None] / 64
    found[f"{names}patch_embeddings.projection.weight"] = kernel
    found[f"{names}patch_embeddings.projection.bias"] = numbers(f"{names}projection.bias", (HIDDEN,), 0.02)
    for layer in range(LAYERS):
        names = f"vit.encoder.layer.{layer}."
        for part in ("query", "key", "value"):
            _dense(found, f"{names}attention.attention.{part}", HIDDEN, HIDDEN, unit=part == "value")
        _dense(found, f"{names}attention.output.dense", HIDDEN, HIDDEN, unit=True)
        _dense(found, f"{names}intermediate.dense", INTERMEDIATE, HIDDEN)
        _dense(found, f"{names}output.dense", HIDDEN, INTERMEDIATE)
        _norm(found, f"{names}layernorm_before")
        _norm(found, f"{names}layernorm_after")
    _norm(found, "vit.layernorm")
    _dense(found, "classifier", 3, HIDDEN, scale=0.02)
    found["classifier.weight"] += np.stack([pattern(1), pattern(2), pattern(3)]) / 4
    return config, found


def llama(size: int = len(VOCABULARY), *, tied: bool = False) -> tuple[dict[str, Any], Tensors]:
    """A language model, which nobody scores."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": size, "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": tied,
    }  # fmt: skip
    found: Tensors = {}
    shapes = {"model.embed_tokens.weight": (size, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (size, HIDDEN)
    for layer in range(LAYERS):
        names = f"model.layers.{layer}."
        shapes |= {f"{names}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {f"{names}mlp.{part}_proj.weight": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
        shapes[f"{names}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{names}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    for name, shape in shapes.items():
        found[name] = numbers(name, shape, 0.1) + (1 if "norm" in name else 0)
    return config, {name: each.astype(np.float32) for name, each in found.items()}


def resnet() -> tuple[dict[str, Any], Tensors]:
    """A convolutional network with running statistics."""
    config = {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "num_channels": 3,
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
        "id2label": dict(enumerate(COLOURS)), "label2id": {name: number for number, name in enumerate(COLOURS)},
    }  # fmt: skip
    found: Tensors = {}

    def block(name: str, rows: int, columns: int, size: int) -> None:
        found[f"{name}.convolution.weight"] = numbers(f"{name}.convolution", (rows, columns, size, size), 0.2)
        for part, start in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            found[f"{name}.normalization.{part}"] = start + numbers(f"{name}.{part}", (rows,), 0.05)
        found[f"{name}.normalization.num_batches_tracked"] = np.array(7)

    block("resnet.embedder.embedder", 8, 3, 7)
    for stage, columns, rows in ((0, 8, 8), (1, 8, 16)):
        names = f"resnet.encoder.stages.{stage}.layers.0"
        block(f"{names}.layer.0", rows, columns, 3)
        block(f"{names}.layer.1", rows, rows, 3)
        if stage:
            block(f"{names}.shortcut", rows, columns, 1)
    _dense(found, "classifier.1", 3, 16, scale=0.3)
    return config, {name: each if name.endswith("tracked") else each.astype(np.float32) for name, each in found.items()}


def tuned(tensors: Tensors, key: str, scale: float = 0.004) -> Tensors:
    """A fine-tune: every number moved a little."""
    return {
        name: each if each.dtype == np.int64 else each + numbers(f"{key} {name}", each.shape, scale)
        for name, each in tensors.items()
    }


# ---- files beside the weights -------------------------------------------------------------------------------------


def tokenizer(vocabulary: Sequence[str] = VOCABULARY, added: Sequence[str] = ()) -> dict[str, str]:
    """A fast tokenizer of whole words, with tokens added behind them."""
    size = len(vocabulary)
    special = [
        {"id": number, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": word in SPECIAL}
        for number, word in [*enumerate(SPECIAL), *enumerate(added, size)]
    ]  # fmt: skip
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(vocabulary)},
                  "unk_token": "[UNK]"},
    }  # fmt: skip
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"}  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16, **named}
    return {"tokenizer.json": json.dumps(whole), "tokenizer_config.json": json.dumps(settings)}


PROCESSOR = {
    "preprocessor_config.json": json.dumps({
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "size": {"height": 16, "width": 16},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    })
}  # fmt: skip


def write_rows(path: Path, rows: Sequence[tuple[str, Any]]) -> None:
    """A table of texts and labels."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("text", "label"), *rows])
    path.write_text(text.getvalue())


def write_pictures(folder: Path, key: str, count: int) -> None:
    """A folder of pictures for each colour, some of them pale."""
    from PIL import Image

    for number in range(count):
        colour = number % 3
        strength = 0.02 + 0.4 * (number // 3 * 3 + 1) / count
        channels = np.full((16, 16, 3), 0.5 - strength / 2)
        channels[..., colour] += strength
        channels += numbers(f"{key} {number}", (16, 16, 3), 0.02)
        path = folder / COLOURS[colour] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((channels.clip(0, 1) * 255).round().astype(np.uint8)).save(path)


# ---- everything that recipes name ---------------------------------------------------------------------------------

#: Words that each has wrong, so that fine-tunes know more than their base, and a mean of several more than any.
WRONG = {
    "base": ["great", "bad"],
    "a": ["fine"],
    "b": ["sad", "great"],
    "c": ["good", "awful", "poor"],
    "d": ["happy", "fine", "bad", "sad"],
}


def make_all(root: Path) -> None:
    """Every good model and all data, in folders of ``root``."""
    _texts(root)
    _pictures(root)
    _languages(root)
    _runs(root)


def berts() -> dict[str, Tensors]:
    """The ancestor and four fine-tunes, each of which has some words wrong."""
    all_right, table = bert()[1], "bert.embeddings.word_embeddings.weight"
    found = {}
    for name, words in WRONG.items():
        found[name] = all_right if name == "base" else tuned(all_right, f"bert {name}")
        found[name] = {**found[name], table: found[name][table].copy()}
        for word in words:
            found[name][table][VOCABULARY.index(word)] += (1.7 if word in BAD else -1.7) * pattern(1)
    return found


def _texts(root: Path) -> None:
    config, models = bert()[0], berts()
    for name, tensors in models.items():
        base = None if name == "base" else "acme/bert-base"
        write_model(root / f"bert-{name}", config, tensors, base=base, files=tokenizer())
    a, b = models["a"], models["b"]

    def variant(name: str, tensors: Tensors, more: Mapping[str, Any] | None = None, **options: Any) -> None:
        options = {"base": "acme/bert-base", "files": tokenizer(), **options}
        write_model(root / f"bert-{name}", {**config, **(more or {})}, tensors, **options)

    variant("b-bfloat16", b, dtype="BF16")
    variant("a-bfloat16", a, dtype="BF16")
    variant("c-float16", models["c"], dtype="F16")
    variant("b-float64", b, dtype="F64")
    halves = {name: "BF16" if "layer" in name else "F32" for name in a}
    variant("a-in-two-types", a, dtype=halves)
    variant("b-sharded", b, shards=3)
    variant("c-sharded", models["c"], shards=2)
    turned = {name: each[::-1].copy() if name.startswith("classifier") else each for name, each in b.items()}
    labels = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    variant("b-turned", turned, labels)
    variant("b-nameless", turned, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}})
    variant("b-without-prefix", {name.removeprefix("bert."): each for name, each in b.items()})
    for name in ("a", "b"):
        other = {**models[name], "classifier.weight": numbers(f"other head {name}", (2, HIDDEN), 0.2)}
        spam = {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}
        variant(f"{name}-spam", other, spam)
    for name, more in (("b", ["<tool>", "<end>"]), ("c", ["<tool>"])):
        tensors, key = dict(models[name]), "bert.embeddings.word_embeddings.weight"
        tensors[key] = np.concatenate([tensors[key], numbers(f"added {name}", (len(more), HIDDEN), 0.2)])
        size = {"vocab_size": len(tensors[key])}
        variant(f"{name}-tokens", tensors, size, files=tokenizer(added=more))
    variant("a-copy", a)
    variant("b-pickled", b)
    _as_pickle(root / "bert-b-pickled")
    variant("drifted", tuned(a, "far", 0.15))
    feelings = [*GOOD, *BAD]
    rows = [(f"{word} {thing}", int(word in GOOD)) for word in feelings for thing in THINGS]
    write_rows(root / "rows.csv", rows)
    report = [(f"{thing} {word} {other}", label) for (word, label) in [(w, int(w in GOOD)) for w in feelings]
              for thing in THINGS for other in THINGS]  # fmt: skip
    write_rows(root / "report.csv", report)
    write_rows(root / "examples.csv", [(f"{one} {two}", 0) for one in THINGS for two in feelings])


def _as_pickle(folder: Path) -> None:
    """The weights as torch saves them."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _pictures(root: Path) -> None:
    for kind, (config, base) in (("vit", vit()), ("resnet", resnet())):
        write_model(root / f"{kind}-base", config, base, files=PROCESSOR)
        head = "classifier" if kind == "vit" else "classifier.1"
        for number, name in enumerate("abc"):
            tensors = tuned(base, f"{kind} {name}")
            tensors[f"{head}.bias"][number] += 0.6
            write_model(root / f"{kind}-{name}", config, tensors, base=f"acme/{kind}-base", files=PROCESSOR)
    for key, count in (("validation", 48), ("test", 60), ("train", 36)):
        write_pictures(root / f"colours-{key}", key, count)


def _languages(root: Path) -> None:
    base = llama()[1]
    write_model(root / "llama-base", llama()[0], base, files=tokenizer())
    for name, tied in (("a", False), ("b", False), ("tied", True)):
        tensors = tuned(base, f"llama {name}")
        if tied:
            del tensors["lm_head.weight"]
        config = llama(tied=tied)[0]
        write_model(root / f"llama-{name}", config, tensors, base="acme/llama-base", files=tokenizer())


def _runs(root: Path) -> None:
    """Two Trainer's folders, of a sweep, each with checkpoints that get better."""
    config, models = bert()[0], berts()
    for run, start in (("run-1", "d"), ("run-2", "c")):
        for step in (2, 4, 6, 8, 10):
            share = step / 10
            moved = {
                name: (1 - share) * models[start][name] + share * models["a"][name] + numbers(
                    f"{run} {step} {name}", each.shape, 0.002
                )
                for name, each in models["base"].items()
            }  # fmt: skip
            moved = {name: each.astype(np.float32) for name, each in moved.items()}
            folder = root / "sweep" / run / f"checkpoint-{step}"
            write_model(folder, config, moved, files=tokenizer())
            (folder / "README.md").unlink()
            state: dict[str, Any] = {
                "global_step": step,
                "best_model_checkpoint": f"sweep/{run}/checkpoint-8",
                "log_history": [],
            }
            (folder / "trainer_state.json").write_text(json.dumps(state))
    resnets = resnet()
    for step in (5, 10, 15):
        folder = root / "resnet-run" / f"checkpoint-{step}"
        write_model(folder, resnets[0], tuned(resnets[1], f"resnet run {step}"), files=PROCESSOR)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def publish(root: Path, hub: Any) -> None:
    """Every model as ``acme/NAME`` on a local Hub, one of them gated, and the texts as a data set."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("acme/gated")
    api.upload_folder(repo_id="acme/gated", folder_path=root / "bert-d")
    api.update_repo_settings("acme/gated", gated="auto")
    for folder in sorted(path.parent for path in root.glob("*/config.json")):
        api.create_repo(f"acme/{folder.name}")
        api.upload_folder(repo_id=f"acme/{folder.name}", folder_path=folder)
    api.create_repo("acme/moods", repo_type="dataset")
    for split, file in (("train", "examples"), ("validation", "rows"), ("test", "report")):
        content = (root / f"{file}.csv").read_bytes()
        api.upload_file(repo_id="acme/moods", repo_type="dataset", path_in_repo=f"{split}.csv", path_or_fileobj=content)


def copied(root: Path, source: str, name: str, change: Callable[[Path], object]) -> None:
    """A copy of a folder, with something changed."""
    shutil.copytree(root / source, root / name)
    change(root / name)
