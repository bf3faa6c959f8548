"""Magnitudes at which task vectors are trimmed, found in a pass or a few over the weights that hold nothing big."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_soup.merging.arithmetic import Cutoffs, task_vector
from hf_soup.merging.engine import Reading
from hf_soup.merging.layout import Run, Segment
from hf_soup.merging.plan import Plan
from hf_soup.merging.processes import ProcessGroup
from hf_soup.merging.weight_files import WeightFiles
from hf_soup.methods import METHODS, Mapper, accumulator, count_kept, ranked
from hf_soup.recipe import MethodCall

#: Elements that are looked at together.
_SLICE = 1 << 18
#: Pieces that the sample is taken from, at most, and elements of all of it.
_SPREAD, _SAMPLE = 1 << 10, 1 << 20


def needs_cutoffs(plan: Plan) -> bool:
    """Whether a method of a plan asks for cutoffs."""
    return any(_asks(call) for call in plan.mixture.methods)


def cutoffs(plan: Plan, reading: Reading, sources: Sequence[int], threads: int) -> Cutoffs:
    """For every tensor whose method asks for them, the cutoff of each source's task vector.

    `hf_soup.methods._ranks.cutoff` of all of a source's task vectors together where the method's ``scope`` is
    ``model``, else of each tensor by itself. Elements that not all have do not count, as they are averaged.

    Args:
        plan: With a base.
        reading: Of its layout.
        sources: Those that are mixed, without the base.
        threads: That work on it.
    """
    groups: dict[str, list[Run]] = {}
    for run in plan.runs:
        call = plan.method_of(run)
        if run.averaged and _asks(call):
            own = plan.layout.tensors[run.first].name if _settings(call)["scope"] == "tensor" else ""
            groups.setdefault(json.dumps([*call, own], sort_keys=True), []).append(run)
    with ThreadPoolExecutor(threads) as pool:
        # Few groups are shared out by their pieces, many one by one.
        inner: Mapper = pool.map if len(groups) < threads else map
        outer = map if len(groups) < threads else pool.map
        found = list(outer(partial(_cutoffs, plan, reading, sources=sources, mapper=inner), groups.values()))
    return {
        plan.layout.tensors[run.first].name: own
        for own, runs in zip(found, groups.values(), strict=True)
        for run in runs
    }  # fmt: skip


def cutoffs_for(plan: Plan, supply: WeightFiles, world: ProcessGroup, threads: int) -> Cutoffs:
    """Where a method trims task vectors, the magnitudes at which; every file is read for them, mostly once."""
    trimmed: Cutoffs = {}
    if not needs_cutoffs(plan):
        return trimmed
    if world.rank == 0:
        supply.fetch_all()
        with closing(Reading(plan.layout, supply.paths())) as reading:
            trimmed = cutoffs(plan, reading, sorted(plan.weights), threads)
    shared: Cutoffs = world.broadcast(trimmed)
    return shared


class _TaskVectors:
    """Of all sources, in pieces, which are read when they are asked for."""

    def __init__(self, reading: Reading, sources: Sequence[int], pieces: Sequence[tuple[Run, Segment]]) -> None:
        self._reading = reading
        self._sources = sources
        self._pieces = [(run, piece) for run, piece in pieces if all(piece.extents[each] for each in sources)]
        self.size = sum(piece.end - piece.begin for _, piece in self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, place: int) -> Tensor:
        return self._read(*self._pieces[place])

    def sample(self) -> list[Tensor]:
        """Some elements of each."""
        spread = self._pieces[:: max(1, len(self._pieces) // _SPREAD)]
        parts = [self._read(run, piece, min(4096, max(256, _SAMPLE // len(spread)))) for run, piece in spread]
        return list(torch.cat(parts, dim=1))

    def _read(self, run: Run, piece: Segment, most: int = _SLICE) -> Tensor:
        piece = piece.part(piece.begin, min(piece.end, piece.begin + most))
        *tensors, origin = [self._reading.read(run, piece, each) for each in self._sources]
        wide = origin.to(accumulator([*tensors, origin]))
        rows = wide.new_empty(len(tensors), piece.end - piece.begin)
        for row, tensor in zip(rows, tensors, strict=True):
            task_vector(tensor, wide, row)
        return rows.nan_to_num_(nan=0.0)  # infinities that all share have no difference


def _cutoffs(
    plan: Plan, reading: Reading, runs: Sequence[Run], *, sources: Sequence[int], mapper: Mapper
) -> tuple[float, ...]:
    """Of runs that are trimmed together, that of each source."""
    pieces = [
        (run, piece)
        for run in runs
        for start in range(0, run.elements, _SLICE)
        for piece in run.pieces(start, min(run.elements, start + _SLICE))
    ]
    assert plan.layout.base is not None, "task vectors are measured from it"
    vectors = _TaskVectors(reading, [*sources, plan.layout.base], pieces)
    if not vectors.size:
        return (0.0,) * len(sources)
    rank = count_kept(vectors.size, _settings(plan.method_of(runs[0]))["density"])
    return tuple(found for [found] in ranked(vectors, [rank], vectors.size, vectors.sample(), mapper))


def _asks(call: MethodCall) -> bool:
    return "cutoffs" in METHODS[call.method].given


def _settings(call: MethodCall) -> dict[str, Any]:
    return {**METHODS[call.method].parameters, **call.parameters}
