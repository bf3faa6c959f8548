"""Where rows come from: files, folders, splits, columns, and what is said when they are not there."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_soup.errors import ResolveError, ScoringError
from hf_soup.evaluation import data
from hf_soup.recipe import Scoring

TEXTS = [f"sentence number {i}" for i in range(10)]


def write_csv(path: Path, texts: Sequence[str] = TEXTS, *, label: str = "label", text: str = "text") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([text, label])
        writer.writerows([line, i % 2] for i, line in enumerate(texts))
    return path


def text_scoring(path: Path | str, **more: Any) -> Scoring:
    return Scoring(task="text-classification", dataset=str(path), **more)


def load_one(scoring: Scoring, cache: Path) -> tuple[Scoring, data.DatasetRows]:
    (loaded,) = data.load([scoring], cache)
    return loaded


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_files_are_read_and_pinned_by_their_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"da[t]a{suffix}"
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["\t".join(["text", "label"]), *("\t".join([row["text"], str(row["label"])]) for row in rows)]
        text = "\n".join(lines)
        path.write_text(text if suffix == ".tsv" else text.replace("\t", ","))
    scoring, found = load_one(text_scoring(path), tmp_path / "cache")
    assert list(found.table["text"]) == TEXTS
    assert scoring.revision == f"sha256:{data.content_hash(path)}"
    # The pinned scoring reads the same; a changed file is told.
    assert load_one(scoring, tmp_path / "cache")[0] == scoring
    with path.open("ab") as stream:
        stream.write(b"\n")
    with pytest.raises(ScoringError, match="has changed"):
        load_one(scoring, tmp_path / "cache")


def test_a_folders_hash_is_over_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "1.txt").write_text("one")
    (folder / "a.txt").write_text("two")
    first = data.content_hash(folder)
    (folder / ".DS_Store").write_text("not data")
    assert data.content_hash(folder) == first
    (folder / "a.txt").rename(folder / "c.txt")
    assert data.content_hash(folder) != first


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        (None, {"train": range(10)}),
        ("train", {"train": range(10)}),
        ("train[:3]", {"train": range(3)}),
        ("train[80%:]", {"train": range(8, 10)}),
        ("train[-2:]", {"train": range(8, 10)}),
        ("train[:2]+train[5:6]", {"train": [0, 1, 5]}),
    ],
)
def test_splits_are_sets_of_row_numbers(tmp_path: Path, split: str | None, numbers: dict[str, Any]) -> None:
    _, rows = load_one(text_scoring(write_csv(tmp_path / "d.csv"), split=split), tmp_path / "cache")
    assert {name: list(found) for name, found in rows.numbers.items()} == {
        name: list(wanted) for name, wanted in numbers.items()
    }
    assert list(rows.table["text"]) == [TEXTS[i] for i in numbers["train"]]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", r"no split 'validation': its splits are train \(10 rows\)"),
        ("train[5", "Cannot read the split"),
        ("train[90:95]", "is empty: there are no rows in the split"),
        ("train[:200%]", "Cannot read the split"),
        ("train[3:3]", "is empty: there are no rows in the split"),
        (" ", "no split ''"),
        ("[:5]", "no split"),
        ("train+train", r"'train\+train' of .* names more than once 10 rows: train rows 0-9\."),
        ("train[:6]+train[4:]", r"names more than once 2 rows: train rows 4-5\."),
    ],
)
def test_bad_splits(tmp_path: Path, split: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        load_one(text_scoring(write_csv(tmp_path / "d.csv"), split=split), tmp_path / "cache")


def test_a_folder_of_files_has_their_splits(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_csv(folder / "train.csv")
    write_csv(folder / "test.csv", TEXTS[:4])
    _, rows = load_one(text_scoring(folder, split="test"), tmp_path / "cache")
    assert len(rows.table) == 4
    with pytest.raises(ScoringError, match=r"needs a split: its splits are train \(10 rows\), test \(4 rows\)"):
        load_one(text_scoring(folder), tmp_path / "cache")


def test_an_image_folder_has_its_folders_as_classes(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), "red" if name == "dog" else "blue").save(tmp_path / "pets" / name / "1.png")
    scoring = Scoring(task="image-classification", dataset=str(tmp_path / "pets"))
    _, rows = load_one(scoring, tmp_path / "cache")
    assert data.declared_classes(rows.table, "label") == ("cat", "dog")
    assert rows.table[0]["image"].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.parquet", b"no parquet", "Cannot load the data of"),
        ("d.csv", b"", "d.csv is empty: there are no rows in it"),
        ("d.jsonl", b"{nonsense", "Cannot load the data of"),
        ("d.xlsx", b"x", "Cannot read 'd.xlsx' as data"),
        ("d.csv", b"text,label\n", "d.csv is empty: there are no rows in it"),
        ("d.jsonl", b"", "d.jsonl is empty: there are no rows in it"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ScoringError, match=message):
        load_one(text_scoring(path), tmp_path / "cache")


@pytest.mark.parametrize("name", ["./missing.csv", "missing.parquet", "/nowhere/at/all", "local:beans"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match=f"no file or folder '{name}'") as raised:
        load_one(text_scoring(name), tmp_path)
    assert raised.value.hint


def test_local_data_needs_no_network_and_no_home(tmp_path: Path) -> None:
    """A home that cannot be written: a folder below a device, so that root cannot either."""
    code = (
        "import sys; from pathlib import Path; from hf_soup import Scoring; from hf_soup.evaluation import data;"
        "scoring = Scoring(task='text-classification', dataset=sys.argv[1]);"
        "print(len(data.load([scoring], Path(sys.argv[2]))[0][1].table))"
    )
    home = "/dev/null/home"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HOME": home, "HF_HOME": f"{home}/hf", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(write_csv(tmp_path / "d.csv")), str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")


def test_two_scorings_of_one_file_hash_and_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = write_csv(tmp_path / "d.csv"), []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append(k) or real(*a, **k))
    data.load([text_scoring(path, split="train[:5]"), text_scoring(path, split="train[5:]")], tmp_path / "cache")
    assert len(calls) == 1
    assert "trust_remote_code" not in calls[0]


def test_a_hub_data_set_is_read_at_the_commit_that_it_resolves_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is the only thing replaced; tests/integration asks a Hub over HTTP."""
    commit, asked = "c" * 40, []
    real = datasets.load_dataset
    path = write_csv(tmp_path / "d.csv")

    def from_the_hub(path_or_id: str = "", **arguments: Any) -> Any:
        asked.append((arguments.pop("path", path_or_id), arguments.pop("revision"), arguments.pop("token")))
        return real("csv", data_files=str(path), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("hf_soup.hub.resolve_dataset", lambda name, revision, *, token=None: ("owner/mood", commit))
    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    scoring, rows = data.load([text_scoring("mood", split="train[:5]")], tmp_path, token="secret")[0]
    assert asked == [("owner/mood", commit, "secret")]
    assert (scoring.dataset, scoring.revision) == ("owner/mood", commit)
    assert rows.origin == data.Origin("owner/mood", "default", commit)


def test_a_failed_load_is_one_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/mood' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("hf_soup.hub.resolve_dataset", lambda name, revision, *, token=None: (name, "c" * 40))
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ScoringError, match="Couldn't reach 'owner/mood'") as raised:
        data.load([text_scoring("owner/mood", split="test")], tmp_path, token="secret")
    assert "logged in" in raised.value.hint
    assert "secret" not in str(raised.value)


def rows_of(numbers: dict[str, Sequence[int]], revision: str = "r", config: str = "c") -> data.DatasetRows:
    return data.DatasetRows(
        data.Origin("owner/d", config, revision),
        {k: np.array(v, dtype=np.int64) for k, v in numbers.items()},
        None,
    )


def test_overlap_shows_the_rows() -> None:
    validation = rows_of({"test": range(10), "train": range(5)})
    with pytest.raises(ScoringError, match=r"share 5 rows: test rows 2-4, 8-9\.") as raised:
        data.refuse_overlap(("a", validation), ("b", rows_of({"test": [9, 8, 2, 3, 4, 20]})))
    assert "validation[:50%]" in raised.value.hint


@pytest.mark.parametrize(
    "report",
    [
        rows_of({"test": range(10, 20)}),
        rows_of({"validation": range(10)}),
        rows_of({"test": range(10)}, config="other"),
        rows_of({"test": range(10)}, revision="other"),
    ],
)
def test_other_rows_do_not_overlap(report: data.DatasetRows) -> None:
    data.refuse_overlap(("a", rows_of({"test": range(10)})), ("b", report))


@pytest.mark.parametrize("other", [{"test": range(5, 15)}, {"test": range(10), "train": [0]}, {"test": [7]}])
def test_validation_data_that_are_the_same_in_part_are_refused(other: dict[str, Sequence[int]]) -> None:
    with pytest.raises(
        ScoringError, match=r"The validation data 'a' and 'b' share .* rows: test rows .*not the same\."
    ):
        data.refuse_partial_overlap(("a", rows_of({"test": range(10)})), ("b", rows_of(other)))


@pytest.mark.parametrize("other", [{"test": range(10, 20)}, {"train": range(10)}])
def test_validation_data_that_are_apart_are_not(other: dict[str, Sequence[int]]) -> None:
    data.refuse_partial_overlap(("a", rows_of({"test": range(10)})), ("b", rows_of(other)))
    data.refuse_partial_overlap(("a", rows_of({"test": range(10)})), ("b", rows_of({"test": [3]}, revision="other")))


def test_columns_by_usual_names_and_by_the_recipe() -> None:
    features = datasets.Features(
        {
            "coarse_label": datasets.ClassLabel(num_classes=6),
            "fine_label": datasets.ClassLabel(num_classes=50),
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "sentence": datasets.Value("string"),
            "emotion": datasets.Value("int64"),
        }
    )
    table = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    usual = (("text",), ("sentence1", "sentence2"), ("sentence",))
    plain = text_scoring("d")
    assert data.label_column(plain, "d", table, 2) == "coarse_label"
    assert data.label_column(plain, "d", table, 50) == "fine_label"
    assert data.input_columns(plain, "d", table, usual) == ("sentence1", "sentence2")
    said = text_scoring("d", label_column="emotion", input_columns=("sentence",))
    assert data.label_column(said, "d", table, 50) == "emotion"
    assert data.input_columns(said, "d", table, usual) == ("sentence",)


@pytest.mark.parametrize(
    "said", [{}, {"label_column": "mood"}, {"input_columns": ("words",)}, {"input_columns": ("y", "words")}]
)
def test_missing_columns_are_answered_with_those_that_there_are(said: dict[str, Any]) -> None:
    table = datasets.Dataset.from_dict({"q": ["x"], "y": [0]})
    scoring = text_scoring("d", **said)
    if "label_column" in said or not said:
        with pytest.raises(ScoringError, match="its columns are q, y"):
            data.label_column(scoring, "d", table, 2)
    if "label_column" not in said:
        with pytest.raises(ScoringError, match="its columns are q, y"):
            data.input_columns(scoring, "d", table, (("text", "other"),))


@pytest.mark.parametrize(
    ("columns", "usual"), [(("q", "y"), (("image",),)), ((), (("text",),)), (("q",) * 3, (("a", "b"),))]
)
def test_too_many_columns(columns: tuple[str, ...], usual: Any) -> None:
    table = datasets.Dataset.from_dict({"q": ["x"], "y": ["z"]})
    with pytest.raises(ScoringError, match=f"has {len(columns)} `input_columns`"):
        data.input_columns(text_scoring("d", input_columns=columns), "d", table, usual)


def test_progress_bars_come_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = datasets.are_progress_bars_disabled()
    load_one(text_scoring(write_csv(tmp_path / "d.csv")), tmp_path / "cache")
    assert datasets.are_progress_bars_disabled() == shown
    assert capsys.readouterr() == ("", "")
