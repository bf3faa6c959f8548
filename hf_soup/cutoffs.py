"""Magnitudes at which task vectors are trimmed, found in two passes over the weights that hold nothing big."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from hf_soup.combine import Cutoffs
from hf_soup.headers import ITEM_BYTES
from hf_soup.methods import METHODS, count_kept, from_above
from hf_soup.plan import Plan
from hf_soup.reading import Reading
from hf_soup.runs import Mixing, Run
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
    """Where a method trims task vectors, the magnitudes at which; every file is read twice for them."""
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
    high, size = torch.zeros(1 << 15, dtype=torch.int64), 0
    for bits in _magnitudes(plan, reading, runs, source, needed):
        high += torch.bincount(bits >> 16, minlength=1 << 15)
        size += len(bits)
    if not size:
        return 0.0
    place, left = from_above(high, count_kept(size, density))
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in _magnitudes(plan, reading, runs, source, needed):
        array = bits.numpy()  # which selects three times as fast
        near = torch.from_numpy(array[array >> 16 == place])
        low += torch.bincount(near & 0xFFFF, minlength=1 << 16)
    last, _ = from_above(low, left)
    return torch.tensor(place << 16 | last, dtype=torch.int32).view(torch.float32).item()


def _magnitudes(
    plan: Plan, reading: Reading, runs: Sequence[Run], source: int, needed: Sequence[int]
) -> Iterator[Tensor]:
    """Magnitudes of a source's task vectors, as the bits of float32s, slice by slice."""
    base = len(plan.sources) - 1
    for run in runs:
        # As `combine` computes them.
        wide = all(part is None or ITEM_BYTES[part.dtype] == 2 for part in run.parts)
        dtype = torch.float32 if wide else torch.float64
        for start in range(0, run.elements, _SLICE):
            for begin, end, offsets in run.pieces(start, min(run.elements, start + _SLICE)):
                if all(each in offsets for each in needed):
                    mine, origin = (
                        reading.read(run, each, offsets[each], end - begin).to(dtype) for each in (source, base)
                    )
                    # Infinities that all share have no difference.
                    yield mine.sub_(origin).nan_to_num_(nan=0.0).abs_().float().view(torch.int32)


def _asks(mixing: Mixing) -> bool:
    return "cutoffs" in METHODS[mixing.method].given


def _settings(mixing: Mixing) -> dict[str, Any]:
    return {**METHODS[mixing.method].parameters, **mixing.parameters}
