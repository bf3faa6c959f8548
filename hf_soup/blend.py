"""Soups of changing weights, in memory: what a selection scores without anything being written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from hf_soup.files import ShortReadError, open_file, read_all, shrunk
from hf_soup.merge import combine, not_finite
from hf_soup.methods import accumulator, round_into
from hf_soup.methods.linear import shares
from hf_soup.plan import Plan
from hf_soup.runs import Run
from hf_soup.tensors import TORCH, bytes_of


class Blend:
    """Soups of changing weights, in memory, for scoring: each costs reading the ingredients that are new.

    It holds a running sum of the ingredients that stay (in the accumulator's dtype) beside the tensors that it
    hands out, three times the model, be its weights of 16 or of 32 bits; the
    model that is built of them may hold a copy more.

    Args:
        plan: Names, shapes and places; its own weights are not used.
        paths: For every source, its weight files on this machine.
    """

    def __init__(self, plan: Plan, paths: Sequence[Mapping[str, Path]]) -> None:
        self.plan = plan
        self._stack = ExitStack()
        self._inputs = [{file: open_file(self._stack, path) for file, path in source.items()} for source in paths]
        self._runs = [plan.run_of(number) if tensor.size else None for number, tensor in enumerate(plan.tensors)]
        self._wide = [
            accumulator([torch.empty(0, dtype=TORCH[dtype]) for dtype in run.dtypes]) if run else torch.float32
            for run in self._runs
        ]
        self._sum: list[Tensor] = []
        self._summed: dict[int, float] = {}

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def tensors(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        """The weighted mean of some sources, under the output's names and in its dtypes.

        Bit for bit what `linear` makes of them in this order, if their sum does not overflow the accumulator.

        Args:
            weights: Source number → share. Where it extends the last call's by one, only that one is read, and where
                the one before stays, that one a second time: to hold it would take another model's memory.

        Raises:
            MergeError: A file is shorter than its header says, or a source alone holds NaN.
        """
        normalize = self.plan.parameters.get("normalize", True)
        given = shares(list(weights.values())) if normalize else weights.values()
        factors = dict(zip(weights, given, strict=True))
        if any(factors.get(source) != factor for source, factor in self._summed.items()) or not (
            factors.keys() - self._summed.keys()
        ):
            self._sum, self._summed = [], {}
        *stay, last = [source for source in factors if source not in self._summed]
        for source in stay:
            self._fold(source, factors[source])
        total = math.fsum(factors.values()) if normalize else 1.0
        result = {}
        for number, tensor in enumerate(self.plan.tensors):
            run = self._runs[number]
            if run is not None and run.patched:
                rounded = self._patched(run, weights)
            elif tensor.averaged:
                value = self._product(last, number, factors[last])
                if self._sum:
                    value.add_(self._sum[number])
                rounded = torch.empty(tensor.elements, dtype=TORCH[tensor.dtype])
                round_into(value.div_(total), rounded)
            else:
                rounded = self._sum[number].clone() if self._sum else self._load(last, number)
            result[tensor.name] = rounded.reshape(tensor.shape)
        return result

    def _fold(self, source: int, factor: float) -> None:
        fresh = not self._sum
        for number, tensor in enumerate(self.plan.tensors):
            run = self._runs[number]
            if run is not None and run.patched:
                if fresh:
                    self._sum.append(torch.empty(0))
            elif not tensor.averaged:
                if fresh:
                    self._sum.append(self._load(source, number))
            elif fresh:
                self._sum.append(self._product(source, number, factor))
            else:
                self._sum[number].add_(self._product(source, number, factor))
        self._summed[source] = factor

    def _patched(self, run: Run, weights: Mapping[int, float]) -> Tensor:
        """A tensor whose rows lie in other places, or that not all have, from some sources, as the merge makes it.

        What none of them has comes from the others: a head that belongs to one ingredient, the rows of a token.
        """
        tensor = self.plan.tensors[run.first]
        rounded = torch.empty(tensor.elements, dtype=TORCH[tensor.dtype])
        for begin, end, offsets in run.pieces(0, run.elements):
            having = [source for source in weights if source in offsets] or list(offsets)
            parts = [self._read(run, source, offsets[source], end - begin) for source in having]
            if tensor.averaged:
                given = [weights.get(source, 1.0) for source in having]
                mixed = combine(self.plan, parts, given, whole=len(having) == len(weights))
                round_into(mixed, rounded[begin:end])
            else:
                rounded[begin:end] = parts[0]
        return rounded

    def _product(self, source: int, number: int, factor: float) -> Tensor:
        value = self._load(source, number)
        if value.numel():
            value = value.to(self._wide[number])
        return value if factor == 1.0 else value.mul_(factor)

    def _load(self, source: int, number: int) -> Tensor:
        run = self._runs[number]
        if run is None:
            return torch.empty(0, dtype=TORCH[self.plan.tensors[number].dtype])
        part = run.parts[source]
        assert part is not None, "what some do not have is not loaded as a whole"
        return self._read(run, source, part.offset, run.elements)

    def _read(self, run: Run, source: int, offset: int, elements: int) -> Tensor:
        tensor, part, label = self.plan.tensors[run.first], run.parts[source], self.plan.sources[source]
        assert part is not None, "only those that have it are asked"
        values = torch.empty(elements, dtype=TORCH[part.dtype])
        try:
            read_all(self._inputs[source][part.file], bytes_of(values.view(torch.uint8)), offset)
        except ShortReadError:
            raise shrunk(label, part.file, tensor.name) from None
        if values.is_floating_point() and values.aminmax().min.isnan():
            # Named here, where it is known whose it is; as a model's answer it would only be "not a number".
            index = int(values.isnan().nonzero()[0]) + (offset - part.offset) // values.itemsize
            raise not_finite(label, tensor.name, float("nan"), index, tensor.shape)
        return values
