"""Which tensor on disk loads into which parameter, and which belong to the head.

Names on disk are not names in memory (a ViT's ``vit.encoder.layer.0.attention.attention.query.weight`` is
``vit.layers.0.attention.q_proj.weight``), and they differ between the versions that wrote them. Here the library
itself says which tensor goes where, on a model on the meta device, which has shapes and no memory.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hf_soup.checkpoint.checkpoint import Checkpoint
from hf_soup.checkpoint.config import (
    body_class,
    error_in_one_line,
    is_quantised,
    library,
    model_class,
    quiet,
    read_config,
)
from hf_soup.checkpoint.labels import num_labels, with_labels
from hf_soup.checkpoint.memo import remembered
from hf_soup.errors import IncompatibleError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Shape = tuple[int, ...]

#: Parameters that published checkpoints lack and load without harm: poolers that a head does not read, what the
#: library works out by itself, what only pretraining reads, and the bias that it leaves out of untied heads at save.
_NOT_MISSED = re.compile(
    r"pooler|position_ids|relative_position_index|num_batches_tracked|masked_spec_embed|mask_token|decoder\.bias$"
)

#: Parts that any model may have, and the most that one may have however many tensors there are.
_PARTS, _MOST_PARTS = 2000, 1_000_000


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
        mismatched: Name, shape, and the shape that the config asks for instead; named as on disk, or by the
            parameter where it is made of several tensors.
        tied: Parameter to the parameter that it shares its tensor with.
    """

    parameters: Mapping[str, str]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, Shape, Shape], ...]
    tied: Mapping[str, str]


def correspondence(config: Mapping[str, Any], tensors: Mapping[str, Shape], name: str) -> Correspondence:
    """Which parameter every tensor of a checkpoint loads into.

    Args:
        config: A ``config.json``. To compare two checkpoints read both with one config: an ancestor's tensors with
            the fine-tune's config, so that its head or its other tower is ignored.
        tensors: Names on disk and shapes.
        name: What errors call the checkpoint.

    Raises:
        IncompatibleError: The library cannot make a model of the config, or cannot convert the tensors.
    """
    import torch

    if method := is_quantised(config):
        raise IncompatibleError(
            f"{name} is quantised ({method}): its tensors are codes, and codes have no average.",
            hint="Use the model in 16 or 32 bits that it was quantised from.",
            code="quantised",
        )
    model = _meta_model(config, name, len(tensors))
    every, tied = list(model.state_dict()), dict(sorted(model.all_tied_weights_keys.items()))
    pairs = _pair(model, tensors)
    with library(f"transformers cannot convert the tensors of {name}"):
        # Its own loading, without contents: only its converters know the shapes that come out of stacking.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        empty = {disk: torch.empty(shape, device="meta") for disk, shape in tensors.items()}
        mapping: Any = get_model_conversion_mapping(model)
        how = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.float32, weight_mapping=mapping)
        # None is no plan for several devices to older releases, and no disk to take what is too much to newer ones.
        info, _ = convert_and_load_state_dict_in_model(model, empty, how, None)
        loaded = set(every) - info.missing_keys
        # Where both are there the library compares them, and here they have no contents.
        model.all_tied_weights_keys = {key: value for key, value in tied.items() if not {key, value} <= loaded}
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    sources: dict[str, list[str]] = {}
    for disk, pair in pairs.items():
        for target in pair.targets:
            sources.setdefault(target, []).append(disk)
    if info.conversion_errors:
        target = min(info.conversion_errors)
        raise IncompatibleError(
            f"The tensors of {name} that make up '{target}' do not fit together:"
            + "".join(f"\n  {disk}  {tensors[disk]}" for disk in sources.get(target, [])[:8]),
            hint="Its files are damaged, or its config belongs to another model.",
        )
    # What was loaded must be what the pairs name, or the two readings have drifted apart.
    if not {pair.targets[0] for pair in pairs.values()} <= loaded <= sources.keys():
        raise _moved("its renaming and its loading disagree")
    mismatched = []
    for target, found, expected in sorted(info.mismatched_keys):
        disk = sources[target][0]
        alone = len(sources[target]) == 1 and pairs[disk].key == target
        mismatched.append((disk if alone else target, tuple(found), tuple(expected)))
    return Correspondence(
        parameters={disk: pairs[disk].key for disk in tensors if disk in pairs},
        ignored=tuple(disk for disk in tensors if disk not in pairs),
        missing=tuple(parameter for parameter in every if parameter in info.missing_keys),
        mismatched=tuple(mismatched),
        tied=tied,
    )


def layers_of_parameters(
    config: Mapping[str, Any], tensors: Collection[str], name: str
) -> tuple[list[str], dict[str, str]]:
    """All modules, and of those that have no others in them the parameters and what they are.

    ``Linear``, ``Conv1D``, whose weight is stored as (in, out), as GPT-2's, ``Embedding`` or ``Conv``; with an asterisk
    where a class of its own may do more with the weight; ``plain`` of other classes, and ``*`` of those with buffers.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = {nn.Linear: "Linear", Conv1D: "Conv1D", nn.Embedding: "Embedding"}
    kinds |= dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "Conv")
    modules: list[str] = []
    found: dict[str, str] = {}
    for path, module in _meta_model(config, name, len(tensors)).named_modules():
        modules.append(path)
        if any(True for _ in module.children()):
            continue
        kind = next((kind for cls, kind in kinds.items() if isinstance(module, cls)), "")
        own = type(module) not in kinds or getattr(module, "groups", 1) > 1
        own |= "mamba" in str(config.get("model_type")) and path.endswith(("out_proj", "conv1d"))  # peft refuses these
        said = f"{kind}{'*' if own else ''}" if kind else "*" if any(True for _ in module.buffers()) else "plain"
        found |= {f"{path}.{parameter}": said for parameter, _ in module.named_parameters()}
    return modules, found


def stacked_parameters(
    config: Mapping[str, Any], tensors: Collection[str], name: str
) -> dict[str, list[tuple[str, str]]]:
    """Parameters that the library stacks of tensors on disk, expert by expert, with rows of one tensor behind those of
    another: parameter → the pattern and the name of each, pattern by pattern, in the order of the rows.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    model = _meta_model(config, name, len(tensors))
    with quiet():
        mapping = get_model_conversion_mapping(model)
    order: dict[str, int] = {}
    for entry in mapping:
        steps = [(type(each), each.dim) for each in getattr(entry, "operations", ()) if hasattr(each, "dim")]
        plain = steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
        if isinstance(entry, WeightConverter) and plain and len(steps) == len(entry.operations):
            order |= {pattern: place for place, pattern in enumerate(entry.source_patterns)}
    found: dict[str, list[tuple[int, int, str, str]]] = {}
    for disk, pair in _pair(model, tensors).items():
        stacked = re.fullmatch(r"(.+)\[(.+)#(\d+)\]", pair.key)
        if stacked and stacked[2] in order and len(pair.targets) == 1:
            place = (order[stacked[2]], int(stacked[3]), stacked[2], disk)
            found.setdefault(stacked[1], []).append(place)
    every = (parameter for parameter in model.state_dict() if parameter in found)
    return {parameter: [(pattern, disk) for _, _, pattern, disk in sorted(found[parameter])] for parameter in every}


def contradictions(config: Mapping[str, Any], tensors: Mapping[str, Shape], name: str) -> list[tuple[str, str]]:
    """What a config asks for and its checkpoint's tensors are not: ``missing`` and a name, ``shape`` and a sentence.

    Args:
        config: Its ``config.json``.
        tensors: Names on disk and shapes.
        name: What errors call it.
    """
    if not config.get("id2label"):  # of an empty one the library makes a model of no outputs; the soup's says them
        config = {key: value for key, value in config.items() if key != "id2label"}
    found = correspondence(config, tensors, name)
    missing = [("missing", each) for each in found.missing if not _NOT_MISSED.search(each)]
    shapes = [("shape", f"'{disk}' is {has}, and its config asks for {asked}") for disk, has, asked in found.mismatched]
    return [*shapes, *missing]


def head_names(config: Mapping[str, Any], names: Collection[str], name: str = "the model") -> set[str]:
    """Which tensors belong to the head: what they load into does not lie in the library's base model.

    A base model has no head, and neither have tensors that the library ignores.
    """
    model = _meta_model(config, name, len(names))
    targets = {disk: pair.targets[0] for disk, pair in _pair(model, names).items()}
    path = next((path for path, module in model.named_modules() if module is model.base_model), "")
    if path:
        return {disk for disk, target in targets.items() if not target.startswith(f"{path}.")}
    # Some models carry their body's parts beside the head (T5); the body of their type says which is which.
    body = body_class(model.config)
    if body is None or isinstance(model, body):
        return set()
    parts = {part for part, _ in _meta_model(config, name, len(names), body).named_children()}
    shared = parts & {part for part, _ in model.named_children()}
    return {disk for disk, target in targets.items() if shared and target.partition(".")[0] not in parts}


def body_config(config: Mapping[str, Any], name: str = "the model") -> dict[str, Any]:
    """The config of a model without its head.

    Raises:
        IncompatibleError: The library has no such class.

    >>> body_config({"model_type": "bert", "architectures": ["BertForMaskedLM"], "id2label": {"0": "a"}})
    {'model_type': 'bert', 'architectures': ['BertModel']}
    """
    body = body_class(read_config(config, name))
    if body is None:
        said = f"transformers has no class for the body of {name}."
        raise IncompatibleError(said, hint="Keep a head: `heads: MODEL`.")
    of_heads = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")
    return {key: value for key, value in config.items() if key not in of_heads} | {"architectures": [body.__name__]}


def counted_names(
    config: Mapping[str, Any], names: Collection[str], what: Literal["labels", "vocabulary"], name: str
) -> list[str]:
    """Which tensors have a row for each label or for each token: those that are longer where a config has more.

    Args:
        config: A ``config.json``.
        names: Of tensors on disk.
        what: What the rows stand for.
        name: What errors call the model.
    """
    more = copy.deepcopy(dict(config))
    if what == "labels":
        count = num_labels(config) or 2
        more.pop("num_labels", None)
        # Said in full: of an empty `id2label` the library makes a model of no outputs.
        config, more = (with_labels(more, [f"LABEL_{n}" for n in range(many)]) for many in (count, count + 1))
    else:
        loaded = read_config(config, name).get_text_config()
        part = more.get("text_config", more) if "vocab_size" not in more else more
        part["vocab_size"] = getattr(loaded, "vocab_size", 0) + 1
    model = _meta_model(config, name, len(names))
    shapes = {key: each.shape for key, each in _meta_model(more, name, len(names)).state_dict().items()}
    grown = set()
    for key, each in model.state_dict().items():
        if key in shapes and shapes[key] != each.shape:
            if shapes[key][0] != each.shape[0] + 1 or shapes[key][1:] != each.shape[1:]:
                counted = "labels" if what == "labels" else "tokens"
                at = "columns" if shapes[key][-1] > each.shape[-1] else "middle"
                message = f"'{key}' of {name}, {tuple(each.shape)}, has the {counted} in its {at}, not in its rows."
                raise IncompatibleError(message, hint="Only rows can be put where they belong. Leave the model out.")
            grown.add(key)
    return sorted(disk for disk, pair in _pair(model, names).items() if pair.key in grown)


class _Pair(NamedTuple):
    """What a tensor loads into: the key of that piece, and the parameters, more than one where it is split."""

    key: str
    targets: tuple[str, ...]


def _pair(model: PreTrainedModel, names: Iterable[str]) -> dict[str, _Pair]:
    """What each tensor on disk loads into; tensors that the library leaves alone have no pair.

    This follows the loop of `convert_and_load_state_dict_in_model` in transformers 5.23 (core_model_loading.py);
    the renaming itself is the library's. `correspondence` runs that function, and compares the two.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        with quiet():
            mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        pairs: dict[str, _Pair] = {}
        taken: Counter[tuple[str, str | None]] = Counter()
        for disk in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(disk, renamings, converters, prefix, known)
            if target not in known and disk in known:
                target, pattern = rename_source_key(disk, [], [], prefix, known)
            if target not in known:
                continue
            number = taken[target, pattern]
            taken[target, pattern] += 1
            if pattern is not None:
                first, *rest = by_pattern[pattern].target_patterns
                others = (target.replace(first, other) for other in rest)
                pairs[disk] = _Pair(f"{target}[{pattern}#{number}]", (target, *others))
            elif not number:  # of several names for one parameter the first wins, and the others are ignored
                pairs[disk] = _Pair(target, (target,))
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise _moved(error_in_one_line(error)) from error
    return pairs


def _meta_model(
    config: Mapping[str, Any], name: str, tensors: int, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """The model of a config, or its body, with shapes and no memory, for files of so many tensors."""
    import torch

    loaded = read_config(config, name)
    cls = cls or model_class(loaded, name)
    # A config can pass its own checks and still make no model (heads that do not divide the width).
    problem = f"transformers cannot make a {cls.__name__} of the config of {name}"
    with library(problem), parts_of(tensors, problem), torch.device("meta"):
        # Another implementation could be a kernel to fetch, or one that is not installed here.
        loaded._attn_implementation = "eager"
        return cls(loaded)


@contextmanager
def parts_of(tensors: int, problem: str) -> Iterator[None]:
    """Within this no more is made, in this thread, than files of so many tensors may need: a config can ask for more
    layers than could be made in hours, even without memory.

    Raises:
        IncompatibleError: With ``problem``, where a model asks for more modules, parameters and buffers.
    """
    from torch.nn.modules import module as torchs

    # A layer of BERT has about three for a tensor; more where the config is that of a model which has this one in it.
    most, made, thread = min(_PARTS + 20 * tensors, _MOST_PARTS), itertools.count(1), threading.get_ident()

    def part(*_: object) -> None:
        if threading.get_ident() == thread and next(made) > most:
            raise IncompatibleError(
                f"{problem}: it asks for more than {most:,} parts, and its files hold {tensors:,} tensors.",
                hint="Its config.json is damaged, hostile or of another model; correct it, or drop the model.",
            )

    with ExitStack() as stack:
        for hook in (
            torchs.register_module_module_registration_hook,
            torchs.register_module_parameter_registration_hook,
            torchs.register_module_buffer_registration_hook,
        ):
            stack.callback(hook(part).remove)
        yield


def _moved(what: str) -> IncompatibleError:
    import transformers

    return IncompatibleError(
        f"Cannot tell which tensors correspond: transformers {transformers.__version__} loads checkpoints in "
        f"another way than 5.23, which this was written for ({what}).",
        hint="Use ingredients with the same tensor names, or install transformers 5.23.",
    )


def head_tensors(checkpoint: Checkpoint, name: str) -> set[str]:
    """Names of the tensors of a model that are not its body's."""
    config, stored = checkpoint.config, list(checkpoint.tensors)
    return set(remembered("head", [config, stored], lambda: sorted(head_names(config, stored, name))))


def label_rows(checkpoint: Checkpoint, name: str) -> list[str]:
    """The tensors of a model that have a row for each label."""
    config, stored = checkpoint.config, list(checkpoint.tensors)
    ask = partial(counted_names, config, stored, "labels", name)
    return remembered("labels", [config, stored], ask)


def names_outputs(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the class of a model has outputs that labels name."""
    try:
        return bool(label_rows(checkpoint, name))
    except IncompatibleError:  # it has them, though not in rows
        return True
