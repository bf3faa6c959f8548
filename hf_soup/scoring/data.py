"""The rows of a `Scoring`: where they come from, which ones, and that held-out is not test (rule 9)."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_soup.errors import ResolveError, ScoringError
from hf_soup.recipe import Scoring
from hf_soup.scoring.statistics import Ints
from hf_soup.scoring.tasks import first_line

LABEL_COLUMNS = ("label", "labels", "coarse_label", "fine_label")
_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_BASE = re.compile(r"\s*(\w+(?:\.\w+)*)\s*(?:\[|\(|$)")


@dataclass(frozen=True)
class Origin:
    """What pins a data set: two scorings read the same rows when this and the row numbers are equal.

    Args:
        dataset: The canonical Hub id, or "" for local data, which its hash alone identifies.
        config: The configuration, or "".
        revision: A commit, or ``sha256:…``.
    """

    dataset: str
    config: str
    revision: str


@dataclass(frozen=True)
class Rows:
    """The rows that one `Scoring` names.

    Args:
        origin: The pinned data set.
        numbers: For each base split the row numbers in it, in the order in which they are read.
        table: The ``datasets.Dataset`` with exactly these rows.
    """

    origin: Origin
    numbers: Mapping[str, Ints]
    table: Any


def load(
    scorings: Sequence[Scoring], cache_folder: Path, token: str | bool | None = None
) -> list[tuple[Scoring, Rows]]:
    """Pin and read the rows of several scorings; each data set is pinned and read once.

    Args:
        scorings: What the recipe says.
        cache_folder: Where local files are converted to Arrow. The rows need it for as long as they live;
            the user's cache is left alone.
        token: For gated and private data sets.

    Returns:
        Each scoring with ``dataset`` canonical and ``revision`` pinned, and its rows.

    Raises:
        ResolveError: The data set cannot be found or reached.
        ScoringError: It cannot be read, or has no such split or no rows in it.
    """
    pins: dict[tuple[str, str | None], tuple[str, str]] = {}
    splits: dict[tuple[str, str | None, str], Mapping[str, Any]] = {}
    loaded = []
    for scoring in scorings:
        wanted = (scoring.dataset, scoring.revision)
        if wanted not in pins:
            pins[wanted] = _pin(scoring, token)
        dataset, revision = pins[wanted]
        pinned = scoring.model_copy(update={"dataset": dataset, "revision": revision})
        where = (dataset, scoring.config, revision)
        if where not in splits:
            splits[where] = _read(pinned, name_of(scoring), cache_folder, token)
        tables = splits[where]
        numbers, table = _choose(name_of(scoring), scoring.split, tables)
        local = revision.startswith("sha256:")
        config = next(iter(tables.values())).config_name or ""
        # A folder and a file are named by their content; the builder's name for a file depends on its path.
        origin = Origin("" if local else dataset, (scoring.config or "") if local else config, revision)
        loaded.append((pinned, Rows(origin, numbers, table)))
    return loaded


def name_of(scoring: Scoring) -> str:
    """What errors and notes call the data: the title of the score without its metric.

    >>> name_of(Scoring(task="text-classification", dataset="dair-ai/emotion", split="test"))
    'dair-ai/emotion test'
    """
    return scoring.title.removesuffix(f" {scoring.metric}")


def is_local(dataset: str) -> bool:
    """Whether a data set is a file or folder and not a Hub id.

    >>> is_local("./beans.csv"), is_local("AI-Lab-Makerere/beans")
    (True, False)
    """
    path = Path(dataset)
    return path.exists() or path.suffix in _BUILDERS or path.is_absolute() or dataset.startswith((".", "~", "local:"))


def refuse_overlap(first: tuple[str, Rows], second: tuple[str, Rows]) -> None:
    """Held-out and report rows of one data set must have no row in common.

    Raises:
        ScoringError: They have; the message shows the ranges.
    """
    (first_title, held_out), (second_title, report) = first, second
    if held_out.origin != report.origin:
        return
    common = {
        split: both
        for split, rows in held_out.numbers.items()
        if split in report.numbers and len(both := np.intersect1d(rows, report.numbers[split]))
    }
    if common:
        shown = "; ".join(f"{split} {_ranges(rows)}" for split, rows in common.items())
        total = sum(len(rows) for rows in common.values())
        raise ScoringError(
            f"The held-out data '{first_title}' and the report '{second_title}' share {total:,} rows: {shown}.",
            hint="What selection has looked at cannot test it: use another split, or slices that do not meet, "
            "such as `split: validation[:50%]` and `split: validation[50%:]`.",
        )


def label_column(scoring: Scoring, title: str, table: Any, classes: int) -> str:
    """The column that holds the labels: the recipe's, or the one with a usual name.

    Where there are several, the first that declares as many classes as the model has.

    Raises:
        ScoringError: There is none.
    """
    if scoring.label_column is not None:
        return _existing(title, table, scoring.label_column, "label_column")
    found = [name for name in LABEL_COLUMNS if name in table.column_names]
    if not found:
        raise ScoringError(
            f"{title} has no label column with a usual name ({', '.join(LABEL_COLUMNS)}); "
            f"its columns are {', '.join(table.column_names)}.",
            hint="Name it: `label_column: …`.",
        )
    fitting = [name for name in found if len(declared_classes(table, name) or ()) == classes]
    return (fitting or found)[0]


def input_columns(scoring: Scoring, title: str, table: Any, usual: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The columns that hold the inputs: the recipe's, or the first of the usual ones that is there.

    Raises:
        ScoringError: There is none.
    """
    most = max(len(names) for names in usual)
    if scoring.input_columns is not None:
        if not 1 <= len(scoring.input_columns) <= most:
            raise ScoringError(
                f"{title} has {len(scoring.input_columns)} `input_columns`; "
                f"the task '{scoring.task}' reads {'one' if most == 1 else f'1 to {most}'}."
            )
        return tuple(_existing(title, table, name, "input_columns") for name in scoring.input_columns)
    for names in usual:
        if set(names) <= set(table.column_names):
            return names
    shown = ", ".join(" + ".join(names) for names in usual)
    raise ScoringError(
        f"{title} has no input column with a usual name ({shown}); its columns are {', '.join(table.column_names)}.",
        hint="Name it: `input_columns: [...]`.",
    )


def declared_classes(table: Any, column: str) -> tuple[str, ...] | None:
    """The class names that the data set declares for a column of numbers, or None."""
    names = getattr(table.features[column], "names", None)
    return tuple(names) if names else None


def read_column(table: Any, column: str) -> list[Any]:
    """One column as plain values; class numbers stay numbers."""
    return list(table.select_columns([column])[:][column])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of datasets unless a person is watching."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    if shown and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _pin(scoring: Scoring, token: str | bool | None) -> tuple[str, str]:
    """The canonical name of a data set and its full revision."""
    if not is_local(scoring.dataset):
        from hf_soup.hub import resolve_dataset

        return resolve_dataset(scoring.dataset, scoring.revision, token=token)
    path = Path(scoring.dataset).expanduser()
    if not path.exists():
        foreign = scoring.dataset.startswith("local:")
        raise ResolveError(
            f"There is no file or folder '{scoring.dataset}'.",
            hint="It was a file on another machine, which only its owner has; name your copy as `dataset`."
            if foreign
            else "Check the path; a Hub data set is written `owner/name`.",
        )
    revision = f"sha256:{content_hash(path)}"
    if scoring.revision not in (None, revision):
        raise ScoringError(
            f"The data '{path.name}' has changed: it is {revision}, and the recipe says {scoring.revision}.",
            hint="Restore it, or remove `revision` from the recipe.",
        )
    return str(path), revision


def content_hash(path: Path) -> str:
    """The sha256 of a file; of a folder, over the lines ``<relative path> <sha256>`` in order of path.

    Hidden files are left out: they are not data.

    Raises:
        ResolveError: A file cannot be read.
    """
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        files = {
            file.relative_to(path).as_posix(): file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        }
    except OSError as error:
        raise ResolveError(f"Cannot read '{path.name}': {error.strerror}.") from None
    lines = (f"{name} {content_hash(files[name])}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(scoring: Scoring, title: str, cache_folder: Path, token: str | bool | None) -> Mapping[str, Any]:
    """All splits of a pinned data set; never with remote code."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    path = Path(scoring.dataset)
    arguments: dict[str, Any]
    if not is_local(scoring.dataset):
        arguments = {"path": scoring.dataset, "revision": scoring.revision, "token": token}
    elif path.is_dir():
        arguments = {"path": str(path), "cache_dir": str(cache_folder)}
    elif path.suffix in _BUILDERS:
        # A name is not a pattern: [ ] * ? in it stand for themselves.
        name = re.sub(r"([*?\[])", r"[\1]", str(path))
        arguments = {"path": _BUILDERS[path.suffix], "data_files": name, "cache_dir": str(cache_folder)}
        if path.suffix == ".tsv":
            arguments["sep"] = "\t"
    else:
        raise ScoringError(
            f"Cannot read '{path.name}' as data.",
            hint=f"Use a file that ends in {', '.join(_BUILDERS)}, or a folder of images.",
        )
    try:
        with quiet():
            splits: Mapping[str, Any] = datasets.load_dataset(name=scoring.config, **arguments)
    except Exception as error:  # of datasets, pyarrow, pandas, fsspec, the HTTP client: no common class
        # DatasetGenerationError says only that something failed; its cause says what.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise ScoringError(
            f"Cannot load the data of {title}: {first_line(cause)}",
            hint="Check `dataset`, `config` and, for gated or private data, that you are logged in."
            if not is_local(scoring.dataset)
            else "Check that the file is what its name says.",
        ) from error
    return splits


def _choose(title: str, spec: str | None, splits: Mapping[str, Any]) -> tuple[dict[str, Ints], Any]:
    """The row numbers that a split names, and these rows."""
    import datasets

    there = f"its splits are {', '.join(f'{name} ({len(table):,} rows)' for name, table in splits.items())}"
    if spec is None:
        if len(splits) > 1:
            raise ScoringError(f"{title} needs a split: {there}.", hint="Say it: `split: …`.")
        spec = next(iter(splits))
    numbers: dict[str, list[Ints]] = {}
    parts = []
    for part in spec.split("+"):
        base = _BASE.match(part)
        if base is None or base[1] not in splits:
            raise ScoringError(f"{title} has no split '{part.strip()}': {there}.")
        table = splits[base[1]]
        try:
            instruction = datasets.ReadInstruction.from_spec(part.strip())
            (chosen,) = instruction.to_absolute({base[1]: len(table)})
        except (ValueError, AssertionError) as error:
            raise ScoringError(
                f"Cannot read the split '{part.strip()}' of {title}: {error}.",
                hint="Write slices as `train[:500]` or `train[80%:]`.",
            ) from None
        rows = np.arange(chosen.from_, chosen.to, dtype=np.int64)
        numbers.setdefault(base[1], []).append(rows)
        parts.append(table.select(rows))
    table = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if len(table) == 0:
        raise ScoringError(f"{title} is empty: there are no rows in the split '{spec}'; {there}.")
    return {base: np.concatenate(rows) for base, rows in numbers.items()}, table


def _existing(title: str, table: Any, name: str, key: str) -> str:
    if name not in table.column_names:
        raise ScoringError(
            f"{title} has no column '{name}' (`{key}`); its columns are {', '.join(table.column_names)}."
        )
    return name


def _ranges(rows: Ints) -> str:
    """Sorted row numbers as ranges, both ends included: ``0-9, 20``."""
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    runs = np.split(rows, breaks)
    shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:8]]
    return "rows " + ", ".join(shown) + (", …" if len(runs) > 8 else "")
