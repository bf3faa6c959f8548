"""Are these models one model with other weights? Configs, labels, processing, and tensors by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_soup import architecture, digests, parameters
from hf_soup.checkpoint import ASSETS, Checkpoint
from hf_soup.headers import TensorInfo
from hf_soup.memo import remembered
from hf_soup.processing import same_processing

_MODULE_WEIGHTS = re.compile(r"\d+_[A-Za-z]+/(model\.safetensors|pytorch_model\.bin)")
#: Files that a model brings along but that do not decide how its inputs are prepared.
_NOT_PROCESSING = ("config.json", "generation_config.json", "modules.json")


@dataclass(frozen=True)
class Reason:
    """Something that was found.

    Args:
        code: For scripts, such as ``labels-unknown``.
        message: For people, with the values and what to do.
        ingredients: Whom it is about.
        refuses: Whether it alone forbids to average.
    """

    code: str
    message: str
    ingredients: tuple[str, ...] = ()
    refuses: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        severity = "refusal" if self.refuses else "warning"
        return {
            "code": self.code,
            "severity": severity,
            "message": self.message,
            "ingredients": list(self.ingredients),
        }


def duplicates(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[Reason]:
    """Models that stand there more than once: they count as often, which may not be meant."""
    seen: dict[tuple[str, str], list[str]] = {}
    for checkpoint, name in zip(checkpoints, names, strict=True):
        seen.setdefault((checkpoint.model, checkpoint.identity), []).append(name)
    return [
        Reason("counted-twice", f"{model} stands there {len(who)} times and counts {len(who)} times.", tuple(who))
        for (model, _), who in seen.items()
        if len(who) > 1
    ]


def quantised(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[Reason]:
    """Models whose weights are codes and not numbers."""
    return [
        Reason(
            "quantised",
            f"{name} is quantised ({method}), and an average of rounded codes means nothing. "
            "Use the model from before quantisation.",
            (name,),
            refuses=True,
        )
        for checkpoint, name in zip(checkpoints, names, strict=True)
        if (method := architecture.is_quantised(checkpoint.config))
    ]


def modules(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[Reason]:
    """Models with weights of their own outside the transformer, which nobody would average."""
    reasons = []
    for checkpoint, name in zip(checkpoints, names, strict=True):
        found = [path for path in checkpoint.files if _MODULE_WEIGHTS.fullmatch(path)]
        if found:
            message = (
                f"{name} has weights in {some(found)}, outside the transformer; they would be missing in the soup. "
                "Only sentence-transformers modules without weights (pooling, normalisation) are taken over."
            )
            reasons.append(Reason("module-weights", message, (name,), refuses=True))
    return reasons


def architectures(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[Reason]:
    """Models that transformers would build differently from the first one."""
    reasons = []
    donor = checkpoints[0]

    def readable() -> bool:
        architecture.read_config(donor.config, names[0])
        return True

    remembered("readable", donor.config, readable)
    for checkpoint, name in zip(checkpoints[1:], names[1:], strict=True):
        if checkpoint.config == donor.config:
            continue
        differences = remembered(
            "same-architecture",
            [donor.config, checkpoint.config],
            partial(architecture.same_architecture, donor.config, checkpoint.config, names=(names[0], name)),
        )
        if differences:
            shown = "; ".join(differences[:6])
            reasons.append(
                Reason(
                    "architecture",
                    f"{name} is another architecture than {names[0]}: {shown}.",
                    (names[0], name),
                    refuses=True,
                )
            )
    return reasons


def labels(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[Reason]:
    """Labels that contradict each other, and models that give theirs no names."""
    reasons = []
    named = [
        architecture.label_names(checkpoint.config, name) for checkpoint, name in zip(checkpoints, names, strict=True)
    ]
    reference = next((index for index, labels in enumerate(named) if labels is not None), 0)
    unknown = [name for name, labels in zip(names, named, strict=True) if labels is None]
    for index, name in enumerate(names):
        if index == reference:
            continue
        found = architecture.labels_differ(checkpoints[reference].config, checkpoints[index].config)
        if found.contradiction:
            reasons.append(
                Reason(
                    "labels",
                    f"{names[reference]} and {name} do not have the same labels: {found.contradiction}.",
                    (names[reference], name),
                    refuses=True,
                )
            )
    if unknown and len(unknown) < len(names):
        reasons.append(
            Reason(
                "labels-unknown",
                f"{', '.join(unknown)} {'gives' if len(unknown) == 1 else 'give'} no names to the labels, so they are "
                f"matched by number with {names[reference]}'s; score them to see whether that is right.",
                tuple(unknown),
            )
        )
    return reasons


def align(
    checkpoints: Sequence[Checkpoint], names: Sequence[str]
) -> tuple[tuple[Mapping[str, TensorInfo], ...], tuple[str, ...], list[Reason]]:
    """Each ingredient's tensors under the donor's names; by what the library loads them into where names differ."""
    donor = checkpoints[0]
    aligned: list[Mapping[str, TensorInfo]]
    alignments: list[str] = []
    reasons: list[Reason] = []
    if all(each.tensors is donor.tensors or each.tensors.keys() == donor.tensors.keys() for each in checkpoints):
        aligned = [checkpoint.tensors for checkpoint in checkpoints]
    else:
        read: dict[frozenset[str], parameters.Correspondence] = {}
        by_key: list[dict[str, TensorInfo]] = []
        tied: Mapping[str, str] = {}
        for checkpoint, name in zip(checkpoints, names, strict=True):
            kind = frozenset(checkpoint.tensors)
            if kind not in read:
                shapes = {tensor: info.shape for tensor, info in checkpoint.tensors.items()}
                read[kind] = parameters.correspondence(donor.config, shapes, name)
            found = read[kind]
            tied = {**tied, **found.tied}
            by_key.append({key: checkpoint.tensors[disk] for disk, key in found.parameters.items()})
            if found.ignored:
                alignments.append(f"{name}: transformers ignores {some(found.ignored)} at load, so they are left out.")
            other = [disk for disk, key in found.parameters.items() if disk not in donor.tensors]
            if other:
                alignments.append(f"{name}: {len(other)} tensors have other names on disk ({some(other)}).")
        # The donor's names; a tied tensor that only others store a second time is kept under their name.
        outputs = {key: info.name for key, info in by_key[0].items()}
        partners = {**tied, **{target: source for source, target in tied.items()}}
        for source in by_key[1:]:
            outputs |= {
                key: info.name for key, info in source.items() if key not in outputs and partners.get(key) in outputs
            }
        aligned = []
        for source, name in zip(by_key, names, strict=True):
            mine = {}
            for key, output in outputs.items():
                info = source.get(key) or source.get(partners.get(key, ""))
                if info is not None:
                    mine[output] = info
                    if key not in source:
                        alignments.append(f"{name}: '{output}' is tied, and stored once as '{info.name}'.")
            aligned.append(mine)
            extra = [info.name for key, info in source.items() if key not in outputs]
            lacking = [output for output in outputs.values() if output not in mine]
            for code, tensors, verb in (
                ("tensors-missing", lacking, "lacks"),
                ("tensors-extra", extra, "has more than"),
            ):
                if tensors:
                    reasons.append(
                        Reason(
                            code,
                            f"{name} {verb} {len(tensors)} tensors of {names[0]}: {some(tensors)}."
                            if code == "tensors-missing"
                            else f"{name} has {len(tensors)} tensors that {names[0]} lacks: {some(tensors)}.",
                            (names[0], name),
                            refuses=True,
                        )
                    )
    reasons += _shapes(aligned, names)
    dtypes = [checkpoint.dtypes[:1] for checkpoint in checkpoints]
    if len(set(dtypes)) > 1:
        shown = ", ".join(f"{name} {dtype[0]}" for name, dtype in zip(names, dtypes, strict=True) if dtype)
        reasons.append(
            Reason(
                "dtypes-mixed",
                f"The models are stored in different types ({shown}); the widest is written.",
                tuple(names),
            )
        )
    return tuple(aligned), tuple(alignments), reasons


def _shapes(aligned: Sequence[Mapping[str, TensorInfo]], names: Sequence[str]) -> list[Reason]:
    others = [source for source in aligned[1:] if source is not aligned[0]]
    if not others:
        return []
    differing = [
        tensor
        for tensor, first in aligned[0].items()
        if any(
            (found := other.get(tensor)) is not first and found is not None and found.shape != first.shape
            for other in others
        )
    ]
    if not differing:
        return []
    tensor = differing[0]
    rows = "\n".join(
        f"    {name}  {source[tensor].shape}" for name, source in zip(names, aligned, strict=True) if tensor in source
    )
    more = f" The same is true of {len(differing) - 1} more tensors." if len(differing) > 1 else ""
    who = tuple(
        name
        for name, source in zip(names, aligned, strict=True)
        if tensor in source and source[tensor].shape != aligned[0][tensor].shape
    )
    return [
        Reason(
            "shapes",
            f"The models disagree on the shape of '{tensor}':\n{rows}\n  {more}".rstrip(),
            who,
            refuses=True,
        )
    ]


def processing(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> list[Reason]:
    """Tokenizers and image processors: by their files' ids where they are equal, else by what they do."""
    reasons: list[Reason] = []
    ids = [_processing_ids(checkpoint) for checkpoint in checkpoints]
    having = [index for index, each in enumerate(ids) if each]
    if not having:
        message = "None of the models brings a tokenizer or an image processor, so neither will the soup."
        return [Reason("processing-absent", message, tuple(names))]
    first = having[0]
    folders: dict[int, Path] = {}
    for index in range(len(checkpoints)):
        if index == first or ids[index] == ids[first]:
            continue
        if not ids[index]:
            message = f"{names[index]} brings no tokenizer or image processor; {names[first]}'s is used."
            reasons.append(Reason("processing-absent", message, (names[index],)))
            continue
        for each in (first, index):
            if each not in folders:
                folders[each] = checkpoints[each].fetch_assets()
        for found in same_processing(
            folders[first], folders[index], checkpoints[first].config, names=(names[first], names[index])
        ):
            differs = found.kind == "difference"
            message = f"{names[first]} and {names[index]} do not prepare their inputs alike: {found.message}."
            reasons.append(
                Reason(
                    "processing" if differs else "processing-not-compared",
                    message if differs else f"{found.message[:1].upper()}{found.message[1:]}.",
                    (names[first], names[index]),
                    refuses=differs,
                )
            )
    return reasons


def processing_files(checkpoint: Checkpoint) -> list[str]:
    """The files of a model that decide how its inputs are prepared: tokenizer and processors."""
    return [path for path in checkpoint.files if ASSETS.fullmatch(path) and path not in _NOT_PROCESSING]


def _processing_ids(checkpoint: Checkpoint) -> dict[str, str]:
    """Content ids of those files, by name."""
    if checkpoint.repo is not None:
        files = checkpoint.repo.files
        return {path: files[path].sha256 or files[path].blob for path in processing_files(checkpoint)}
    assert checkpoint.folder is not None
    return {path: digests.sha256_of(checkpoint.folder / path) for path in processing_files(checkpoint)}


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
