"""What benchmarks measure with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# pytest's importlib mode leaves them off the path.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import family


def test_a_peak_is_that_of_the_process_and_not_of_this_one() -> None:
    """This one holds 200 MB, and the one that is measured 50 beside what Python takes."""
    held = bytearray(os.urandom(1 << 20)) * 200
    code = "import os; held = bytearray(os.urandom(1 << 20)) * 50"
    took = family.run([sys.executable, "-S", "-c", code], subprocess.DEVNULL, subprocess.DEVNULL, os.environ)
    assert 50 < took.peak < 120 < len(held) / 1e6
    with pytest.raises(subprocess.CalledProcessError):
        family.run([sys.executable, "-S", "-c", "1 / 0"], subprocess.DEVNULL, subprocess.DEVNULL, os.environ)
