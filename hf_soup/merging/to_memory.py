"""Candidates: what plans make of the sources of one layout, in memory, without anything being written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_soup._util.parallel import in_parallel, usable_cores
from hf_soup.checkpoint import TORCH
from hf_soup.merging.arithmetic import Aids, all_finite, combine, shared_infinity
from hf_soup.merging.cutoffs import cutoffs, needs_cutoffs
from hf_soup.merging.engine import Reading
from hf_soup.merging.layout import Layout, Run
from hf_soup.merging.plan import Plan
from hf_soup.merging.statistics_store import StatisticsStore
from hf_soup.methods import accumulator, round_into, shares

#: Elements of each source that are read at a time, of a larger tensor too where all sources are mixed at once.
_SLICE = 1 << 20


class Materializer:
    """Makes candidates of one layout, in memory, for scoring: each costs reading the ingredients that are new.

    It holds a running sum of the ingredients that stay (in the accumulator's dtype) beside the tensors that it
    hands out, three times the model, be its weights of 16 or of 32 bits; the
    model that is built of them may hold a copy more. Where the method is another than `linear`, or tensors have shares
    of their own, there is no such sum, and each candidate costs reading all that go in, tensor by tensor.

    Args:
        layout: Names, shapes and places.
        paths: For every source, its weight files.
    """

    def __init__(self, layout: Layout, paths: Sequence[Mapping[str, Path]]) -> None:
        self.layout = layout
        self._reading = Reading(layout, paths)
        self._spans = list(_spans(layout))
        self._sum: list[Tensor] = []
        self._summed: dict[int, float] = {}

    def close(self) -> None:
        """Close the files."""
        self._reading.close()

    def forget(self) -> None:
        """Let go of the running sum."""
        self._sum, self._summed = [], {}

    def materialize(self, plan: Plan) -> dict[str, Tensor]:
        """What a plan of this layout makes, under the output's names and in its dtypes.

        Bit for bit what the merge makes of it, a mean in the order of the mixture's weights and all else in that of the
        sources, if no sum overflows the accumulator, and they are all of one type: sources that are not in the mixture
        may widen it.

        Args:
            plan: Where its weights extend those of the last one by one, only that one is read, and where the one
                before stays, that one a second time: to hold it would take another model's memory.

        Raises:
            MergeError: A file is shorter than its header says, or a source alone holds NaN.
        """
        if plan.mixture.is_linear and not self.layout.bases:
            return self._mean(plan, self._aids(plan))
        names = [tensor.name for tensor in self.layout.tensors]
        # Products of adapters are made by one thread each; other methods have torch's own.
        threads = usable_cores() if plan.mixture.is_linear else 1
        return dict(zip(names, in_parallel(self.one_by_one(plan), names, threads), strict=True))

    def one_by_one(self, plan: Plan) -> Callable[[str], Tensor]:
        """The same for a tensor at a time, which several threads may ask for."""
        aids, numbers = self._aids(plan), {tensor.name: place for place, tensor in enumerate(self.layout.tensors)}

        def one(name: str) -> Tensor:
            return self._mixed(plan, numbers[name], aids).reshape(self.layout.tensors[numbers[name]].shape)

        return one

    def _aids(self, plan: Plan) -> Aids:
        # In the recipe's order, as in the written soup: what is dropped at random goes by an ingredient's place.
        sources = sorted(plan.weights)
        trimmed = cutoffs(plan, self._reading, sources, usable_cores()) if needs_cutoffs(plan) else {}
        return Aids(trimmed, StatisticsStore(plan))

    def _mean(self, plan: Plan, aids: Aids) -> dict[str, Tensor]:
        """The weighted mean, or the sum; of one ingredient, that ingredient."""
        normalize = plan.mixture.method.parameters.get("normalize", True)
        weights = plan.weights
        given = shares(list(weights.values())) if normalize else weights.values()
        factors = dict(zip(weights, given, strict=True))
        known = len(self._summed)
        if known >= len(factors) or list(factors.items())[:known] != list(self._summed.items()):
            self.forget()
        *stay, last = [source for source in factors if source not in self._summed]
        for source in stay:
            self._fold(source, factors[source])
        total = math.fsum(factors.values()) if normalize else 1.0
        result = {}
        for place, span in enumerate(self._spans):
            if span.patched:
                value = self._mixed(plan, span.first, aids)
            elif not span.averaged:
                value = self._sum[place] if self._sum else self._reading.read(span, span.segments[0], last)
            else:
                value = self._product(last, span, factors[last])
                if self._sum:
                    value.add_(self._sum[place])
                value.div_(total)
            begin = 0
            for tensor in self.layout.tensors[span.first : span.stop]:
                rounded = torch.empty(tensor.elements, dtype=TORCH[tensor.dtype])
                round_into(value[begin : begin + tensor.elements], rounded)
                result[tensor.name] = rounded.reshape(tensor.shape)
                begin += tensor.elements
        for tensor in self.layout.tensors:
            if not tensor.size:
                result[tensor.name] = torch.empty(tensor.shape, dtype=TORCH[tensor.dtype])
        return result

    def _fold(self, source: int, factor: float) -> None:
        fresh = not self._sum
        for place, span in enumerate(self._spans):
            if fresh:
                whole = torch.empty(0) if span.patched else self._product(source, span, factor)
                self._sum.append(whole)
            elif span.averaged and not span.patched:
                self._sum[place].add_(self._product(source, span, factor))
        self._summed[source] = factor

    def _mixed(self, plan: Plan, number: int, aids: Aids) -> Tensor:
        """A tensor as the merge makes it, slice by slice, flat."""
        tensor = self.layout.tensors[number]
        rounded = torch.empty(tensor.elements, dtype=TORCH[tensor.dtype])
        if not tensor.size:
            return rounded
        run = self.layout.run_of(number)
        whole = plan.is_whole(run)
        for pieces in run.slices(0, run.elements, run.elements if whole else _SLICE, across=whole):
            begin, end = pieces[0].begin, pieces[-1].end
            groups = plan.groups(run, pieces[0])
            if groups and (together := self._reading.mean(plan, run, pieces, groups)) is not None:
                round_into(together, rounded[begin:end])
                continue
            having = plan.sources_of(run, pieces[0])
            if plan.mixture.is_linear:  # a mean is added up in the order of the mixture
                having = [source for source in plan.weights if source in having] or having
            parts = {
                source: torch.cat([self._reading.read(run, piece, source) for piece in pieces]) for source in having
            }
            if tensor.averaged:
                first, finite = parts[having[0]], all_finite(parts)
                if not finite:
                    shared = shared_infinity(self.layout, run, parts, begin)
                    parts = {source: part.masked_fill(shared, 0.0) for source, part in parts.items()}
                mixed = combine(plan, run, parts, aids, begin=begin)
                if not finite:
                    mixed = torch.where(shared, first.to(mixed.dtype), mixed)
                round_into(mixed, rounded[begin:end])
            else:
                rounded[begin:end] = parts[having[0]]
        return rounded

    def _product(self, source: int, span: Run, factor: float) -> Tensor:
        value = self._reading.read(span, span.segments[0], source)
        if not span.averaged:
            return value
        value = value.to(accumulator([value, *(torch.empty(0, dtype=TORCH[dtype]) for dtype in span.dtypes)]))
        return value if factor == 1.0 else value.mul_(factor)


def _spans(layout: Layout) -> Iterator[Run]:
    """The runs in pieces of whole tensors: what is read at once, as hundreds of small reads would show."""
    for run in layout.runs:
        first = run.first
        while first < run.stop:
            stop, elements = first + 1, layout.tensors[first].elements
            while stop < run.stop and elements + layout.tensors[stop].elements <= _SLICE:
                elements += layout.tensors[stop].elements
                stop += 1
            yield layout.cut_out(run, first, stop)
            first = stop
