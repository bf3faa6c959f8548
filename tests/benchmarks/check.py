"""`check` of fine-tunes on a Hub that takes its time: seconds, requests and bytes.

    python tests/benchmarks/check.py [--models 8] [--latency 0.05] [--runs 5]

Publishes an encoder of 33 million numbers (float32, one file of 134 MB) and fine-tunes of it, with cards and
tokenizers, on a local Hub in a process of its own that answers every request after so many seconds. Timed are whole
processes of `hf-soup check`: the first one, when nothing is remembered of what transformers says about the config, and
later ones. Then the same models as folders. Requests are those of the last run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read by the client when it is imported

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

SERVE = """
import asyncio, json, sys
from pathlib import Path
from hf_soup.local_hub import LocalHub

latency = float(sys.argv[2])

async def wait(request):
    await asyncio.sleep(latency)

with LocalHub(Path(sys.argv[1])) as hub:
    print(hub.endpoint, hub.token, flush=True)
    for line in sys.stdin:
        if line.strip() == "slow":
            hub.intercept = wait
        hub.requests.clear() if line.strip() == "forget" else None
        found = [[each.method, each.path, each.range] for each in hub.requests]
        print(json.dumps(found), flush=True)
"""


def make(folder: Path, models: int) -> list[Path]:
    """An ancestor and its fine-tunes."""
    config = BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=12)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder / "base")
    words = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(30517))])
    tensors = load_file(folder / "base" / "model.safetensors")
    for number in range(models):
        path = folder / f"m{number}"
        path.mkdir()
        shutil.copy(folder / "base" / "config.json", path)
        moved = {name: each + 0.1 * each.std(correction=0) * torch.randn_like(each) for name, each in tensors.items()}
        save_file(moved, path / "model.safetensors", {"format": "pt"})
        (path / "README.md").write_text("---\nlicense: mit\nbase_model: bench/base\n---\n")
    every = [folder / "base", *(folder / f"m{number}" for number in range(models))]
    for path in every:
        (path / "vocab.txt").write_text(words)
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return every


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, dict[str, object]]:
    """Seconds of a whole process, and what it printed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "hf_soup", "check", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, json.loads(done.stdout)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--runs", type=int, default=5)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make(folder, wanted.models)
        serve = [sys.executable, "-c", SERVE, str(folder / "hub"), str(wanted.latency)]
        with subprocess.Popen(serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            endpoint, token = server.stdout.readline().split()

            def ask(word: str) -> list[list[str]]:
                server.stdin.write(f"{word}\n")
                server.stdin.flush()
                return json.loads(server.stdout.readline())

            api = HfApi(endpoint=endpoint, token=token)
            for path in paths:
                api.create_repo(f"bench/{path.name}")
                files = [CommitOperationAdd(file.name, file) for file in sorted(path.iterdir())]
                api.create_commit(f"bench/{path.name}", files, commit_message="Upload")
            ask("slow")
            environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token}
            models = [f"bench/{path.name}" for path in paths[1:]]
            firsts, laters = [], []
            for run in range(wanted.runs):
                environment["HF_HOME"] = str(folder / f"home{run}")
                firsts.append(timed(models, environment)[0])
                ask("forget")
                seconds, report = timed(models, environment)
                laters.append(seconds)
            requests = ask("say")
            server.stdin.close()
        assert report["verdict"] == "proven", report["reasons"]
        for path in paths:
            (path / "README.md").unlink(missing_ok=True)  # it would have the Hub asked, which is no longer there
        here = [timed([*map(str, paths[1:]), "--base", str(paths[0])], environment)[0] for _ in range(wanted.runs)]
        for title, found in (("first", firsts), ("later", laters), ("folders", here)):
            print(f"{title:8} {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})")
        print(f"bytes    {report['transferred_bytes'] / 1e6:.2f} MB together, {wanted.models + 1} repos")
        kinds: Counter[str] = Counter()
        for method, path, given in requests:
            start = given.removeprefix("bytes=").partition("-")[0]
            redirected = "" if "/cdn/" in path or not given else ", redirected"
            kind = "samples" if start not in ("", "0") else "header" if given else path.split("/")[1]
            kinds[f"{method} {kind}{redirected}"] += 1
        print("requests " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))


if __name__ == "__main__":
    main()
