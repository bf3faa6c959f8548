"""All that decides the bytes of a merge: a layout, what is made of it, and what the ingredients showed on examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hf_soup.checkpoint import ADAPTER_FOLDER, ITEM_BYTES
from hf_soup.merging.layout import Layout, OutputTensor, Run, Segment
from hf_soup.recipe import MethodCall, Mixture

#: Bytes of output that a thread finishes before it notes them.
UNIT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Blocks of a run that are finished, noted and checked together: 16 MiB, or what is left of the run.

    Args:
        run: Its number.
        begin, end: Elements of the run.
        tensor, block: Where its first block belongs.
        size: In bytes, as written.
    """

    run: int
    begin: int
    end: int
    tensor: int
    block: int
    size: int


@dataclass(frozen=True)
class Plan:
    """What one merged model is made of. It is cheap: what only a merge needs is worked out when it is asked for.

    Args:
        layout: Of the sources; those that the mixture does not name are read only for what nobody else has.
        mixture: Who goes in, with which shares, by which methods.
        statistics: Where methods ask for them: kind and number of examples → ingredient → the identity of what it
            showed.
    """

    layout: Layout
    mixture: Mixture
    statistics: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)

    @cached_property
    def weights(self) -> dict[int, float]:
        """The ingredients that go in, by their numbers, and their shares."""
        numbers = self.layout.numbers
        return {numbers[name]: weight for name, weight in self.mixture.weights.items()}

    def method_of(self, run: Run) -> MethodCall:
        """How a run is combined, all of whose tensors are combined alike."""
        own = self.mixture.tensor_methods
        return own.get(self.layout.tensors[run.first].name, self.mixture.method) if own else self.mixture.method

    def weights_of(self, run: Run) -> Mapping[int, float]:
        """The share of every ingredient in a run, all of whose tensors have the same."""
        own = self.mixture.tensor_weights.get(self.layout.tensors[run.first].name)
        return self.weights if own is None else dict(zip(self.weights, own, strict=True))

    def is_whole(self, run: Run) -> bool:
        """Whether a run, of one tensor, is combined as a whole: not where some sources lack some of it."""
        return run.averaged and run.complete and _kind(self.method_of(run).method) == "whole"

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Those of the layout, cut where tensors have shares or methods of their own, or methods look at single ones.

        As there are two kinds of these for most methods, they are the layout's own, and cost nothing for a candidate.
        """
        mixture = self.mixture
        if not mixture.tensor_weights and not mixture.tensor_methods:
            return self.layout.tensor_runs if _kind(mixture.method.method) else self.layout.runs
        apart = {call.method for call in mixture.methods if _kind(call.method)}

        def kind(tensor: OutputTensor) -> tuple[object, MethodCall, str]:
            call = mixture.tensor_methods.get(tensor.name, mixture.method)
            return mixture.tensor_weights.get(tensor.name), call, tensor.name if call.method in apart else ""

        return tuple(self.layout.split(kind))

    def sources_of(self, run: Run, segment: Segment) -> list[int]:
        """Of what a segment is made: the ingredients that go in and have it, and the base where it counts.

        What none of them has comes from the others: a head that belongs to one ingredient, the rows of a token.
        """
        base = self.layout.base
        having = [source for source, at in enumerate(segment.extents) if at]
        own = [source for source in having if source in self.weights] or [source for source in having if source != base]
        return [*own, base] if base in having and _needs_base(self.method_of(run).method) else own

    def groups(self, run: Run, segment: Segment) -> list[tuple[int, ...]]:
        """Where the mean of adapters is taken: the sources in groups, each of which adds to the same elements of one
        base, so that these are read once; none where nothing is read together.
        """
        bases, weights = self.layout.bases, self.weights_of(run)
        own = self.sources_of(run, segment) if bases and self.method_of(run).method == "linear" else []
        if {*own} != {*self.weights} or not run.averaged or not all(weights[source] > 0 for source in own):
            return []
        found: dict[object, list[int]] = {}
        for source in sorted(own):
            base, at = bases[source], segment.extents[source]
            assert at is not None, "it has the segment"
            alone = base is None or at.file.startswith(ADAPTER_FOLDER) or (at.update and at.update.lengths)
            found.setdefault(source if alone else (base, at.file, at.offset), []).append(source)
        return [tuple(group) for group in found.values()] if len(found) < len(own) else []

    @cached_property
    def in_order(self) -> Plan:
        """The same with its ingredients in the order of the layout, in which all but means are computed."""
        mixture, order = self.mixture, sorted(self.weights)
        if order == list(self.weights):
            return self
        places = [list(self.weights).index(number) for number in order]
        own = {tensor: tuple([shares[place] for place in places]) for tensor, shares in mixture.tensor_weights.items()}
        weights = {self.layout.names[number]: self.weights[number] for number in order}
        return replace(self, mixture=replace(mixture, weights=weights, tensor_weights=own))

    @cached_property
    def key(self) -> str:
        """The sha256 of all that decides the numbers of a candidate: of the sources that go in, and of no others."""
        if not self.mixture.is_linear and self.in_order is not self:
            return self.in_order.key
        layout, mixture = self.layout, self.mixture
        sources: list[object] = [[layout.source_identities[n], share] for n, share in self.weights.items()]
        how: list[object] = []  # of one ingredient, which is itself
        if not mixture.is_linear or list(self.weights.values()) != [1.0]:
            shown = [[kind, [names.get(each) for each in mixture.weights]] for kind, names in self.statistics.items()]
            how = [mixture.methods, list(mixture.tensor_methods), mixture.seed, mixture.tensor_weights, sorted(shown)]
        if layout.base is not None and any(_needs_base(call.method) for call in mixture.methods):
            sources.append(layout.source_identities[layout.base])
        rows: list[object] = []
        for run in layout.patched_runs:
            rows.append(self.is_whole(run))
            for segment in run.segments:
                places = [(segment.extents[n], layout.states[n]) for n in self.sources_of(run, segment)]
                rows.append([segment.begin, segment.end, places])
        return hashlib.sha256(json.dumps([how, sources, rows], sort_keys=True).encode()).hexdigest()

    @cached_property
    def units(self) -> tuple[WorkUnit, ...]:
        """The pieces in which the work is done, the same for any number of threads and processes."""
        units = []
        for number, run in enumerate(self.runs):
            item = ITEM_BYTES[run.dtype]
            begin = end = 0
            head = (run.first, 0)
            if self.is_whole(run):
                units.append(WorkUnit(number, 0, run.elements, *head, run.elements * item))
                continue
            for tensor, block, size in self.layout.blocks(run.first, 0):
                if tensor >= run.stop:  # what stands between may be empty, and have no block
                    break
                if (end - begin) * item + size > UNIT_BYTES and end > begin:
                    units.append(WorkUnit(number, begin, end, *head, (end - begin) * item))
                    begin, head = end, (tensor, block)
                end += size // item
            units.append(WorkUnit(number, begin, end, *head, (end - begin) * item))
        return tuple(units)

    def blocks_of(self, unit: WorkUnit) -> list[tuple[int, int, int]]:
        """The blocks of a unit, as `Layout.blocks` gives them."""
        blocks, left = [], unit.size
        for entry in self.layout.blocks(unit.tensor, unit.block):
            if not left:
                break
            blocks.append(entry)
            left -= entry[2]
        return blocks

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides the bytes of the output."""
        return hashlib.sha256(
            f"{self.layout.identity}{json.dumps(self.outline(), sort_keys=True)}".encode()
        ).hexdigest()

    def outline(self) -> dict[str, Any]:
        """The plan without its layout, as plain data: enough to tell in what another one differs."""
        mixture = self.mixture
        return {
            "sources": list(self.layout.labels),
            "states": list(self.layout.states),
            "ingredients": list(mixture.weights),
            "weights": list(mixture.weights.values()),
            "method": mixture.method.method,
            "parameters": dict(mixture.method.parameters),
            "tensor_weights": {name: list(shares) for name, shares in mixture.tensor_weights.items()},
            "tensor_methods": {name: list(call) for name, call in mixture.tensor_methods.items()},
            "seed": mixture.seed,
            "statistics": {kind: dict(names) for kind, names in self.statistics.items()},
            "files": [{"name": file.name, "size": file.size} for file in self.layout.files],
        }


def _needs_base(method: str) -> bool:
    if method == "linear":
        return False
    from hf_soup.methods import METHODS  # late, as in `_kind`

    return METHODS[method].needs_base


def _kind(method: str) -> str:
    """Empty for a method of elements, "apart" where it has to know whose they are, "whole" for one of tensors."""
    if method == "linear":
        return ""
    from hf_soup.methods import METHODS  # late, as torch takes a second to import and a plan of an average needs none

    found = METHODS[method]
    return "whole" if found.whole else "apart" if found.given else ""
