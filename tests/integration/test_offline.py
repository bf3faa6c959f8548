"""Without a network: what was fetched once is enough, and what was not is named."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hf_soup import Recipe
from hf_soup.hub import download as transfer, repo as hub
from hf_soup.local_hub import LocalHub

# The client hands files to its HTTP library in a way that the library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def test_what_was_cooked_once_is_cooked_again_offline(
    cli: Callable[..., Any],
    publish: Callable[..., str],
    online: LocalHub,
    hf_soup: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By a branch or by a commit, and it says that the Hub was not asked; with the same bytes."""
    for name in ("base", "a", "b", "c"):
        publish(name)
    first = cli("cook", "acme/a", "acme/b", "-o", "first", "--json").json
    cli("push", "first", "acme/pair")
    second = cli("cook", "acme/pair", "acme/a", "-o", "second", "--json").json
    repo = hub.resolve("acme/pair")
    for file in repo.files:
        transfer.fetch_one(repo, file)  # as somebody has who used the soup
    asked = len(online.requests)

    # A soup is its leaves offline too.
    of_soups = hf_soup("cook", "acme/pair", "acme/a", "-o", "of-soups", "--json", HF_HUB_OFFLINE="1")
    assert of_soups.returncode == 0, of_soups.stderr
    assert json.loads(of_soups.stdout)["digest"] == second["digest"]
    assert second["weights"] == json.loads(of_soups.stdout)["weights"] == {"acme/a": 3.0, "acme/b": 1.0}

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = cli("cook", "acme/a", "acme/b", "-o", "again", "--json")
    assert again.json["digest"] == first["digest"]
    assert "note: acme/a: the Hub was not reached; the commit is the one in the cache" in again.err
    missing = cli("cook", "acme/a", "acme/c", "-o", "more")
    assert missing.code == 1
    assert "'acme/c' is not in the cache, and offline mode is on.\nUnset HF_HUB_OFFLINE" in missing.err

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli("cook", "first/soup.yaml", "-o", "resolved", "--json").json["digest"] == first["digest"]
    assert len(online.requests) == asked
    for name in ("again", "resolved"):
        cooked, earlier = (Recipe.load(tmp_path / each / "soup.yaml") for each in (name, "first"))
        assert cooked.ingredients == earlier.ingredients


def test_the_commit_that_is_named_is_the_one_that_is_used(
    cli: Callable[..., Any], publish: Callable[..., str], family: Path, tmp_path: Path
) -> None:
    """A branch that moved does not move the soup."""
    for name in ("base", "a", "b"):
        publish(name)
    first = cli("cook", "acme/a", "acme/b", "-o", "first", "--json").json
    (tmp_path / "c").mkdir()
    for path in (family / "c").iterdir():
        (tmp_path / "c" / path.name).write_bytes(path.read_bytes())
    publish("a", tmp_path / "c")
    assert cli("cook", "first/soup.yaml", "-o", "again", "--json").json["digest"] == first["digest"]
    assert cli("cook", "acme/a", "acme/b", "-o", "moved", "--json").json["digest"] != first["digest"]
