"""Are these models one model with other weights? Configs, labels, processing, and tensors by name and shape."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hf_soup._util.text import some
from hf_soup.checkpoint import (
    TIMM,
    Checkpoint,
    ConfigDifference,
    ProcessorDifference,
    Tokens,
    contradictions,
    described_modules,
    is_quantised,
    label_names,
    label_order,
    labels_differ,
    names_outputs,
    num_labels,
    read_config,
    remembered,
    same_architecture,
    same_processing,
    stated_modules,
)
from hf_soup.errors import shortened
from hf_soup.hub import ASSETS, MODULES
from hf_soup.lineage.aligned_model import AlignedModel
from hf_soup.recipe import Finding

_MODULE_WEIGHTS = re.compile(r"(\w+_)?\d+_[A-Z]\w*/(model|pytorch_model)[\w.-]*\.(safetensors|bin)")
#: Keys of configs that have to do with the number of tokens.
_VOCABULARY, _TOKEN = re.compile(r"(\w+\.)*vocab_size"), re.compile(r"(\w+\.)*\w+_token_id")
_TIED = "tie_word_embeddings"
#: Keys of how places of a text are counted, which no shape shows.
_POSITIONS = re.compile(r"(\w+\.)*((original_)?max_position_embeddings|n_positions|rope_\w+|rotary_emb_base)")
#: What helps where only heads differ.
HEADS_HINT = "To average their bodies alone set `heads: body` in the recipe, or `heads: MODEL` to keep that one's head."
#: Files that a model brings along but that do not decide how its inputs are prepared.
_NOT_PROCESSING = ("config.json", "generation_config.json", "modules.json")


def quantised(models: Sequence[AlignedModel]) -> list[Finding]:
    """Models whose weights are codes and not numbers."""
    return [
        Finding(
            "quantised",
            f"{model.name} is quantised ({method}), and an average of rounded codes means nothing. "
            "Use the model from before quantisation.",
            (model.name,),
            refuses=True,
        )
        for model in models
        if (method := is_quantised(model.checkpoint.config))
    ]


def adapter_bases(models: Sequence[AlignedModel], named: Checkpoint | None) -> Iterator[Finding]:
    """Adapters that change several states of one base, or another one than the recipe names."""
    states: dict[str, dict[str, list[str]]] = {}
    bases = {base.identity: base for model in models if (base := model.checkpoint.base)}
    for model in models:
        if base := model.checkpoint.base:
            states.setdefault(base.model, {}).setdefault(base.identity, []).append(model.name)
    if named and named.model in states:
        bases[named.identity] = named
        states[named.model].setdefault(named.identity, []).append("the recipe's `base_model`")
    for base_model, found in states.items():
        if len(found) > 1:
            shown = "; ".join(f"{some(who)} of {bases[at].short or bases[at]}" for at, who in found.items())
            yield Finding(
                "base-revisions",
                f"There are several revisions of {base_model}: {shown}. Each adapter is added to its own. To take one, "
                "name it as `base` beside each adapter.",
                tuple(model.name for model in models if model.checkpoint.base),
            )


def modules(models: Sequence[AlignedModel]) -> Iterator[Finding]:
    """Models with weights of their own outside the transformer, which nobody would average, or with code there."""
    for model in models:
        name, checkpoint = model.name, model.checkpoint
        found = [path for path in checkpoint.source.files if _MODULE_WEIGHTS.fullmatch(path)]
        if found:
            message = (
                f"{name} has weights in {some(found)}, outside the transformer; they would be missing in the soup. "
                "Only sentence-transformers modules without weights (pooling, normalisation) are taken over."
            )
            yield Finding("module-weights", message, (name,), refuses=True)
        code = {path.removesuffix(".py") for path in checkpoint.source.files if path.endswith(".py")}
        classes = [module["type"] for module in stated_modules(checkpoint.source, name)] if code else []
        if own := [each for each in classes if each.split(".")[0] in code]:
            yield Finding(
                "module-code",
                f"{name} has modules that are code of its own ({some(own)}), which is not taken over; the soup could "
                "not be loaded.",
                (name,),
                refuses=True,
            )
    first, ids = models[0], [model.checkpoint.source.content_ids(MODULES.fullmatch) for model in models]
    for model, contents in zip(models, ids, strict=True):
        if contents == ids[0]:
            continue
        ours, theirs = (described_modules(each.checkpoint, each.name) for each in (first, model))
        if ours != theirs:
            yield Finding(
                "modules",
                f"{first.name} and {model.name} make embeddings in different ways: "
                f"{shortened(', '.join(ours))} against {shortened(', '.join(theirs))}. Leave one of them out.",
                (first.name, model.name),
                refuses=True,
            )


def architectures(models: Sequence[AlignedModel], donor: AlignedModel, *, body_only: bool = False) -> Iterator[Finding]:
    """Models that transformers would build differently from the donor; ``body_only`` leaves heads out of it.

    The number of tokens does not count here: whether rows can be aligned is seen when the tokenizers are. Nor does
    whether embeddings are tied, as a tied model is an untied one with two equal tensors; but an encoder-decoder that
    ties them may also scale what it reads off them, as T5 does.
    """
    config, whose = donor.checkpoint.config, donor.name
    remembered("readable", config, lambda: bool(read_config(config, whose)))
    for model in models:
        name, theirs = model.name, model.checkpoint.config
        if theirs == config:
            continue
        answer = remembered(
            "same-body" if body_only else "same-architecture",
            [config, theirs],
            partial(same_architecture, config, theirs, body_only=body_only, names=(whose, name)),
        )
        differences = [ConfigDifference(*each) for each in answer]
        if any(each.key == _TIED for each in differences) and (body_only or not _writes(config, whose)):
            differences = [each for each in differences if each.key != _TIED]
        if vocabularies := [each for each in differences if _counts_tokens(each)]:
            tokens = min(int(size) for each in vocabularies for size in (each.ours, each.theirs))
            differences = [each for each in differences if each not in vocabularies and not _is_added(each, tokens)]
        if positions := [each for each in differences if _POSITIONS.fullmatch(each.key)]:
            differences = [each for each in differences if each not in positions]
            message = (
                f"{name} counts the places of a text in another way than {whose}: {_listed(positions)}. The soup "
                f"would have {whose}'s setting, in which {name} was not trained. Leave it out."
            )
            yield Finding("positions", message, (whose, name), refuses=True)
        if differences:
            message = f"{name} is another architecture than {whose}: {_listed(differences)}."
            if not body_only and all(each.key == "class" for each in differences):
                message += f" {HEADS_HINT}"
            yield Finding("architecture", message, (whose, name), refuses=True)


def _writes(config: Mapping[str, Any], name: str) -> bool:
    """Whether a model reads one text and writes another."""
    return remembered("encoder-decoder", config, lambda: bool(read_config(config, name).is_encoder_decoder))


def _listed(differences: Sequence[ConfigDifference]) -> str:
    return "; ".join(str(each) for each in differences[:6])


def _counts_tokens(difference: ConfigDifference) -> bool:
    """Whether it is that of two numbers of tokens."""
    numbers = difference.ours.isdecimal() and difference.theirs.isdecimal()
    return numbers and _VOCABULARY.fullmatch(difference.key) is not None


def _is_added(difference: ConfigDifference, tokens: int) -> bool:
    """Whether the number of a special token differs as one side has none, or has one that was added.

    >>> [_is_added(ConfigDifference("pad_token_id", *sides), 18) for sides in (("None", "3"), ("0", "18"), ("0", "5"))]
    [True, True, False]
    """
    named = _TOKEN.fullmatch(difference.key)
    sides = [re.findall(r"-?\d+", side) for side in (difference.ours, difference.theirs)] if named else []
    return any(not side or any(not 0 <= int(number) < tokens for number in side) for side in sides)


def labels(models: Sequence[AlignedModel], wanted: Sequence[str] | None = None) -> list[Finding]:
    """Labels that contradict each other, and models that give theirs no names.

    Args:
        models: The ingredients.
        wanted: The labels of the recipe. They speak for the models that name none, which is what the recipe of a soup
            relies on.
    """
    reasons = []
    named = [label_names(model.checkpoint.config, model.name) for model in models]
    reference = next((model for model, labels in zip(models, named, strict=True) if labels is not None), models[0])
    config, whose = reference.checkpoint.config, reference.name
    if wanted is not None:
        config, whose = {"id2label": dict(enumerate(wanted))}, "the recipe"
    unknown = [model.name for model, labels in zip(models, named, strict=True) if labels is None]
    ours = label_names(config)
    for model, theirs in zip(models, named, strict=True):
        if model.name == whose:
            continue
        said = labels_differ(config, model.checkpoint.config)
        count = num_labels(model.checkpoint.config) or 2  # what the library takes where nobody says it
        if wanted is not None and len(wanted) != count:
            said = f"{len(wanted)} labels against {count}"
        if said and (ours is None or theirs is None or label_order(ours, theirs) is None):
            hint = HEADS_HINT if wanted is None else "Correct `labels` in the recipe, or leave the model out."
            message = f"{whose} and {model.name} do not have the same labels: {said}. {hint}"
            reasons.append(Finding("labels", message, (whose, model.name), refuses=True))
    if (reasons or unknown or wanted is not None) and not names_outputs(models[0].checkpoint, models[0].name):
        # Labels are left over from another head: nothing of this one can be in another order.
        if wanted is None:
            return []
        message = (
            f"The recipe gives `labels`, but {models[0].name} has no outputs that they could name. Leave them out."
        )
        return [Finding("labels", message, (models[0].name,), refuses=True)]
    if unknown and len(unknown) < len(models):
        matched = "the recipe's `labels`" if wanted is not None else f"{reference.name}'s"
        message = (
            f"{', '.join(unknown)} {'gives' if len(unknown) == 1 else 'give'} no names to the labels, so they are "
            f"matched by number with {matched}; score them to see whether that is right."
        )
        reasons.append(Finding("labels-unknown", message, tuple(unknown)))
    return reasons


def types(models: Sequence[AlignedModel]) -> list[Finding]:
    """Say what is stored in several types."""
    dtypes = {model.name: model.checkpoint.dtypes[:1] for model in models}
    if len(set(dtypes.values())) < 2:
        return []
    shown = ", ".join(f"{name} {dtype[0]}" for name, dtype in dtypes.items() if dtype)
    kinds = {kind for dtype in dtypes.values() for kind in dtype}
    written = "bfloat16, which has the range of both," if kinds == {"BF16", "F16"} else "the widest"
    message = f"The models are stored in different types ({shown}); {written} is written where no `dtype` is named."
    return [Finding("dtypes-mixed", message, tuple(dtypes))]


def complete(models: Sequence[AlignedModel], donor: AlignedModel, *, everyone: bool) -> Iterator[Finding]:
    """Files that are not what their own config asks for, so that the library could not load what is made of them.

    The donor's, whose config the soup has; ``everyone``'s where only bodies are averaged, as what an ingredient lacks
    is then averaged over the others, and where shapes differ, as that may be why.
    """
    for model in models if everyone else [donor]:
        name, checkpoint = model.name, model.checkpoint
        shapes = {tensor: info.shape for tensor, info in checkpoint.tensors.items()}
        ask = partial(contradictions, checkpoint.config, shapes, name)
        about = [checkpoint.config, {tensor: list(shape) for tensor, shape in shapes.items()}]
        found = remembered("contradictions", about, ask)
        wrong, lacking = ([said for kind, said in found if kind == wanted] for wanted in ("shape", "missing"))
        repair = "Correct its config.json, or leave it out."
        if wrong:
            more = f" The same is true of {len(wrong) - 1} more." if len(wrong) > 1 else ""
            message = f"{name} contradicts itself: {wrong[0]}.{more} {repair}"
            yield Finding("config-wrong", message, (name,), refuses=True)
        if lacking:
            message = f"{name} lacks {len(lacking)} tensors that its own config asks for: {some(lacking)}. {repair}"
            yield Finding("tensors-missing" if everyone else "config-wrong", message, (name,), refuses=True)


def processing(models: Sequence[AlignedModel]) -> tuple[list[Finding], Tokens]:
    """Tokenizers and image processors: by their files' ids where they are equal, else by what they do."""
    reasons: list[Finding] = []
    names, checkpoints = [model.name for model in models], [model.checkpoint for model in models]
    ids = [{file: each.source.content_id(file) for file in processing_files(each)} for each in checkpoints]
    having = [index for index, each in enumerate(ids) if each]
    prepared = [each.config.get("pretrained_cfg") for each in checkpoints if each.config.get("model_type") == TIMM]
    for name, stated in zip(names, prepared, strict=False):
        if stated != prepared[0]:
            message = f"{names[0]} and {name} do not prepare pictures alike: their `pretrained_cfg` differ."
            reasons.append(Finding("processing", message, (names[0], name), refuses=True))
    if prepared:
        return reasons, Tokens()
    if not having:
        message = "None of the models brings a tokenizer or an image processor, so neither will the soup."
        return [Finding("processing-absent", message, tuple(names))], Tokens()

    def compared(a: int, b: int) -> list[ProcessorDifference]:
        one, other = (checkpoints[each].source.fetch_assets() for each in (a, b))
        return same_processing(one, other, checkpoints[a].config, names=(names[a], names[b]))

    first, counts, difference = having[0], [0] * len(checkpoints), ""
    not_compared = "" if len(having) == len(checkpoints) else "but not all bring one"
    for name in (names[index] for index in range(len(names)) if index not in having):
        message = f"{name} brings no tokenizer or image processor; {names[first]}'s is used."
        reasons.append(Finding("processing-absent", message, (name,)))
    others = [index for index in having if ids[index] != ids[first]]
    for index in others:
        for found in compared(first, index):
            if found.tokens is not None:
                counts[first], counts[index] = found.tokens
                difference = difference or found.message
                continue
            if found.about == "tokenizer":
                not_compared = f"but {'they differ' if found.kind == 'difference' else found.message}"
            reasons.append(_processing_reason(found, names[first], names[index]))
    # Those that are as the first have as many tokens.
    counts = [count or counts[first] for count in counts]
    largest = counts.index(max(counts))
    # Each adds to the first one's; whether they add the same, in the same place, only the largest can say.
    for index in others if largest != first else []:
        if ids[index] != ids[largest]:
            clashes = [found for found in compared(largest, index) if found.kind == "difference"]
            if any(found.about == "tokenizer" for found in clashes):
                not_compared = "but they differ"
            reasons += [_processing_reason(found, names[largest], names[index]) for found in clashes]
    return reasons, Tokens(difference=not_compared) if not_compared else Tokens(tuple(counts), difference)


def _processing_reason(found: ProcessorDifference, one: str, other: str) -> Finding:
    if found.kind == "difference":
        message = f"{one} and {other} do not prepare their inputs alike: {found.message}."
        return Finding("processing", message, (one, other), refuses=True)
    return Finding("processing-not-compared", f"{found.message[:1].upper()}{found.message[1:]}.", (one, other))


def processing_files(checkpoint: Checkpoint) -> list[str]:
    """The files of a model that decide how its inputs are prepared: tokenizer and processors."""
    return [path for path in checkpoint.source.files if ASSETS.fullmatch(path) and path not in _NOT_PROCESSING]
