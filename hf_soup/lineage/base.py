"""The base as a source, for methods that work on task vectors."""

from __future__ import annotations

from dataclasses import replace

from hf_soup._util.text import some
from hf_soup.checkpoint import (
    FLOATS,
    Checkpoint,
    RowRange,
    TensorInfo,
    head_tensors,
    label_names,
)
from hf_soup.errors import IncompatibleError
from hf_soup.lineage.aligned_model import AlignedModel, tensors_of_base
from hf_soup.lineage.alignment import AlignedModels
from hf_soup.lineage.declared_bases import BaseReference


def with_base(models: AlignedModels, reference: BaseReference | None, method: str) -> AlignedModels:
    """The ingredients, and their base, its tensors under the names of the output.

    What the base does not have, as a head for these labels, has no task vector and is the mean of the ingredients.

    Args:
        models: The ingredients.
        reference: Their base, where one is known.
        method: What errors call the method.

    Raises:
        IncompatibleError: No base is known, or it cannot be read, or has nothing in common.
    """
    hint = "Name it: `base_model: MODEL` in the recipe, or --base MODEL."
    if reference is None or not reference.declared:
        pointed = f" The weights point to {reference.model}." if reference else ""
        said = f"`{method}` works on what was learned since the base, and none is known.{pointed}"
        raise IncompatibleError(said, hint=hint, code="no-base")
    base = reference.checkpoint
    if base is None:
        raise IncompatibleError(
            f"`{method}` needs the base {reference.model}, which could not be read.", hint=hint, code="no-base"
        )
    name = models.donor.name
    found = _as_named(models, base, head_tensors(models.donor.checkpoint, name))
    outputs = {output: info for model in reversed(models.ingredients) for output, info in model.tensors.items()}
    lacking = [output for output, info in outputs.items() if output not in found and info.dtype in FLOATS]
    if len(lacking) == sum(info.dtype in FLOATS for info in outputs.values()):
        raise IncompatibleError(f"{reference.model} has no tensor of {name}, so there are no task vectors.", hint=hint)
    note = f"{some(lacking)}: {reference.model} has none that corresponds, so it is averaged and not part of {method}."
    return replace(
        models,
        base=AlignedModel(f"{reference.model} (base)", base, found),
        # What is no weight is the ingredients' own, so the base's is taken for equal.
        patched=models.patched | (outputs.keys() - found.keys()) | {o for o, info in found.items() if info.rows},
        notes=(*models.notes, *([note] if lacking else [])),
    )


def _as_named(models: AlignedModels, base: Checkpoint, heads: set[str]) -> dict[str, TensorInfo]:
    donor, own = models.donor.checkpoint, models.donor.tensors
    at = {info.name: output for output, info in own.items() if info.dtype in FLOATS}
    if at.keys() - heads <= base.tensors.keys():
        found = {output: base.tensors[disk] for disk, output in at.items() if disk in base.tensors}
    else:
        found = tensors_of_base(base, donor, at)
    # A head is compared by its labels, not by its shape: that of a base mostly answers something else.
    labels = label_names(base.config, base.model)
    same = base.config.get("architectures") == donor.config.get("architectures") and labels == models.labels
    grown = any(info.shape != own[output].shape for output, info in found.items())
    tables = models.donor.token_tables if grown else []
    fitting = {}
    for output, info in found.items():
        shape = own[output].shape
        if own[output].name in heads and not same:
            continue
        if info.shape == shape:
            fitting[output] = info
        elif output in tables and shape and info.shape[1:] == shape[1:]:
            # Tokens were added behind those that the base has, or its further rows are padding.
            fitting[output] = info.moved([RowRange(0, 0, min(info.shape[0], shape[0]))], shape[0])
    return fitting
