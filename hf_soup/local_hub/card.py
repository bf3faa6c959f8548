"""What the Hub derives from the files of a repo: metadata, tags, ancestors."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from hf_soup._util.licenses import LICENSES

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_ID = re.compile(r"([\w-]+/)?[\w.-]+")
#: Field of a card → what each of its texts must be, and what the Hub says where one is not.
_VALID: dict[str, tuple[Callable[[str], object], str]] = {
    # Real cards have `Apache-2.0` too.
    "license": (lambda text: text.lower() in LICENSES, "must be one of the Hub's licenses"),
    "language": (re.compile(r"[a-z]{2,3}|code|multilingual").fullmatch, "must be ISO 639-1, 639-2 or 639-3 codes"),
    "datasets": (_ID.fullmatch, "must be dataset ids from https://hf.co/datasets"),
    # Cards have addresses there, too.
    "base_model": (
        lambda text: _ID.fullmatch(text.removeprefix("https://huggingface.co/")),
        "must be model ids from https://hf.co/models",
    ),
}
_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
#: Ending of a file's name → the tag that says in which formats there are weights.
_FORMATS = {
    ".safetensors": "safetensors",
    ".bin": "pytorch",
    ".h5": "tf",
    ".msgpack": "jax",
    ".onnx": "onnx",
    ".gguf": "gguf",
}


def read_card(text: str) -> dict[str, Any]:
    """The metadata at the head of a README, as plain JSON values; empty if there is none.

    Raises:
        ValueError: It is not valid YAML, or not a mapping.

    >>> read_card("---\\nlicense: mit\\n---\\n# A model")
    {'license': 'mit'}
    """
    found = _FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(found[1]) if found else None
        plain = json.loads(json.dumps(data or {}, default=str), parse_constant=lambda _: None)
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
        elif key in _VALID and (wrong := [value for value in _texts(values) if not _VALID[key][0](value)]):
            found.append(f'"{key}" {_VALID[key][1]}: {", ".join(map(repr, wrong))}')
    for key in ("library_name", "license_link", "license_name", "pipeline_tag"):
        if not isinstance(card.get(key, ""), str):
            found.append(f'"{key}" must be a string')
    if card.get("base_model_relation", "finetune") not in _RELATIONS:
        found.append(f'"base_model_relation" must be one of {", ".join(_RELATIONS)}')
    if not isinstance(card.get("model-index", []), list):
        found.append('"model-index" must be an array')
    return found


def describe(
    card: Mapping[str, Any], config: Mapping[str, Any], names: list[str], current: Callable[[str], str] = str
) -> dict[str, Any]:
    """``library_name``, ``pipeline_tag``, ``baseModels`` and ``tags`` of a repo with these files.

    ``current`` gives the id that a model has now: tags hold it, whatever the card calls the ancestor.
    """
    adapter = "adapter_config.json" in names
    guessed = "peft" if adapter else "transformers" if "model_type" in config else None
    library = card.get("library_name") or guessed
    architecture = next(iter(_texts(config.get("architectures"))), "")
    guesses = (task for ending, task in _TASKS.items() if architecture.endswith(ending))
    task = card.get("pipeline_tag") or next(guesses, None)
    ancestors = list(dict.fromkeys(current(name) for name in _texts(card.get("base_model"))))
    formats = [tag for ending, tag in _FORMATS.items() if any(name.endswith(ending) for name in names)]
    # A card that does not say how a model came from its ancestors is guessed at as the Hub does.
    merged, quantised = len(ancestors) > 1, "gguf" in formats or "quantization_config" in config
    guess = "adapter" if adapter else "merge" if merged else "quantized" if quantised else "finetune"
    relation = card.get("base_model_relation") or guess
    tags = [
        library,
        *formats,
        *_texts(config.get("model_type")),
        task,
        *_texts(card.get("tags")),
        *_texts(card.get("language")),
        *(f"dataset:{value}" for value in _texts(card.get("datasets"))),
        *(f"base_model:{value}" for value in ancestors),
        *(f"base_model:{relation}:{value}" for value in ancestors),
        *(f"license:{value}" for value in _texts(card.get("license"))),
        *(f"task_categories:{value}" for value in _texts(card.get("task_categories"))),
    ]
    return {
        "library_name": library,
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(tag for tag in tags if tag)),
        "baseModels": {"relation": relation, "models": [{"id": value} for value in ancestors]} if ancestors else None,
    }


def _texts(value: object) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str) and v]
