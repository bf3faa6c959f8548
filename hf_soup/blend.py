"""Soups of changing weights, in memory: what a selection scores without anything being written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from hf_soup.checkpoint import TensorInfo
from hf_soup.merge import TORCH, open_file, read_all
from hf_soup.methods import accumulator
from hf_soup.plan import Plan


class Blend:
    """Soups of changing weights, in memory, for scoring: each costs reading the ingredients that are new.

    It holds a running sum of the ingredients that stay (in the accumulator's dtype) beside the tensors that it
    hands out, so with 16-bit weights three times the model and with 32-bit weights three times as well; the
    model that is built of them may hold a copy more.

    Args:
        plan: Names, shapes and places; its own weights are not used.
        paths: For every source, its weight files on this machine.
    """

    def __init__(self, plan: Plan, paths: Sequence[Mapping[str, Path]]) -> None:
        self.plan = plan
        self._stack = ExitStack()
        self._inputs = [{file: open_file(self._stack, path) for file, path in source.items()} for source in paths]
        self._sum: list[Tensor] = []
        self._summed: dict[int, float] = {}

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def tensors(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        """The weighted mean of some sources, under the output's names and in its dtypes.

        Args:
            weights: Source number → share. Where it extends an earlier call's by one, only that one is read.

        Raises:
            MergeError: A file is shorter than its header says.
        """
        if any(weights.get(source) != weight for source, weight in self._summed.items()):
            self._sum, self._summed = [], {}
        *stay, last = [source for source in weights if source not in self._summed] or list(weights)[-1:]
        if last in self._summed:
            self._sum, self._summed = [], {}
            stay = [source for source in weights if source != last]
        for source in stay:
            self._fold(source, weights[source])
        total = sum(weights.values())
        result = {}
        for number, tensor in enumerate(self.plan.tensors):
            part = tensor.parts[last]
            value = self._load(last, part)
            if tensor.averaged:
                dtype = accumulator([torch.empty(0, dtype=TORCH[p.dtype]) for p in tensor.parts])
                value = value.to(dtype)
                if self._sum:
                    value = value.mul_(weights[last]).add_(self._sum[number]).div_(total)
                value = value.to(TORCH[tensor.dtype])
            result[tensor.name] = value.reshape(tensor.shape)
        return result

    def _fold(self, source: int, weight: float) -> None:
        fresh = not self._sum
        for number, tensor in enumerate(self.plan.tensors):
            value = self._load(source, tensor.parts[source])
            if tensor.averaged:
                dtype = accumulator([torch.empty(0, dtype=TORCH[p.dtype]) for p in tensor.parts])
                value = value.to(dtype).mul_(weight)
            if fresh:
                self._sum.append(value)
            elif tensor.averaged:
                self._sum[number].add_(value)
        self._summed[source] = weight

    def _load(self, source: int, part: TensorInfo) -> Tensor:
        buffer = torch.empty(part.size, dtype=torch.uint8)
        if part.size:
            read_all(self._inputs[source][part.file], buffer, part.offset, self.plan.sources[source], part)
        return buffer.view(TORCH[part.dtype])
