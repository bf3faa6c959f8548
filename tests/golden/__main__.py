"""What the package makes of small recipes and bad inputs, written down and compared.

::

    PYTHONPATH=../before python tests/golden record before.json
    python tests/golden record after.json
    python tests/golden compare before.json after.json

It runs the `hf_soup` that Python finds, as a user does, so the code of before can be recorded with this script.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FOREIGN = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "EVALUATE_")


def environment(home: Path, endpoint: str) -> dict[str, str]:
    """Nothing of the user's account and settings, and a local Hub."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and not name.lower().endswith("_proxy")
    }
    # Commands run in another folder.
    paths = [str(Path(each).resolve()) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "home"), "HF_TOKEN": "hf_acme", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        "TMPDIR": str(home / "temporary"), "MPLCONFIGDIR": str(home / "home" / "matplotlib"), "COLUMNS": "100",
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/golden", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="Cook every recipe, try every bad input, and write down what came.")
    recording.add_argument("file", type=Path)
    recording.add_argument("--only", default="", metavar="PATTERN", help="Those whose name matches alone.")
    comparing = commands.add_parser("compare", help="Print how two records differ; exit code 1 when they do.")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    working = commands.add_parser("work")  # what `record` starts, in an environment of its own
    for name in ("root", "endpoint", "file", "only"):
        working.add_argument(name)
    given = parser.parse_args()
    if given.command == "compare":
        from golden.comparing import compare

        return compare(given.before, given.after)
    if given.command == "work":
        from golden.recording import record

        record(Path(given.root), given.endpoint, Path(given.file), given.only)
        return 0
    # Before the client is imported; the local Hub takes plain uploads.
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from golden.models import make_all, publish
    from hf_soup import local_hub

    print(f"hf_soup of {Path(local_hub.__file__).parents[2]}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        home = Path(folder).resolve()
        for name in ("kitchen", "temporary", "home"):
            (home / name).mkdir()
        # The Hub is in this process: what the package does apart needs a process without other threads.
        with local_hub.LocalHub(home / "hub", users={"hf_acme": "acme", "hf_other": "other"}) as hub:
            make_all(home / "kitchen")
            publish(home / "kitchen", hub)
            line = ["work", str(home / "kitchen"), hub.endpoint, str(given.file.absolute()), given.only]
            command = [sys.executable, str(Path(__file__).parent), *line]
            return subprocess.run(command, env=environment(home, hub.endpoint), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
