"""The whole demo, with a zoo that trains in seconds, on a machine that is set up as badly as it can be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_soup.local_hub
from hf_soup.demo import Zoo, child_environment, run_demo
from hf_soup.local_hub import LocalHub
from hf_soup.local_hub.wire import Record

TOKEN = "hf_" + "u" * 34


def test_the_demo_needs_no_network_and_no_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Offline mode, a dead proxy and the user's own token are set; it passes, and the token reaches nobody."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HF_TOKEN": TOKEN,
    }.items():
        monkeypatch.setenv(name, value)
    requests: list[Record] = []

    class Watched(LocalHub):
        def __exit__(self, *details: object) -> None:
            requests.extend(self.requests)
            super().__exit__(*details)  # type: ignore[arg-type]

    monkeypatch.setattr(hf_soup.local_hub, "LocalHub", Watched)
    zoo = Zoo(letters=256, letter_epochs=1, good=2, epochs=(1, 2))
    run_demo(tmp_path / "demo", progress=lambda text: None, zoo=zoo)

    said = capfd.readouterr().out
    assert "$ hf-soup check" in said
    assert "$ hf-soup cook" in said
    assert "$ hf-soup push" in said
    assert "probability ensemble" in said
    assert "hf-soup cook recipe.yaml" in said, "it ends with what the user would run"
    rows = ["vit-digits-1", "vit-digits-2", "vit-digits-hot", "uniform soup of all 3", "greedy soup of", "ensemble"]
    assert all(row in said for row in rows)
    summary = json.loads((tmp_path / "demo" / "1" / "soup" / "soup.json").read_text())
    assert len(summary["lineage"]["ingredients"]) == 3
    for title in ("shifted test accuracy", "test accuracy"):
        sentence = summary["comparisons"][title]["sentence"]
        assert f"{title}: {sentence}" in said, "it says whether the soup won, either way"

    # What it published is what it says, on a machine that has nothing but the repos.
    with LocalHub(tmp_path / "demo" / "hub") as hub:
        environment = child_environment(os.environ, tmp_path / "fresh", hub.endpoint, hub.token)
        command = [
            sys.executable,
            "-m",
            "hf_soup",
            "verify",
            re.findall(r"hf-soup push \S+ (\S+)", said)[-1],
            "--score",
            "--json",
        ]
        verified = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert json.loads(verified.stdout)["verdict"] == "identical", verified.stdout + verified.stderr
    assert len(json.loads(verified.stdout)["scores"]) == len(summary["scores"]["soup"])

    assert len(requests) > 50
    assert not any(TOKEN in record.authorization for record in requests)
    assert any(record.authorization for record in requests), "the generated token is used"
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert TOKEN.encode() not in path.read_bytes(), path
