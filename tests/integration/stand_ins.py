"""Small stand-ins of models and data sets on the Hub: the same names and the same quirks, a few thousand parameters.

They are made the way the real ones were, so that scores and lineage mean something: an ancestor is trained on one
thing, its fine-tunes on another, on pictures and sentences that are drawn here. What surrounds the weights (configs of
several versions, cards, processors, files that belong in no soup) is as in the real repos.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn_data import EMOTIONS, LEAVES, Files, card, leaf_files, leaves, sentence_files, sentences, vocabulary
from huggingface_hub import CommitOperationAdd, HfApi
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForPreTraining,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

from hf_soup.local_hub import LocalHub

Tensors = dict[str, Tensor]

VIT = "google/vit-base-patch16-224-in21k"
DISTILBERT = "distilbert/distilbert-base-uncased"
BERT = "google-bert/bert-base-uncased"
CLIP = "openai/clip-vit-base-patch32"

#: What training scripts and converters leave in a repo; none of it belongs in a soup.
JUNK: Files = {
    "runs/Nov24_09-26-00_gpu/events.out.tfevents.1669281960.gpu.1.0": b"\x00events",
    "training_args.bin": b"\x80\x04pickle",
    "trainer_state.json": b'{"epoch": 4.0, "log_history": []}',
    "train_results.json": b'{"epoch": 4.0}',
    "all_results.json": b'{"eval_accuracy": 0.98}',
    "emissions.csv": b"timestamp,emissions\n2023,0.001\n",
    "confusion_matrix.png": b"\x89PNG\r\n",
    "flax_model.msgpack": b"\x81flax",
    "tf_model.h5": b"\x89HDF\r\n",
    "onnx/model.onnx": b"\x08\x07onnx",
    "pytorch_model.bin": b"PK\x03\x04pickle",
    ".gitignore": b"checkpoint-*/\n",
}


# ---- files ----------------------------------------------------------------------------------------------------


def publish(hub: LocalHub, repo_id: str, files: Mapping[str, bytes], kind: str = "model") -> str:
    """Put files on the local Hub as one commit, and return it."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(repo_id, repo_type=kind, exist_ok=True)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    with warnings.catch_warnings():
        # The client hands files to its HTTP library in a way that the library deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        return str(api.create_commit(repo_id, operations, commit_message="Upload", repo_type=kind).oid)


def bot_pull_request(
    hub: LocalHub,
    repo_id: str,
    files: Mapping[str, bytes],
    author: str = "SFconvertbot",
    title: str = "Adding `safetensors` variant of this model",
) -> None:
    """Open a pull request on main's head as somebody else would, who has no token here."""
    repo = hub.store.repos["model", repo_id]
    changes = [hub.store.put(path, content) for path, content in files.items()]
    hub.store.open_pull_request(repo, (title, "", author), hub.store.revision(repo, "main"), changes)


def as_json(value: object) -> bytes:
    """A JSON file."""
    return json.dumps(value, indent=2).encode()


def weights(tensors: Tensors) -> Files:
    """The tensors in one file."""
    return {"model.safetensors": save({name: each.contiguous() for name, each in tensors.items()}, {"format": "pt"})}


def sharded(tensors: Tensors, count: int = 2) -> Files:
    """The tensors in several files with an index."""
    names, files, index = list(tensors), Files(), dict[str, str]()
    for number in range(count):
        part, file = names[number::count], f"model-{number + 1:05}-of-{count:05}.safetensors"
        files[file] = save({name: tensors[name].contiguous() for name in part}, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(each.numel() * each.element_size() for each in tensors.values())
    return files | {"model.safetensors.index.json": as_json({"metadata": {"total_size": total}, "weight_map": index})}


def pickled(tensors: Tensors) -> Files:
    """The tensors as old versions saved them."""
    stream = io.BytesIO()
    torch.save(dict(tensors), stream)
    return {"pytorch_model.bin": stream.getvalue()}


def saved(model: Any) -> tuple[dict[str, Any], Tensors]:
    """A model's config and tensors as the library writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


def built(model_class: Any, config: Any, seed: int = 0) -> Any:
    """A model with initial weights that the seed decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)


def nearby(tensors: Tensors, seed: int, scale: float = 0.1) -> Tensors:
    """A fine-tune without training: every tensor moved by a share of its own spread."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: each + scale * each.std(correction=0) * torch.randn(each.shape, generator=generator)
        if each.is_floating_point()
        else each
        for name, each in tensors.items()
    }


def old_names(tensors: Tensors) -> Tensors:
    """A BERT's tensors under the names that it had before 2019, with a buffer that is no longer saved."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for name, each in tensors.items()
    }
    return renamed | {"bert.embeddings.position_ids": torch.arange(16)[None]}


def _train(model: Any, batches: Iterator[dict[str, Tensor]], steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    model.train()
    for _ in range(steps):
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _batches(rows: dict[str, Tensor], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.split(torch.randperm(len(rows["labels"]), generator=generator), size):
            yield {name: each[chosen] for name, each in rows.items()}


# ---- beans ----------------------------------------------------------------------------------------------------


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    small = [np.asarray(each.resize((16, 16), Image.Resampling.BILINEAR)) for each in pictures]
    return (torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5  # (n, 3, 16, 16)


def vit_config(**changes: Any) -> ViTConfig:
    """The ancestor's, with three labels."""
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    small |= {"image_size": 16, "patch_size": 4, "num_labels": 3}
    return ViTConfig(**small, initializer_range=0.1, hidden_act="gelu", **changes)


_NAMED = {"id2label": dict(enumerate(LEAVES)), "label2id": {name: number for number, name in enumerate(LEAVES)}}
_TEXT_NUMBERS = {"id2label": _NAMED["id2label"], "label2id": {name: str(n) for n, name in enumerate(LEAVES)}}
_CASED = {"id2label": {n: each.title() for n, each in enumerate(LEAVES)}, "label2id": {}}
_GENERIC = {"id2label": {n: f"LABEL_{n}" for n in range(3)}, "label2id": {f"LABEL_{n}": n for n in range(3)}}
_MISSPELT = {"id2labl": _NAMED["id2label"], **_GENERIC}
_OLD = {"torch_dtype": "float32", "transformers_version": "4.25.1"}
_NEW = {"dtype": "float32", "transformers_version": "5.2.0"}
_MEANS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "do_resize": True}
_OLD_PROCESSOR = {**_MEANS, "do_normalize": True, "feature_extractor_type": "ViTFeatureExtractor", "size": 16}
_NEW_PROCESSOR = {
    **{**_MEANS, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255},
    **{"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}},
}
_TRAINED_ON = {"tags": ["image-classification", "vision", "generated_from_trainer"], "datasets": ["beans"]}

#: Repo → changes to its config (None takes a field out), its processor, its card's front matter, further files.
_BEANS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None, Sequence[str]]] = {
    "amyeroberts/vit-base-beans-2": (
        {**_OLD, **_TEXT_NUMBERS, "_name_or_path": VIT, "problem_type": "single_label_classification"},
        _OLD_PROCESSOR,
        {"license": "apache-2.0", **_TRAINED_ON},
        [".gitignore", "training_args.bin", "trainer_state.json", "train_results.json", "all_results.json"],
    ),
    "zqTensor/vit-base-beans": (
        {**_OLD, **_NAMED, "_name_or_path": VIT, "encoder_stride": 16},
        _NEW_PROCESSOR,
        {"license": "Apache-2.0", "base_model": VIT, **_TRAINED_ON},
        ["emissions.csv", "training_args.bin", "runs/Nov24_09-26-00_gpu/events.out.tfevents.1669281960.gpu.1.0"],
    ),
    "johnnydevriese/vit_beans": (
        {**_OLD, **_GENERIC, "_name_or_path": "johnnydevriese/vit_beans", "encoder_stride": None},
        _OLD_PROCESSOR,
        None,
        ["confusion_matrix.png", "pytorch_model.bin"],
    ),
    "samink/vit-base-beans-tutorial-samink": (
        {**_NEW, **_CASED, "problem_type": "single_label_classification"},
        _NEW_PROCESSOR,
        {"license": ["apache-2.0"], "base_model": [VIT], "library_name": "transformers", **_TRAINED_ON},
        ["training_args.bin"],
    ),
    "Andrew-Finch/vit-base-beans": (
        {**_NEW, **_NAMED, "_name_or_path": "./vit-base-beans", "gradient_checkpointing": False},
        {**_NEW_PROCESSOR, "do_convert_rgb": None},
        dict(_TRAINED_ON),
        ["tf_model.h5", "flax_model.msgpack"],
    ),
    "cyanjing/vit-base-beans": (
        {**_OLD, **_MISSPELT, "_name_or_path": "vit-base-beans"},
        _OLD_PROCESSOR,
        {"license": "apache-2.0", "base_model": VIT, **_TRAINED_ON},
        ["onnx/model.onnx"],
    ),
    "salunev/vit-base-beans": (
        {**_OLD, **_NAMED, "_name_or_path": "salunev/vit-base-beans"},
        _NEW_PROCESSOR,
        {"license": "other", "license_name": "leaf-terms", "base_model": VIT, **_TRAINED_ON},
        [],
    ),
    "hanyp/vit-base-beans": (
        {**_NEW, **_NAMED},
        _NEW_PROCESSOR,
        {"license": "apache-2.0", "base_model": [VIT], "pipeline_tag": "image-classification", **_TRAINED_ON},
        list(JUNK),
    ),
}
#: Stored in several files; and with safetensors only in the bot's pull request.
_SHARDED, _IN_PULL_REQUEST = "hanyp/vit-base-beans", "sanjeev498/vit-base-beans"


def make_beans(hub: LocalHub) -> None:
    """The ancestor, nine fine-tunes, and the data set with its old name."""
    ancestor = built(ViTForImageClassification, vit_config())
    pictures, labels = leaves("ancestor", 400, green=False)
    rows = {"pixel_values": _pixels(pictures), "labels": torch.tensor(labels)}
    _train(ancestor, _batches(rows, 32, seed=0), 100, 2e-3)
    config, tensors = saved(ancestor)
    # The real one is a body without a head, and so its names have no prefix.
    body = {name.removeprefix("vit."): each for name, each in tensors.items() if name.startswith("vit.")}
    config = {**config, "architectures": ["ViTModel"]}
    for key in ("id2label", "label2id"):
        del config[key]
    processor = {**_OLD_PROCESSOR, "feature_extractor_type": "ViTFeatureExtractor"}
    files = {"config.json": as_json(config), "preprocessor_config.json": as_json(processor), **weights(body)}
    publish(hub, VIT, files | {"README.md": card(license="apache-2.0", tags=["vision"], datasets=["imagenet-21k"])})

    pictures, labels = leaves("train", 120)
    rows = {"pixel_values": _pixels(pictures), "labels": torch.tensor(labels)}
    start = built(ViTForImageClassification, vit_config(), seed=1)
    start.vit.load_state_dict(ancestor.vit.state_dict())
    begin = {name: each.clone() for name, each in start.state_dict().items()}
    fine_tunes = {**_BEANS, _IN_PULL_REQUEST: ({**_OLD, **_NAMED}, _OLD_PROCESSOR, dict(_TRAINED_ON), [])}
    for number, (repo, (changes, processor, front, others)) in enumerate(fine_tunes.items()):
        start.load_state_dict(begin)
        _train(start, _batches(rows, 10, seed=number), 40 + 2 * number, 10 ** (-2.5 + 0.1 * (number % 3)))
        config, tensors = saved(start)
        config = {key: each for key, each in {**config, **changes}.items() if each is not None}
        if "dtype" in config and "torch_dtype" in config:
            del config["dtype"]
        files = {path: JUNK[path] for path in others}
        files |= {"config.json": as_json(config), "preprocessor_config.json": as_json(processor)}
        if front is not None:
            files["README.md"] = card(**front)
        if repo == _IN_PULL_REQUEST:
            publish(hub, repo, files | pickled(tensors))
            bot_pull_request(hub, repo, weights(tensors))
        else:
            publish(hub, repo, files | (sharded(tensors) if repo == _SHARDED else weights(tensors)))
    publish(hub, "AI-Lab-Makerere/beans", leaf_files(), kind="dataset")
    hub.store.rename("dataset", "beans", "AI-Lab-Makerere/beans")


# ---- emotion --------------------------------------------------------------------------------------------------


def tokenizer_files(words: Sequence[str] | None = None) -> Files:
    """A tokenizer as the library saves it, of the given tokens."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "vocab.txt").write_text("\n".join(words or vocabulary()) + "\n")
        tokenizer = DistilBertTokenizer.from_pretrained(place, model_max_length=32)
        tokenizer.save_pretrained(place)
        names = [path for path in sorted(place.iterdir()) if path.suffix in (".json", ".txt")]
        return {path.name: path.read_bytes() for path in names}


def distilbert_config(**changes: Any) -> DistilBertConfig:
    """The ancestor's, with six labels."""
    small: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 64,
        "max_position_embeddings": 32,
        "num_labels": 6,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    }  # without dropout it learns in half the steps
    return DistilBertConfig(vocab_size=len(vocabulary()), initializer_range=0.1, **small, **changes)


def _labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


_UNNAMED = _labels([f"LABEL_{number}" for number in range(6)])
_OWNERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, Sequence[str]]] = {
    "rgao": (
        {**_OLD, **_UNNAMED, "_name_or_path": "distilbert-base-uncased", "problem_type": "single_label_classification"},
        {"license": "apache-2.0", "datasets": ["emotion"], "tags": ["generated_from_trainer"]},
        ["training_args.bin", ".gitignore", "runs/Nov24_09-26-00_gpu/events.out.tfevents.1669281960.gpu.1.0"],
    ),
    "jkraushaar": (
        {**_OLD, **_labels(EMOTIONS), "_name_or_path": "distilbert-base-uncased"},
        {"license": "Apache-2.0", "base_model": "distilbert-base-uncased", "datasets": ["emotion"]},
        ["training_args.bin"],
    ),
    "changki": (
        {**_NEW, **_labels([f"{name.title()} " for name in EMOTIONS])},
        {"license": ["apache-2.0"], "base_model": [DISTILBERT], "datasets": ["dair-ai/emotion"], "language": "en"},
        ["trainer_state.json"],
    ),
    "ffalcao": ({**_OLD, **_UNNAMED, "_name_or_path": "distilbert-base-uncased-finetuned-emotion"}, None, []),
    "matorus": ({**_OLD, **_UNNAMED, "_name_or_path": "distilbert-base-uncased"}, {"license": "apache-2.0"}, []),
}


def make_emotion(hub: LocalHub) -> None:
    """The ancestor, five fine-tunes (one with safetensors in a pull request), and the data set, with old names."""
    files = tokenizer_files()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = DistilBertTokenizer.from_pretrained(folder)

    def rows(split: str, count: int) -> dict[str, Tensor]:
        texts, labels = sentences(split, count)
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor(labels)}

    ancestor = built(DistilBertForMaskedLM, distilbert_config())
    _train(ancestor, _masked(rows("ancestor", 300)), 60, 2e-3)
    config, tensors = saved(ancestor)
    front = card(license="apache-2.0", language="en", datasets=["bookcorpus"])
    others = {"tf_model.h5": JUNK["tf_model.h5"]}
    publish(hub, DISTILBERT, files | others | {"config.json": as_json(config), "README.md": front} | weights(tensors))
    hub.store.rename("model", "distilbert-base-uncased", DISTILBERT)

    start = built(DistilBertForSequenceClassification, distilbert_config(), seed=1)
    start.distilbert.load_state_dict(ancestor.distilbert.state_dict())
    begin = {name: each.clone() for name, each in start.state_dict().items()}
    train = rows("train", 180)
    slow = {"vocab.txt": files["vocab.txt"], "tokenizer_config.json": as_json({"do_lower_case": True,
            "model_max_length": 32, "tokenizer_class": "DistilBertTokenizer"})}  # fmt: skip
    for number, (owner, (changes, matter, junk)) in enumerate(_OWNERS.items()):
        start.load_state_dict(begin)
        _train(start, _batches(train, 24, seed=number), 40 + number, 3.5e-3)
        config, tensors = saved(start)
        config = {**config, **changes}
        if "torch_dtype" in config:
            del config["dtype"]
        mine = {path: JUNK[path] for path in junk} | {"config.json": as_json(config)}
        mine |= slow if owner == "ffalcao" else files
        mine |= {} if matter is None else {"README.md": card(**matter)}
        repo = f"{owner}/distilbert-base-uncased-finetuned-emotion"
        publish(hub, repo, mine | (pickled(tensors) if owner == "matorus" else weights(tensors)))
        if owner == "matorus":
            bot_pull_request(hub, repo, weights(tensors))
    publish(hub, "dair-ai/emotion", sentence_files(), kind="dataset")
    hub.store.rename("dataset", "emotion", "dair-ai/emotion")


def _masked(rows: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Batches with one word of each sentence hidden."""
    generator = torch.Generator().manual_seed(0)
    for batch in _batches(rows, 32, seed=0):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = mask.sum(1) - 2  # without [CLS] and [SEP]
        place = 1 + (torch.rand(len(ids), generator=generator) * lengths).long()
        hidden = functional.one_hot(place, ids.shape[1]).bool()
        labels = torch.where(hidden, ids, -100)
        yield {"input_ids": torch.where(hidden, 4, ids), "attention_mask": mask, "labels": labels}


# ---- BERT and CLIP --------------------------------------------------------------------------------------------


def bert_config(**changes: Any) -> BertConfig:
    """A BERT of two layers."""
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return BertConfig(vocab_size=len(vocabulary()), max_position_embeddings=16, **small, **changes)


def bert_body() -> Tensors:
    """The tensors of the BERT that `make_bert` publishes, without its heads, under today's names."""
    _, tensors = saved(built(BertForPreTraining, bert_config()))
    return {name: each for name, each in tensors.items() if name.startswith("bert.")}


def make_bert(hub: LocalHub) -> None:
    """A BERT of 2018 with its old name and old tensor names, and fine-tunes of it that are pickles without a card."""
    config, tensors = saved(built(BertForPreTraining, bert_config()))
    files = tokenizer_files() | {"config.json": as_json({**config, "architectures": ["BertForMaskedLM"]})}
    publish(hub, BERT, files | {"README.md": card(license="apache-2.0")} | weights(old_names(tensors)))
    hub.store.rename("model", "bert-base-uncased", BERT)
    body = bert_body()
    head = {"classifier.weight": 0.02 * torch.ones(3, 32).cumsum(1) % 0.07, "classifier.bias": torch.zeros(3)}
    names = {"id2label": {n: f"LABEL_{n}" for n in range(3)}, "label2id": {f"LABEL_{n}": n for n in range(3)}}
    config |= {"architectures": ["BertForSequenceClassification"], "_name_or_path": "bert-base-uncased", **names}
    for number in range(2):
        files = tokenizer_files() | {"config.json": as_json(config), "eval_results.json": b"[" + b"0," * 5000 + b"0]"}
        publish(hub, f"connectivity/feather_berts_{number}", files | pickled(nearby(body | head, number)))


def make_clip(hub: LocalHub) -> None:
    """A whole CLIP, and fine-tunes of its vision tower that bring no processor."""
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = {**small, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    tokens = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "projection_dim": 16}
    whole = CLIPConfig(vision_config=vision, text_config={**small, **tokens}, projection_dim=16)
    config, tensors = saved(built(CLIPModel, whole))
    processor = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 16, "size": 16, "do_resize": True}
    processor |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_center_crop": True}
    files = {"config.json": as_json(config), "preprocessor_config.json": as_json(processor), **weights(tensors)}
    publish(hub, CLIP, files | {"README.md": card(tags=["vision"])})
    tower = {name: each for name, each in tensors.items() if name.startswith("vision_model.")}
    alone = {**vision, "model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    for number, task in enumerate(("mnist", "svhn", "dtd")):
        config = {**alone, "_name_or_path": CLIP, "torch_dtype": "float32", "transformers_version": "4.37.2"}
        front = card(base_model=[CLIP], datasets=[task], metrics=["accuracy"])
        files = {"config.json": as_json(config), "README.md": front, **weights(nearby(tower, number))}
        publish(hub, f"tanganke/clip-vit-base-patch32_{task}", files)


def make_all(hub: LocalHub) -> None:
    """Everything above."""
    threads = torch.get_num_threads()
    # One thread: models this small spend nine tenths of their time on waking a second one.
    torch.set_num_threads(1)
    try:
        for make in (make_beans, make_emotion, make_bert, make_clip):
            make(hub)
    finally:
        torch.set_num_threads(threads)
