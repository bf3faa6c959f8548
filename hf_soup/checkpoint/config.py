"""What transformers reads out of a config: the model's class, what its function depends on, its labels.

Configs are strangers' text: no code that they name is run, and nothing that they name is fetched.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from hf_soup.errors import IncompatibleError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


#: Counts that a config may not exceed: a model of more layers would be built for hours, even without memory.
_COUNTED = re.compile(r"(layers?|depths?|blocks?|stages?|groups?|experts|labels)$")
_LARGEST = {"experts": 65_536, "labels": 1_000_000}

#: Tasks of transformers' pipelines → the mappings that list the classes which each takes. That of bodies without a head
#: is left out: it takes every class.
PIPELINES = {
    "audio-classification": ("AUDIO_CLASSIFICATION",),
    "automatic-speech-recognition": ("CTC", "TDT", "SPEECH_SEQ_2_SEQ"),
    "text-to-audio": ("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM"),
    "text-classification": ("SEQUENCE_CLASSIFICATION",),
    "token-classification": ("TOKEN_CLASSIFICATION",),
    "table-question-answering": ("TABLE_QUESTION_ANSWERING",),
    "document-question-answering": ("DOCUMENT_QUESTION_ANSWERING",),
    "fill-mask": ("MASKED_LM",),
    "text-generation": ("CAUSAL_LM",),
    "zero-shot-classification": ("SEQUENCE_CLASSIFICATION",),
    "zero-shot-image-classification": ("ZERO_SHOT_IMAGE_CLASSIFICATION",),
    "image-classification": ("IMAGE_CLASSIFICATION",),
    "image-segmentation": ("IMAGE_SEGMENTATION", "SEMANTIC_SEGMENTATION"),
    "image-text-to-text": ("IMAGE_TEXT_TO_TEXT",),
    "object-detection": ("OBJECT_DETECTION",),
    "zero-shot-object-detection": ("ZERO_SHOT_OBJECT_DETECTION",),
    "depth-estimation": ("DEPTH_ESTIMATION",),
    "video-classification": ("VIDEO_CLASSIFICATION",),
    "mask-generation": ("MASK_GENERATION",),
    "keypoint-matching": ("KEYPOINT_MATCHING",),
    "any-to-any": ("MULTIMODAL_LM",),
}

#: Fields that name kernels or backbones to fetch, or code. They say how a model is computed or where it began,
#: not which parameters it has, so the library does not get to see them.
_FETCHING = re.compile(
    r"_?(attn|experts)_implementation(_internal)?|(fusion|kernel|distributed)_config|use_pretrained_backbone|auto_map"
)

#: Fields that only training, saving or pretraining heads read: dropout and its relatives, initialisation,
#: auxiliary losses, caches, what is returned. ``encoder_stride`` belongs to the decoder of masked-image
#: pretraining, whose shape shows it.
_NOT_THE_FUNCTION = re.compile(
    r"drop|initializer|^init_|^_?output_|^layer_?scale_init|use_cache|gradient_checkpointing|aux_loss|_loss|^loss"
    r"|label_smoothing|^pretraining_tp$|^encoder_stride$|^apply_spec_augment$|^mask_(time|feature)_"
)


def read_config(config: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """The library's own config object of a ``config.json``.

    Raises:
        IncompatibleError: It is no config, of a model type that the library does not know, or the library
            refuses its values; ``name`` says whose it is.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(config, Mapping):
        raise IncompatibleError(f"The config of {name} is no JSON object but {type(config).__name__}.")
    model_type = config.get("model_type")
    if model_type is None and "pretrained_cfg" in config:
        architecture = shortened_value(config.get("architecture"))
        raise IncompatibleError(f"{name} is a model of timm ({architecture}), not of transformers.")
    if not isinstance(model_type, str) or not model_type:
        raise IncompatibleError(
            f"The config of {name} does not say what model it is: its 'model_type' is {model_type!r}.",
            hint="Models for transformers say it in config.json; others cannot be averaged by their config.",
        )
    if model_type not in CONFIG_MAPPING:
        own = "; it brings its own code" if "auto_map" in config else ""
        raise IncompatibleError(
            f"{name} is a '{model_type[:80]}', which this transformers does not know{own}.",
            hint="Upgrade transformers if the model type is newer than it; code of a repo is never run.",
        )
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise IncompatibleError(
            f"The config of {name} does not say which class it is for: "
            f"its 'architectures' is {shortened_value(named)}.",
            hint='It is a list of names, such as ["BertModel"]; correct it in its config.json, or drop the model.',
        )
    for key, value in ((key, value) for part in _parts(config) for key, value in part.items()):
        counted = _COUNTED.search("labels" if key in ("id2label", "label2id") else str(key))
        stated = value if isinstance(value, list) else [len(value) if isinstance(value, Mapping) else value]
        counts = [each for each in stated if isinstance(each, int)]
        if counted and max(counts, default=0) > (limit := _LARGEST.get(counted[1], 4096)):
            raise IncompatibleError(
                f"The config of {name} asks for {key} = {max(counts):,}; at most {limit:,} are taken.",
                hint="Its config.json is damaged or hostile; correct it, or drop the model.",
            )
    with library(f"transformers cannot read the config of {name} ({model_type})"):
        return CONFIG_MAPPING[model_type].from_dict(_as_read(config))


def _as_read(value: Any) -> Any:
    """A config, or a part of one, as the library gets to see it: without what would be fetched, and with the numbers
    for which JSON has no word, from the way in which the library writes them.

    >>> _as_read({"time_step_limit": [0.0, {"__float__": "Infinity"}], "auto_map": {}})
    {'time_step_limit': [0.0, inf]}
    """
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("NaN", "Infinity", "-Infinity"):
            return float(value["__float__"])
        return {str(key): _as_read(each) for key, each in value.items() if not _FETCHING.fullmatch(str(key))}
    return [_as_read(each) for each in value] if isinstance(value, list) else value


def model_class(config: PreTrainedConfig, name: str = "the model") -> type[PreTrainedModel]:
    """The transformers class of a config: the one that it names, else the body that belongs to its type.

    Raises:
        IncompatibleError: The class is none of transformers', or is for another kind of config.
    """
    import torch
    import transformers

    body = body_class(config)
    if not config.architectures:
        if body is None:
            raise IncompatibleError(f"The config of {name} names no class, and '{config.model_type}' has no body.")
        return body
    named = str(config.architectures[0])
    found: Any = getattr(transformers, named, None) if named.isidentifier() else None
    # Those that others are made from, as PreTrainedModel itself, compute nothing.
    model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not model or found.forward is torch.nn.Module.forward:
        raise IncompatibleError(
            f"{name} is a '{named[:80]}', which is no model class of this transformers.",
            hint="Upgrade transformers if the class is newer than it; code of a repo is never run.",
        )
    # Some types borrow the classes of another (InternLM3 is a Llama), so the body's config class will do too.
    takes = found.config_class
    if takes is not None and not isinstance(config, takes) and takes is not getattr(body, "config_class", None):
        raise IncompatibleError(
            f"The config of {name} contradicts itself: '{named}' is no class for a '{config.model_type}'.",
            hint="Correct 'architectures' or 'model_type' in its config.json, or drop the model.",
        )
    return cast("type[PreTrainedModel]", found)


class ConfigDifference(NamedTuple):
    """What the library reads out of two configs and is not the same: the key, and both values as an error shows them.

    >>> str(ConfigDifference("hidden_act", "gelu", "relu"))
    'hidden_act: gelu against relu'
    """

    key: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.key}: {self.ours} against {self.theirs}"


def same_architecture(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    body_only: bool = False,
    names: tuple[str, str] = ("the first model", "the second model"),
) -> list[ConfigDifference]:
    """How the models differ that the library reads out of two configs; empty when they do not.

    The loaded values are compared, defaults included, so fields that come and go between versions do not count;
    nor do labels (see `labels_differ`), names, dtypes, what is returned, and what only training reads, such as
    dropout. Token ids are left out for models that generate: their forward pass does not read them.

    Args:
        a, b: Two ``config.json``.
        body_only: Compare no classes, and where one config is that of a part of the other (the vision tower of a
            CLIP), compare that part. For an ancestor.
        names: What errors call them.

    >>> vit = {"model_type": "vit", "hidden_size": 64, "num_attention_heads": 4, "torch_dtype": "float32"}
    >>> same_architecture(vit, {**vit, "hidden_act": "relu", "dtype": "bfloat16"}, body_only=True)
    [ConfigDifference(key='hidden_act', ours='gelu', theirs='relu')]
    """
    left, right = read_config(a, names[0]), read_config(b, names[1])
    differences: list[ConfigDifference] = []
    ignore_tokens = body_only
    if body_only:
        left, right = _part_like(left, right), _part_like(right, left)
    else:
        first, second = model_class(left, names[0]), model_class(right, names[1])
        ignore_tokens = first.can_generate() and second.can_generate()
        if first is not second:
            differences.append(ConfigDifference("class", first.__name__, second.__name__))
    if type(left) is not type(right):
        return [*differences, ConfigDifference("model_type", str(left.model_type), str(right.model_type))]
    ours, theirs = dict(_fields(left, ignore_tokens)), dict(_fields(right, ignore_tokens))
    if ignore_tokens and not body_only:  # they generate; T5 reads out of an untied config that outputs are not scaled
        key = "scale_decoder_outputs"
        for values, config in ((ours, left), (theirs, right)):
            values[f"{key} (by tie_word_embeddings)"] = getattr(config, key, None)
    return differences + [
        ConfigDifference(key, shortened_value(ours.get(key)), shortened_value(theirs.get(key)))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


#: peft's names of what a model does → the library's.
_PEFT_TASKS = {
    "CAUSAL_LM": "CAUSAL_LM",
    "QUESTION_ANS": "QUESTION_ANSWERING",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
}


def adapted_config(
    config: Mapping[str, Any], settings: Mapping[str, Any], outputs: int | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """The config of a model of which an adapter brings parts: of the class that it was trained as.

    Args:
        config: Its base's.
        settings: ``adapter_config.json``.
        outputs: How many a head of the adapter has; nobody says their names.
        tokens: How many rows a table of the adapter has.
    """
    from transformers.models.auto import modeling_auto

    stated = settings.get("auto_mapping")
    named = stated.get("base_model_class") if isinstance(stated, Mapping) else None
    if task := _PEFT_TASKS.get(str(settings.get("task_type"))):
        classes = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(str(config.get("model_type")))
        named = classes[0] if isinstance(classes, tuple) else classes
    changed = {**config, "architectures": [named] if isinstance(named, str) else config.get("architectures")}
    if outputs is not None:
        labels = {str(number): f"LABEL_{number}" for number in range(outputs)}
        changed |= {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
    return changed if tokens is None else {**changed, "vocab_size": tokens}


def pipeline_tasks(named: str) -> list[str]:
    """The tasks whose pipelines take a class, the one that it is for first.

    >>> pipeline_tasks("Wav2Vec2ForSequenceClassification"), pipeline_tasks("BertModel")
    (['audio-classification'], [])
    """
    from transformers.models.auto import modeling_auto

    def takes(mapping: str) -> bool:
        found = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
        return any(named == each or (isinstance(each, tuple) and named in each) for each in found)

    # The library lists models that write, such as BART, with those that fill gaps, too.
    writes = named.endswith("ForConditionalGeneration")
    found = [task for task, mappings in PIPELINES.items() if any(map(takes, mappings))]
    return [task for task in found if not (writes and task == "fill-mask")]


def ties_embeddings(config: Mapping[str, Any], name: str) -> bool:
    """Whether the library ties the embeddings of tokens to what predicts them.

    >>> ties_embeddings({"model_type": "gpt2"}, "acme/a")
    True
    """
    return bool(read_config(config, name).tie_word_embeddings)


def is_quantised(config: Mapping[str, Any]) -> str | None:
    """The method that a checkpoint was quantised with; None for an ordinary one.

    >>> is_quantised({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    """
    found = next((part["quantization_config"] for part in _parts(config) if part.get("quantization_config")), None)
    return str(found.get("quant_method") or "unknown method")[:80] if isinstance(found, Mapping) else None


def output_dtype_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of a config that says which dtype the weights are in, in its sub-configs too where they say any.

    >>> output_dtype_config({"model_type": "vit", "torch_dtype": "float32"}, "bfloat16")
    {'model_type': 'vit', 'dtype': 'bfloat16'}
    """
    written = copy.deepcopy(dict(config))
    for part in _parts(written):
        if part is written or {"torch_dtype", "dtype"} & part.keys():
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    return written


def _parts(config: Mapping[str, Any], depth: int = 0) -> Iterator[Any]:
    """A config and its sub-configs."""
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and (str(key).endswith("_config") or "model_type" in value) and depth < 8:
            yield from _parts(value, depth + 1)


def _part_like(whole: PreTrainedConfig, other: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a composite config that is of the other's type, or the whole."""
    parts = [whole, *(getattr(whole, key, None) for key in whole.sub_configs)]
    return next((part for part in parts if type(part) is type(other)), whole)


def _fields(config: PreTrainedConfig, ignore_tokens: bool, path: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a loaded config that its model's function depends on, each value in one spelling."""
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"is_encoder_decoder"}
    for field in dataclasses.fields(config):
        key, value = field.name, getattr(config, field.name, None)
        if key in common or _NOT_THE_FUNCTION.search(key) or (ignore_tokens and key.endswith("_token_id")):
            continue
        if isinstance(value, PreTrainedConfig):
            yield f"{path}{key}", value.model_type
            yield from _fields(value, ignore_tokens, f"{path}{key}.")
            continue
        plain = json.loads(json.dumps(value, default=str))  # tuples become lists
        if isinstance(plain, list) and len(plain) == 2 and plain[0] == plain[1] and re.search(r"(size|stride)$", key):
            plain = plain[0]  # one number for a square
        yield f"{path}{key}", plain


def body_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of a model without a head; None where the config's type has none."""
    from transformers import MODEL_MAPPING

    found: Any = MODEL_MAPPING.get(type(config), None)
    return cast("type[PreTrainedModel] | None", found[0] if isinstance(found, tuple) else found)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's log lines, progress bars and warnings, in all threads: what matters is raised."""
    from transformers.utils import logging as its_logging

    logging: Any = its_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def library(problem: str) -> Iterator[None]:
    """Quiet; whatever the library runs into, and a stranger's values make it run into anything, is ``problem``."""
    try:
        with quiet():
            yield
    except IncompatibleError:
        raise
    except Exception as error:
        raise IncompatibleError(f"{problem}: {error_in_one_line(error)}") from error


def error_in_one_line(error: Exception) -> str:
    """An error of another library in one line: its kind, and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def shortened_value(value: object) -> str:
    """A value as an error shows it, cut to 80 characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
