"""What is kept between runs is compared when it is used: nothing that was damaged or swapped goes into a soup."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from lora import MARKS, adapted
from safetensors.torch import load_file

from hf_soup import Recipe, cook, hub
from hf_soup.checkpoint import open_checkpoint
from hf_soup.errors import ResolveError
from hf_soup.local_hub import LocalHub

pytestmark = MARKS
#: What is made anew with the bytes that it had. Notes of the Hub and of sha256s are written anew all the same.
MADE = ("converted", "data", "logits", "statistics", "transformers")
DAMAGES = ("flipped", "cut", "swapped")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home that shares nothing with other tests."""
    return tmp_path / "home"


def damage(files: list[Path], how: str) -> None:
    """Change files in place and put the times of their contents back; swapped files get the next one's content."""
    contents = [file.read_bytes() for file in files]
    for number, (file, content) in enumerate(zip(files, contents, strict=True)):
        times, middle = file.stat(), len(content) // 2
        changed = {
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "cut": content[:-1],
            "swapped": contents[(number + 1) % len(contents)],
        }[how]
        assert changed != content, file
        file.write_bytes(changed)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def kinds_of(files: list[Path]) -> Iterator[list[Path]]:
    """Files that would be taken for each other: of one kind of content, and apart the notes beside them."""
    for kind in dict.fromkeys(file.parents[-1 - len(constants.HF_HOME.split("/"))] for file in files):
        within = [file for file in files if kind in file.parents]
        yield from ([file for file in within if (file.suffix == ".sha256") is notes] for notes in (False, True))


def test_every_cache(
    publish: Callable[..., str], online: LocalHub, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        shutil.copytree(family / name, tmp_path / name)
        torch.save(load_file(family / name / "model.safetensors"), tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "model.safetensors").unlink()
        publish(name, tmp_path / name)
    publish("base")
    data = [{"task": "text-classification", "dataset": str(family / f"{name}.csv")} for name in ("rows", "report")]
    recipe = Recipe.model_validate({
        "base_model": "acme/base", "ingredients": ["acme/a", "acme/b"], "allow_pickle": True, "calibration": data[0],
        "method": {"name": "fisher", "examples": 2}, "validation": data[1:],
    })  # fmt: skip
    wanted = cook(recipe, tmp_path / "first")
    own = tmp_path / "home" / "hf-soup"
    assert {*MADE, "resolved"} <= {path.name for path in own.iterdir()}
    kept = {file: file.read_bytes() for kind in MADE for file in sorted((own / kind).rglob("*")) if file.is_file()}
    blobs = {file: file.read_bytes() for file in sorted((tmp_path / "home" / "hub").glob("models*/blobs/*"))}
    for how in DAMAGES:
        notes = [file for file in sorted((own / "resolved").rglob("*")) if file.is_file()]
        for group in kinds_of([*kept, *notes]):
            damage(group, how)
        with monkeypatch.context() as away:
            away.setattr(constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(ResolveError, match="'acme/a' is not in the cache"):
                hub.resolve("acme/a")  # nothing else says which commit it was
        damage([*blobs], how)
        again = cook(recipe, tmp_path / how)
        assert (again.digest, again.report.scores) == (wanted.digest, wanted.report.scores)
        for file, content in {**kept, **blobs}.items():
            assert file.read_bytes() == content, (how, file)


@pytest.mark.parametrize("how", DAMAGES)
def test_the_files_of_an_adapter_with_a_tokenizer(language_family: Path, tmp_path: Path, how: str) -> None:
    folder = adapted(language_family / "base", tmp_path / "adapter", 1, target_modules=["q_proj"])
    shutil.copy(language_family / "base" / "tokenizer_config.json", folder)
    place = open_checkpoint(str(folder)).source.fetch_assets()
    assert place.parent == tmp_path / "home" / "hf-soup" / "adapters"
    right = {file: file.read_bytes() for file in sorted(place.iterdir())}
    damage([*right], how)
    assert open_checkpoint(str(folder)).source.fetch_assets() == place
    assert {file: file.read_bytes() for file in sorted(place.iterdir())} == right
