"""Links in a stranger's folder: what is copied as it is comes from the folder itself, and weights from anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_soup import hub
from hf_soup.local_hub import LocalHub

Cli = Callable[..., Any]
SECRET = "hf_" + 30 * "s"


@pytest.fixture
def pair(family: Path, tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(family / "a", tmp_path / "a")), Path(shutil.copytree(family / "b", tmp_path / "b"))


@pytest.mark.parametrize(
    ("link", "file"),
    [
        ("chat_template.jinja", "chat_template.jinja"),
        ("vocab.txt", "vocab.txt"),
        ("config.json", "config.json"),
        ("additional_chat_templates", "additional_chat_templates/mine.jinja"),
        ("1_Pooling", "1_Pooling/config.json"),
    ],
)
@pytest.mark.parametrize("whose", [0, 1])
def test_a_link_out_of_the_folder_is_refused_by_name(
    cli: Cli, pair: tuple[Path, Path], tmp_path: Path, link: str, file: str, whose: int
) -> None:
    """Also where a folder on the way is the link."""
    secrets = tmp_path / "secrets"
    (secrets / Path(file).parent).mkdir(parents=True)
    (secrets / file).write_text(SECRET)
    (pair[whose] / link).unlink(missing_ok=True)
    (pair[whose] / link).symlink_to(secrets / link)
    for command in (["check"], ["cook", "-o", "soup"]):
        done = cli(*command, *pair)
        assert done.code == 1
        where = f"'{pair[whose]}': {file} is a link to '{secrets / file}', which is not in the folder."
        assert where in done.err, done.err
        assert SECRET not in done.out + done.err
    assert not (tmp_path / "soup").exists()


def test_an_environment_is_no_vocabulary(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A file of the kernel has no size, and so no content where it is listed."""
    (pair[0] / "vocab.txt").unlink()
    (pair[0] / "vocab.txt").symlink_to("/proc/self/environ")
    done = cli("cook", *pair, "-o", "soup")
    assert (done.code, (tmp_path / "soup").exists()) == (1, False)
    assert "vocab.txt is a link to '/proc/" in done.err


def test_links_that_are_meant(cli: Cli, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Weights on another disk, files within the folder, a folder that is one itself, others beside and in it."""
    cli("cook", *pair, "-o", "plain")
    (tmp_path / "shared").mkdir()
    for folder in pair:
        weights = shutil.move(folder / "model.safetensors", tmp_path / "shared" / f"{folder.name}.safetensors")
        (folder / "model.safetensors").symlink_to(weights)
        (folder / "vocab.txt").rename(folder / "words")
        (folder / "vocab.txt").symlink_to("words")
        (folder / "logs").symlink_to("/etc")
        (folder / "notes.txt").symlink_to("/etc/passwd")
    pair[0].rename(tmp_path / "elsewhere")
    pair[0].symlink_to(tmp_path / "elsewhere")
    (tmp_path / "table.csv").symlink_to("/etc/passwd")
    done = cli("cook", *pair, "-o", "linked")
    assert done.code == 0, done.err
    for file in ("model.safetensors", "vocab.txt"):
        assert (tmp_path / "linked" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert not (tmp_path / "linked" / "notes.txt").exists()


def test_a_snapshot_of_the_cache(cli: Cli, publish: Callable[..., str], online: LocalHub, tmp_path: Path) -> None:
    """Its files are links to the blobs of its repo, and may be to no others."""
    folders = []
    for name in "ab":
        repo = hub.resolve(publish(name))
        fetched = [hub.fetch_one(repo, file) for file in repo.files]
        folders.append(fetched[0].parent)
    assert (folders[0] / "vocab.txt").is_symlink()
    done = cli("cook", *folders, "-o", "soup")
    assert done.code == 0, done.err
    (folders[0] / "vocab.txt").unlink()
    (folders[0] / "vocab.txt").symlink_to((folders[1] / "vocab.txt").resolve())
    assert "vocab.txt is a link to" in cli("cook", *folders, "-o", "other").err


def test_a_soup_with_links_is_not_pushed(cli: Cli, pair: tuple[Path, Path], online: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    assert cli("cook", *pair, "-o", "soup").code == 0
    (tmp_path / "soup" / "notes.txt").symlink_to(tmp_path / "secret")
    done = cli("push", "soup", "acme/soup")
    assert (done.code, "notes.txt would be read from outside of the folder" in done.err) == (1, True), done.err
    assert online.store.find("model", "acme/soup") is None
