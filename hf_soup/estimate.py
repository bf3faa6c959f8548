"""How long will it take? From short trials of what the work consists of, on this machine and with this Hub."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_soup import transfer
from hf_soup.checkpoint import Checkpoint
from hf_soup.combine import combine
from hf_soup.hub import Repo
from hf_soup.methods import METHODS, round_into
from hf_soup.plan import Plan
from hf_soup.runs import Mixing, Run
from hf_soup.tensors import TORCH, bytes_of

#: Numbers that are mixed for a trial, and bytes that are read and fetched for one.
_ELEMENTS = 1 << 18
_READ = 64 << 20
_FETCHED = 4 << 20
#: A trial that has taken so long is not repeated.
_TRIAL_SECONDS = 0.5


def estimated_seconds(
    plan: Plan, checkpoints: Sequence[Checkpoint], missing: Sequence[tuple[Repo, str]]
) -> dict[str, float]:
    """Seconds to fetch what is missing and to merge; both go on at the same time.

    Args:
        plan: What is written.
        checkpoints: The sources, of which one is read for a trial.
        missing: Weight files that are to be fetched, of which the beginning of one is.
    """
    cores = len(os.sched_getaffinity(0))
    merge = 0.0
    alike: dict[str, list[Run]] = {}
    for run in plan.runs:
        if run.averaged:
            key = json.dumps([run.dtype, run.dtypes, plan.mixing(run)], sort_keys=True)
            alike.setdefault(key, []).append(run)
    for runs in alike.values():
        merge += _mixing(plan, runs[0]) * sum(run.elements for run in runs) / cores
    total = sum(tensor.size for checkpoint in checkpoints for tensor in checkpoint.tensors.values())
    here = [
        (checkpoint.folder / file, checkpoint.files[file])
        for checkpoint in checkpoints
        if checkpoint.folder is not None
        for file in checkpoint.weight_files
        if file not in checkpoint.converted
    ]
    if here:
        path, size = max(here, key=lambda entry: entry[1])
        started = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            file.seek(max(0, size // 2 - _READ // 2))
            count = len(file.read(_READ))
        # Reading overlaps computing, so the slower of the two counts.
        merge = max(merge, (time.perf_counter() - started) / max(1, count) * total)
    fetch = 0.0
    if missing:
        repo, name = max(missing, key=lambda entry: entry[0].files[entry[1]].size)
        stop = min(_FETCHED, repo.files[name].size)
        started = time.perf_counter()
        transfer.read_range(repo, name, 0, stop)
        fetch = (time.perf_counter() - started) / stop * sum(repo.files[name].size for repo, name in missing)
    return {"fetch": round(fetch, 1), "merge": round(merge, 1), "total": round(max(fetch, merge), 1)}


class _Ones:
    """In the place of statistics."""

    def __init__(self, plan: Plan) -> None:
        self._shapes = {tensor.name: tensor.shape for tensor in plan.tensors}

    def read(self, mixing: Mixing, _: int, tensor: str, begin: int, count: int) -> Tensor:
        return (
            torch.ones(count) if METHODS[mixing.method].elementwise else torch.eye(*self._shapes[tensor][-1:] or (1,))
        )

    def turned(self, *_: object) -> bool:
        return False


def _mixing(plan: Plan, run: Run) -> float:
    """Seconds of one core for one number of a run: mixing, rounding, hashing."""
    elements = run.elements if run.whole else _ELEMENTS
    parts = {}
    for source, part in enumerate(run.parts):
        if part is not None:
            parts[source] = torch.randn(elements, generator=torch.Generator().manual_seed(source)).to(TORCH[part.dtype])
    out = torch.empty(elements, dtype=TORCH[run.dtype])
    shares = dict(enumerate(plan.shares(run)))
    cutoffs = {plan.tensors[run.first].name: [1.0] * len(parts)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds: list[float] = []
        while len(seconds) < 5 and sum(seconds) < _TRIAL_SECONDS:
            started = time.perf_counter()
            mixed = combine(plan, run, parts, shares, mixed=parts.keys(), cutoffs=cutoffs, statistics=_Ones(plan))
            mixed.aminmax()
            round_into(mixed, out)
            hashlib.sha256(bytes_of(out.view(torch.uint8)))
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds) / elements
