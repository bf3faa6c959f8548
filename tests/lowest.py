"""Run the suite with the lowest versions that setup.cfg allows, in an environment that is made for it and removed.

    python tests/lowest.py [--python 3.12] [what pytest is to do]

Needs `uv` on the path (`pip install uv`), and about 8 GB of disk where pip's torch is the CUDA build.
docs/dependencies.md says what to do when a bound has to go up.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What older releases need and newer ones do not: transformers showed no image processors without it.
BESIDE = ("torchvision>=0.24",)
#: Those that publish no wheels, or are made here. Of all others a version counts only if it has a wheel.
BUILT = ("hf-soup", "pylatexenc", "rouge-score", "sqlitedict", "word2number")
#: What the newest releases alone do, not this package; docs/dependencies.md says it of each.
NEWEST_ONLY = (
    "tests/unit/test_docs.py::test_a_schema_is_what_the_value_says",
    "tests/integration/test_ecosystem.py::test_the_command_is_an_extension_of_hf",
    "tests/integration/test_local_hub.py::test_a_download_goes_on_after_a_broken_connection",
    "tests/integration/test_push.py::test_the_card_is_one_that_the_hub_takes",
    "tests/integration/test_recipes.py::test_what_was_pushed_loads_by_its_name",
    "tests/integration/test_hub_faults.py::test_a_signal_ends_it_at_once[15]",
    "tests/integration/test_push_faults.py::test_an_answer_that_no_hub_gives_is_said[commit]",
)


def main() -> int:
    """Make the environment, show what is in it, and hand on what pytest says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.11", help="a version, or the path of one (default: %(default)s)")
    known, to_pytest = parser.parse_known_args()
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("`uv` is not on the path. Install it: `pip install uv`.")
    with tempfile.TemporaryDirectory(prefix="lowest-") as folder:
        python = Path(folder, "bin", "python")
        subprocess.run([uv, "venv", "--quiet", "--python", known.python, folder], check=True)
        lowest = ["--compile-bytecode", "--resolution", "lowest-direct", "--only-binary", ":all:"]
        lowest += [option for name in BUILT for option in ("--no-binary", name)]
        install = [uv, "pip", "install", "--quiet", "--python", python, *lowest, "--editable", f"{ROOT}[test]", *BESIDE]
        subprocess.run(install, check=True)
        subprocess.run([uv, "pip", "list", "--python", python], check=True)
        # Old releases warn of new ones that they were not written for; with the newest every warning is an error.
        leniently = ["-W", "default", *(option for test in NEWEST_ONLY for option in ("--deselect", test))]
        return subprocess.run([python, "-m", "pytest", *leniently, *to_pytest], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
