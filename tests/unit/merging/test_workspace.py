"""The folder beside the output: one lock, journals that survive, one rename that replaces nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_soup.errors import MergeError
from hf_soup.merging import Workspace
from hf_soup.merging.workspace import CompletedUnit

PLAN = {
    "files": [{"name": "model.safetensors"}],
    "sources": ["a", "b"], "states": ["a@0", "b@0"], "weights": [1.0, 1.0], "method": "linear", "parameters": {},
}  # fmt: skip
BLOCKS = [CompletedUnit(0, "aa"), CompletedUnit(1, "bbbb", (4, 5)), CompletedUnit(2, "cc")]


def state(path: Path) -> tuple[int, ...]:
    """Whether something is what it was; reading it changes only the time of access."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---- what exists is not touched -----------------------------------------------------------------------------

EXISTING: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_text("mine"),
    "a folder": lambda path: (path.mkdir(), (path / "mine").write_text("mine")),
    "an empty folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: path.symlink_to("."),
}


@pytest.mark.parametrize("make", EXISTING.values(), ids=EXISTING)
def test_an_output_that_exists_is_refused_and_untouched(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "soup")
    before = [(path, state(path)) for path in (tmp_path / "soup", tmp_path)]
    with (
        pytest.raises(MergeError, match="exists already, and nothing that exists is overwritten"),
        Workspace(tmp_path / "soup"),
    ):
        pass
    assert [(path, state(path)) for path, _ in before] == before


@pytest.mark.parametrize("make", EXISTING.values(), ids=EXISTING)
def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """And the finished soup stays, for the same command once that is out of the way."""
    output = tmp_path / "soup"
    with Workspace(output) as staging:
        staging.open("f", PLAN)
        (staging.folder / "model.safetensors").write_text("soup")
        staging.note(0, BLOCKS)
        make(output)
        before = state(output)
        with pytest.raises(MergeError, match="exists already"):
            staging.publish()
    assert state(output) == before
    output.rename(tmp_path / "away")
    with Workspace(output) as staging:
        assert staging.open("f", PLAN) == "continued"
        assert list(staging.finished()) == BLOCKS
        assert staging.publish() == output
    assert (output / "model.safetensors").read_text() == "soup"


def test_files_of_others_in_the_staging_folder_stay(tmp_path: Path) -> None:
    mine = tmp_path / ".soup.cooking" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    for fingerprint in ("f", "g"):
        with Workspace(tmp_path / "soup") as staging:
            staging.open(fingerprint, PLAN)
    with Workspace(tmp_path / "soup") as staging:
        staging.open("g", PLAN)
        staging.publish()
    assert listing(tmp_path) == [".soup.cooking", ".soup.cooking/notes.txt", "soup"]


@pytest.mark.parametrize("parent", ["/proc/self/soups", "/dev/null/soups"])
def test_a_place_that_cannot_be_written_is_one_clear_error(parent: str) -> None:
    """These refuse root too, unlike a folder without write permission."""
    with (
        pytest.raises(MergeError, match=f"Cannot write beside '{parent}/soup'") as error,
        Workspace(Path(parent) / "soup"),
    ):
        pass
    assert "-o" in error.value.hint


def test_a_parent_that_does_not_exist_is_made(tmp_path: Path) -> None:
    with Workspace(tmp_path / "a" / "b" / "soup") as staging:
        staging.open("f", PLAN)
        staging.publish()
    assert listing(tmp_path / "a" / "b") == ["soup"]


# ---- the lock -----------------------------------------------------------------------------------------------


def test_of_two_runs_into_one_folder_one_wins(tmp_path: Path) -> None:
    with Workspace(tmp_path / "soup") as staging:
        staging.open("f", PLAN)
        with (
            pytest.raises(MergeError, match="Another process is cooking 'soup' right now"),
            Workspace(tmp_path / "soup"),
        ):
            pass
        staging.publish()
    assert listing(tmp_path) == ["soup"]


def test_many_processes_at_once_make_one_soup(tmp_path: Path) -> None:
    """Whenever each of them comes: before the lock, while it is held, or as the folder is renamed away."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom hf_soup.errors import MergeError\n"
        "from hf_soup.merging.workspace import Workspace\n"
        "outcomes = []\n"
        "for number in range(40):\n"
        "    try:\n"
        "        with Workspace(Path(sys.argv[1], str(number))) as staging:\n"
        "            staging.open('f', {'files': []})\n"
        "            (staging.folder / 'by').write_text(sys.argv[2])\n"
        "            staging.publish()\n"
        "            outcomes.append(number)\n"
        "    except MergeError as error:\n"
        "        assert 'exists already' in str(error) or 'Another process' in str(error), error\n"
        "print(outcomes)\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(who)], stdout=subprocess.PIPE, text=True)
        for who in range(4)
    ]
    won = {str(who): json.loads(child.communicate(timeout=60)[0]) for who, child in enumerate(children)}
    assert all(child.returncode == 0 for child in children)
    for who, numbers in won.items():
        for number in numbers:
            assert (tmp_path / str(number) / "by").read_text() == who
    assert sum(map(len, won.values())) == len(listing(tmp_path)) // 2 == 40


def test_a_folder_in_which_nothing_was_begun_goes(tmp_path: Path) -> None:
    with Workspace(tmp_path / "soup"):
        assert listing(tmp_path) == [".soup.cooking", ".soup.cooking/lock"]
    assert listing(tmp_path) == []


# ---- continuing ---------------------------------------------------------------------------------------------


def test_the_same_merge_continues_and_another_starts_anew(tmp_path: Path) -> None:
    """What an interrupted run wrote beside the weights is half-made, and made again."""
    for fingerprint, said in (("f", None), ("f", "continued"), ("g", "so this one starts anew"), ("g", "continued")):
        with Workspace(tmp_path / "soup") as staging:
            answer = staging.open(fingerprint, PLAN)
            assert answer == said or (answer and said and said in answer)
            assert listing(staging.folder) == (["model.safetensors"] if said == "continued" else [])
            assert list(staging.finished()) == (BLOCKS if said == "continued" else [])
            if said != "continued":
                staging.note(0, BLOCKS)
            (staging.folder / "model.safetensors").write_text("soup")
            (staging.folder / "tokenizer.json").write_text('{"cut off')
            (staging.folder / "plots").mkdir()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"fingerprint": 1}', '{"fingerprint": 1, "plan": []}'])
def test_a_plan_that_cannot_be_read_starts_anew(tmp_path: Path, text: str) -> None:
    with Workspace(tmp_path / "soup") as staging:
        staging.open("f", PLAN)
        staging.note(0, BLOCKS)
        (staging.root / "plan.json").write_text(text)
    with Workspace(tmp_path / "soup") as staging:
        assert staging.open("f", PLAN) == "what an interrupted run left cannot be read, so this one starts anew"
        assert list(staging.finished()) == []


def test_nobody_begins_while_a_process_of_another_run_is_at_work(tmp_path: Path) -> None:
    """It would write into what the new run makes; the world that has just begun may join."""
    with Workspace(tmp_path / "soup") as staging:
        staging.open("f", PLAN)
    with (
        Workspace(tmp_path / "soup").join("f", 1),
        pytest.raises(MergeError, match="A process of an interrupted run is still at work on 'soup'"),
        Workspace(tmp_path / "soup"),
    ):
        pass
    with Workspace(tmp_path / "soup") as staging:
        assert staging.open("f", PLAN) == "continued"
        staging.publish()
    assert listing(tmp_path) == ["soup"]


@pytest.mark.parametrize("link", ["disk", ".soup.cooking"])
def test_a_link_to_nothing_is_no_folder(tmp_path: Path, link: str) -> None:
    """As of a disk that is not mounted: an error, and no wait for it."""
    (tmp_path / link).symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(MergeError, match=r"Cannot write beside .*soup': File exists"),
        Workspace(tmp_path / ("soup" if link == ".soup.cooking" else "disk/soup")),
    ):
        raise AssertionError("it was opened")


@pytest.mark.parametrize("name", ["", "soup", "fetched"])
def test_nothing_behind_a_link_is_touched(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "keep").write_text("mine")
    link = tmp_path / ".soup.cooking" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(mine)
    with pytest.raises(MergeError, match="is a link, and nothing behind it is touched"), Workspace(tmp_path / "soup"):
        pass
    assert (mine / "keep").read_text() == "mine"


@pytest.mark.parametrize("line", ['[Infinity, "", []]', "[" * 100_000, '["x", 1]', '[1, "aa", ["y"]]', "{}"])
def test_a_garbled_journal_is_passed_over(tmp_path: Path, line: str) -> None:
    with Workspace(tmp_path / "soup") as staging:
        staging.open("f", PLAN)
        staging.note(0, BLOCKS)
        (staging.root / "journal.1").write_text(f"{line}\n")
        assert list(staging.finished()) == BLOCKS


def test_processes_that_see_different_folders_are_told(tmp_path: Path) -> None:
    with (
        pytest.raises(MergeError, match=r"does not see .*\.soup\.cooking"),
        Workspace(tmp_path / "soup").join("f", 1),
    ):
        pass
    assert listing(tmp_path) == []


def test_journals_of_all_processes_count_and_lines_that_were_cut_do_not(tmp_path: Path) -> None:
    with Workspace(tmp_path / "soup") as staging:
        staging.open("f", PLAN)
        staging.note(1, BLOCKS[2:])
        staging.note(0, BLOCKS[:1])
        staging.note(0, BLOCKS[1:2])
        journal = staging.root / "journal.0"
        for cut in (b'[[1, 2, "ab', b"[[1, 2]]\n", b"5\n", b"\0\0\xff\n", b'[["x", 2, "ab"]]\n'):
            journal.write_bytes(journal.read_bytes() + cut)
            assert list(staging.finished()) == BLOCKS[:2] + BLOCKS[2:]
            journal.write_bytes(journal.read_bytes().removesuffix(cut))


def test_a_new_run_does_not_write_behind_a_line_that_was_cut(tmp_path: Path) -> None:
    """It would be lost with it."""
    with Workspace(tmp_path / "soup") as staging:
        staging.open("f", PLAN)
        staging.note(0, BLOCKS[:1])
        staging.note(3, BLOCKS[1:2])
        journal = staging.root / "journal.0"
        journal.write_bytes(journal.read_bytes() + b'[[1, 0, "c')
        staging.restart(list(staging.finished()))
        assert [path.name for path in staging.root.glob("journal*")] == ["journal.0"]
        staging.note(0, BLOCKS[2:])
        assert list(staging.finished()) == BLOCKS


# ---- the disk -----------------------------------------------------------------------------------------------


def test_files_are_as_large_as_they_will_be_and_keep_what_they_hold(tmp_path: Path) -> None:
    with Workspace(tmp_path / "soup") as staging:
        staging.open("f", PLAN)
        path = staging.folder / "model.safetensors"
        staging.allocate([("model.safetensors", b"head", 1000)])
        assert path.read_bytes() == b"head" + bytes(996)
        assert path.stat().st_blocks * 512 >= 1000
        path.write_bytes(b"????" + b"x" * 2000)
        staging.allocate([("model.safetensors", b"head", 1000)])
        assert path.read_bytes() == b"head" + b"x" * 996


def test_what_the_disk_refuses_is_a_merge_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start and at the end too; what is finished is kept."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Workspace(tmp_path / "soup") as staging:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_text", refuse)
            with pytest.raises(MergeError, match="Cannot make 'soup': Input/output error"):
                staging.open("f", PLAN)
        staging.open("f", PLAN)
        staging.note(0, BLOCKS)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            with pytest.raises(MergeError, match="What is finished is kept"):
                staging.publish()
        assert list(staging.finished()) == BLOCKS
        staging.publish()
    assert listing(tmp_path) == ["soup"]
