"""What transformers makes of a model without its weights: parameters, labels, heads, processing.

Names on disk are not names in memory (a ViT's ``vit.encoder.layer.0.attention.attention.query.weight`` is
``vit.layers.0.attention.q_proj.weight``), and they differ between the versions that wrote them. Here the library
itself says which tensor goes where, on a model on the meta device, which has shapes and no memory. Configs are
strangers' text: no code that they name is run, and nothing that they name is fetched.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from hf_soup.errors import IncompatibleError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: A config is a stranger's text: a model of more layers would be built for hours, even without memory.
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MAX_LABELS = 1_000_000

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

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
_ROLES = ("unk", "bos", "eos", "cls", "sep", "pad", "mask")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "I didn't expect THAT, did you?",
    "  leading, trailing   and\tinner  white\nspace ",
    "lower UPPER Title CamelCase sNaKe_case",
    "0 7 42 1234567890 3.14159 1,000,000 1e-5 2024-02-29",
    "naïve café Ångström Straße Œuvre",
    "e\u0301 against \u00e9, ﬁ against fi, ① against 1",
    "Привет, мир! Γειά σου κόσμε.",
    "你好，世界。こんにちは世界。안녕하세요 세계",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया",
    "🙂 👩‍🔬 🇺🇳 ¿¡§±",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break \ufeff",
    "Donaudampfschifffahrtsgesellschaftskapitänskajütenschlüssel",
    "pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism",
    "a" * 150,
    "https://huggingface.co/acme/model?x=1&y=2 <b>mail@example.org</b>",
    "def f(x):\n    return {'a': [x, -1]} # ok",
    "<s> </s> [CLS] [SEP] [MASK] <pad> <unk> <|endoftext|>",
    "!!! ... --- ??? \"quoted\" 'single' (round) [square]",
)
_GENERIC_LABEL = re.compile(r"label_\d+")


class Mismatch(NamedTuple):
    """A tensor whose shape is not the one that the config asks for."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Correspondence:
    """How the tensors of a checkpoint map to the parameters of the model that the library makes of a config.

    Tensors of two checkpoints correspond when their keys in ``parameters`` are equal, both having been read with
    the same config.

    Args:
        parameters: Name on disk to the key of what it loads into: the parameter's or persistent buffer's name, and
            where the library transforms or stacks tensors also which piece it is
            (``…mlp.experts.gate_up_proj[.experts.*.w1.weight#3]``).
        ignored: Tensors that the library leaves alone at load: old buffers, other heads, other towers, second
            copies under an old name.
        missing: Parameters for which there is no tensor, neither their own nor that of one they are tied to.
        mismatched: Tensors of another shape than the config says; named as on disk, or by their parameter where
            it is made of several tensors.
        tied: Parameter to the parameter that it shares its tensor with.
    """

    parameters: Mapping[str, str]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    tied: Mapping[str, str]


class Finding(NamedTuple):
    """Something about processing: a difference, or a note about what could not be compared."""

    kind: Literal["difference", "note"]
    message: str


class LabelComparison(NamedTuple):
    """Whether two heads name their outputs alike.

    Args:
        contradiction: Why they do not, as a sentence; empty where they do or where nobody can tell.
        unknown: One side or both give no names, so the outputs match by position only.
    """

    contradiction: str
    unknown: bool


def read_config(config: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """The library's own config object of a ``config.json``.

    Raises:
        IncompatibleError: It is no config, of a model type that the library does not know, or the library
            refuses its values; ``name`` says whose it is.
    """
    from transformers import CONFIG_MAPPING

    if not isinstance(config, Mapping):
        raise IncompatibleError(
            f"The config of {name} is no JSON object but {type(config).__name__}.",
            hint="A model's config.json is an object with the key 'model_type'.",
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise IncompatibleError(
            f"The config of {name} does not say what model it is: its 'model_type' is {model_type!r}.",
            hint="Models for transformers say it in config.json; others cannot be averaged by their config.",
        )
    if model_type not in CONFIG_MAPPING:
        own = "auto_map" in config
        raise IncompatibleError(
            f"{name} is a '{model_type[:80]}', which this transformers does not know"
            f"{'; it brings its own code' if own else ''}.",
            hint="Code of a repo is never run. Use ingredients whose model type transformers has."
            if own
            else "Upgrade transformers if the model type is newer than it.",
        )
    _check_bounds(config, name)
    with _quiet():
        try:
            return CONFIG_MAPPING[model_type].from_dict(_without_fetching(config))
        # The library checks a stranger's values with whatever exception they run into.
        except Exception as error:
            raise IncompatibleError(
                f"transformers cannot read the config of {name} ({model_type}): {_first_line(error)}"
            ) from error


def model_class(config: PreTrainedConfig, name: str = "the model") -> type[PreTrainedModel]:
    """The transformers class of a config: the one that it names, else the body that belongs to its type.

    Raises:
        IncompatibleError: The class is none of transformers', or is for another kind of config.
    """
    import transformers

    named = config.architectures[0] if config.architectures else None
    body: Any = transformers.MODEL_MAPPING.get(type(config), None)
    body = body[0] if isinstance(body, tuple) else body
    if named is None:
        if body is None:
            raise IncompatibleError(f"The config of {name} names no class, and '{config.model_type}' has no body.")
        return cast("type[PreTrainedModel]", body)
    found = getattr(transformers, named, None) if isinstance(named, str) and named.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise IncompatibleError(
            f"{name} is a '{str(named)[:80]}', which is no model class of this transformers.",
            hint="Code of a repo is never run; upgrade transformers if the class is newer than it.",
        )
    # Some types borrow the classes of another (InternLM3 is a Llama), so the body's config class will do too.
    suits = found.config_class is None or isinstance(config, found.config_class)
    if not suits and found is not body and found.config_class is not getattr(body, "config_class", None):
        raise IncompatibleError(
            f"The config of {name} contradicts itself: '{named}' is no class for a '{config.model_type}'.",
            hint="Correct 'architectures' or 'model_type' in its config.json, or drop the model.",
        )
    return found


def correspondence(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], name: str) -> Correspondence:
    """Which parameter every tensor of a checkpoint loads into.

    Args:
        config: A ``config.json``. To compare two checkpoints read both with one config: an ancestor's tensors with
            the fine-tune's config, so that its head or its other tower is ignored.
        tensors: Names on disk and shapes.
        name: What errors call the checkpoint.

    Raises:
        IncompatibleError: The library cannot make a model of the config, or cannot convert the tensors.
    """
    method = is_quantised(config)
    if method is not None:
        raise IncompatibleError(
            f"{name} is quantised ({method}): its tensors are codes, and codes have no average.",
            hint="Use the model in 16 or 32 bits that it was quantised from.",
        )
    model = _meta_model(config, name)
    tied = dict(sorted(model.all_tied_weights_keys.items()))
    every = list(model.state_dict())
    pairs = _pair(model, tensors)
    targets = {pair.target for pair in pairs.values()}
    absent, mismatched = _dry_load(model, tensors, pairs, name)

    # What the library has found missing must be what no pair names, or the two readings have drifted apart.
    others = {target for pair in pairs.values() for target in pair.others}
    if targets & absent or set(every) - absent - targets - others:
        raise _moved("its renaming and its loading disagree")

    partners: dict[str, set[str]] = {}
    for one, other in tied.items():
        partners.setdefault(other, {other}).add(one)
    filled = {one for group in partners.values() if group - absent for one in group}
    pattern = "|".join(f"({part})" for part in sorted(model._keys_to_ignore_on_load_missing or ()))
    computed = re.compile(pattern) if pattern else None
    return Correspondence(
        parameters={disk: pairs[disk].key for disk in tensors if disk in pairs},
        ignored=tuple(disk for disk in tensors if disk not in pairs),
        missing=tuple(
            one for one in every if one in absent and one not in filled and not (computed and computed.search(one))
        ),
        mismatched=mismatched,
        tied=tied,
    )


def head_names(config: Mapping[str, Any], names: Iterable[str], name: str = "the model") -> set[str]:
    """Which tensors belong to the head: what they load into does not lie in the library's base model.

    A base model has no head, and neither have tensors that the library ignores.
    """
    model = _meta_model(config, name)
    base = model.base_model
    bodies = [path for path, module in model.named_modules() if module is base]
    prefix = f"{bodies[0]}." if bodies and bodies[0] else ""
    pairs = _pair(model, names)
    if prefix:
        return {disk for disk, pair in pairs.items() if not pair.target.startswith(prefix)}
    # Some models carry their body's parts beside the head (T5); the body of their type says which is which.
    from transformers import MODEL_MAPPING

    body: Any = MODEL_MAPPING.get(type(model.config), None)
    if not isinstance(body, type) or isinstance(model, body):
        return set()
    parts = {part for part, _ in _build(body, read_config(config, name), name).named_children()}
    if not parts & {part for part, _ in model.named_children()}:
        return set()
    return {disk for disk, pair in pairs.items() if pair.target.partition(".")[0] not in parts}


def same_architecture(a: Mapping[str, Any], b: Mapping[str, Any], *, body_only: bool = False) -> list[str]:
    """How the models differ that the library reads out of two configs; empty when they do not.

    The loaded values are compared, defaults included, so fields that come and go between versions do not count.
    Not compared either: labels (see `labels_differ`), names, versions, dtypes, what is returned, and what only
    training reads, such as dropout. Token ids are left out for models that generate: their forward pass does not
    read them.

    Args:
        a, b: Two ``config.json``.
        body_only: Compare no classes, and where one config is that of a part of the other (the vision tower of a
            CLIP), compare that part. For an ancestor.

    >>> vit = {"model_type": "vit", "hidden_size": 64, "num_attention_heads": 4, "torch_dtype": "float32"}
    >>> same_architecture(vit, {**vit, "hidden_act": "relu", "dtype": "bfloat16"}, body_only=True)
    ['hidden_act: gelu against relu']
    """
    left, right = read_config(a, "the first model"), read_config(b, "the second model")
    differences = []
    ignore_tokens = body_only
    if body_only:
        left, right = _part_like(left, right), _part_like(right, left)
    else:
        first, second = model_class(left, "the first model"), model_class(right, "the second model")
        if first is not second:
            differences.append(f"class: {first.__name__} against {second.__name__}")
        ignore_tokens = first.can_generate() and second.can_generate()
    if type(left) is not type(right):
        return [*differences, f"model_type: {left.model_type} against {right.model_type}"]
    ours, theirs = dict(_fields(left, ignore_tokens)), dict(_fields(right, ignore_tokens))
    for key in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(key), theirs.get(key)
        if one != other:
            differences.append(f"{key}: {_shown(one)} against {_shown(other)}")
    return differences


def label_names(config: Mapping[str, Any], name: str = "the model") -> tuple[str, ...] | None:
    """The names of a classifier's outputs in their order; None where they are absent or the generic ones.

    Raises:
        IncompatibleError: ``id2label`` is no map from 0, 1, 2, … to names.

    >>> label_names({"id2label": {"1": "joy", "0": "sadness"}})
    ('sadness', 'joy')
    >>> label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    """
    labels = config.get("id2label")
    if labels is None or labels == {}:
        return None
    hint = "Its config.json is damaged; correct it, or drop the model."
    if not isinstance(labels, Mapping) or len(labels) > MAX_LABELS:
        raise IncompatibleError(f"'id2label' of {name} is no map of at most {MAX_LABELS:,} labels.", hint=hint)
    numbered: dict[int, str] = {}
    for key, value in labels.items():
        if not isinstance(key, int | str) or not re.fullmatch(r"[0-9]{1,7}", str(key)):
            raise IncompatibleError(f"'id2label' of {name} has the key {_shown(key)}, no number.", hint=hint)
        if not isinstance(value, str | int | float):
            raise IncompatibleError(f"'id2label' of {name} names {key} {_shown(value)}, no text.", hint=hint)
        if int(key) in numbered:
            raise IncompatibleError(f"'id2label' of {name} has {int(key)} twice.", hint=hint)
        numbered[int(key)] = str(value)
    holes = [number for number in range(max(numbered) + 1) if number not in numbered][:5]
    if holes:
        shown = ", ".join(map(str, holes))
        raise IncompatibleError(
            f"'id2label' of {name} has {len(numbered)} names up to {max(numbered)}, but none for {shown}.",
            hint=hint,
        )
    ordered = tuple(numbered[number] for number in range(len(numbered)))
    return None if all(_GENERIC_LABEL.fullmatch(label.strip().casefold()) for label in ordered) else ordered


def num_labels(config: Mapping[str, Any]) -> int | None:
    """How many outputs a config declares; None where it does not say (the library then assumes two)."""
    for key in ("id2label", "num_labels", "label2id"):
        value = config.get(key)
        if isinstance(value, Mapping) and value:
            return len(value)
        if key == "num_labels" and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def labels_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> LabelComparison:
    """Whether two classifiers say the same about their outputs. Case and outer spaces make no other label.

    >>> a = {"id2label": {"0": "cat", "1": "dog"}}
    >>> labels_differ(a, {"id2label": {"0": "Dog", "1": "cat"}}).contradiction
    'the same 2 labels stand in another order: 0 cat is 1, 1 dog is 0'
    >>> labels_differ(a, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    LabelComparison(contradiction='', unknown=True)
    """
    ours, theirs = label_names(a, "the first model"), label_names(b, "the second model")
    counts = num_labels(a), num_labels(b)
    if None not in counts and counts[0] != counts[1]:
        return LabelComparison(f"{counts[0]} labels against {counts[1]}", ours is None or theirs is None)
    if ours is None or theirs is None:
        return LabelComparison("", unknown=True)
    left, right = ([label.strip().casefold() for label in labels] for labels in (ours, theirs))
    moved = [number for number, (one, other) in enumerate(zip(left, right, strict=True)) if one != other]
    if not moved:
        return LabelComparison("", unknown=False)
    more = f", and {len(moved) - 8} more" if len(moved) > 8 else ""
    if Counter(left) == Counter(right):
        shown = ", ".join(f"{number} {ours[number]} is {right.index(left[number])}" for number in moved[:8])
        return LabelComparison(f"the same {len(left)} labels stand in another order: {shown}{more}", False)
    shown = ", ".join(f"{number} is {ours[number]} against {theirs[number]}" for number in moved[:8])
    return LabelComparison(f"other labels: {shown}{more}", False)


def is_quantised(config: Mapping[str, Any]) -> str | None:
    """The method that a checkpoint was quantised with; None for an ordinary one.

    >>> is_quantised({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    """
    for part in _parts(config):
        found = part.get("quantization_config")
        if isinstance(found, Mapping) and found:
            return str(found.get("quant_method") or "unknown method")[:80]
    return None


def output_dtype_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A copy of a config that says which dtype the weights are in, in its sub-configs too where they say any.

    >>> output_dtype_config({"model_type": "vit", "torch_dtype": "float32"}, "bfloat16")
    {'model_type': 'vit', 'dtype': 'bfloat16'}
    """

    def rewritten(part: Mapping[str, Any], top: bool) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, value in part.items():
            if key in ("torch_dtype", "dtype"):
                continue
            nested = isinstance(value, Mapping) and (key.endswith("_config") or "model_type" in value)
            copied[key] = rewritten(value, top=False) if nested else value
        if top or {"torch_dtype", "dtype"} & part.keys():
            copied["dtype"] = dtype
        return copied

    return rewritten(config, top=True)


def same_processing(
    folder_a: Path, folder_b: Path, config: Mapping[str, Any], *, names: tuple[str, str] | None = None
) -> list[Finding]:
    """What two models' tokenizers and image processors do differently to probe texts and images.

    Args:
        folder_a, folder_b: Folders with the files of tokenizer and processor, and config.json. Equal files are
            not loaded.
        config: The models' config; it says how many channels an image has.
        names: What the findings call the two; their folders' names by default.

    Returns:
        Differences, and notes where one has nothing to compare or cannot be loaded; empty when both do the same.
    """
    import transformers

    tokenizers: Any = transformers.AutoTokenizer
    processors: Any = transformers.AutoImageProcessor
    safely = {"trust_remote_code": False, "local_files_only": True}
    called = names or (folder_a.name, folder_b.name)
    channels = 1 if config.get("num_channels") == 1 else 3
    kinds: list[tuple[str, tuple[str, ...], Callable[[Path], Any], Callable[[Any, Any], list[str]]]] = [
        (
            "tokenizer",
            _TOKENIZER_FILES,
            lambda folder: tokenizers.from_pretrained(folder, **safely),
            _tokenizer_differences,
        ),
        (
            "image processor",
            _PROCESSOR_FILES,
            lambda folder: processors.from_pretrained(folder, **safely, backend="pil"),
            lambda one, other: _image_differences(one, other, channels),
        ),
    ]
    findings = []
    for kind, files, load, differences in kinds:
        contents = [_contents(folder, files) for folder in (folder_a, folder_b)]
        if contents[0] == contents[1]:
            continue
        if not all(contents):
            without, other = called if not contents[0] else called[::-1]
            findings.append(Finding("note", f"{without} has no {kind}, {other} has one"))
            continue
        with _quiet():
            try:
                found = differences(load(folder_a), load(folder_b))
            # A tokenizer library that is not installed, a class of the repo's own, a damaged file, a processor
            # that takes no pictures: whatever it is, nothing was compared, and that is what the note says.
            except Exception as error:  # noqa: BLE001
                shown = " and ".join(called)
                findings.append(Finding("note", f"the {kind}s of {shown} could not be compared: {_first_line(error)}"))
                continue
        findings += [Finding("difference", f"{kind}: {what}") for what in found]
    return findings


def _contents(folder: Path, files: Iterable[str]) -> dict[str, bytes]:
    return {file: (folder / file).read_bytes() for file in files if (folder / file).is_file()}


def _tokenizer_differences(a: Any, b: Any) -> list[str]:
    found = [] if len(a) == len(b) else [f"{len(a)} tokens against {len(b)}"]
    for key in (*(f"{role}_token_id" for role in _ROLES), "model_max_length"):
        one, other = getattr(a, key, None), getattr(b, key, None)
        if one != other:
            found.append(f"{key}: {one} against {other}")
    special = [str(token) for role in _ROLES if (token := getattr(a, f"{role}_token", None))]
    probes: list[tuple[str, ...]] = [*((text,) for text in _TEXTS), (_TEXTS[1], _TEXTS[2]), (" x ".join(special),)]
    changed = []
    for probe in probes:
        one, other = dict(a(*probe)), dict(b(*probe))
        # One version returns token types where another does not; only what both return can contradict.
        if any(one[key] != other[key] for key in one.keys() & other.keys()):
            changed.append((" | ".join(probe), one["input_ids"], other["input_ids"]))
    if changed:
        text, one, other = changed[0]
        found.append(
            f"{len(changed)} of {len(probes)} probe texts become other tokens; "
            f"{_shown(text)!r}: {_shown(one)} against {_shown(other)}"
        )
    elif None not in (a.pad_token_id, b.pad_token_id):
        batch = list(_TEXTS[1:4])
        if list(a(batch, padding=True)["input_ids"]) != list(b(batch, padding=True)["input_ids"]):
            found.append(f"padding: {a.padding_side} against {b.padding_side}")
    return found


def _image_differences(a: Any, b: Any, channels: int) -> list[str]:
    import numpy as np

    noise = np.random.default_rng(0)
    largest = 0.0
    for height, width in ((8, 8), (48, 64), (224, 224), (301, 200)):
        ramp = np.linspace(0, 200, height * width * channels).reshape(height, width, channels)
        image = (ramp + noise.integers(0, 56, ramp.shape)).astype(np.uint8)
        one, other = (
            np.asarray(processor(images=image, input_data_format="channels_last", return_tensors="np")["pixel_values"])
            for processor in (a, b)
        )
        if one.shape != other.shape:
            return [f"a picture of {height}×{width} becomes {one.shape[1:]} against {other.shape[1:]}"]
        largest = max(largest, float(np.abs(one.astype(np.float64) - other).max()))
    # Both run in one process with one library: more than a mean written with fewer digits is another processor.
    return [f"pixel values of probe pictures differ by up to {largest:.3g}"] if largest > 1e-6 else []


class _Pair(NamedTuple):
    """What a tensor loads into: the (first) parameter, the key that names the piece, further parameters."""

    target: str
    key: str
    others: tuple[str, ...] = ()


def _pair(model: PreTrainedModel, names: Iterable[str]) -> dict[str, _Pair]:
    """What each tensor on disk loads into; tensors that the library leaves alone have no pair.

    This follows the loop of `convert_and_load_state_dict_in_model` in transformers 5.23 (core_model_loading.py);
    the renaming itself is the library's. `_dry_load` runs that function, and `correspondence` compares the two.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise _moved(str(error)) from error
    with _quiet():
        try:
            mapping = get_model_conversion_mapping(model)
            renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
            by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
            known, prefix = model.state_dict(), model.base_model_prefix
            pairs: dict[str, _Pair] = {}
            taken: Counter[tuple[str, str]] = Counter()
            for disk in sorted(names, key=dot_natural_key):
                target, pattern = rename_source_key(disk, renamings, converters, prefix, known)
                if target not in known and disk in known:
                    target, pattern = rename_source_key(disk, [], [], prefix, known)
                if target not in known:
                    continue
                if pattern is None:
                    # The first of several names for one parameter wins; the library drops the others in silence.
                    if not taken[target, ""]:
                        pairs[disk] = _Pair(target, target)
                    taken[target, ""] += 1
                    continue
                first, *rest = by_pattern[pattern].target_patterns
                key = f"{target}[{pattern}#{taken[target, pattern]}]"
                pairs[disk] = _Pair(target, key, tuple(target.replace(first, other) for other in rest))
                taken[target, pattern] += 1
        except (AttributeError, TypeError, KeyError) as error:
            raise _moved(_first_line(error)) from error
    return pairs


def _dry_load(
    model: PreTrainedModel, tensors: Mapping[str, tuple[int, ...]], pairs: Mapping[str, _Pair], name: str
) -> tuple[set[str], tuple[Mismatch, ...]]:
    """Load tensors without contents, as the library would: what stays empty, and which shapes do not fit.

    The library's function of transformers 5.23 runs here too, because only its converters know the shapes that
    stacked and split tensors come out with.
    """
    import torch

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError as error:
        raise _moved(str(error)) from error
    with _quiet():
        try:
            empty = {disk: torch.empty(shape, device="meta") for disk, shape in tensors.items()}
            mapping: Any = get_model_conversion_mapping(model)
            how = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.float32, weight_mapping=mapping)
            info, _ = convert_and_load_state_dict_in_model(model, empty, how)
        # Whatever a converter runs into comes from the shapes on disk, or from the library having moved.
        except Exception as error:
            raise IncompatibleError(
                f"transformers cannot convert the tensors of {name}: {_first_line(error)}"
            ) from error
    sources: dict[str, list[str]] = {}
    for disk, pair in pairs.items():
        for target in (pair.target, *pair.others):
            sources.setdefault(target, []).append(disk)
    if info.conversion_errors:
        target = min(info.conversion_errors)
        disks = sources.get(target, [])
        shown = "".join(f"\n  {disk}  {tensors[disk]}" for disk in disks[:8])
        more = f"\n  and {len(disks) - 8} more" if len(disks) > 8 else ""
        raise IncompatibleError(
            f"The tensors of {name} that make up '{target}' do not fit together:{shown}{more}",
            hint="Its files are damaged, or its config belongs to another model.",
        )
    mismatched = []
    for target, found, expected in sorted(info.mismatched_keys):
        disks = sources.get(target, [])
        alone = len(disks) == 1 and pairs[disks[0]].key == target
        mismatched.append(Mismatch(disks[0] if alone else target, tuple(found), tuple(expected)))
    return set(info.missing_keys), tuple(mismatched)


def _meta_model(config: Mapping[str, Any], name: str) -> PreTrainedModel:
    """The model of a config with shapes and no memory."""
    loaded = read_config(config, name)
    return _build(model_class(loaded, name), loaded, name)


def _build(cls: type[PreTrainedModel], config: PreTrainedConfig, name: str) -> PreTrainedModel:
    import torch

    with _quiet(), torch.device("meta"):
        try:
            # Another implementation could be a kernel to fetch, or one that is not installed here.
            config._attn_implementation = "eager"
            return cls(config)
        # A config can pass its own checks and still make no model (heads that do not divide the width).
        except Exception as error:
            raise IncompatibleError(
                f"transformers cannot make a {cls.__name__} of the config of {name}: {_first_line(error)}"
            ) from error


def _check_bounds(config: Mapping[str, Any], name: str) -> None:
    for part in _parts(config):
        for key, value in part.items():
            counted = re.search(r"(layers?|depths?|blocks?|stages?|groups?|experts|labels)$", str(key))
            counts = value if isinstance(value, list) else [value]
            most = max((count for count in counts if isinstance(count, int)), default=0)
            limit = {"experts": MAX_EXPERTS, "labels": MAX_LABELS}.get(counted[1], MAX_LAYERS) if counted else most
            if most > limit:
                raise IncompatibleError(
                    f"The config of {name} asks for {key} = {most:,}; at most {limit:,} are taken.",
                    hint="Its config.json is damaged or hostile; correct it, or drop the model.",
                )


def _parts(config: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """A config and its sub-configs."""
    yield config
    for key, value in config.items():
        if isinstance(value, Mapping) and str(key).endswith("_config") and depth < 8:
            yield from _parts(value, depth + 1)


def _without_fetching(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(key): _without_fetching(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _FETCHING.fullmatch(str(key))
    }


def _part_like(whole: PreTrainedConfig, other: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a composite config that is of the other's type, or the whole."""
    if type(whole) is type(other):
        return whole
    parts = [getattr(whole, key, None) for key in whole.sub_configs_defaults]
    return next((part for part in parts if type(part) is type(other)), whole)


def _fields(config: PreTrainedConfig, ignore_tokens: bool, path: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a loaded config that its model's function depends on."""
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"is_encoder_decoder"}
    for field in dataclasses.fields(config):
        key = field.name
        if key in common or _NOT_THE_FUNCTION.search(key) or (ignore_tokens and key.endswith("_token_id")):
            continue
        value = getattr(config, key, None)
        if isinstance(value, PreTrainedConfig):
            yield f"{path}{key}", value.model_type
            yield from _fields(value, ignore_tokens, f"{path}{key}.")
        else:
            yield f"{path}{key}", _plain(key, value)


def _plain(key: str, value: object) -> object:
    """A value in the one spelling that others are compared with: lists for tuples, one number for a square."""
    if isinstance(value, list | tuple):
        square = len(value) == 2 and value[0] == value[1] and re.search(r"(size|stride)$", key)
        return value[0] if square else [_plain("", item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(str(name), item) for name, item in value.items()}
    return value


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def _moved(what: str) -> IncompatibleError:
    import transformers

    return IncompatibleError(
        f"Cannot tell which tensors correspond: transformers {transformers.__version__} loads checkpoints in "
        f"another way than 5.23, which this was written for ({what}).",
        hint="Use ingredients with the same tensor names, or install transformers 5.23.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's log lines, progress bars and warnings: what matters is raised or returned.

    These switches are the process's own, so use this module from one thread at a time.
    """
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
