"""Methods against those of mergekit 0.1.5 and peft: the same numbers? and how fast?

    python tests/benchmarks/methods.py [--folder DIR] [--values] [--runs 3] [--only METHOD ...]

Installs both into an environment of their own.

With --values: a small language model, trained on Python code, and three fine-tunes of it on other texts that every
Python has. Every method that a peer has too is cooked with the parameters that mean the same there, in float32. What
is printed is the difference of the results in parts of what the merge changed: the largest of all entries in parts of
the largest change of their tensor, and the mean. Random masks are not the same numbers, so for these it is the share
of entries that changed, and how far the change goes along the plain sum of the task vectors.

Without: whole processes on 4 fine-tunes and a base of 0.5 GB each in bfloat16, page cache warm, runs in turn, mergekit
with its best flags; wall clock, CPU time and peak memory, and the ratios run by run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import average
import family
import inputs
import torch
from family import Took
from safetensors.torch import load_file
from torch import Tensor

PEFT = "peft==0.21.2"


@dataclass(frozen=True)
class Case:
    """A method with parameters that mean the same here and there.

    Args:
        ours: Parameters here.
        theirs: Parameters of the peer; those of each model beside the weight are in ``each``.
        weights: Shares; mergekit has none in some methods, peft's sign votes none either.
        base: Whether mergekit's recipe names the ancestor; slerp's base is the first model instead.
        peer: "mergekit", or "peft" for its function of the name ``called``.
        called: The peer's name, where it is another.
        random: Whether it draws masks.
    """

    name: str
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    base: bool = True
    peer: str = "mergekit"
    called: str = ""
    random: bool = False
    note: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} {self.note}".strip()


_UNEQUAL = (1.0, 0.5, 2.0)
_SUM = {"normalize": False, "lambda": 0.3}
_DARE = {"density": 0.5}
CASES = [
    Case("linear", weights=_UNEQUAL, base=False),
    Case("slerp", {"t": 0.3}, {"t": 0.3}, weights=(1.0, 1.0), base=False),
    Case("slerp", {"t": 0.3}, weights=(0.7, 0.3), base=False, called="nuslerp", note="(nuslerp)"),
    Case("multislerp", weights=_UNEQUAL, base=False),
    Case("karcher", base=False),
    Case("task_arithmetic", {"scale": 0.3}, _SUM, weights=_UNEQUAL),
    Case("ties", {"density": 0.2, "scope": "tensor"}, {}, {"density": 0.2}, weights=_UNEQUAL),
    Case("ties", {"density": 0.2}, {}, {"density": 0.2}, weights=_UNEQUAL, note="(scope: model)"),
    Case("breadcrumbs", {"scale": 0.3}, _SUM, {"density": 0.9, "gamma": 0.01}, weights=_UNEQUAL),
    Case("model_stock"),
    Case("sce"),
    Case("sce", {"select_topk": 0.1}, {"select_topk": 0.1}, note="(select_topk: 0.1)"),
    Case("dare_linear", {"density": 0.5, "scale": 0.3}, _SUM, _DARE, random=True),
    Case("dare_ties", {"density": 0.5}, {"normalize": True}, _DARE, random=True),
    Case("della", {"density": 0.5, "epsilon": 0.3}, {}, {**_DARE, "epsilon": 0.15}, random=True),
    Case("task_arithmetic", {"scale": 0.3}, {"scale": 0.3}, weights=_UNEQUAL, peer="peft"),
    Case("ties", {"density": 0.2, "scope": "tensor"}, _DARE | {"density": 0.2}, peer="peft"),
    Case("breadcrumbs", {"density": 0.2, "gamma": 0.0, "scale": 0.3}, {"density": 0.2, "scale": 0.3},
         weights=_UNEQUAL, peer="peft", called="magnitude_prune", note="(magnitude_prune)"),
    Case("dare_linear", {"density": 0.5, "scale": 0.3}, {"density": 0.5, "scale": 0.3}, peer="peft", random=True),
    Case("dare_ties", {"density": 0.5}, {"density": 0.5}, peer="peft", random=True),
]  # fmt: skip
#: Merges folders by a function of peft on task vectors, tensor by tensor.
_PEFT = """
import json, pathlib, sys, torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
name, parameters, weights, out, base, *paths = sys.argv[1:]
parameters, weights = json.loads(parameters), torch.tensor(json.loads(weights))
scale = parameters.pop("scale", 1.0)
origin, *tuned = [load_file(f"{path}/model.safetensors") for path in (base, *paths)]
torch.manual_seed(0)
mixed = {}
for key, start in origin.items():
    task = [each[key] - start for each in tuned]
    mixed[key] = start + scale * getattr(merge_utils, name)(task, weights, **parameters)
pathlib.Path(out).mkdir()
save_file(mixed, f"{out}/model.safetensors")
"""
#: Suffixes of the files of Python's library that the ancestor and the fine-tunes learn.
_TEXTS = ("asyncio/*.py", "idlelib/*.txt", "unittest/*.py", "encodings/*.py")


def small_models(folder: Path) -> list[Path]:
    """A language model of bytes, and three fine-tunes, if they are not there yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    paths = [folder / name for name in ("small", "small-1", "small-2", "small-3")]
    library = Path(sysconfig.get_path("stdlib"))
    for number, (path, pattern) in enumerate(zip(paths, _TEXTS, strict=True)):
        if (path / "config.json").exists():
            continue
        torch.manual_seed(number)
        if number:
            model = LlamaForCausalLM.from_pretrained(paths[0])
        else:
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
            ))  # fmt: skip
        data = torch.tensor(list(b"".join(file.read_bytes() for file in sorted(library.glob(pattern)))))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4 if number else 2e-3)
        for _ in range(100 if number else 300):
            starts = torch.randint(len(data) - 64, (16,))
            batch = torch.stack([data[start : start + 64] for start in starts])
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{path.name}: loss {loss.item():.2f}", file=sys.stderr)
        model.save_pretrained(path)
    return paths


def commands(case: Case, paths: list[Path], folder: Path, dtype: str) -> tuple[list[Any], list[Any]]:
    """What cooks a case into ``ours`` and ``theirs``; the first path is the ancestor's."""
    base, *tuned = paths
    used = list(zip(tuned, case.weights, strict=False))
    ingredients = [{"model": str(path), "weight": weight} for path, weight in used]
    if case.name == "slerp":
        ingredients = [{"model": str(path)} for path, _ in used]
    recipe = {
        "base_model": str(base),
        "ingredients": ingredients,
        "method": {"name": case.name, **case.ours},
        "dtype": dtype,
    }
    mine = folder / "ours.yaml"
    mine.write_text(json.dumps(recipe))
    ours = [sys.executable, "-m", "hf_soup", "cook", mine, "-o", folder / "ours", "--quiet"]
    called = case.called or case.name
    if case.peer == "peft":
        values = [json.dumps(case.theirs), json.dumps(case.weights)]
        return ours, [folder / "peer" / "bin" / "python", "-c", _PEFT, called, *values, folder / "theirs", base, *tuned]
    models = [{"model": str(path), "parameters": {"weight": weight, **case.each}} for path, weight in used]
    wanted: dict[str, Any] = {
        "merge_method": called, "dtype": dtype, "models": models, "parameters": dict(case.theirs),
    }  # fmt: skip
    if case.base or called == "slerp":
        wanted["base_model"] = str(base if case.base else tuned[0])
    yaml = folder / "theirs.yaml"
    yaml.write_text(json.dumps(wanted))
    flags = ["-j", str(average.CORES), "--async-write", "--quiet", "--random-seed", "0"]
    return ours, [average.install_peer(folder), yaml, folder / "theirs", *flags]


def run(command: list[Any], folder: Path) -> Took:
    """A whole process; what it printed goes to the folder's log."""
    with (folder / "log").open("ab") as log:
        return family.run(command, log, log, {**os.environ, "HF_HOME": str(folder / "home")})


def fresh(folder: Path) -> None:
    """No outputs, and nothing of an interrupted run, which the next would continue in less time and memory."""
    for name in ("ours", "theirs", ".ours.cooking"):
        shutil.rmtree(folder / name, ignore_errors=True)


def values(folder: Path, cases: list[Case]) -> None:
    """Print how far results differ."""
    paths = small_models(folder)
    base, *tuned = [read(path) for path in paths]
    print("| method | peer | largest difference | mean | ours: changed, along | theirs |\n|---|---|---|---|---|---|")
    for case in cases:
        fresh(folder)
        ours, theirs = commands(case, paths, folder, "float32")
        run(ours, folder)
        run(theirs, folder)
        mine, other = read(folder / "ours"), read(folder / "theirs")
        assert mine.keys() == other.keys() == base.keys()
        largest = total = size = 0.0
        for name, start in base.items():
            difference, change = (mine[name] - other[name]).abs(), (mine[name] - start).abs()
            largest = max(largest, float(difference.max() / change.max().clamp(min=1e-30)))
            total, size = total + float(difference.sum()), size + float(change.sum())
        row = f"| `{case.title}` | {case.peer} | "
        if case.random:
            used = [(each, weight) for each, weight in zip(tuned, case.weights, strict=False)]
            plain = {name: sum(w * (each[name] - start) for each, w in used) for name, start in base.items()}
            row += f"random | | {_share(mine, base, plain)} | {_share(other, base, plain)} |"
        else:
            row += f"{largest:.1e} | {total / size:.1e} | | |"
        print(row, flush=True)


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in float64."""
    return {
        name: value.double() for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()
    }


def _share(mixed: Mapping[str, Tensor], base: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> str:
    """The share of entries that changed, and the change along the plain sum in parts of it."""
    changed = sum(int((mixed[name] != start).sum()) for name, start in base.items())
    along = sum(float(((mixed[name] - start) * plain[name]).sum()) for name, start in base.items())
    length = sum(float(each.square().sum()) for each in plain.values())
    return f"{changed / sum(start.numel() for start in base.values()):.4f}, {along / length:.4f}"


def speed(folder: Path, cases: list[Case], runs: int) -> None:
    """Print what whole processes take."""
    made = inputs.llama(0.5)
    paths = [inputs.write(folder / f"tuned-{n}", made, n, 2, apart=1e-3 if n else 0.0) for n in range(5)]
    print("| method | ours: wall, CPU, peak | mergekit | wall, run by run | CPU |\n|---|---|---|---|---|")
    for case in cases:
        taken: dict[str, list[Took]] = {"ours": [], "theirs": []}
        weights = case.weights if case.name == "slerp" else (*case.weights, 1.0)
        both = commands(Case(**{**vars(case), "weights": weights}), paths, folder, "bfloat16")
        for _ in range(runs):
            for name, command in zip(taken, both, strict=True):
                fresh(folder)
                average.cat(paths)  # so that all inputs are in memory
                taken[name].append(run(command, folder))
        row = [f"`{case.title}`"]
        for each in taken.values():
            middle = [
                statistics.median(values) for values in zip(*[(t.wall, t.cpu, t.peak) for t in each], strict=True)
            ]
            row.append(f"{middle[0]:.1f} s, {middle[1]:.1f} s, {middle[2]:.0f} MB")
        pairs = list(zip(taken["theirs"], taken["ours"], strict=True))
        for ratios in ([a.wall / b.wall for a, b in pairs], [a.cpu / b.cpu for a, b in pairs]):
            row.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench")
    parser.add_argument("--values", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    average.install_peer(folder)
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    if not options.values:
        return speed(folder, [case for case in chosen if case.peer == "mergekit" and not case.note], options.runs)
    if not list((folder / "peer").glob("lib/*/site-packages/peft")):
        subprocess.run([folder / "peer" / "bin" / "pip", "install", "--quiet", PEFT], check=True)
    return values(folder, chosen)


if __name__ == "__main__":
    main()
