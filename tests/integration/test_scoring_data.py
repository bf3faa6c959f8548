"""Data sets of a Hub over HTTP: pinned once, read at the commit, and refused in one clear error."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hub_faults import Hangup
from huggingface_hub import CommitOperationAdd, HfApi, constants

from hf_soup.local_hub import LocalHub

Load = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

#: Reads one scoring: the variable ``said``, or in a process of its own what its argument says.
CODE = """
import json, sys, tempfile
from pathlib import Path
from hf_soup.errors import SoupError
from hf_soup.recipe import Scoring
from hf_soup.evaluation import data
said = globals().get("said") or json.loads(sys.argv[1])
try:
    with tempfile.TemporaryDirectory() as cache:
        scoring, rows = data.load([Scoring(task="text-classification", **said)], Path(cache), token=None)[0]
        print(json.dumps({
            "dataset": scoring.dataset, "revision": scoring.revision, "config": rows.origin.config,
            "texts": list(rows.table["text"]), "classes": data.declared_classes(rows.table, "label"),
        }))
except SoupError as error:
    print(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}))
"""
CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': sad
          '1': glad
---
"""


@pytest.fixture
def local_hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub with the data set."""
    with LocalHub(tmp_path / "hub", users={"t-acme": "acme", "t-other": "other"}) as running:
        api = HfApi(endpoint=running.endpoint, token="t-acme")
        api.create_repo("acme/mood", repo_type="dataset")
        commit(api, "first")
        yield running


def commit(api: HfApi, text: str) -> str:
    lines = "".join(json.dumps({"text": f"{text} {i}", "label": i % 2}) + "\n" for i in range(6))
    files = {"README.md": CARD, "train.jsonl": lines, "test.jsonl": lines[: len(lines) // 2]}
    operations = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    done = api.create_commit("acme/mood", operations, commit_message=text, repo_type="dataset")
    return str(done.oid)


@pytest.fixture
def load(online: LocalHub, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Load:
    """Reads one scoring as ``CODE`` does, in this process."""

    def run(**said: Any) -> dict[str, Any]:
        exec(CODE, {"said": said})
        out, err = capfd.readouterr()
        assert "it/s" not in err
        found: dict[str, Any] = json.loads(out)
        return found

    return run


def test_a_data_set_is_pinned_and_read_at_its_commit(load: Load, online: LocalHub) -> None:
    said = {"dataset": "acme/mood", "split": "train[:2]"}
    first = load(**said)
    assert first["texts"] == ["first 0", "first 1"]
    assert first["classes"] == ["sad", "glad"]
    assert len(first["revision"]) == 40
    second = commit(HfApi(endpoint=online.endpoint, token="t-acme"), "second")
    now = load(**said)
    assert (now["revision"], now["texts"]) == (second, ["second 0", "second 1"])
    # A resolved recipe names the commit, and reads what it read then.
    again = load(revision=first["revision"], **said)
    assert again == first


def test_what_is_wrong_is_said(load: Load) -> None:
    missing = load(dataset="acme/nothing", split="test")
    assert missing["error"] == "ResolveError"
    assert "acme/nothing" in missing["message"]
    split = load(dataset="acme/mood", split="validation")
    assert "no split 'validation': its splits are train (6 rows), test (3 rows)" in split["message"]
    config = load(dataset="acme/mood", split="test", config="french")
    assert "french" in config["message"]
    assert "default" in config["message"]


def test_a_moved_data_set_is_known_by_its_new_name(load: Load, online: LocalHub) -> None:
    api = HfApi(endpoint=online.endpoint, token="t-acme")
    api.move_repo("acme/mood", "acme/moods", repo_type="dataset")
    found = load(dataset="acme/mood", split="test")
    assert found["dataset"] == "acme/moods"


def test_a_gated_data_set_and_a_lost_connection(load: Load, online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    api = HfApi(endpoint=online.endpoint, token="t-acme")
    online.intercept = lambda request: Hangup() if request.url.path.endswith("test.jsonl") else None
    lost = load(dataset="acme/mood", split="test")
    assert lost["error"] == "ScoringError"
    assert "Cannot load the data of acme/mood test" in lost["message"]
    online.intercept = None
    api.update_repo_settings("acme/mood", gated="auto", repo_type="dataset")
    monkeypatch.setenv("HF_TOKEN", "t-other")
    gated = load(dataset="acme/mood", split="test")
    assert gated["error"] in ("ResolveError", "ScoringError")
    assert "gated" in gated["message"] + gated["hint"]
    assert "t-other" not in json.dumps(gated)


def test_a_cached_data_set_is_read_without_a_network(
    load: Load, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a process that knows only the cache; what is not in one is said."""
    said = {"dataset": "acme/mood", "split": "test"}
    first = load(**said)
    command = [sys.executable, "-c", CODE, json.dumps({"revision": first["revision"], **said})]
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    again = subprocess.run(command, env=offline, capture_output=True, text=True, check=True)
    assert "it/s" not in again.stderr
    assert json.loads(again.stdout) == first

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    # Pinned, so that only the reading itself needs the network.
    unread = load(revision=first["revision"], **said)
    assert unread["error"] in ("ResolveError", "ScoringError")
    assert unread["hint"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(**said)["error"] == "ResolveError"
