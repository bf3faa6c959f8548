"""A model under the names of a soup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from hf_soup.checkpoint import Checkpoint, TensorInfo, correspondence, counted_names, remembered


@dataclass(frozen=True)
class AlignedModel:
    """A model that tensors of a soup come from.

    Args:
        name: What tables and mixtures call it: its model, told apart where two share it.
        checkpoint: Pinned.
        tensors: Its tensors under the names of the output.
    """

    name: str
    checkpoint: Checkpoint = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def label(self) -> str:
        """What errors of a merge call it."""
        return str(self.checkpoint) if self.checkpoint.source.commit else self.name

    @property
    def state(self) -> str:
        """What identifies its bytes."""
        return self.checkpoint.identity

    @property
    def base_state(self) -> str | None:
        """Of an adapter, what identifies the bytes of its base."""
        base = self.checkpoint.base
        return base.identity if base else None

    @property
    def token_tables(self) -> list[str]:
        """The tensors that have a row for each token."""
        config, stored = self.checkpoint.config, list(dict.fromkeys(info.name for info in self.tensors.values()))
        ask = partial(counted_names, config, stored, "vocabulary", self.name)
        counted = set(remembered("vocabulary", [config, stored], ask))
        return [output for output, info in self.tensors.items() if info.name in counted]


def tensors_of_base(base: Checkpoint, donor: Checkpoint, outputs: Mapping[str, str]) -> dict[str, TensorInfo]:
    """A base's tensors under the names of the output, by what the library loads them into in the donor's model.

    Args:
        base: Of whatever class and names.
        donor: Whose config and names the output has.
        outputs: Name on the donor's disk → name in the output, of those that are wanted.
    """
    theirs, ours = _by_parameter(base, donor), _by_parameter(donor, donor)
    return {outputs[own.name]: theirs[key] for key, own in ours.items() if key in theirs and own.name in outputs}


def _by_parameter(checkpoint: Checkpoint, donor: Checkpoint) -> dict[str, TensorInfo]:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    read = correspondence(donor.config, shapes, checkpoint.model)
    return {key: checkpoint.tensors[disk] for disk, key in read.parameters.items()}
