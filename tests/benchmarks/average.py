"""Uniform average of 8 × 1 GB bfloat16: this tool, the fastest peer and the physical limit, in turn, in one run.

    python tests/benchmarks/average.py [--folder DIR] [--runs 5] [--models 8] [--no-peer] [--cold]

Makes the inputs (8 checkpoints in the layout of a Llama, 1 GB in 4 shards each) and installs mergekit 0.1.5 into an
environment of its own beside them. What is timed, run by run:

first      whole process, nothing remembered: folders are hashed, and transformers is asked about the architecture
again      whole process, as every later one on these files
work       `cook` in a process that has imported everything, and without fsync
mergekit   whole process, with its best flags
limit      as many threads as cores read all inputs into reused buffers, write one output and hash it

Prints medians, the ratios of single rounds, and peak memory. With --cold the page cache is emptied before every timing
(as root, on Linux), and the limit is `cat` of all inputs by as many processes as cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import inputs
from family import run

PEER = "mergekit==0.1.5"
CORES = len(os.sched_getaffinity(0))
#: Imports everything, then times the work alone.
WORK = """
import os, sys, time
import hf_soup.merging.to_files, hf_soup.workflows.cook
os.fsync = lambda descriptor: None
started = time.perf_counter()
hf_soup.cook(sys.argv[2:], sys.argv[1])
print("WORK", time.perf_counter() - started)
"""


def install_peer(folder: Path) -> Path:
    """The peer's command in an environment of its own."""
    command = folder / "peer" / "bin" / "mergekit-yaml"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "peer"], check=True)
        subprocess.run([folder / "peer" / "bin" / "pip", "install", "--quiet", PEER], check=True)
    return command


def timed(command: list[str | Path], log: Path, home: Path) -> tuple[float, float, str]:
    """Seconds and peak resident MB of a whole process, and what it printed."""
    with tempfile.TemporaryFile("w+") as out, log.open("ab") as errors:
        took = run(command, out, errors, {**os.environ, "HF_HOME": str(home)})
        out.seek(0)
        return took.wall, took.peak, out.read()


def limit(paths: list[Path], out: Path) -> float:
    """Seconds to read every weight file into reused buffers, and to write and hash one output, on all cores."""
    files = sorted(file for path in paths for file in path.glob("*.safetensors"))
    first = sorted(paths[0].glob("*.safetensors"))
    block = 4 << 20
    data = os.urandom(block)
    started = time.perf_counter()

    def read(mine: list[Path]) -> None:
        buffer = memoryview(bytearray(block))
        for file in mine:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    def write(mine: list[Path]) -> None:
        for file in mine:
            with (out / file.name).open("wb", buffering=0) as opened:
                for _ in range(file.stat().st_size // block):
                    opened.write(data)
                    hashlib.sha256(data)

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(read, [files[core::CORES] for core in range(CORES)]))
        list(pool.map(write, [first[core::CORES] for core in range(CORES)]))
    return time.perf_counter() - started


def cat(paths: list[Path]) -> float:
    """Seconds for as many `cat` as cores to read every weight file."""
    files = sorted(file for path in paths for file in path.glob("*.safetensors"))
    started = time.perf_counter()
    running = [subprocess.Popen(["cat", *files[core::CORES]], stdout=subprocess.DEVNULL) for core in range(CORES)]
    for process in running:
        process.wait()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    made = inputs.llama(1.0)
    paths = [inputs.write(folder / f"llama-{number}", made, number, 4) for number in range(options.models)]
    out, log, home, new_home = folder / "out", folder / "log", folder / "home", folder / "new-home"
    cook = [sys.executable, "-m", "hf_soup", "cook", *paths, "-o", out, "--quiet"]
    commands: dict[str, list[str | Path]] = {"first": cook, "again": cook}
    commands["work"] = [sys.executable, "-c", WORK, out, *paths]
    if not options.no_peer:
        recipe = folder / "peer.yaml"
        entries = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
        recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": entries}))
        commands["mergekit"] = [install_peer(folder), recipe, out, "-j", "2", "--async-write", "--quiet"]
    seconds: dict[str, list[float]] = {name: [] for name in [*commands, "limit"]}
    memory: dict[str, list[float]] = {name: [] for name in commands}

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(new_home, ignore_errors=True)
        if options.cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")

    for number in range(options.runs + 1):
        for name, command in commands.items():
            fresh()
            took, peak, said = timed(command, log, new_home if name == "first" else home)
            if name == "work":
                took = float(said.split()[-1])
            if number:  # the first round warms what is warm
                seconds[name].append(took)
                memory[name].append(peak)
        fresh()
        out.mkdir()
        took = cat(paths) if options.cold else limit(paths, out)
        if number:
            seconds["limit"].append(took)
    fresh()
    size = sum(file.stat().st_size for file in paths[0].glob("*.safetensors")) / 1e9
    state = "cold cache" if options.cold else "warm cache"
    print(f"{len(paths)} x {size:.2f} GB bfloat16, {CORES} cores, {options.runs} runs, {state}")
    for name, found in seconds.items():
        peak = f"  peak {max(memory[name]):7.0f} MB" if name in memory else ""
        print(f"{name:9} median {statistics.median(found):6.2f} s  ({min(found):.2f} to {max(found):.2f}){peak}")
    for one, other in (("mergekit", "again"), ("mergekit", "first"), ("work", "limit"), ("again", "limit")):
        if seconds.get(one) and seconds[other]:
            ratios = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
            print(f"{one} / {other}, run by run: median {statistics.median(ratios):.2f}"
                  f" ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
