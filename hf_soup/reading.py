"""Pieces of the sources' weights, read into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from hf_soup.combine import not_finite
from hf_soup.files import ShortReadError, open_file, read_all, shrunk
from hf_soup.plan import Plan
from hf_soup.runs import Run
from hf_soup.tensors import TORCH, bytes_of, widened


class Buffers:
    """Memory that a thread reads into and writes from, again and again."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def part(self, source: int, size: int, dtype: str) -> tuple[Tensor, memoryview]:
        """``size`` bytes for a source, as elements and as memory."""
        held = self._held.get(source)
        if held is None or held.numel() < size:
            held = self._held[source] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(TORCH[dtype]), bytes_of(held[:size])

    def output(self, size: int, dtype: str) -> tuple[Tensor, memoryview]:
        """The same for what is written."""
        return self.part(-1, size, dtype)


class Reading:
    """The sources of a plan, opened.

    Args:
        plan: Names, shapes and places.
        paths: For every source, its weight files on this machine.
    """

    def __init__(self, plan: Plan, paths: Sequence[Mapping[str, Path]]) -> None:
        self._plan = plan
        self._stack = ExitStack()
        self._files = [{file: open_file(self._stack, path) for file, path in source.items()} for source in paths]

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, run: Run, source: int, offset: int, elements: int) -> Tensor:
        """Elements of a run as a source stores them, flat, or as float64 where that is written.

        Args:
            run: Of the plan, or in pieces of whole tensors.
            source: One that has them.
            offset: Of the first, in the source's file.
            elements: How many.

        Raises:
            MergeError: The file is shorter than its header says, or NaN is among them.
        """
        part, label, number = run.parts[source], self._plan.sources[source], run.first
        assert part is not None, "only those that have it are asked"
        values = torch.empty(elements, dtype=TORCH[part.dtype])
        try:
            read_all(self._files[source][part.file], bytes_of(values.view(torch.uint8)), offset)
        except ShortReadError:
            raise shrunk(label, part.file, self._plan.tensors[number].name) from None
        if values.is_floating_point() and values.aminmax().min.isnan():
            # Named here, where it is known whose it is; as a model's answer it would only be "not a number".
            index = int(values.isnan().nonzero()[0]) + (offset - part.offset) // values.itemsize
            while number + 1 < run.stop and index >= self._plan.tensors[number].elements:
                index -= self._plan.tensors[number].elements
                number += 1
            tensor = self._plan.tensors[number]
            raise not_finite(label, tensor.name, float("nan"), index, tensor.shape)
        return widened(values, run.dtype)
