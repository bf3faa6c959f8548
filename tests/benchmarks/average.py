"""Uniform average of 8 × 1 GB bfloat16: this tool, the fastest peer and the physical limit, in turn, in one run.

    python tests/benchmarks/average.py [--folder DIR] [--runs 5] [--models 8]

Makes the inputs (8 Llama checkpoints of 0.99 GB in 4 shards each), installs mergekit 0.1.5 into an environment of
its own beside them, and times whole processes, imports included. Prints medians, ratios and peak memory. The limit is
as many threads as cores reading all inputs into reused buffers, writing one output and hashing it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PEER = "mergekit==0.1.5"
SIZES = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28}


def make(folder: Path, models: int) -> list[Path]:
    """Checkpoints of one ancestor with a little noise each, with a tokenizer-less config, as both tools need it."""
    paths = [folder / f"model-{number}" for number in range(models)]
    if all((path / "config.json").exists() for path in paths):
        return paths
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**SIZES, num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    for path in paths:
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 1e-3)
        model.save_pretrained(path, max_shard_size="260MB")
    return paths


def install_peer(folder: Path) -> Path:
    """The peer's command in an environment of its own."""
    command = folder / "peer" / "bin" / "mergekit-yaml"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "peer"], check=True)
        subprocess.run([folder / "peer" / "bin" / "pip", "install", "--quiet", PEER], check=True)
    return command


def timed(command: list[str | Path], log: Path) -> tuple[float, float]:
    """Seconds and peak resident MB of a whole process."""
    with log.open("ab") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command[0]} failed; see {log}")
    return seconds, usage.ru_maxrss / 1000


def limit(inputs: list[Path], out: Path) -> float:
    """Seconds to read every weight file into reused buffers, and to write and hash one output, on all cores."""
    cores = len(os.sched_getaffinity(0))
    files = sorted(file for path in inputs for file in path.glob("*.safetensors"))
    first = sorted(inputs[0].glob("*.safetensors"))
    block = 4 << 20
    started = time.perf_counter()

    def read(mine: list[Path]) -> None:
        buffer = memoryview(bytearray(block))
        for file in mine:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    def write(mine: list[Path]) -> None:
        data = os.urandom(block)
        for file in mine:
            with (out / file.name).open("wb", buffering=0) as opened:
                for _ in range(file.stat().st_size // block):
                    opened.write(data)
                    hashlib.sha256(data)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(read, [files[core::cores] for core in range(cores)]))
        list(pool.map(write, [first[core::cores] for core in range(cores)]))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--models", type=int, default=8)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    inputs = make(folder, options.models)
    peer = install_peer(folder)
    recipe = folder / "peer.yaml"
    entries = [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs]
    recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": entries}))
    out, log = folder / "out", folder / "log"
    ours = [sys.executable, "-m", "hf_soup", "cook", *inputs, "-o", out, "--quiet"]
    theirs = [peer, recipe, out, "-j", "2", "--async-write", "--quiet"]
    seconds: dict[str, list[float]] = {"hf-soup": [], "mergekit": [], "limit": []}
    memory: dict[str, list[float]] = {"hf-soup": [], "mergekit": []}
    for run in range(options.runs + 1):
        for name, command in (("hf-soup", ours), ("mergekit", theirs)):
            shutil.rmtree(out, ignore_errors=True)
            took, peak = timed(list(command), log)
            if run:  # the first round warms the page cache
                seconds[name].append(took)
                memory[name].append(peak)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        took = limit(inputs, out)
        if run:
            seconds["limit"].append(took)
        shutil.rmtree(out)
    size = sum(file.stat().st_size for file in inputs[0].glob("*.safetensors")) / 1e9
    print(
        f"{len(inputs)} x {size:.2f} GB bfloat16, {len(os.sched_getaffinity(0))} cores, {options.runs} runs, warm cache"
    )
    for name, found in seconds.items():
        peak = f"  peak {max(memory[name]):7.0f} MB" if name in memory else ""
        print(f"{name:9} median {statistics.median(found):6.2f} s  ({min(found):.2f} to {max(found):.2f}){peak}")
    for other in ("mergekit", "limit"):
        ratios = [a / b for a, b in zip(seconds[other], seconds["hf-soup"], strict=True)]
        print(f"{other} / hf-soup, run by run: median {statistics.median(ratios):.2f}")
    print(f"(this script's own peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB)")


if __name__ == "__main__":
    main()
