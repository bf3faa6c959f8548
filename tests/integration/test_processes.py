"""Two processes, started by torchrun and by accelerate launch, write one soup: the bytes of a single process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_soup import plan as plan_module
from hf_soup.headers import read_header
from hf_soup.merge import merge
from hf_soup.plan import BLOCK_BYTES, make_plan
from hf_soup.recipe import Recipe
from hf_soup.soup import cook
from hf_soup.staging import Staging
from hf_soup.supply import Supply

# Python runs this file at its start in every process: it tells, from outside, which process opened a journal to write.
WITNESS = """
import os, sys

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and "/journal." in arguments[0] and arguments[1] == "a":
        rank = os.environ.get("RANK", "alone")
        os.write(2, f"\\nWITNESS {rank} {os.path.basename(arguments[0])}\\n".encode())

sys.addaudithook(hook)
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
    ],
}  # fmt: skip
#: One process dies by SIGKILL after its first block; the other reports what it can.
DYING = """
import os, signal, sys
from pathlib import Path
from hf_soup import plan as plan_module
from hf_soup.errors import MergeError
from hf_soup.merge import merge
from hf_soup.plan import Plan
from hf_soup.staging import Staging
from hf_soup.supply import Supply
from hf_soup.world import world

plan_module.UNIT_BYTES = 4 << 20
here = world()
staging = Staging(Path("soup"))
note = staging.note

def noting(rank, entries):
    note(rank, entries)
    if entries and rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

staging.note = noting
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else the launcher may end the other before it can say anything
values = staging.join()
paths = [{n: Path(p) for n, p in s.items()} for s in values["paths"]]
try:
    merge(Plan.from_dict(values['plan']), Supply.here(paths), staging, world=here, threads=1, quiet=True)
except MergeError as error:
    print("SAID", here.rank, error.message, flush=True)
"""

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path) -> Launch:
    """Runs ``LAUNCHER MODULE_OR_FILE ARGUMENTS``, watched by the witness."""
    (tmp_path / "sitecustomize.py").write_text(WITNESS)

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *map(str, arguments)]
        env = {**environment, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}", **changes}
        with subprocess.Popen(
            command, env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        ) as child:  # fmt: skip
            try:
                out, err = child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    return run


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def ingredients(family: Path) -> list[object]:
    return [*(family / name for name in "abc"), "--base", family / "base", "--quiet"]


@pytest.fixture(scope="module")
def alone(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The soup that one process makes."""
    recipe = Recipe(ingredients=[str(family / name) for name in "abc"], base=str(family / "base"))
    return cook(recipe, tmp_path_factory.mktemp("alone") / "soup", say=lambda _: None).folder


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_write_the_bytes_of_one(
    launch: Launch, launcher: str, family: Path, alone: Path, tmp_path: Path
) -> None:
    """Both of them write, one of them speaks."""
    command = ["-m", "hf_soup", "cook", *ingredients(family), "-o", "soup", "--json"]
    done = launch(*LAUNCHERS[launcher], *command, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"WITNESS (.*)", done.stderr)) == {"0 journal.0", "1 journal.1"}
    assert json.loads(done.stdout)["digest"] == json.loads((alone / "soup.json").read_text())["digest"]
    assert weights(tmp_path / "soup") == weights(alone)
    # The processes divided the files whose sha256 was not known, and the recipe has them all.
    for name in ("soup.json", "soup.yaml"):
        assert (tmp_path / "soup" / name).read_bytes() == (alone / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "soup" in path.name) == ["soup"]


def test_the_hash_seed_does_not_show(launch: Launch, family: Path, alone: Path, tmp_path: Path) -> None:
    """In no file of the soup."""
    done = launch("hf_soup", "cook", *ingredients(family), "-o", "soup", PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "soup.json", "soup.yaml", "config.json", "README.md"):
        assert (tmp_path / "soup" / name).read_bytes() == (alone / name).read_bytes(), name


def test_several_processes_do_not_stream(launch: Launch, family: Path, tmp_path: Path) -> None:
    done = launch(*LAUNCHERS["torchrun"], "-m", "hf_soup", "cook", *ingredients(family), "-o", "soup", "--stream")
    assert done.returncode != 0
    assert "Error: `--stream` fetches for one process, and there are 2." in done.stderr
    assert not list(tmp_path.glob("*soup*"))


def test_processes_that_nobody_launched_are_one_clear_error(launch: Launch, family: Path, tmp_path: Path) -> None:
    """Two are announced, one is there: it does not wait for the other."""
    done = launch("hf_soup", "cook", *ingredients(family), "-o", "soup", WORLD_SIZE="2")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: WORLD_SIZE is 2, but no launcher set RANK, LOCAL_RANK, MASTER_ADDR")
    assert "torchrun --nproc-per-node" in done.stderr
    assert not list(tmp_path.glob("*soup*"))


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_leaves_what_is_finished(
    launch: Launch, tmp_path: Path, dies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one says so instead of waiting; the same command continues, here with a single process."""
    paths, headers = [], []
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        save_file({f"t{i}": torch.full((1 << 21,), number + i / 8, dtype=torch.bfloat16) for i in range(6)}, path)
        data = path.read_bytes()
        headers.append({t.name: t for t in read_header(lambda _, i, j, d=data: d[i:j], "m", len(data), "m")})
        paths.append({"m": path})
    plan = make_plan(["a@0", "b@0"], headers, [0.3, 0.9])
    with Staging(tmp_path / "soup") as staging:
        staging.begin(plan.fingerprint, plan.to_dict(), paths)
    monkeypatch.setattr(plan_module, "UNIT_BYTES", BLOCK_BYTES)
    (tmp_path / "dying.py").write_text(DYING)
    done = launch(*LAUNCHERS["torchrun"], "dying.py", dies)
    assert done.returncode != 0
    assert f"SAID {1 - dies} Another of the processes that work together has ended early." in done.stdout, done.stderr
    with Staging(tmp_path / "soup") as staging:
        assert staging.begin(plan.fingerprint, plan.to_dict(), paths) == "continued"
        merged = merge(plan, Supply.here(paths), staging, threads=1, quiet=True)
        staging.publish()
    assert merged.resumed == 4 * BLOCK_BYTES  # three of the living one, one of the other
    with Staging(tmp_path / "fresh") as staging:
        staging.begin(plan.fingerprint, plan.to_dict(), paths)
        assert merge(plan, Supply.here(paths), staging, threads=1, quiet=True).digest == merged.digest
