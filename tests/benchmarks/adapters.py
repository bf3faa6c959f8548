"""Adapters into their base: a cook against copying the base and the bare products in torch, in turns.

    python tests/benchmarks/adapters.py [--layers N] [--adapters N] [--rank N] [--runs N] [--folder DIR]

Makes a Llama of bfloat16 weights (1 GB with 24 layers) and LoRA adapters of all linear layers with random factors. The
yardstick is what nobody can do without: the base copied by `cp`, and for every matrix and adapter the product of its
factors, in float32 by torch with all cores. A cook reads, adds, rounds, hashes and writes beside that, and starts
Python. Prints seconds, and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(folder: Path, layers: int, adapters: int, rank: int) -> list[Path]:
    """The base, and adapters of it."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1536, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=12,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="10GB")
    shapes = {name: each.shape for name, each in model.state_dict().items() if name.split(".")[-2] in MODULES}
    del model
    made = []
    for number in range(adapters):
        factors = {}
        for name, (rows, columns) in shapes.items():
            path = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{path}.lora_A.weight"] = 0.01 * torch.randn(rank, columns)
            factors[f"{path}.lora_B.weight"] = 0.01 * torch.randn(rows, rank)
        made.append(folder / f"adapter-{number}")
        made[-1].mkdir()
        save_file(factors, made[-1] / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": str(folder / "base"),
            "target_modules": list(MODULES), "task_type": "CAUSAL_LM",
        }  # fmt: skip
        (made[-1] / "adapter_config.json").write_text(json.dumps(settings))
    return made


def cooked(adapters: list[Path], out: Path) -> float:
    """Seconds of a whole process."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hf_soup", "cook", *adapters, "-o", out, "--quiet"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - started


def limit(base: Path, adapters: list[Path], out: Path) -> tuple[float, float]:
    """Seconds of `cp`, and of the products."""
    started = time.perf_counter()
    subprocess.run(["cp", base / "model.safetensors", out], check=True)
    copied = time.perf_counter() - started
    total = 0.0
    for adapter in adapters:
        factors = load_file(adapter / "adapter_model.safetensors")
        started = time.perf_counter()
        for name, first in factors.items():
            if ".lora_A." in name:
                torch.mm(factors[name.replace("lora_A", "lora_B")], first)
        total += time.perf_counter() - started
    return copied, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are made, and removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapters-", dir=options.folder) as name:
        folder = Path(name)
        adapters = make(folder, options.layers, options.adapters, options.rank)
        size = (folder / "base" / "model.safetensors").stat().st_size
        print(f"{len(adapters)} adapters of rank {options.rank} on a base of {size / 1e9:.2f} GB")
        cooked(adapters, folder / "soup")  # hashes of folders are remembered
        ratios = []
        for _ in range(options.runs):
            copied, products = limit(folder / "base", adapters, folder / "copy")
            seconds = cooked(adapters, folder / "soup")
            ratios.append(seconds / (copied + products))
            print(f"cook {seconds:.2f} s, cp {copied:.2f} s, products {products:.2f} s, ratio {ratios[-1]:.2f}")
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
