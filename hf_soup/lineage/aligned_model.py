"""A model under the names of a soup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_soup.checkpoint import Checkpoint, TensorInfo


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
