"""Time and memory against the size of the models and their number, as a table and a plot: linear, and flat.

    python tests/benchmarks/memory.py [--folder DIR] [--plot docs/memory.png] [--sizes 0.25 1 4] [--counts 2 8 32]

Whole processes on files in the page cache, each once before it is counted. A quarter of every model is one tensor. Two
different checkpoints are made of each size; the others are hard links to them, so that 32 models of 4 GB fit on a disk.
The last row is a mixture of experts: 8 x 1 GB in 100,000 tensors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import inputs
from family import watched

_IN_PROCESS = """
import sys, time
import hf_soup.merging.to_files, hf_soup.workflows.cook

def peak():  # getrusage's would begin with that of the process that started this one
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
started = time.perf_counter()
hf_soup.cook(sys.argv[2:], sys.argv[1])
print(time.perf_counter() - started, before, peak())
"""


def links(folder: Path, originals: list[Path], count: int) -> list[Path]:
    """So many checkpoints; those beyond the originals are hard links to them."""
    found = list(originals[:count])
    for number in range(len(found), count):
        path = folder / f"{originals[0].name}-link-{number}"
        if not path.exists():
            path.mkdir()
            for file in originals[number % len(originals)].iterdir():
                os.link(file, path / file.name)
        found.append(path)
    time.sleep(2.5)  # linking touches the originals, and what was touched just now is hashed again
    return found


def measure(paths: list[Path], out: Path, runs: int) -> tuple[float, float, float]:
    """Median seconds of `cook`, MB resident after the imports, and the peak."""
    seconds, memory = [], []
    for run in range(runs + 1):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-c", _IN_PROCESS, out, *paths], stdout=subprocess.PIPE, text=True)
        with watched(process.pid) as held:
            said, _ = process.communicate()
        if process.returncode:
            raise SystemExit("it failed")
        took, before, peak = said.split()
        if run:
            seconds.append(float(took))
            memory.append((float(before) / 1000, max(float(peak) / 1000, *held)))
    shutil.rmtree(out)
    return statistics.median(seconds), max(m[0] for m in memory), max(m[1] for m in memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 1.0, 4.0])
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    folder: Path = options.folder
    rows: list[tuple[float, int, float, float, float]] = []
    print(
        "| model | ingredients | read | `cook` | GB/s read | memory at the peak | of it imports |\n"
        "|---|---|---|---|---|---|---|"
    )

    def row(title: str, size: float, count: int, paths: list[Path]) -> None:
        took, before, peak = measure(paths, folder / "out", options.runs)
        print(f"| {title} | {count} | {size * count:.1f} GB | {took:.2f} s | {size * count / took:.1f} |"
              f" {peak:.0f} MB | {before:.0f} MB |", flush=True)  # fmt: skip
        rows.append((size, count, took, peak, before))

    for size in options.sizes:
        made = inputs.llama(size)
        originals = [inputs.write(folder / f"size-{size:g}-{number}", made, number) for number in range(2)]
        for count in options.counts:
            row(f"{size:g} GB", size, count, links(folder, originals, count))
    dense = list(rows)
    made = inputs.mixture(100_000)
    row(
        "1 GB in 100,000 tensors",
        1.04,
        8,
        [inputs.write(folder / f"moe-{number}", made, number, 4) for number in range(8)],
    )
    if options.plot:
        plot(dense, options.plot)


def plot(rows: list[tuple[float, int, float, float, float]], path: Path) -> None:
    """Time against bytes read, and memory against them, a line for each number of ingredients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for count in sorted({row[1] for row in rows}):
        mine = [row for row in rows if row[1] == count]
        read = [row[0] * count for row in mine]
        time_axes.plot(read, [row[2] for row in mine], "o-", label=f"{count} ingredients")
        memory_axes.plot(read, [row[3] for row in mine], "o-", label=f"{count} ingredients")
    memory_axes.axhline(500, color="grey", linestyle="--", linewidth=0.8)
    for axes, title in ((time_axes, "seconds"), (memory_axes, "memory of all processes at the peak, MB")):
        axes.set(xscale="log", xlabel="GB read", title=title)
        axes.legend(frameon=False, fontsize=8)
    time_axes.set(yscale="log")
    memory_axes.set(ylim=(0, 550))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"({time.perf_counter() - started:.0f} s)", file=sys.stderr)
