"""In the ecosystem: `hf soup`, the client's settings, and who says hello to the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from hf_soup import __version__
from hf_soup.hub import client, repo as hub
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

ROOT = Path(__file__).parents[2]

#: The real `hf`, on a machine where GitHub is this checkout: what it would ask GitHub is answered here.
HF = f"""
import sys, types
from huggingface_hub.cli import extensions
from huggingface_hub.cli.hf import main

def github(method, url, **options):
    if url.endswith("/info/refs"):
        return types.SimpleNamespace(text="{"0" * 40} HEAD\\x00")
    if method == "HEAD" or url.endswith("pyproject.toml"):
        return types.SimpleNamespace(text="", status_code=200)
    raise OSError(f"404: {{url}}")  # there is no script and no manifest

extensions._github_request = github
sys.argv[0] = "hf"
main()
"""

#: `uv` as far as `hf` uses it, without a package index: the checkout in place of its archive, and what it needs as
#: it is installed here.
UV = f"""#!{sys.executable}
import pathlib, subprocess, sys
if sys.argv[1] == "venv":
    sys.exit(subprocess.run([sys.executable, "-m", "venv", "--without-pip", sys.argv[2]]).returncode)
assert sys.argv[1:4] == ["pip", "install", "--reinstall"] and sys.argv[6].endswith("/hf-soup/archive/HEAD.zip")
(site,) = pathlib.Path(sys.argv[5]).parents[1].glob("lib/*/site-packages")
(site / "needed.pth").write_text({sysconfig.get_paths()["purelib"]!r})
pip = [sys.executable, "-m", "pip", "--python", sys.argv[5], "install", "--quiet", "--no-deps", "--ignore-installed"]
sys.exit(subprocess.run([*pip, "--no-build-isolation", "--no-compile", "./archive"]).returncode)
"""


def test_the_command_is_an_extension_of_hf(environment: dict[str, str], tmp_path: Path) -> None:
    """`hf extensions install OWNER/hf-soup`, then `hf soup …`, whose arguments and exit codes are `hf-soup`'s."""
    shutil.copytree(ROOT / "hf_soup", tmp_path / "archive" / "hf_soup")
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / "archive" / file)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").write_text(UV)
    (tools / "uv").chmod(0o755)
    changed = {**environment, "HOME": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}"}
    changed["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"

    def hf(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HF, *arguments]
        return subprocess.run(command, env=changed, cwd=tmp_path, capture_output=True, text=True, check=False)

    installed = hf("extensions", "install", "acme/hf-soup")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "soup" in hf("extensions", "list").stdout
    told = hf("soup", "methods", "linear", "--json")
    assert told.returncode == 0, told.stderr
    assert [method["name"] for method in json.loads(told.stdout)["methods"]] == ["linear"]
    assert hf("soup", "push", str(tmp_path / "none"), "acme/soup").returncode == 1
    assert __version__ in hf("soup", "--version").stdout


def test_the_hub_is_told_who_asks(online: LocalHub, publish: Callable[..., str], cli: Callable[..., Any]) -> None:
    names = [publish("a"), publish("b")]
    agents: set[str] = set()

    def note(request: Request) -> None:
        if request.url.path.startswith("/api/models"):
            agents.add(request.headers["user-agent"])

    online.intercept = note
    assert cli("check", *names).code == 0
    assert hub.is_reachable()
    assert agents
    assert all(f"hf-soup/{__version__}" in agent for agent in agents), agents


@pytest.mark.parametrize(
    ("settings", "level"),
    [({}, "CRITICAL"), ({"HF_HUB_VERBOSITY": "info"}, "INFO"), ({"HF_DEBUG": "1"}, "DEBUG")],
)
def test_the_clients_log_is_as_loud_as_somebody_asks(settings: dict[str, str], level: str) -> None:
    """Silent by default, as what goes wrong is worded here."""
    code = (
        "import logging; from hf_soup.hub.client import patient; patient()\n"
        "print(logging.getLevelName(logging.getLogger('huggingface_hub').level))"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_VERBOSITY", "HF_DEBUG")}
    environment |= settings
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == level
    assert client.api().library_name == "hf-soup"
