"""`cook --stream` from a Hub of a given bandwidth: time against fetching alone and merging alone, and the disk used.

    python tests/benchmarks/stream.py [--folder DIR] [--models 4] [--size 0.5] [--rates 50 200] [--runs 3]

Puts models of 0.5 GB in 4 shards on a local Hub in a process of its own, which sends no more than so many MB a second
to all connections together (0: as fast as it can). Timed in turn, in a process that has imported everything:

fetch     the files alone, to where `--stream` puts them, as many at a time
merge     `cook` of the same files on the disk
stream    `cook --stream`
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
from pathlib import Path

import inputs

SERVE = """
import asyncio, sys, time
from pathlib import Path
from starlette.responses import Response
from hf_soup.local_hub import LocalHub

rate, next_at = float(sys.argv[2]) * 1e6, 0.0

class Throttled(Response):
    def __init__(self, response):
        super().__init__()
        self.inner = response

    async def __call__(self, scope, receive, send):
        async def sending(message):
            global next_at
            now = time.monotonic()
            next_at = max(now, next_at) + len(message.get("body", b"")) / rate
            await asyncio.sleep(next_at - now)
            await send(message)
        await self.inner(scope, receive, sending)

with LocalHub(Path(sys.argv[1])) as hub:
    if rate:
        hub.transform = lambda request, response: Throttled(response) if "/cdn/" in request.url.path else response
    print(hub.endpoint, hub.token, flush=True)
    sys.stdin.read()
"""
WORK = """
import json, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import hf_soup.merging.to_files, hf_soup.workflows.cook
from hf_soup.hub import repo as hub, download as transfer

what, out, models = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
os.fsync = lambda descriptor: None
peak, stop, beside = [0], threading.Event(), out.parent / f".{out.name}.cooking/fetched"

def watch():
    while not stop.is_set():
        try:
            peak[0] = max(peak[0], sum(path.stat().st_size for path in beside.iterdir()))
        except OSError:
            pass
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
if what == "fetch":
    repos = [hub.resolve(model) for model in models]
    files = [(repo, name) for name in sorted(repos[0].files) for repo in repos if name.endswith(".safetensors")]
    out.mkdir()
    started = time.perf_counter()
    def get(item):
        repo, name = item
        target = out / f"{repo.id.replace('/', '-')}-{name}"
        transfer.download_beside(repo, name, target, arrived=lambda count: None, stopped=lambda: False)
        target.unlink()
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(get, files))
else:
    started = time.perf_counter()
    hf_soup.cook(models, out, stream=what == "stream")
seconds = time.perf_counter() - started
stop.set()
print(json.dumps([seconds, peak[0]]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--size", type=float, default=0.5)
    parser.add_argument("--rates", type=float, nargs="+", default=[50.0, 200.0])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder: Path = options.folder
    made = inputs.llama(options.size)
    paths = [inputs.write(folder / f"stream-{number}", made, number, 4) for number in range(options.models)]
    size = sum(file.stat().st_size for file in paths[0].glob("*.safetensors"))
    root, home, out = folder / "hub", folder / "home", folder / "streamed"
    ids = [f"acme/stream-{number}" for number in range(options.models)]
    print(f"{len(ids)} x {size / 1e9:.2f} GB in 4 shards, {len(os.sched_getaffinity(0))} cores, {options.runs} runs")
    for rate in options.rates:
        with subprocess.Popen(
            [sys.executable, "-c", SERVE, root, str(rate)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout
            assert server.stdin
            endpoint, token = server.stdout.readline().split()
            env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
                   "HF_HOME": str(home)}  # fmt: skip
            for name, path in zip(ids, paths, strict=True):
                code = "import sys; from huggingface_hub import HfApi; a = HfApi(); a.create_repo(sys.argv[1], " \
                       "exist_ok=True); a.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"  # fmt: skip
                subprocess.run([sys.executable, "-c", code, name, path], env=env, check=True, capture_output=True)
            found: dict[str, list[float]] = {"fetch": [], "merge": [], "stream": []}
            peak = 0
            for run in range(options.runs + 1):
                for what, seconds in found.items():
                    shutil.rmtree(out, ignore_errors=True)
                    models = paths if what == "merge" else ids
                    done = subprocess.run([sys.executable, "-c", WORK, what, out, *models], env=env, check=True,
                                          capture_output=True, text=True)  # fmt: skip
                    took, beside = json.loads(done.stdout)
                    if run:
                        seconds.append(took)
                        peak = max(peak, beside)
            shutil.rmtree(out)
            server.stdin.close()
        ratios = [s / max(f, m) for f, m, s in zip(*found.values(), strict=True)]
        medians = ", ".join(f"{what} {statistics.median(seconds):.2f} s" for what, seconds in found.items())
        print(f"{rate:g} MB/s: {medians}; stream / the slower of the two, run by run: median "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); beside the output at most "
              f"{peak / 1e6:.0f} MB, one shard of each is {size / 4e6 * len(ids):.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
