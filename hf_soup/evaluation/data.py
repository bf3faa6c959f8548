"""The rows of a `Scoring`: where they come from, which ones, and that validation is not test (rule 9)."""

from __future__ import annotations

import glob
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_soup._util.text import first_line, near
from hf_soup.errors import ResolveError, ScoringError
from hf_soup.evaluation.statistics import Ints
from hf_soup.hub import cut_off
from hf_soup.recipe import Scoring

LABEL_COLUMNS = ("label", "labels", "coarse_label", "fine_label")
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class Origin(NamedTuple):
    """What pins a data set: two scorings read the same rows when this and the row numbers are equal."""

    dataset: str  #: The canonical Hub id, or "" for local data, which its hash alone identifies.
    config: str
    revision: str  #: A commit, or ``sha256:…``.


class DatasetRows(NamedTuple):
    """The rows that one `Scoring` names."""

    origin: Origin
    numbers: Mapping[str, Ints]  #: For each base split the row numbers in it, in the order in which they are read.
    table: Any  #: The ``datasets.Dataset`` with exactly these rows.


def load(
    scorings: Sequence[Scoring], cache_folder: Path, token: str | bool | None = None
) -> list[tuple[Scoring, DatasetRows]]:
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
    known: dict[tuple[str, str | None, str | None], tuple[str, str, Mapping[str, Any]]] = {}
    loaded = []
    for scoring in scorings:
        key = (scoring.dataset, scoring.config, scoring.revision)
        if key not in known:
            dataset, revision = _pin(scoring, token)
            known[key] = dataset, revision, _read(scoring, dataset, revision, cache_folder, token)
        dataset, revision, tables = known[key]
        # A folder and a file are named by their content; the builder's name for a file depends on its path.
        local = revision.startswith("sha256:")
        config = scoring.config if local else next(iter(tables.values())).config_name
        origin = Origin("" if local else dataset, config or "", revision)
        pinned = scoring.model_copy(update={"dataset": dataset, "revision": revision})
        loaded.append((pinned, DatasetRows(origin, *_choose(name_of(scoring), scoring.split, tables))))
    return loaded


def name_of(scoring: Scoring) -> str:
    """What errors and notes call the data: the title of the score without its metric.

    >>> name_of(Scoring(task="text-classification", dataset="dair-ai/emotion", split="test"))
    'dair-ai/emotion test'
    """
    return scoring.title.removesuffix(f" {scoring.measure}")


def refuse_overlap(
    first: tuple[str, DatasetRows], second: tuple[str, DatasetRows], what: str = "validation data"
) -> None:
    """Validation rows, or examples, and test rows of one data set must have no row in common."""
    (first_title, validation), (second_title, test) = first, second
    if common := _common(validation, test):
        raise ScoringError(
            f"The {what} '{first_title}' and the test data '{second_title}' share {common}.",
            hint="What selection has looked at cannot test it: use another split, or slices that do not meet, "
            "such as `split: validation[:50%]` and `split: validation[50%:]`.",
        )


def refuse_partial_overlap(first: tuple[str, DatasetRows], second: tuple[str, DatasetRows]) -> None:
    """Validation data sets that are not one have no row in common: halves and inner splits of each would mix."""
    (title, rows), (other_title, others) = first, second
    if common := _common(rows, others):
        raise ScoringError(
            f"The validation data '{title}' and '{other_title}' share {common}, and are not the same.",
            hint="Several scores may look at the same rows, which the same `split` and `input_columns` name, or at "
            "slices that do not meet.",
        )


def _common(first: DatasetRows, second: DatasetRows) -> str:
    """What two have in common, such as ``2 rows: test rows 3-4``."""
    if first.origin != second.origin:
        return ""
    return _counted(
        {split: np.intersect1d(rows, second.numbers.get(split, [])) for split, rows in first.numbers.items()}
    )


def label_column(scoring: Scoring, title: str, table: Any, classes: int, usual: Sequence[str] = LABEL_COLUMNS) -> str:
    """The recipe's, or the one with a usual name; of several, the first that declares the model's number of classes."""
    said = None if scoring.label_column is None else (scoring.label_column,)
    found = [name for (name,) in _columns(title, table, said, [(name,) for name in usual], "label_column")]
    return next((name for name in found if len(declared_classes(table, name) or ()) == classes), found[0])


def input_columns(
    scoring: Scoring, title: str, table: Any, usual: Sequence[tuple[str, ...]], most: int = 0
) -> tuple[str, ...]:
    """The columns that hold the inputs: the recipe's, or the first of the usual ones that is there."""
    said, most = scoring.input_columns, most or max(len(names) for names in usual)
    if said is not None and not 1 <= len(said) <= most:
        raise ScoringError(f"{title} has {len(said)} `input_columns`; '{scoring.task}' reads 1 to {most}.")
    return _columns(title, table, said, usual, "input_columns")[0]


def _columns(
    title: str, table: Any, said: tuple[str, ...] | None, usual: Sequence[tuple[str, ...]], key: str
) -> list[tuple[str, ...]]:
    wanted = usual if said is None else [said]
    found = [names for names in wanted if set(names) <= set(table.column_names)]
    if not found:
        shown = ", ".join(" + ".join(names) for names in wanted)
        raise ScoringError(
            f"{title} has none of the columns that can be `{key}` ({shown}); "
            f"its columns are {', '.join(table.column_names)}.",
            hint=f"Name it: `{key}: …`.",
        )
    return found


def declared_classes(table: Any, column: str) -> tuple[str, ...] | None:
    """The class names that the data set declares for a column of numbers, or of lists of numbers, or None."""
    feature = table.features[column]
    return tuple(getattr(getattr(feature, "feature", feature), "names", None) or ()) or None


def _pin(scoring: Scoring, token: str | bool | None) -> tuple[str, str]:
    """The canonical name of a data set and its full revision; the hash of a file or folder, which no Hub id names."""
    path = Path(scoring.dataset).expanduser()
    foreign = scoring.dataset.startswith("local:")
    named = path.suffix in _BUILDERS or path.is_absolute() or scoring.dataset.startswith((".", "~"))
    if not path.exists() and not named and not foreign:
        from hf_soup.hub import resolve_dataset

        return resolve_dataset(scoring.dataset, scoring.revision, token=token)
    if not path.exists():
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


def loader_of(scoring: Scoring) -> str | None:
    """What `datasets` calls the loader of a local file or folder; None for data of the Hub.

    >>> loader_of(Scoring(task="text-classification", dataset="local:rows.tsv", revision="sha256:0"))
    'csv'
    """
    local = (scoring.revision or "").startswith("sha256:")
    return _BUILDERS.get(Path(scoring.dataset).suffix, "imagefolder") if local else None


def content_hash(path: Path) -> str:
    """The sha256 of a file; of a folder, over the lines ``<relative path> <sha256>`` of what is not hidden."""
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    except OSError as error:
        raise ResolveError(f"Cannot read '{path.name}': {error.strerror}.") from None
    lines = (f"{name} {content_hash(path / name)}\n" for name in names if "/." not in f"/{name}")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read(
    scoring: Scoring, dataset: str, revision: str, cache_folder: Path, token: str | bool | None
) -> Mapping[str, Any]:
    """All splits of a pinned data set; never with remote code."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    path, hint = Path(dataset), "Check that the file is what its name says."
    arguments: dict[str, Any] = {"path": dataset, "cache_dir": str(cache_folder)}
    if not revision.startswith("sha256:"):
        arguments = {"path": dataset, "revision": revision, "token": token}
        hint = "Check `dataset`, `config` and, for gated or private data, that you are logged in."
    elif not path.is_dir():
        if path.suffix not in _BUILDERS:
            raise ScoringError(
                f"Cannot read '{path.name}' as data.",
                hint=f"Use a file that ends in {', '.join(_BUILDERS)}, or a folder of images.",
            )
        if not path.stat().st_size:  # of which some loaders say nothing that helps
            raise ScoringError(f"{name_of(scoring)} is empty: there are no rows in it.")
        arguments |= {"path": _BUILDERS[path.suffix], "data_files": glob.escape(dataset)}
        if path.suffix == ".tsv":
            arguments["sep"] = "\t"
    bars = not datasets.are_progress_bars_disabled()
    if bars and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        splits: Mapping[str, Any] = datasets.load_dataset(name=scoring.config, **arguments)
    except Exception as error:  # of datasets, pyarrow, pandas, fsspec, the HTTP client: no common class
        # DatasetGenerationError says only that something failed; its cause says what.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if "corresponds to no data" in str(cause):  # it has no code for a file that has columns and no rows
            raise ScoringError(f"{name_of(scoring)} is empty: there are no rows in it.") from error
        raise ScoringError(
            f"Cannot load the data of {name_of(scoring)}: {first_line(cause)}",
            hint=hint,
            code=cut_off(error),
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return splits


def _choose(title: str, spec: str | None, splits: Mapping[str, Any]) -> tuple[dict[str, Ints], Any]:
    """The row numbers that a split names, and these rows."""
    import datasets

    there = f"its splits are {', '.join(f'{name} ({len(table):,} rows)' for name, table in splits.items())}"
    if spec is None:
        if len(splits) > 1:
            raise ScoringError(
                f"{title} needs a split: {there}.", hint="Say it: `split: …`, or DATA:SPLIT on the command line."
            )
        spec = next(iter(splits))
    for part in spec.split("+"):
        if part.partition("[")[0].strip() not in splits:
            raise ScoringError(f"{title} has no split '{part.strip()}'{near(part.strip(), splits)}: {there}.")
    try:
        instruction = datasets.ReadInstruction.from_spec(spec.strip())
        chosen = instruction.to_absolute({name: len(table) for name, table in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ScoringError(
            f"Cannot read the split '{spec}' of {title}: {error}.",
            hint="Write slices as `train[:500]` or `train[80%:]`.",
        ) from None
    numbers: dict[str, Ints] = {}
    parts = []
    for found in chosen:
        rows = np.arange(found.from_, found.to)
        numbers[found.splitname] = np.concatenate([numbers.get(found.splitname, rows[:0]), rows])
        parts.append(splits[found.splitname].select(rows))
    table = datasets.concatenate_datasets(parts)
    if len(table) == 0:
        raise ScoringError(f"{title} is empty: there are no rows in the split '{spec}'; {there}.")
    counted = {split: np.unique(rows, return_counts=True) for split, rows in numbers.items()}
    if repeated := _counted({split: rows[counts > 1] for split, (rows, counts) in counted.items()}):
        raise ScoringError(
            f"The split '{spec}' of {title} names more than once {repeated}.",
            hint="Each row counts once: write slices that do not meet, such as `train[:50]+train[50:80]`.",
        )
    return numbers, table


def _counted(numbers: Mapping[str, Ints]) -> str:
    """Rows of splits as ``3 rows: test rows 0-1; train rows 5``; nothing where there are none."""
    total = sum(len(rows) for rows in numbers.values())
    shown = "; ".join(f"{split} {_ranges(rows)}" for split, rows in numbers.items() if len(rows))
    return f"{total:,} rows: {shown}" if total else ""


def _ranges(rows: Ints) -> str:
    """Sorted row numbers as ranges, both ends included: ``0-9, 20``."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    shown = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:8]]
    return "rows " + ", ".join(shown) + (", …" if len(runs) > 8 else "")
