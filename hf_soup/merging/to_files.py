"""The streaming engine: read slices of every ingredient, combine, round once, hash, write; and continue.

The output is cut into units of 16 MiB, which processes and threads share out. A unit's bytes depend on the plan alone,
so neither the number of threads or processes nor the size of slices nor an interruption shows in them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_soup._util.io import in_memory, open_file
from hf_soup._util.parallel import usable_cores
from hf_soup._util.progress import bar
from hf_soup.checkpoint import ITEM_BYTES, keep_freed
from hf_soup.errors import MergeError
from hf_soup.hub import remember_sha256
from hf_soup.merging.arithmetic import Aids
from hf_soup.merging.cutoffs import cutoffs_for
from hf_soup.merging.digest import digest_of
from hf_soup.merging.engine import Buffers, Engine
from hf_soup.merging.plan import Plan, WorkUnit
from hf_soup.merging.processes import ProcessGroup
from hf_soup.merging.statistics_store import StatisticsStore
from hf_soup.merging.weight_files import WeightFiles
from hf_soup.merging.workers import Write, forked, may_fork
from hf_soup.merging.workspace import CompletedUnit, Workspace
from hf_soup.recipe import AdapterReport, BatchNormUpdate

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet


@dataclass(frozen=True)
class MergeResult:
    """What a merge leaves behind.

    Args:
        digest: Over all tensors: sha256 of the lines ``name dtype shape root`` in name order, ``root`` the sha256
            of the concatenated sha256s of a tensor's 4 MiB blocks.
        roots: ``root`` of every tensor.
        resumed: Bytes that an interrupted run had already written.
        differing: Integer and boolean tensors on which the sources disagree; the first source's were kept.
        batch_norm: Where statistics of batch normalisation were collected again, with what.
        adapter: Where the output is an adapter, what it holds.
    """

    digest: str
    roots: Mapping[str, str] = field(repr=False)
    resumed: int
    differing: tuple[str, ...]
    batch_norm: BatchNormUpdate | None = None
    adapter: AdapterReport | None = None


def merge(
    plan: Plan,
    supply: WeightFiles,
    staging: Workspace,
    *,
    world: ProcessGroup | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> MergeResult:
    """Write the output files of a plan into a staging folder.

    Args:
        plan: What to write.
        supply: The sources' weight files.
        staging: Where; units that an interrupted run finished are checked again and kept.
        world: The processes that share the work.
        threads: Of this process; by default one a core, and a few more where files must come from the disk.
        quiet: No progress bar.

    Raises:
        MergeError: An ingredient holds NaN or Inf, a file is shorter than its header says, or the disk is full.
        ResolveError: A file could not be fetched.
    """
    world, layout = world or ProcessGroup(), plan.layout
    threads = threads or _threads(supply)
    with ExitStack() as stack:
        # The threads below are the parallelism; torch's own would fight them for the cores.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        keep_freed()
        stack.enter_context(staging.disk_errors())
        if world.rank == 0:
            staging.allocate((file.name, file.header, file.size) for file in layout.files)
        world.barrier()
        outputs = [open_file(stack, staging.folder / file.name, os.O_RDWR) for file in layout.files]
        if world.rank == 0:
            staging.restart(_still_right(plan, outputs, staging.finished(), threads, quiet))
        world.barrier()
        kept = {entry.unit for entry in staging.finished()}
        # Every process must see the same journal before any of them writes to one.
        world.barrier()
        resumed = sum(plan.units[number].size for number in kept)
        stack.callback(supply.close)
        followed = [file for file in supply.files() if file.follow]
        for number, file in enumerate(followed):
            file.follow = number % world.size == world.rank
        fetch = sum(file.size for file in supply.files())
        if not fetch:
            supply.fetch_all()  # out of the cache, in a moment; then other processes may read them
        title = "Fetching and merging" if fetch else "Merging"
        with bar(title, layout.size + fetch, initial=resumed, quiet=quiet or world.rank > 0) as shown:
            supply.fetched = shown.update
            aids = Aids(cutoffs_for(plan, supply, world, threads), StatisticsStore(plan))
            engine = Engine(plan, supply, outputs, threads, aids)
            share = _share(plan, kept, world)
            _run(
                engine,
                share,
                lambda entries: staging.note(world.rank, entries),
                threads,
                shown.update,
                alone=world.size == 1,
            )
            with ThreadPoolExecutor(threads) as pool:  # which is waited for, before the files are closed
                hashes = list(pool.map(lambda file: file.hasher().finish(), followed[world.rank :: world.size]))
    hashed = world.gather(hashes)
    if world.rank > 0:
        return MergeResult("", {}, 0, ())
    finished = {entry.unit: entry for entry in staging.finished()}
    missing = len(plan.units) - len(finished)
    if missing:
        raise MergeError(
            f"{missing} parts of '{staging.output.name}' were not written.",
            hint="All processes need the same file system, and the same output folder.",
        )
    for rank, digests in enumerate(hashed[1:], 1):
        for file, digest in zip(followed[rank :: world.size], digests, strict=True):
            if file.path and file.stamp:  # from before anything was read, so that what changed since is not believed
                remember_sha256(file.path, file.stamp, digest, since=max(file.stamp[3:]) + 100_000_000)
    roots = tensor_roots(plan, finished)
    differing = {number for entry in finished.values() for number in entry.differing} & set(range(len(layout.tensors)))
    return MergeResult(
        digest=digest_of((tensor.name, tensor.dtype, tensor.shape, roots[tensor.name]) for tensor in layout.tensors),
        roots=roots,
        resumed=resumed,
        differing=tuple(sorted(layout.tensors[number].name for number in differing)),
    )


def tensor_roots(plan: Plan, finished: Mapping[int, CompletedUnit]) -> dict[str, str]:
    """The root of every tensor, from the sha256s of the blocks of all units."""
    tensors = plan.layout.tensors
    roots = [hashlib.sha256(b"").hexdigest()] * len(tensors)
    held = b""  # of the tensor that is not complete
    for number, unit in enumerate(plan.units):
        digests = bytes.fromhex(finished[number].digests)
        for place, (tensor, block, _) in enumerate(plan.blocks_of(unit)):
            held += digests[32 * place : 32 * place + 32]
            if block + 1 == tensors[tensor].blocks:
                roots[tensor] = hashlib.sha256(held).hexdigest()
                held = b""
    return {tensor.name: root for tensor, root in zip(tensors, roots, strict=True)}


def merge_along(output: Path, world: ProcessGroup, threads: int | None) -> None:
    """The part that every process but the first has in a merge, whose plan and weight files that one broadcasts."""
    sent = world.broadcast(None)
    if sent is None:
        return  # an adapter, which the first one makes
    plan, supply = sent
    staging = Workspace(output)
    with staging.join(plan.fingerprint, world.rank):
        merge(plan, supply, staging, world=world, threads=threads, quiet=True)


def _run(
    engine: Engine,
    share: Sequence[int],
    note: Callable[[Sequence[CompletedUnit]], None],
    threads: int,
    progress: Callable[[int], object],
    *,
    alone: bool,
) -> None:
    """Compute units on several threads, or, where no launcher started others, processes; when one fails, the others
    stop after theirs.
    """
    supply, units = engine.supply, engine.plan.units
    numbers = {units[number]: number for number in share}
    written: dict[WorkUnit, CompletedUnit] = {}

    def work(elsewhere: Write | None) -> None:
        write = elsewhere or partial(engine.write, buffers=Buffers())
        while (unit := supply.take()) is not None:
            written[unit] = write(numbers[unit])
            engine.follow(numbers[unit])
            sure = supply.done(unit)
            note([written.pop(each) for each in sure])
            progress(unit.size)

    fork = alone and may_fork(engine, sum(units[number].size for number in share), threads)
    with ExitStack() as stack:
        elsewhere = stack.enter_context(forked(engine, threads)) if fork else None
        supply.begin(engine.plan, [units[number] for number in share])
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        futures = [pool.submit(work, elsewhere) for _ in range(threads)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            note([written.pop(each) for each in supply.wait()])
        except FileNotFoundError:
            supply.stop()
            supply.raise_error()  # a file whose bytes were wrong is removed before its fetch says so
            raise
        finally:
            supply.stop()


def _threads(supply: WeightFiles) -> int:
    """One a core; where these would wait for the disk, a few more that compute meanwhile."""
    here = [file.path for file in supply.files() if file.verified and file.path and file.path.exists()]
    slow = any(not in_memory(path) for path in here[:: max(1, len(here) // 16)])
    return usable_cores() + (4 if slow else 0)


def _share(plan: Plan, kept: AbstractSet[int], world: ProcessGroup) -> list[int]:
    """Numbers of the units that this process does: as many bytes as every other's, one after the other."""
    todo = [number for number in range(len(plan.units)) if number not in kept]
    *starts, total = accumulate((plan.units[number].size for number in todo), initial=0)
    low, high = total * world.rank // world.size, total * (world.rank + 1) // world.size
    return [number for number, start in zip(todo, starts, strict=True) if low <= start < high]


def _still_right(
    plan: Plan, outputs: Sequence[int], finished: Iterator[CompletedUnit], threads: int, quiet: bool
) -> list[CompletedUnit]:
    """The finished units whose bytes still have the sha256s that were noted."""
    entries = [entry for entry in dict.fromkeys(finished) if 0 <= entry.unit < len(plan.units)]
    total = sum(plan.units[entry.unit].size for entry in entries)

    def check(entry: CompletedUnit) -> bool:
        unit = plan.units[entry.unit]
        run = plan.runs[unit.run]
        offset = run.offset + unit.begin * ITEM_BYTES[run.dtype]
        found = []
        for _, _, size in plan.blocks_of(unit):
            found.append(hashlib.sha256(os.pread(outputs[run.file], size, offset)).hexdigest())
            offset += size
        shown.update(unit.size)
        return "".join(found) == entry.digests

    with bar("Checking what is finished", total, quiet=quiet) as shown, ThreadPoolExecutor(threads) as pool:
        return [entry for entry, right in zip(entries, pool.map(check, entries), strict=True) if right]
