"""Magnitudes at which task vectors are trimmed, found in a pass or a few over the weights that hold nothing big."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_soup.combine import Cutoffs
from hf_soup.headers import ITEM_BYTES
from hf_soup.methods import METHODS, count_kept, magnitude_bits, nth_largest
from hf_soup.plan import Plan
from hf_soup.reading import Reading
from hf_soup.runs import Mixing, Piece, Run
from hf_soup.supply import Supply
from hf_soup.world import World

#: Elements that are looked at together.
_SLICE = 1 << 18


def needed(plan: Plan) -> bool:
    """Whether a method of a plan asks for cutoffs."""
    return any(_asks(mixing) for mixing in plan.mixings)


def cutoffs(plan: Plan, reading: Reading, sources: Sequence[int], threads: int) -> Cutoffs:
    """For every tensor whose method asks for them, the cutoff of each source's task vector.

    `hf_soup.methods.cutoff` of all of a source's task vectors together where the method's ``scope`` is ``model``,
    else of each tensor by itself. Elements that not all have do not count, as they are averaged.

    Args:
        plan: With the ancestor.
        reading: Of its sources.
        sources: Those that are mixed, without the ancestor.
        threads: That work on it.
    """
    groups: dict[str, list[Run]] = {}
    for run in plan.runs:
        mixing = plan.mixing(run)
        if run.averaged and _asks(mixing):
            own = plan.tensors[run.first].name if _settings(mixing)["scope"] == "tensor" else ""
            groups.setdefault(json.dumps([*mixing, own], sort_keys=True), []).append(run)
    tasks = [(runs, source) for runs in groups.values() for source in sources]

    def find(task: tuple[list[Run], int]) -> float:
        runs, source = task
        density = _settings(plan.mixing(runs[0]))["density"]
        return _cutoff(plan, reading, runs, source, [*sources, len(plan.sources) - 1], density)

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(find, tasks))
    result: dict[str, Sequence[float]] = {}
    for number, runs in enumerate(groups.values()):
        own_cutoffs = tuple(found[number * len(sources) :][: len(sources)])
        result |= {plan.tensors[run.first].name: own_cutoffs for run in runs}
    return result


def cutoffs_for(plan: Plan, supply: Supply, world: World, threads: int) -> Cutoffs | None:
    """Where a method trims task vectors, the magnitudes at which; every file is read for them, mostly once."""
    if not needed(plan):
        return None
    found: Cutoffs = {}
    if world.rank == 0:
        supply.fetch_all()
        with closing(Reading(plan, supply.paths())) as reading:
            found = cutoffs(plan, reading, range(len(plan.sources) - plan.with_base), threads)
    shared: Cutoffs = world.share(found)
    return shared


def _cutoff(
    plan: Plan, reading: Reading, runs: Sequence[Run], source: int, needed: Sequence[int], density: float
) -> float:
    pieces = [
        (run, piece)
        for run in runs
        for start in range(0, run.elements, _SLICE)
        for piece in run.pieces(start, min(run.elements, start + _SLICE))
        if all(each in piece.offsets for each in needed)
    ]
    size = sum(piece.end - piece.begin for _, piece in pieces)
    if not size:
        return 0.0

    def magnitudes(run: Run, piece: Piece, most: int = _SLICE) -> Tensor:
        # As `combine` computes them.
        narrow = all(part is None or ITEM_BYTES[part.dtype] == 2 for part in run.parts)
        count, dtype = min(most, piece.end - piece.begin), torch.float32 if narrow else torch.float64
        mine, origin = (
            reading.read(run, each, piece.offsets[each], count).to(dtype) for each in (source, len(plan.sources) - 1)
        )
        # Infinities that all share have no difference.
        return magnitude_bits(mine.sub_(origin).nan_to_num_(nan=0.0))

    spread = pieces[:: max(1, len(pieces) >> 10)]
    sample = torch.cat([magnitudes(run, piece, max(256, _SLICE // len(spread))) for run, piece in spread])
    every = partial(itertools.starmap, magnitudes, pieces)
    return nth_largest(every, [count_kept(size, density)], sample, size)[0]


def _asks(mixing: Mixing) -> bool:
    return "cutoffs" in METHODS[mixing.method].given


def _settings(mixing: Mixing) -> dict[str, Any]:
    return {**METHODS[mixing.method].parameters, **mixing.parameters}
