"""How long will it take? From short trials of what the work consists of, on this machine and with this Hub."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_soup._util.parallel import usable_cores
from hf_soup.checkpoint import TORCH, Checkpoint, FileSource, bytes_of
from hf_soup.merging import Aids, Plan, Run, StatisticsStore, combine, needs_cutoffs
from hf_soup.methods import METHODS, round_into
from hf_soup.recipe import MethodCall

#: Numbers that are mixed for a trial, and bytes that are read and fetched for one.
_ELEMENTS = 1 << 18
_READ = 64 << 20
_FETCHED = 4 << 20
#: Rows, columns and whatever else a trial of a whole tensor has at most.
_SIDE = 256
#: A trial that has taken so long is not repeated.
_TRIAL_SECONDS = 0.3


def estimated_seconds(
    plan: Plan, checkpoints: Sequence[Checkpoint], missing: Sequence[tuple[FileSource, str]]
) -> dict[str, float]:
    """Seconds to fetch what is missing and to merge; both go on at the same time.

    Args:
        plan: What is written.
        checkpoints: The sources, of which one is read for a trial.
        missing: Weight files that are to be fetched, of which the beginning of one is.
    """
    alike: dict[str, list[Run]] = {}
    for run in plan.runs:
        if run.averaged:
            lacking = [at is None for at in run.segments[0].extents]
            sides = len(plan.layout.tensors[run.first].shape) if plan.is_whole(run) else 0
            key = json.dumps([run.dtype, run.dtypes, lacking, sides, plan.method_of(run)], sort_keys=True)
            alike.setdefault(key, []).append(run)
    times = [_seconds(plan, runs) for runs in alike.values()]
    merge = max([sum(seconds for seconds, _ in times) / usable_cores(), *(alone for _, alone in times)])
    total = sum(tensor.size for checkpoint in checkpoints for tensor in checkpoint.tensors.values())
    here = [
        (path, each.weights.source.files[file])
        for each in checkpoints
        for file in each.weights.files
        if (path := each.weights.source.here(file))
    ]
    if here:
        path, size = max(here, key=lambda entry: entry[1])
        started = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            file.seek(max(0, size // 2 - _READ // 2))
            count = len(file.read(_READ))
        # Reading overlaps computing, so the slower of the two counts.
        passes = 2 if needs_cutoffs(plan) else 1
        merge = max(merge, passes * (time.perf_counter() - started) / max(1, count) * total)
    fetch = 0.0
    if missing:
        source, name = max(missing, key=lambda entry: entry[0].files[entry[1]])
        stop = min(_FETCHED, source.files[name])
        started = time.perf_counter()
        source.read(name, 0, stop)
        fetch = (time.perf_counter() - started) / stop * sum(source.files[name] for source, name in missing)
    return {"fetch": round(fetch, 1), "merge": round(merge, 1), "total": round(max(fetch, merge), 1)}


class _Ones(StatisticsStore):
    """In the place of statistics of a tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def read(self, call: MethodCall, source: int, tensor: str, begin: int, count: int) -> Tensor:
        return torch.ones(count) if METHODS[call.method].elementwise else torch.eye(*self._shape[-1:] or (1,))

    def transposed(self, call: MethodCall, tensor: str) -> bool:
        return False


def _seconds(plan: Plan, runs: Sequence[Run]) -> tuple[float, float]:
    """Seconds of one core for runs that are mixed alike, and for the longest of what cores cannot share out."""
    if not plan.is_whole(runs[0]):
        return _mixing(plan, runs[0], (_ELEMENTS,)) * sum(run.elements for run in runs), 0.0
    shapes = [plan.layout.tensors[run.first].shape for run in runs]
    largest = max(shapes, key=math.prod)
    small, half = ([min(side, most) for side in largest] for most in (_SIDE, _SIDE // 2))
    each = _mixing(plan, runs[0], small)
    # What a number costs grows with the smaller side where a matrix is decomposed, and with nothing elsewhere.
    growth = 0.0
    if len(small) == 2 and half != small:
        growth = min(1.0, max(0.0, math.log2(each / _mixing(plan, runs[0], half))))
    side = max(1, min(small, default=1))
    seconds = [math.prod(shape) * each * (min(shape, default=1) / side) ** growth for shape in shapes]
    return math.fsum(seconds), max(seconds)


def _mixing(plan: Plan, run: Run, shape: Sequence[int]) -> float:
    """Seconds of one core for one number of a run: mixing, rounding, hashing."""
    elements = math.prod(shape)
    tensor = replace(plan.layout.tensors[run.first], shape=tuple(shape), elements=elements)
    run = replace(run, first=0, stop=1, elements=elements)
    plan = replace(plan, layout=replace(plan.layout, tensors=(tensor,), runs=(run,)))
    parts = {}
    for source, at in enumerate(run.segments[0].extents):
        if at is not None:
            # None below zero, so that no two are opposite, which some methods refuse.
            values = torch.rand(elements, generator=torch.Generator().manual_seed(source))
            parts[source] = values.to(TORCH[at.dtype])
    out = torch.empty(elements, dtype=TORCH[run.dtype])
    aids = Aids({tensor.name: [1.0] * len(plan.weights)}, _Ones(tensor.shape))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds: list[float] = []
        while len(seconds) < 5 and sum(seconds) < _TRIAL_SECONDS:
            started = time.perf_counter()
            mixed = combine(plan, run, parts, aids)
            mixed.aminmax()
            round_into(mixed, out)
            hashlib.sha256(bytes_of(out.view(torch.uint8)))
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds) / elements
