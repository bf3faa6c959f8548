"""One pinned model: where every tensor lies (file, offset, dtype, shape), on the Hub or in a folder.

Opening a checkpoint reads its config, index and safetensors headers, and no weights. What a stranger wrote in
them is bounded and validated before it is believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_soup import hub
from hf_soup.checkpoint.file_sources import FileSource
from hf_soup.checkpoint.headers import (
    FLOATS,
    ITEM_BYTES,
    TensorInfo,
)
from hf_soup.checkpoint.tensor_sources import TensorSource
from hf_soup.hub import CHECKPOINT


def called(folder: Path) -> str:
    """What a folder is called where its path is nobody's business; a checkpoint of a run with the run's name.

    >>> called(Path("/home/me/run-2")), called(Path("/home/me/run-2/checkpoint-200"))
    ('run-2', 'run-2/checkpoint-200')
    """
    within = f"{folder.parent.name}/" if CHECKPOINT.fullmatch(folder.name) and folder.parent.name else ""
    return f"{within}{folder.name}".replace("@", "-")  # what stands after an @ is a revision


@dataclass(frozen=True)
class Checkpoint:
    """A model whose weights are known by name and place, pinned to a commit or to the sha256 of its weight files.

    Args:
        model: ``owner/name`` as the Hub answers, or ``local:name`` for a folder; see `called`.
        config: ``config.json``.
        card: The front matter of ``README.md``.
        source: Where its files are.
        weights: Where its tensors are.
        notes: What was unusual about opening it.
        base: Of an adapter, the model that it changes.
    """

    model: str
    config: Mapping[str, Any] = field(repr=False)
    card: Mapping[str, Any] = field(repr=False)
    source: FileSource = field(repr=False)
    weights: TensorSource = field(repr=False)
    notes: tuple[str, ...] = ()
    base: Checkpoint | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.model}@{self.short}" if self.short else self.model

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name on disk."""
        return self.weights.tensors

    @property
    def revision(self) -> str:
        """The full commit, or ``sha256:…`` over a folder's weight files, which are read where it is not known yet."""
        return self.source.commit or self.weights.content

    @property
    def known_revision(self) -> str | None:
        """The revision, where it costs no reading."""
        return self.source.commit or self.weights.known_content

    @property
    def short(self) -> str:
        """The first seven digits of the revision, where it is known."""
        return (self.known_revision or "").removeprefix("sha256:")[:7]

    @property
    def identity(self) -> str:
        """What tells whether an interrupted merge had the same weights: the commit, or the state of the files."""
        own = f"{self.model}@{self.source.commit}" if self.source.commit else self.model
        if self.source.commit and self.base is None:
            return own
        stamps = self.weights.source.stamps
        changing = sorted(stamps[file] for file in self.weights.files if file in stamps)
        return f"{own} {changing}{f' over {self.base.identity}' if self.base else ''}"

    @property
    def parameters(self) -> int:
        """How many numbers its floating-point tensors hold."""
        return sum(self._numbers.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types of its floating-point tensors, the commonest (by numbers held) first."""
        return tuple(sorted(self._numbers, key=lambda dtype: -self._numbers[dtype]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """How many numbers there are of each floating-point type."""
        held: dict[str, int] = {}
        for tensor in self.tensors.values():
            held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.size
        return {dtype: size // ITEM_BYTES[dtype] for dtype, size in held.items() if dtype in FLOATS}


def require_unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse folders whose weights are not those that were pinned any more, as where training goes on.

    Raises:
        MergeError: A file was written to since.
    """
    for checkpoint in checkpoints:
        source = checkpoint.weights.source
        for file in (file for file in checkpoint.weights.files if file in source.stamps):
            path = source.fetch(file)
            if not path.exists() or hub.stamp_of(path) != source.stamps[file]:
                raise hub.changed_while_read(str(checkpoint), path.name)


def distinct_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What to call each checkpoint: its model; where two share it, with the revision, and then with a number."""
    names = [checkpoint.model for checkpoint in checkpoints]
    twice = {name for name in names if names.count(name) > 1}
    names = [
        f"{each.model}@{each.revision.removeprefix('sha256:')[:7]}" if each.model in twice else each.model
        for each in checkpoints
    ]
    return [
        f"{name}#{names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]
