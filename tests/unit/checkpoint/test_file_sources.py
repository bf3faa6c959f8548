"""Where files and tensors are: what callers ask of a repo on the Hub and of a folder alike."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_soup import hub
from hf_soup.checkpoint import FileSource, HubRepo, LocalFolder, fetch_files, open_checkpoint, require_unchanged
from hf_soup.errors import MergeError, ResolveError
from hf_soup.local_hub import LocalHub
from hf_soup.merging import fetch_weights, missing_weights, weight_files_of


@pytest.fixture
def folder(family: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family / "a", tmp_path / "a"))


def test_a_repo_and_a_folder_answer_alike(
    online: LocalHub, publish: Callable[..., str], family: Path, folder: Path
) -> None:
    repo: FileSource = HubRepo.of(hub.resolve(publish("a")))
    local: FileSource = LocalFolder.of(folder, folder.rglob("*"))
    assert repo.files["config.json"] == local.files["config.json"]
    assert repo.read("config.json", 2, 9) == local.read("config.json", 2, 9)
    assert (repo.reference, local.reference) == ("acme/a", str(folder))
    assert repo.content_id("model.safetensors") == local.content_id("model.safetensors")
    assert (len(repo.commit or ""), local.commit) == (40, None)
    assert (repo.here("config.json"), local.here("config.json")) == (None, folder / "config.json")
    places = fetch_files([(repo, "config.json"), (local, "config.json")], quiet=True)
    assert places == [repo.here("config.json"), folder / "config.json"]
    assert places[0].read_bytes() == places[1].read_bytes()
    for source in (repo, local):
        assert (source.fetch_assets() / "vocab.txt").read_bytes() == (family / "a" / "vocab.txt").read_bytes()


def test_a_file_is_fetched_once_however_often_its_model_was_opened(
    online: LocalHub, publish: Callable[..., str]
) -> None:
    repo = publish("a")
    first = open_checkpoint(repo)
    second = open_checkpoint(f"{repo}@{first.revision}")
    assert first.source == second.source
    assert first.source != LocalFolder.of(Path(repo), [])
    assert len(missing_weights([first, second])) == 1
    assert len(weight_files_of([first, second]).files()) == 1
    one, other = fetch_weights([first, second], quiet=True)
    assert one == other
    assert missing_weights([first, second]) == []


def test_what_a_folder_was_is_kept(folder: Path) -> None:
    """Later files are not in it, changed ones are not believed, and it says what is wrong with those that went."""
    opened = open_checkpoint(str(folder))
    (folder / "added.json").write_text("{}")
    assert "added.json" not in opened.source.files
    require_unchanged([opened])
    os.utime(folder / "model.safetensors", ns=(0, 0))
    with pytest.raises(MergeError, match=r"'model\.safetensors' changed while it was read"):
        require_unchanged([opened])
    (folder / "config.json").unlink()
    with pytest.raises(ResolveError, match=r"Cannot read '.*config\.json': No such file"):
        opened.source.read("config.json", 0, 1)


def test_a_converted_pickle_is_a_folder_of_weights_beside_the_model(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files stay where they are; the tensors have a place of their own, whose state is looked at too."""
    monkeypatch.setattr(hub, "own_cache_folder", lambda: tmp_path / "cache")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.arange(3.0)}, folder / "pytorch_model.bin")
    opened = open_checkpoint(str(folder), allow_pickle=True)
    assert opened.source.reference == str(folder)
    assert "model.safetensors" not in opened.source.files
    (path,) = (tmp_path / "cache" / "converted").glob("*/*.safetensors")
    assert fetch_weights([opened]) == [{"model.safetensors": path}]
    shutil.copytree(folder, tmp_path / "b", ignore=lambda *_: ["pytorch_model.bin"])
    shutil.copy(path, tmp_path / "b" / "model.safetensors")
    assert opened.revision == open_checkpoint(str(tmp_path / "b")).revision
    again = open_checkpoint(str(folder), allow_pickle=True)
    assert again.identity == opened.identity
    os.utime(path, ns=(0, 0))
    with pytest.raises(MergeError, match="changed while it was read"):
        require_unchanged([opened])
