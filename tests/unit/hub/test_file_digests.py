"""The sha256 of files: read once for each state, never believed for another."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_soup.hub import (
    FileHasher,
    file_digests as digests,
    keep_note,
    known_sha256,
    remember_sha256,
    sha256_of,
    stamp_of,
)

DATA = bytes(range(256)) * 20_000
RIGHT = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and nothing known."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_known", {})
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every file that was hashed as a whole."""
    found: list[object] = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: found.append(file) or original(file, name))
    return found


def settle(seconds: float = 0.06) -> None:
    """Until a change would show in the time of a file."""
    time.sleep(seconds)


def test_a_file_is_read_once(file: Path, reads: list[object]) -> None:
    settle()
    assert [sha256_of(file) for _ in range(3)] == [RIGHT] * 3
    assert known_sha256(file) == RIGHT
    assert len(reads) == 1


def test_a_file_that_was_just_written_is_read_again(file: Path, reads: list[object]) -> None:
    """A change in the same tick of the clock would not show."""
    os.utime(file)
    assert sha256_of(file) == RIGHT
    file.write_bytes(DATA[::-1])
    assert sha256_of(file) == hashlib.sha256(DATA[::-1]).hexdigest()
    assert len(reads) == 2


@pytest.mark.parametrize("change", ["content", "size", "replaced", "touched"])
def test_another_state_is_another_file(file: Path, change: str) -> None:
    settle()
    sha256_of(file)
    settle()
    before = stamp_of(file)
    if change == "touched":
        os.utime(file, ns=(0, before[3]))  # the time of the content as it was; that of the inode tells
    elif change == "replaced":
        other = file.with_name("other")
        other.write_bytes(DATA[::-1])
        other.replace(file)
    else:
        file.write_bytes(DATA[::-1] if change == "content" else DATA[:-1])
    assert known_sha256(file) is None
    assert sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_it_is_kept_for_other_processes_where_the_clock_allows(file: Path, home: Path, reads: list[object]) -> None:
    settle()
    sha256_of(file)
    assert not list(home.rglob("sha256/*"))  # younger than the coarsest clock's tick
    stamp = stamp_of(file)
    remember_sha256(file, stamp, RIGHT, since=max(stamp[3:]) + 3_000_000_000)
    (note,) = home.rglob("sha256/*")
    assert b"weights" not in note.name.encode() + note.read_bytes()
    digests._known.clear()
    assert sha256_of(file) == RIGHT
    assert len(reads) == 1


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "swapped"])
def test_a_damaged_note_is_none(file: Path, home: Path, damage: str) -> None:
    """Also where a digit of the sha256 is another one, or all that is in it is of another file."""
    stamp = stamp_of(file)
    remember_sha256(file, stamp, RIGHT, since=max(stamp[3:]) + 3_000_000_000)
    (note,) = home.rglob("sha256/*")
    content = note.read_bytes()
    at = content.index(RIGHT.encode())
    keep_note(note.with_name("other"), " ".join(map(str, stamp)) + f" {'0' * 64}")
    note.write_bytes({
        "empty": b"", "text": b"1 2 3 4 5 aa", "cut": content[:-30],
        "flipped": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
        "swapped": note.with_name("other").read_bytes(),
    }[damage])  # fmt: skip
    digests._known.clear()
    assert sha256_of(file) == RIGHT


def test_a_home_that_cannot_be_written_costs_only_the_note(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", "/dev/null/home")
    stamp = stamp_of(file)
    remember_sha256(file, stamp, RIGHT, since=max(stamp[3:]) + 3_000_000_000)
    assert known_sha256(file) == RIGHT


def test_following_readers_hashes_every_byte_once_in_order(file: Path) -> None:
    """Whatever the order in which they read, and from several threads."""
    settle()
    descriptor = os.open(file, os.O_RDONLY)
    follower = FileHasher(file, descriptor)
    stops = [100_000 * number for number in (3, 1, 9, 5, 20, 2, 30)]
    threads = [threading.Thread(target=follower.follow, args=(stop,)) for stop in stops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert follower.finish() == RIGHT
    os.close(descriptor)
    assert known_sha256(file) == RIGHT


def test_what_changed_while_it_was_followed_is_not_believed(file: Path) -> None:
    settle()
    descriptor = os.open(file, os.O_RDONLY)
    follower = FileHasher(file, descriptor)
    follower.follow(1000)
    settle()
    file.write_bytes(DATA[::-1])
    follower.finish()
    os.close(descriptor)
    assert known_sha256(file) is None


def test_a_file_that_shrank_ends_the_following(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    follower = FileHasher(file, descriptor)
    os.truncate(file, 10)
    assert follower.finish() == hashlib.sha256(DATA[:10]).hexdigest()
    os.close(descriptor)
    assert known_sha256(file) is None
