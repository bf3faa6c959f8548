"""The soup of adapters as an adapter: a cook against peft's own `svd`, and the error of both.

    python tests/benchmarks/adapter_soup.py [--layers N] [--adapters N] [--rank N] [--out-rank N] [--runs N]
        [--folder DIR]

Makes a Llama and LoRA adapters of all its linear layers, as `adapters.py` does. A cook is timed as a whole process, on
all layers. peft's `add_weighted_adapter` takes minutes for each layer, so it is timed on one, in this process, without
loading; and what it takes on all is that many times as long. The error is the length of what is lost, in parts of that
of the sum of all products (Frobenius norms over one layer), and beside it is that of the best there is, from the
singular values.
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
from adapters import make
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

Factors = dict[str, tuple[Tensor, Tensor]]


def cooked(adapters: list[Path], out: Path, rank: int) -> float:
    """Seconds of a whole process."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hf_soup", "cook", *adapters, "-o", out, "--output", "adapter",
                    "--rank", str(rank), "--quiet"], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - started


def factors_of(folder: Path) -> Factors:
    """Of every matrix B, with its scale, and A, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    firsts = [name for name in tensors if ".lora_A." in name]
    return {
        name: (scale * tensors[name.replace("lora_A", "lora_B")].double(), tensors[name].double()) for name in firsts
    }


def error(made: Factors, parts: list[Factors]) -> tuple[float, float]:
    """Of factors against the mean of others, and of the best of their rank."""
    lost = least = size = 0.0
    for name, (left, right) in made.items():
        wanted = sum(part[name][0] @ part[name][1] for part in parts) / len(parts)
        lost += float((wanted - left @ right).norm() ** 2)
        least += float(torch.linalg.svdvals(wanted)[left.shape[1] :].norm() ** 2)
        size += float(wanted.norm() ** 2)
    return (lost / size) ** 0.5, (least / size) ** 0.5


def by_peft(base: Path, adapters: list[Path], rank: int) -> tuple[float, Factors]:
    """Seconds of its `svd`, and what comes out."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    started = time.perf_counter()
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "soup", combination_type="svd", svd_rank=rank)
    seconds = time.perf_counter() - started
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            pair = module.lora_B["soup"].weight.detach(), module.lora_A["soup"].weight.detach()
            found[f"{name}.lora_A.weight"] = (module.scaling["soup"] * pair[0].double(), pair[1].double())
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out-rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files are made, and removed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adapter-soup-", dir=options.folder) as name:
        whole, one = Path(name) / "whole", Path(name) / "one"
        adapters = make(whole, options.layers, options.adapters, options.rank)
        few = make(one, 1, options.adapters, options.rank)
        size = (whole / "base" / "model.safetensors").stat().st_size
        print(f"{len(adapters)} adapters of rank {options.rank} on a base of {size / 1e9:.2f} GB, soups of rank "
              f"{options.out_rank}")  # fmt: skip
        cooked(adapters, whole / "soup", options.out_rank)  # hashes of folders are remembered
        cooked(few, one / "soup", options.out_rank)
        parts = [factors_of(each) for each in few]
        lost, least = error(factors_of(one / "soup"), parts)
        print(f"error of a cook {lost:.6f}, of the best there is {least:.6f}")
        ratios = []
        for _ in range(options.runs):
            seconds = cooked(adapters, whole / "soup", options.out_rank)
            theirs, found = by_peft(one / "base", few, options.out_rank)
            ratios.append(theirs * options.layers / seconds)
            lost, _ = error(found, parts)
            print(f"cook {seconds:.2f} s, peft {theirs:.2f} s a layer (error {lost:.6f}), ratio {ratios[-1]:.1f}")
        print(f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
