"""Preprocessed rows on disk: made once, the same by any number of threads, and made anew when they are damaged."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from sklearn.datasets import load_digits

from hf_soup.errors import ScoringError
from hf_soup.evaluation import ClassificationDataset, encoded_rows as stored
from hf_soup.evaluation.preprocessing import prepare_datasets
from hf_soup.evaluation.tasks.image_classification import ImageClassification
from hf_soup.recipe import Scoring

DIGITS = load_digits()
IMAGES = [Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)) for pixels in DIGITS.images[:100]]
CONFIG: dict[str, Any] = {"num_channels": 1, "id2label": {str(i): str(i) for i in range(10)}}


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries are kept."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hf-soup" / "data"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits as PNGs in a parquet file, under 0 to 9."""
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": IMAGES, "label": DIGITS.target[:100].tolist()}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    return write_processor(tmp_path / "donor", size=8)


def write_processor(folder: Path, size: int, channels: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size},
        "image_mean": [0.3] * channels, "image_std": [0.35] * channels,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def bench_of(path: Path, donor: Path, config: dict[str, Any] = CONFIG, **more: Any) -> ClassificationDataset:
    scoring = Scoring(task="image-classification", dataset=str(path), **more)
    return prepare_datasets([("validation", scoring)], folder=donor, config=config)[0]


def pixels_of(bench: ClassificationDataset) -> bytes:
    return bench.inputs.batch(np.arange(bench.n))["pixel_values"].numpy().tobytes()


def entries_in(folder: Path) -> list[Path]:
    """Each of them, and its note behind it."""
    return sorted(folder.iterdir())


def refuse_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        raise AssertionError("an image is decoded or preprocessed again")

    monkeypatch.setattr(ImageClassification, "read", work)
    monkeypatch.setattr(ImageClassification, "preprocess", work)


def test_a_second_run_decodes_and_preprocesses_nothing(
    digits: Path, donor: Path, entries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench_of(digits, donor)
    assert len(entries_in(entries)) == 2
    refuse_work(monkeypatch)
    second = bench_of(digits, donor)
    assert pixels_of(second) == pixels_of(first)
    assert second.fingerprint == first.fingerprint
    # Another file of the same content, and another metric and other labels, are the same inputs.
    copy = Path(shutil.copy(digits, digits.with_name("copy.parquet")))
    other = bench_of(copy, donor, metric="f1_macro", name="copy", labels=tuple("0123456789"))
    assert other.fingerprint == first.fingerprint


def test_the_bytes_are_the_same_at_any_number_of_threads(
    digits: Path, donor: Path, entries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_of(digits, donor)
    entry, _ = entries_in(entries)
    whole = entry.read_bytes()
    for threads in (1, 3, 8):
        entry.unlink()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, threads=threads: range(threads))
        bench_of(digits, donor)
        assert entry.read_bytes() == whole


@pytest.mark.parametrize(
    "damage", ["cut", "longer", "empty", "nonsense", "other numbers", "zeros", "no ends", "another shape"]
)
def test_a_damaged_entry_is_made_anew(digits: Path, donor: Path, entries: Path, damage: str) -> None:
    wanted = pixels_of(bench_of(digits, donor))
    entry, _ = entries_in(entries)
    whole = entry.read_bytes()
    bad = {
        "cut": whole[: len(whole) // 2],
        "longer": whole + b" ",
        "empty": b"",
        "nonsense": whole[:-4096] + bytes(4096),
        "zeros": bytes(10_000) + whole[10_000:],
        "no ends": whole[:-4896] + bytes(800) + whole[-4096:],
        "another shape": whole.replace(b'"shape": [1, 8, 8]', b'"shape": [8, 1, 8]'),
        "other numbers": whole.replace(b'"rows": 100', b'"rows": 101'),
    }[damage]
    assert bad != whole
    entry.write_bytes(bad)
    assert pixels_of(bench_of(digits, donor)) == wanted
    assert entry.read_bytes() == whole


def test_whatever_changes_the_inputs_changes_the_entry(digits: Path, donor: Path, tmp_path: Path) -> None:
    found = [
        bench_of(digits, donor),
        bench_of(digits, donor, split="train[:50]"),
        bench_of(digits, donor, split="train[50:]+train[:50]"),
        bench_of(digits, write_processor(tmp_path / "large", size=16)),
        bench_of(digits, write_processor(tmp_path / "colour", size=8, channels=3), {**CONFIG, "num_channels": 3}),
    ]
    assert len({bench.fingerprint for bench in found}) == len(found)
    assert len({pixels_of(bench) for bench in found}) == len(found)


def test_dropped_rows_change_the_fingerprint_and_not_the_entry(
    digits: Path, donor: Path, entries: Path, tmp_path: Path
) -> None:
    alone = bench_of(digits, donor)
    rows = {"image": [np.asarray(IMAGES[3]).tolist(), np.asarray(IMAGES[50]).tolist()], "label": [3, 0]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "report.parquet")
    roles = [("validation", digits), ("test", tmp_path / "report.parquet")]
    score, _ = prepare_datasets(
        [(role, Scoring(task="image-classification", dataset=str(path))) for role, path in roles],
        folder=donor,
        config=CONFIG,
    )
    assert (score.n, len(entries_in(entries))) == (98, 4)
    assert score.fingerprint != alone.fingerprint
    size = len(pixels_of(alone)) // 100
    every = [pixels_of(alone)[row * size : (row + 1) * size] for row in range(100) if row not in (3, 50)]
    assert pixels_of(score) == b"".join(every)


@pytest.mark.parametrize("home", ["/dev/null/home", "read-only"])
def test_a_home_that_cannot_be_written(
    digits: Path, donor: Path, home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = pixels_of(bench_of(digits, donor))
    if home == "read-only":
        # A file where the folder should be, so that root cannot write either.
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "hf-soup").write_text("")
        home = str(tmp_path / "other")
    monkeypatch.setattr(constants, "HF_HOME", home)
    assert pixels_of(bench_of(digits, donor)) == wanted


def test_an_entry_deleted_while_it_is_in_use_is_read_to_the_end(digits: Path, donor: Path, entries: Path) -> None:
    bench = bench_of(digits, donor)
    wanted = pixels_of(bench)
    shutil.rmtree(entries)
    assert pixels_of(bench) == wanted


def test_what_a_killed_process_left_is_made_over(digits: Path, donor: Path, entries: Path) -> None:
    wanted = pixels_of(bench_of(digits, donor))
    entry, note = entries_in(entries)
    entry.rename(partial := entry.with_name(f"{entry.name}.1.2.partial"))
    with partial.open("r+b") as stream:
        stream.truncate(5000)
    assert pixels_of(bench_of(digits, donor)) == wanted
    assert entries_in(entries) == [entry, note]


def test_of_two_processes_one_makes_the_entry(entries: Path, tmp_path: Path) -> None:
    """They begin together; each that makes a chunk, which takes a while, writes a line."""
    code = (
        "import sys, time; from pathlib import Path; import numpy as np\n"
        "from hf_soup.evaluation.encoded_rows import Chunk, stored\n"
        "def make(numbers):\n"
        "    print('made'); time.sleep(0.05)\n"
        "    return Chunk([bytes(16)], ['pixel_values'], [np.full((1, 2, 2), numbers[0], dtype=np.float32)])\n"
        "print('ready', flush=True); sys.stdin.read()\n"
        "chunks = [range(i, i + 1) for i in range(5)]\n"
        "found = stored('key', 'data', chunks, make, scratch=Path(sys.argv[1]), threads=1, quiet=True)\n"
        "print([int(row.sum()) for row in found.rows(np.arange(5))])"
    )
    environment = {**os.environ, "HF_HOME": str(entries.parents[1])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in running if process.stdout] == ["ready\n"] * 2
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda process: process.communicate(timeout=100)[0].splitlines(), running))
    assert sum(line == "made" for lines in said for line in lines) == 5
    assert said[0][-1] == said[1][-1] == "[0, 4, 8, 12, 16]"
    assert [path.name for path in entries_in(entries)] == ["key", "key.sha256"]


def test_images_of_several_sizes_in_several_chunks(donor: Path, tmp_path: Path, entries: Path) -> None:
    processor = json.loads((donor / "preprocessor_config.json").read_text())
    (donor / "preprocessor_config.json").write_text(json.dumps({**processor, "do_resize": False}))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [*IMAGES[:40], Image.new("L", (9, 8))], "label": [i % 2 for i in range(41)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    split = "train[:32]+train[40:]"  # the wide one stands in a chunk by itself
    with pytest.raises(ScoringError, match=r"images of \(1, 8, 8\) and of \(1, 8, 9\) of d.parquet") as raised:
        bench_of(tmp_path / "d.parquet", donor, split=split)
    assert "do_resize" in raised.value.hint
    assert not list(entries.iterdir())


def test_a_full_disk_is_one_error(digits: Path, tmp_path: Path, entries: Path) -> None:
    """A limit on the size of files stands in for the disk; nothing of the attempt keeps its place on it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ScoringError, match=r"Cannot keep the preprocessed rows of digits\.parquet in .*") as raised:
            bench_of(digits, write_processor(tmp_path / "large", size=32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "HF_HOME" in raised.value.hint
    assert not list(entries.iterdir())


def test_no_more_than_some_chunks_are_held(tmp_path: Path) -> None:
    """What is made and not yet written stays below two chunks a thread, however slow the disk is."""
    held, most, guard = set(), 0, threading.Lock()

    class Row(np.ndarray):  # type: ignore[type-arg]
        def __del__(self) -> None:
            with guard:
                held.discard(id(self))

    def make(numbers: range) -> stored.Chunk:
        nonlocal most
        rows = [np.full((1, 2, 2), number, dtype=np.float32).view(Row) for number in numbers]
        with guard:
            held.update(map(id, rows))
            most = max(most, len(held))
        return stored.Chunk([bytes(16)] * len(rows), ["pixel_values"], rows)

    chunks = [range(start, start + 10) for start in range(0, 1000, 10)]
    found = stored.stored("key", "data", chunks, make, scratch=tmp_path, threads=2, quiet=True)
    assert [int(row[0, 0, 0]) for row in found.rows(np.arange(1000))] == list(range(1000))
    assert 10 <= most <= 50


def test_rows_without_tokens_are_kept_as_such(tmp_path: Path) -> None:
    def make(numbers: range) -> stored.Chunk:
        rows = [np.arange(2 * number, dtype=np.int32).reshape(2, number) for number in numbers]
        return stored.Chunk([bytes([number] * 16) for number in numbers], ["input_ids", "attention_mask"], rows)

    for count in (1, 4):
        found = stored.stored(f"{count}", "d", [range(count)], make, scratch=tmp_path, threads=1, quiet=True)
        assert [row.tolist() for row in found.rows(np.arange(count))] == [
            row.tolist() for row in make(range(count)).rows
        ]
        assert (found.sizes.tolist(), found.names) == ([2 * i for i in range(count)], ["input_ids", "attention_mask"])
        assert found.digests == make(range(count)).digests


def test_one_that_waited_for_an_attempt_that_failed_is_waited_for_too(tmp_path: Path, entries: Path) -> None:
    """The file that the second waits for is deleted meanwhile, and the third comes while the second makes another."""
    begun, made = [threading.Event() for _ in range(3)], []
    go = [threading.Event() for _ in range(3)]

    def make(number: int) -> stored.Chunk:
        begun[number].set()
        go[number].wait(60)
        if number == 0:
            raise ScoringError("broken")
        made.append(number)
        return stored.Chunk([bytes(16)], ["pixel_values"], [np.ones((1, 2, 2), dtype=np.float32)])

    def ask(number: int) -> stored.EncodedRows:
        return stored.stored("key", "data", [range(1)], lambda _: make(number), scratch=tmp_path, threads=1, quiet=True)

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, 0)]
        assert begun[0].wait(60)
        asked.append(pool.submit(ask, 1))
        time.sleep(0.2)  # until it waits for the lock
        go[0].set()
        assert begun[1].wait(60)
        asked.append(pool.submit(ask, 2))
        assert not begun[2].wait(0.5)
        go[1].set()
        go[2].set()
        with pytest.raises(ScoringError, match="broken"):
            asked[0].result()
        assert [each.result().rows(np.arange(1))[0].sum() for each in asked[1:]] == [4, 4]
    assert made == [1]
    assert [path.name for path in entries_in(entries)] == ["key", "key.sha256"]
