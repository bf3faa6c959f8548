"""What the Hub derives from the files of a repo: metadata, tags, ancestors, parameter counts."""

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_MAX_HEADER_BYTES = 100_000_000
_MAX_METADATA_LETTERS = 200_000
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them grow to gigabytes as soon as the metadata is sent as JSON."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)


def read_card(text: str) -> dict[str, Any]:
    """The metadata at the head of a README, as plain JSON values; empty if there is none.

    Raises:
        ValueError: It is not valid YAML, or not a mapping.

    >>> read_card("---\\nlicense: mit\\n---\\n# A model")
    {'license': 'mit'}
    """
    found = _FRONT_MATTER.match(text)
    if not found:
        return {}
    if len(found[1]) > _MAX_METADATA_LETTERS:
        raise ValueError(f"YAML metadata error: more than {_MAX_METADATA_LETTERS} characters")
    try:
        data = yaml.load(found[1], Loader=_Loader)
        written = json.dumps(data or {}, default=str, ensure_ascii=False)
        plain = json.loads(written.encode(), parse_constant=lambda _: None)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"YAML metadata error: {error}") from error
    if not isinstance(plain, dict):
        raise ValueError("YAML metadata error: expected an object with keys, such as `license: mit`")
    return plain


def problems(text: str) -> list[str]:
    """Why the Hub would refuse this README; empty if it would not."""
    try:
        card = read_card(text)
    except ValueError as error:
        return [str(error)]
    found = []
    for key in ("base_model", "datasets", "language", "license", "metrics", "tags"):
        values = card.get(key)
        listed = values if isinstance(values, list) else [values]
        if values is not None and not all(isinstance(value, str) for value in listed):
            found.append(f'"{key}" must be a string or an array of strings')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(card.get(key, ""), str):
            found.append(f'"{key}" must be a string')
    if card.get("base_model_relation", "finetune") not in _RELATIONS:
        found.append(f'"base_model_relation" must be one of {", ".join(_RELATIONS)}')
    index = card.get("model-index", [])
    entries = index if isinstance(index, list) else [None]
    if not all(isinstance(entry, dict) and isinstance(entry.get("results"), list) for entry in entries):
        found.append('"model-index" must be an array of objects with a name and an array of results')
    return found


def _texts(value: object) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v]


def _base_models(card: Mapping[str, Any], names: list[str]) -> tuple[str, list[str]]:
    # A card that does not say how a model came from its ancestors is guessed at as the Hub does.
    ids = _texts(card.get("base_model"))
    if (relation := card.get("base_model_relation")) in _RELATIONS:
        return str(relation), ids
    if "adapter_config.json" in names:
        return "adapter", ids
    if any(name.endswith(".gguf") for name in names):
        return "quantized", ids
    return ("merge" if len(ids) > 1 else "finetune"), ids


def describe(card: Mapping[str, Any], config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """``library_name``, ``pipeline_tag``, ``baseModels`` and ``tags`` of a repo with these files."""
    library = next(iter(_texts(card.get("library_name"))), "transformers" if "model_type" in config else None)
    architecture = next(iter(_texts(config.get("architectures"))), "")
    guessed = (task for ending, task in _TASKS.items() if architecture.endswith(ending))
    task = next(iter(_texts(card.get("pipeline_tag"))), None) or next(guessed, None)
    relation, ids = _base_models(card, names)
    tags = [library, "safetensors" if any(name.endswith(".safetensors") for name in names) else None]
    tags += [*_texts(config.get("model_type")), task]
    tags += [*_texts(card.get("tags")), *_texts(card.get("language"))]
    tags += [f"dataset:{value}" for value in _texts(card.get("datasets"))]
    tags += [f"base_model:{value}" for value in ids] + [f"base_model:{relation}:{value}" for value in ids]
    tags += [f"license:{value}" for value in _texts(card.get("license"))]
    tags += [f"task_categories:{value}" for value in _texts(card.get("task_categories"))]
    return {
        "library_name": library,
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
        "baseModels": {"relation": relation, "models": [{"id": value} for value in ids]} if ids else None,
    }


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """The header of a safetensors file, or None if it is not one."""
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= _MAX_HEADER_BYTES:
            return None
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError):
            return None
    tensors = [t for name, t in header.items() if name != "__metadata__"] if isinstance(header, dict) else [None]
    return header if all(map(_is_tensor, tensors)) else None


def _is_tensor(entry: object) -> bool:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    whole = isinstance(shape, list) and all(isinstance(size, int) and size >= 0 for size in shape)
    return whole and isinstance(entry, dict) and isinstance(entry.get("dtype"), str)


def parameter_counts(headers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Parameters by dtype, as the Hub shows them."""
    counts: dict[str, int] = {}
    for header in headers:
        for name, entry in header.items():
            if name != "__metadata__":
                counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
    return {"parameters": counts, "total": sum(counts.values())} if counts else None
