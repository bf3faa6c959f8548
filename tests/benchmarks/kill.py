"""A hundred SIGKILLs at random moments: the same command continues, and its bytes do not show it.

    python tests/benchmarks/kill.py [--folder DIR] [--kills 100] [--seed 0]

Averages 8 models of 0.5 GB. Each round starts a cook and kills it at a moment drawn evenly from the last 70 % of the
time that a whole one takes (before that Python imports); it may kill what continues it again, up to three times. Then
it lets the command finish, and compares digest and files with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import inputs


def state(folder: Path, out: Path) -> str:
    """What a kill found."""
    staging = folder / f".{out.name}.cooking"
    if out.exists():
        return "after the rename"
    if not (staging / "plan.json").exists():
        return "before the merge"
    noted = sum(len(path.read_text().splitlines()) for path in staging.glob("journal.*"))
    return "in the merge" if noted else "before the first unit"


def digest(out: Path) -> str:
    """Of all files of a soup but the times in them."""
    total = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file():
            total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hf-soup-bench")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder: Path = options.folder
    made = inputs.llama(0.5)
    paths = [inputs.write(folder / f"half-{number}", made, number) for number in range(8)]
    out = folder / "killed"
    command = [sys.executable, "-m", "hf_soup", "cook", *paths, "-o", out, "--quiet", "--json"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish() -> dict[str, object]:
        process = start()
        said, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"the continued run failed:\n{errors}")
        report: dict[str, object] = json.loads(said)
        return report

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / f".{out.name}.cooking", ignore_errors=True)

    clean()
    finish()
    clean()
    started = time.perf_counter()
    expected_digest = finish()["digest"]
    whole = time.perf_counter() - started
    expected = digest(out)
    clean()
    dice = random.Random(options.seed)
    found: collections.Counter[str] = collections.Counter()
    kills = resumed = rounds = 0
    while kills < options.kills:
        rounds += 1
        for _ in range(dice.randint(1, 3)):
            process = start()
            time.sleep(dice.uniform(0.3 * whole, whole))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode == 0:
                found["too late"] += 1
                break
            assert process.returncode == -signal.SIGKILL, process.returncode
            kills += 1
            found[state(folder, out)] += 1
            if out.exists():
                break
        if not out.exists():
            report = finish()
            resumed += bool(report["resumed"])
            assert report["digest"] == expected_digest, report
        assert digest(out) == expected, f"round {rounds}: other bytes"
        clean()
        left = [path for path in folder.iterdir() if "killed" in path.name]
        assert not left, left
    print(f"{kills} kills in {rounds} rounds (a whole run takes {whole:.1f} s): every soup has the same bytes")
    print(f"{resumed} runs continued from finished units")
    for what, count in found.most_common():
        print(f"  {count:3} {what}")


if __name__ == "__main__":
    main()
