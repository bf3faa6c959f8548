"""The whole demo, with a zoo that trains in seconds, on a machine that is set up as badly as it can be."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

import hf_soup.local_hub
from hf_soup.demo import DigitsZoo, LanguageZoo, Shell, Zoo, run_demo
from hf_soup.local_hub import LocalHub
from hf_soup.local_hub.wire import Record

TOKEN = "hf_" + "u" * 34
DIGITS = DigitsZoo(letters=256, letter_epochs=1, good=2, epochs=(1, 2))
LANGUAGE = LanguageZoo(good=2, steps=4, fine_tune_steps=(1, 2), texts=(24, 32))


def ask(hub: str, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what runs in this process."""
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", token)


@pytest.mark.parametrize("zoo", [DIGITS, LANGUAGE], ids=["digits", "language models"])
def test_the_demo_needs_no_network_and_no_account(
    zoo: Zoo,
    cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Offline mode, a dead proxy and the user's own token are set; it passes, and the token reaches nobody.

    It uploads and pushes in processes of their own, which need all of it; what loads torch runs in this one.
    """
    told, requests = [], list[Record]()
    run = Shell.run

    class Watched(LocalHub):
        def __exit__(self, *details: object) -> None:
            requests.extend(self.requests)
            super().__exit__(*details)  # type: ignore[arg-type]

    def run_here(shell: Shell, name: str, *arguments: str, stderr: int | None = None) -> str:
        if name.split()[1:2] in (["upload"], ["push"]):
            return run(shell, name, *arguments, stderr=stderr)
        told.append(capsys.readouterr().out)
        with pytest.MonkeyPatch.context() as patch:
            for variable in bad:
                patch.delenv(variable)
            ask(shell.environment["HF_ENDPOINT"], shell.environment["HF_TOKEN"], patch)
            if name != "load":
                return str(cli(*arguments[2:]).out)
            patch.setattr(sys, "argv", list(arguments))
            runpy.run_path(arguments[0])
            return capsys.readouterr().out

    bad = {
        "HF_HUB_OFFLINE": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HF_TOKEN": TOKEN,
    }
    with monkeypatch.context() as patch:
        for name, value in bad.items():
            patch.setenv(name, value)
        patch.setattr(hf_soup.local_hub, "LocalHub", Watched)
        patch.setattr(Shell, "run", run_here)
        run_demo(tmp_path / "demo", zoo, progress=lambda text: None)

    said = "".join([*told, capsys.readouterr().out])
    assert "$ hf-soup check" in said
    assert "$ hf-soup cook" in said
    assert "$ hf-soup push" in said
    assert "hf-soup cook recipe.yaml" in said, "it ends with what the user would run"
    assert all(row in said for row in [*zoo.fine_tunes, "uniform soup of all 3", "greedy soup of"])
    assert ("probability ensemble" in said) == (zoo is DIGITS)
    summary = json.loads((tmp_path / "demo" / "1" / "soup" / "soup.json").read_text())
    assert len(summary["lineage"]["ingredients"]) == 3
    assert ("The greedy soup is a copy of it." in said) == ("greedy soup of 1\n" in re.sub(" {2,}.*", "", said))
    if "The greedy soup is a copy of it." not in said:
        for title in ["shifted test accuracy", "test accuracy"] if zoo is DIGITS else ["test bits_per_byte"]:
            sentence = summary["comparisons"][title]["sentence"]
            assert f"{title}: {sentence}" in said, "it says whether the soup won, either way"
    if zoo is LANGUAGE:
        (bits,) = re.findall(r" needs (\S+) bits per byte of 32 test texts", said)
        assert float(bits) == pytest.approx(summary["scores"]["soup"]["test bits_per_byte"]["value"], abs=1e-3)

    # What it published is what it says, on a machine that has nothing but the repos.
    shutil.rmtree(tmp_path / "home")
    with LocalHub(tmp_path / "demo" / "hub") as hub:
        ask(hub.endpoint, hub.token, monkeypatch)
        pushed = re.findall(r"hf-soup push \S+ (\S+)", said)[-1]
        verified = cli("verify", pushed, "--score", "--json").json
    assert verified["verdict"] == "identical", verified
    assert len(verified["scores"]) == len(summary["scores"]["soup"])

    assert len(requests) > 50
    assert not any(TOKEN in record.authorization for record in requests)
    assert any(record.authorization for record in requests), "the generated token is used"
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert TOKEN.encode() not in path.read_bytes(), path
