"""Fixtures that every kind of test shares: a local Hub, and an environment that knows nothing of the user's account."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_soup.demo import child_environment
from hf_soup.local_hub import LocalHub

OWNER = "acme"


@pytest.fixture
def local_hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A local Hub on which the user may write in every namespace."""
    with LocalHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def environment(local_hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    """The environment of a child process that talks to the local Hub, with a home of its own."""
    return child_environment(os.environ, tmp_path / "home", local_hub.endpoint, local_hub.token)


@pytest.fixture
def hf_soup(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``hf-soup ARGUMENTS`` in a process of its own, in ``tmp_path``; keywords change its environment."""

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hf_soup", *map(str, arguments)],
            env={**environment, **changes},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run
