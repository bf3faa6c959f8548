"""Soups of changing weights, in memory: what a selection scores without anything being written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_soup._util.parallel import usable_cores
from hf_soup.checkpoint import TORCH
from hf_soup.merging.arithmetic import Cutoffs, combine, same_infinity
from hf_soup.merging.cutoffs import cutoffs, needs_cutoffs
from hf_soup.merging.engine import Reading
from hf_soup.merging.layout import Plan, Run
from hf_soup.merging.statistics_store import StatisticsStore
from hf_soup.methods import accumulator, round_into, shares

#: Elements of each source that are read at a time, of a larger tensor too where all sources are mixed at once.
_SLICE = 1 << 20


class Blend:
    """Soups of changing weights, in memory, for scoring: each costs reading the ingredients that are new.

    It holds a running sum of the ingredients that stay (in the accumulator's dtype) beside the tensors that it
    hands out, three times the model, be its weights of 16 or of 32 bits; the
    model that is built of them may hold a copy more. Where the method is another than `linear`, or tensors have shares
    of their own, there is no such sum, and each soup costs reading all that go in, tensor by tensor.

    Args:
        plan: Names, shapes and places; its own weights are not used.
        paths: For every source, its weight files on this machine.
    """

    def __init__(self, plan: Plan, paths: Sequence[Mapping[str, Path]]) -> None:
        self.plan = plan
        self._reading = Reading(plan, paths)
        self._spans = list(_spans(plan))
        straight = replace(plan, method="linear", parameters={}, with_base=False, overrides={})
        self._straight = plan if plan.method == "linear" and not plan.overrides else straight
        self._sum: list[Tensor] = []
        self._summed: dict[int, float] = {}

    def close(self) -> None:
        """Close the files."""
        self._reading.close()

    def forget(self) -> None:
        """Let go of the running sum."""
        self._sum, self._summed = [], {}

    def tensors(
        self,
        weights: Mapping[int, float],
        *,
        layers: Mapping[str, Mapping[int, float]] | None = None,
        parameters: Mapping[str, Any] | None = None,
        statistics: Mapping[str, tuple[str, ...]] | None = None,
    ) -> dict[str, Tensor]:
        """Some sources, mixed, under the output's names and in its dtypes.

        Bit for bit what the merge makes of them, a mean in this order and all else in that of the sources, if no sum
        overflows the accumulator, and they are all of one type: sources that are not among them may widen it.

        Args:
            weights: Source number → share. Where it extends the last call's by one, only that one is read, and where
                the one before stays, that one a second time: to hold it would take another model's memory.
            layers: Shares of tensors that have their own, of the same sources.
            parameters: Of the method, in place of the plan's.
            statistics: What was learned of those sources together, beside the plan's.

        Raises:
            MergeError: A file is shorter than its header says, or a source alone holds NaN.
        """
        plan = self.plan if parameters is None else replace(self.plan, parameters=dict(parameters))
        if plan is self._straight and not layers:
            return self.mean(weights)
        # In the recipe's order, as in the written soup: what is dropped at random goes by an ingredient's place.
        given = dict(sorted(weights.items())) | ({len(plan.sources) - 1: 0.0} if plan.with_base else {})
        own = layers or {}
        found: Cutoffs = {}
        if needs_cutoffs(plan):
            found = cutoffs(plan, self._reading, sorted(weights), usable_cores())
        if statistics:
            plan = replace(plan, statistics={**plan.statistics, **statistics})
        with closing(StatisticsStore(plan)) as collected:
            return {
                tensor.name: self._mixed(plan, number, {**given, **own.get(tensor.name, {})}, found, collected).reshape(
                    tensor.shape
                )
                for number, tensor in enumerate(plan.tensors)
            }

    def mean(self, weights: Mapping[int, float]) -> dict[str, Tensor]:
        """The weighted mean of some sources, whatever the method; one alone is itself."""
        normalize = self._straight.parameters.get("normalize", True)
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
                value = self._mixed(self._straight, span.first, weights)
            elif not span.averaged:
                value = self._sum[place] if self._sum else self._load(last, span)
            else:
                value = self._product(last, span, factors[last])
                if self._sum:
                    value.add_(self._sum[place])
                value.div_(total)
            begin = 0
            for tensor in self.plan.tensors[span.first : span.stop]:
                rounded = torch.empty(tensor.elements, dtype=TORCH[tensor.dtype])
                round_into(value[begin : begin + tensor.elements], rounded)
                result[tensor.name] = rounded.reshape(tensor.shape)
                begin += tensor.elements
        for tensor in self.plan.tensors:
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

    def _mixed(
        self,
        plan: Plan,
        number: int,
        weights: Mapping[int, float],
        found: Cutoffs | None = None,
        collected: StatisticsStore | None = None,
    ) -> Tensor:
        """A tensor of some sources as the merge makes it, slice by slice, flat.

        What none of them has comes from the others: a head that belongs to one ingredient, the rows of a token.
        """
        tensor = plan.tensors[number]
        base = len(self.plan.sources) - 1 if self.plan.with_base else None
        rounded = torch.empty(tensor.elements, dtype=TORCH[tensor.dtype])
        if not tensor.size:
            return rounded
        run = plan.run_of(number)
        for pieces in run.slices(0, run.elements, run.elements if run.whole else _SLICE):
            begin, end, offsets = pieces[0].begin, pieces[-1].end, pieces[0].offsets
            having = [source for source in weights if source in offsets]
            if having in ([], [base]):
                having = [source for source in offsets if source != base]
            parts = {
                source: torch.cat([self._reading.read(run, source, p.offsets[source], p.end - p.begin) for p in pieces])
                for source in having
            }
            if tensor.averaged:
                given = {source: weights.get(source, 1.0) for source in having}
                first, shared = parts[having[0]], same_infinity(parts.values())
                if infinite := bool(shared.any()):
                    parts = {source: part.masked_fill(shared, 0.0) for source, part in parts.items()}
                mixed = combine(
                    plan, run, parts, given, mixed=weights, begin=begin, cutoffs=found, statistics=collected
                )
                if infinite:
                    mixed = torch.where(shared, first.to(mixed.dtype), mixed)
                round_into(mixed, rounded[begin:end])
            else:
                rounded[begin:end] = parts[having[0]]
        return rounded

    def _product(self, source: int, span: Run, factor: float) -> Tensor:
        value = self._load(source, span)
        if not span.averaged:
            return value
        value = value.to(accumulator([value, *(torch.empty(0, dtype=TORCH[dtype]) for dtype in span.dtypes)]))
        return value if factor == 1.0 else value.mul_(factor)

    def _load(self, source: int, span: Run) -> Tensor:
        part = span.parts[source]
        assert part is not None, "what some do not have is not loaded as a whole"
        return self._reading.read(span, source, part.offset, span.elements)


def _spans(plan: Plan) -> Iterator[Run]:
    """The runs of a plan, in pieces of whole tensors: what is read at once, as hundreds of small reads would show."""
    for run in plan.runs:
        first = run.first
        while first < run.stop:
            stop, elements = first + 1, plan.tensors[first].elements
            while stop < run.stop and elements + plan.tensors[stop].elements <= _SLICE:
                elements += plan.tensors[stop].elements
                stop += 1
            yield replace(plan.run_of(first), stop=stop, elements=elements)
            first = stop
