"""What transformers said is asked once; a mistake is not kept, and another version is asked again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_soup.checkpoint import memo, remembered
from hf_soup.hub import prune


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


def test_the_same_question_is_asked_once() -> None:
    asked: list[int] = []

    def answer() -> list[str]:
        asked.append(1)
        return ["a", "b"]

    for _ in range(3):
        assert remembered("head", [{"x": 1}, ["n"]], answer) == ["a", "b"]
        assert remembered("pairs", 1, lambda: [("a", "b")]) == [("a", "b")]
    assert len(asked) == 1
    remembered("head", [{"x": 2}, ["n"]], answer)
    remembered("tail", [{"x": 1}, ["n"]], answer)
    assert len(asked) == 3


def test_an_error_is_not_kept() -> None:
    def fail() -> bool:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            remembered("readable", {}, fail)
    assert remembered("readable", {}, lambda: True)


def test_another_library_or_other_code_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remembered("q", 1, lambda: ["a"]) == ["a"]
    monkeypatch.setattr(memo, "_asked", lambda: ["99.0", "0" * 64])
    assert remembered("q", 1, lambda: ["b"]) == ["b"]


@pytest.mark.parametrize("text", [b"", b"{", b"true", b"[" * 99_999])
def test_a_note_that_cannot_be_read_is_none(home: Path, text: bytes) -> None:
    remembered("q", 1, lambda: True)
    (note,) = home.rglob("*.json")
    note.write_bytes(text)
    assert remembered("q", 1, lambda: ["x"]) == ["x"]


def test_a_home_that_cannot_be_written_costs_only_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", "/dev/null/home")
    assert [remembered("q", 1, lambda: ["x"]) for _ in range(2)] == [["x"], ["x"]]


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    tmp_path = tmp_path / "kept"
    tmp_path.mkdir()
    for number, name in enumerate("cab"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "folder").mkdir()
    prune(tmp_path, 30)
    assert {path.name for path in tmp_path.iterdir()} == {*"abc", "folder"}
    prune(tmp_path, 20)
    assert {path.name for path in tmp_path.iterdir()} == {*"ab", "folder"}
    prune(tmp_path, 0)  # what was made just now is needed
    assert {path.name for path in tmp_path.iterdir()} == {"b", "folder"}
    prune(tmp_path / "none", 0)
    # Of a file with a note beside it, the note says when it was used, and goes with it.
    for time, name in enumerate(("b", "x", "y", "x.sha256")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (time, time))
    prune(tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.sha256", "folder"}
    (tmp_path / "z").write_bytes(bytes(10))
    prune(tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"z", "folder"}
