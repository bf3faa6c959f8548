"""A run that was killed, wherever, is continued by the same command, and its bytes do not show it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from plans import candidate, files_here, make_plan
from safetensors.torch import save_file

from hf_soup.checkpoint import TensorInfo, read_header
from hf_soup.merging import BLOCK_BYTES, MergeResult, Plan, Workspace, merge, plan as plan_module
from hf_soup.recipe import MethodCall

#: Merges in a child of its own for every point: it dies by SIGKILL at that step on the disk, in the middle of it.
DRIVER = '''
import json, os, pickle, signal, sys
from pathlib import Path
from hf_soup.merging import plan as plan_module
from hf_soup.merging import merge
from hf_soup.merging import Workspace
from hf_soup.merging.weight_files import WeightFiles

plan_module.UNIT_BYTES = 4 << 20
folder = Path(sys.argv[1])
plan, supply = pickle.loads((folder / "job").read_bytes())
steps = 0

def step(kind, half=None):
    """Count a step; at the point, do half of it and die."""
    global steps
    steps += 1
    kinds.append(kind)
    if steps == point:
        if half:
            half()
        os.kill(os.getpid(), signal.SIGKILL)

def slow_disk():
    pwrite, fallocate, fsync = os.pwrite, os.posix_fallocate, os.fsync
    note, write, rename, clear = Workspace.note, Workspace._write, Path.rename, Workspace._clear

    def noting(self, rank, entries):
        def half():
            line = json.dumps(entries[0])
            with (self.root / f"journal.{rank}").open("a") as journal:
                journal.write(line[: len(line) // 2])
        if entries:
            step("note", half)
        note(self, rank, entries)

    def writing(fd, data, offset):
        step("block", lambda: pwrite(fd, data[: len(data) // 2], offset))
        return pwrite(fd, data, offset)

    def wrapped(kind, function):
        def call(*arguments):
            step(kind)
            return function(*arguments)
        return call

    os.pwrite, Workspace.note = writing, noting
    os.posix_fallocate, os.fsync = wrapped("allocate", fallocate), wrapped("sync", fsync)
    Workspace._write, Workspace._clear = wrapped("text", write), wrapped("clear", clear)
    Path.rename = wrapped("rename", rename)

def cook(name):
    with Workspace(folder / name) as staging:
        staging.open(plan.fingerprint, plan.outline())
        merge(plan, supply, staging, threads=1, quiet=True)
        staging.publish()

kinds, point = [], 0
pid = os.fork()
if pid == 0:
    slow_disk()
    cook("whole")
    (folder / "steps.json").write_text(json.dumps(kinds))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
kinds = json.loads((folder / "steps.json").read_text())
blocks = [number for number, kind in enumerate(kinds, 1) if kind == "block"]
notes = [number for number, kind in enumerate(kinds, 1) if kind == "note"]
others = [number for number, kind in enumerate(kinds, 1) if kind not in ("block", "note")]
points = sorted({*others, *blocks[:: max(1, len(blocks) // 3)], notes[0], notes[2], notes[-1]})
for point in points:
    pid = os.fork()
    if pid == 0:
        kinds = []
        slow_disk()
        cook(f"killed{point}")
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
print(json.dumps({str(point): kinds[point - 1] for point in points}))
'''


@dataclass
class Job:
    """Two models of six blocks, in two output files."""

    folder: Path
    plan: Plan
    paths: list[dict[str, Path]]

    def cook(self, name: str, plan: Plan | None = None) -> tuple[str | None, MergeResult, str]:
        """What `begin` said, what came out, and the sha256 of all files."""
        plan = plan or self.plan
        with Workspace(self.folder / name) as staging:
            said = staging.open(plan.fingerprint, plan.outline())
            merged = merge(plan, files_here(self.paths), staging, threads=2, quiet=True)
            output = staging.publish()
        total = hashlib.sha256()
        for path in sorted(output.iterdir()):
            total.update(path.name.encode() + path.read_bytes())
        assert not (self.folder / f".{name}.cooking").exists()
        shutil.rmtree(output)  # all of them together would be half a gigabyte
        return said, merged, total.hexdigest()


def make_job(folder: Path) -> Job:
    paths, found = [], []
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        path = folder / f"{number}.safetensors"
        tensors = {f"t{i}": torch.randn(1 << 20, 3, generator=generator).bfloat16() for i in range(3)}
        save_file({**tensors, "ids": torch.arange(3)}, path)
        with path.open("rb") as file:

            def read(_: str, start: int, stop: int, file=file) -> bytes:  # type: ignore[no-untyped-def]
                file.seek(start)
                return bytes(file.read(stop - start))

            header: dict[str, TensorInfo] = {t.name: t for t in read_header(read, "m", path.stat().st_size, "m")}
        found.append(header)
        paths.append({"m": path})
    plan = make_plan(["a@0", "b@0"], found, [0.3, 0.9], max_file_bytes=13_000_000)
    (folder / "job").write_bytes(pickle.dumps((plan, files_here(paths))))
    return Job(folder, plan, paths)


@pytest.fixture(autouse=True, scope="module")
def small_units() -> Iterator[None]:
    """A block each, so that a small model has many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "UNIT_BYTES", BLOCK_BYTES)
        yield


@pytest.fixture(scope="module")
def job(module_path: Path) -> Job:
    return make_job(module_path)


def test_killed_at_any_step(job: Job) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, job.folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    points: dict[str, str] = json.loads(done.stdout)
    assert {"allocate", "text", "block", "note", "sync", "rename", "clear"} <= set(points.values())
    assert len(points) >= 12
    _, whole, files = job.cook("reference")
    continued = 0
    for number, kind in points.items():
        output = job.folder / f"killed{number}"
        if output.exists():
            # Killed after the rename: the soup is whole, and only what was beside it is left.
            assert kind in ("sync", "clear")
            assert sorted(path.name for path in output.iterdir()) == [file.name for file in job.plan.layout.files]
            continue
        noted = sum(each in ("note",) for at, each in points.items() if int(at) < int(number))
        said, merged, now = job.cook(output.name)
        assert (merged.digest, now) == (whole.digest, files), (number, kind)
        assert merged.resumed % (1 << 20) in (0, 24)  # the three integers
        if noted:
            assert said == "continued"
            assert merged.resumed > 0, (number, kind)
            continued += 1
        if kind in ("rename", "sync"):
            assert merged.resumed == sum(tensor.size for tensor in job.plan.layout.tensors)
    assert continued >= 5
    assert whole.resumed == 0


def interrupted(job: Job, name: str) -> Workspace:
    """A staging folder in which all blocks are finished."""
    with Workspace(job.folder / name) as staging:
        staging.open(job.plan.fingerprint, job.plan.outline())
        merge(job.plan, files_here(job.paths), staging, threads=2, quiet=True)
    return staging


def test_finished_blocks_are_checked_again(job: Job) -> None:
    """One was changed on the disk, one sha256 in a journal is wrong, and a header is gone: all are made again."""
    _, whole, files = job.cook("clean")
    staging = interrupted(job, "damaged")
    first = next(tensor for tensor in job.plan.layout.tensors if tensor.blocks == 2)
    with (staging.folder / job.plan.layout.files[first.file].name).open("r+b") as file:
        file.write(bytes(100))
        file.seek(first.offset + BLOCK_BYTES + 5)
        file.write(b"\x55")
    with (staging.root / "journal.7").open("a") as journal:
        for unit in (0, 99, -1, len(job.plan.units)):
            journal.write(json.dumps([unit, "0" * 64, []]) + "\n")
    size = sum(tensor.size for tensor in job.plan.layout.tensors)
    said, merged, now = job.cook("damaged")
    assert said == "continued"
    assert merged.resumed == size - (first.size - BLOCK_BYTES)
    assert (merged.digest, now) == (whole.digest, files)


def test_a_file_that_was_cut_is_made_again(job: Job) -> None:
    _, whole, files = job.cook("full")
    staging = interrupted(job, "cut")
    os.truncate(staging.folder / job.plan.layout.files[0].name, 5_000_000)
    (staging.folder / job.plan.layout.files[1].name).unlink()
    said, merged, now = job.cook("cut")
    assert said == "continued"
    assert merged.resumed == BLOCK_BYTES + 24  # the integers come first
    assert (merged.digest, now) == (whole.digest, files)


def test_another_recipe_starts_anew_and_says_why(job: Job) -> None:
    interrupted(job, "changed")
    plan = candidate(job.plan, {0: 0.5, 1: 0.5})
    said, merged, _ = job.cook("changed", plan)
    assert said == "an interrupted run had other weights, so this one starts anew"
    assert merged.resumed == 0
    assert merged.digest == job.cook("changed anew", plan)[1].digest


CHANGES = {
    "other ingredients (a@0, b@0)": ({"labels": ("a@0", "c@0"), "states": ("a@0", "c@0")}, {}),
    "the same ingredients before they changed": ({"states": ("a@0", "b@1")}, {}),
    "another method": ({}, {"method": MethodCall("ties", {})}),
    "other parameters of the method": ({}, {"method": MethodCall("linear", {"normalize": False})}),
    "other weights and other parameters of the method": (
        {},
        {"weights": {"a@0": 1.0, "b@0": 1.0}, "method": MethodCall("linear", {"normalize": False})},
    ),
    "another layout of the output": ({"files": ()}, {}),
}


@pytest.mark.parametrize("had", CHANGES)
def test_what_was_different_is_said(job: Job, had: str) -> None:
    interrupted(job, f"was {had}")
    of_layout, of_mixture = CHANGES[had]
    layout = dataclasses.replace(job.plan.layout, **of_layout)
    plan = Plan(layout, dataclasses.replace(job.plan.mixture, **of_mixture))
    with Workspace(job.folder / f"was {had}") as staging:
        said = staging.open(plan.fingerprint, plan.outline())
        assert said == f"an interrupted run had {had}, so this one starts anew"
        assert list(staging.finished()) == []


def test_a_signal_leaves_what_is_finished(job: Job) -> None:
    """Real processes with a slow disk, stopped from outside when their journal has a few lines."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    code = (
        "import pickle, os, sys, time\nfrom pathlib import Path\nfrom hf_soup.merging.to_files import merge\n"
        "from hf_soup.merging.workspace import Workspace\n"
        "from hf_soup.merging import plan as plan_module\nplan_module.UNIT_BYTES = 4 << 20\n"
        "plan, supply = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "write = os.pwrite\n"
        "def slowly(*arguments):\n    time.sleep(0.03)\n    return write(*arguments)\n"
        "os.pwrite = slowly\n"
        "for folder in map(Path, sys.argv[2:]):\n"
        "    if not (pid := os.fork()):\n"
        "        with Workspace(folder) as staging:\n"
        "            merge(plan, supply, staging, threads=1, quiet=True)\n"
        "        os._exit(0)\n"
        "    print(pid, flush=True)\n"
        "    print(os.waitpid(pid, 0)[1], flush=True)\n"
    )
    folders = [job.folder / f"stopped{number.value}" for number in numbers]
    for folder in folders:
        with Workspace(folder) as staging:
            staging.open(job.plan.fingerprint, job.plan.outline())
    with subprocess.Popen(
        [sys.executable, "-c", code, job.folder / "job", *folders],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout
        for number, folder in zip(numbers, folders, strict=True):
            pid = int(parent.stdout.readline())
            journal, deadline = Workspace(folder).root / "journal.0", time.monotonic() + 60
            while not journal.exists() or len(journal.read_text().splitlines()) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            os.kill(pid, number)
            assert int(parent.stdout.readline()) != 0
    _, _, files = job.cook("beside")
    for folder in folders:
        said, merged, now = job.cook(folder.name)
        assert said == "continued"
        assert merged.resumed > 0
        assert now == files
