"""The data sets of a recipe: read, checked, compared with each other, and preprocessed."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import tempfile
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from hf_soup._util.text import first_line
from hf_soup.errors import ScoringError
from hf_soup.evaluation import data, label_map
from hf_soup.evaluation.clusters import in_clusters
from hf_soup.evaluation.dataset import CalibrationDataset, EvalDataset
from hf_soup.evaluation.encoded_rows import Chunk, EncodedRows, key_of, stored
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks import task_named
from hf_soup.evaluation.tasks.task import PreparedRows, Task, digest
from hf_soup.recipe import CalibrationData, Scoring


def prepare_datasets(
    scorings: Sequence[tuple[str, Scoring]],
    *,
    folder: Path,
    config: Mapping[str, Any],
    token: str | bool | None = None,
    quiet: bool = False,
) -> list[EvalDataset]:
    """Read, check and preprocess all validation and test data of a recipe.

    What was preprocessed once is read from the disk the next time, where the data, the donor's tokenizer or image
    processor, and the libraries are the same. Neither images nor their numbers are ever all in memory.

    They are given together because rule 9 is about them together: validation rows that are test rows too
    are refused, and validation rows that equal a test row elsewhere in content are dropped, with a note.

    Args:
        scorings: ``("validation" or "test", scoring)``.
        folder: The donor's: its ``config.json`` and tokenizer or image processor.
        config: The donor's ``config.json``.
        token: For gated and private data sets.
        quiet: No progress bar.

    Returns:
        One bench for each scoring, in their order.

    Raises:
        ResolveError: A data set cannot be found or reached.
        ScoringError: A data set cannot be used: the message says why and what there is instead.
    """
    heads = {task_named(scoring.task).head: scoring.task for _, scoring in scorings}
    if len(heads) > 1:
        raise ScoringError(
            f"One model has one head, and {' and '.join(sorted(heads.values()))} are tasks of different ones.",
            hint="Leave one of them out, or measure it by a function of your own.",
        )
    for _, scoring in scorings:
        task_named(scoring.task).require(scoring, config)
    names = [data.name_of(scoring) for _, scoring in scorings]
    tests = [place for place, (role, _) in enumerate(scorings) if role == "test"]
    validation = [place for place, (role, _) in enumerate(scorings) if role == "validation"]
    benches: dict[int, EvalDataset] = {}
    in_tests: set[bytes] = set()
    with tempfile.TemporaryDirectory(prefix="hf-soup-data-") as cache:
        scratch = Path(cache)
        loaded = data.load([scoring for _, scoring in scorings], scratch, token)
        for place, other in itertools.product(validation, tests):
            data.refuse_overlap((names[place], loaded[place][1]), (names[other], loaded[other][1]))
        # Test data first: what they hold is what validation may not hold.
        for place in tests + validation:
            barred = in_tests if place in validation else set()
            benches[place], digests = _prepare_one(
                scorings[place][1], *loaded[place], folder, config, barred, scratch, quiet
            )
            if place in tests:
                in_tests.update(digests)
        for place, other in itertools.combinations(validation, 2):
            if benches[place].fingerprint != benches[other].fingerprint:
                data.refuse_partial_overlap((names[place], loaded[place][1]), (names[other], loaded[other][1]))
    return [benches[place] for place in range(len(loaded))]


def _prepare_one(
    asked: Scoring,
    scoring: Scoring,
    rows: data.DatasetRows,
    folder: Path,
    config: Mapping[str, Any],
    barred: Set[bytes],
    scratch: Path,
    quiet: bool,
) -> tuple[EvalDataset, Sequence[bytes]]:
    """A bench of the rows that are not ``barred``, and the hash of every row."""
    task, name, table = task_named(scoring.task)(scoring, folder, config), data.name_of(asked), rows.table
    columns = data.input_columns(scoring, name, table, task.columns, task.most_columns)
    labels = task.labels(scoring, name, table, columns)
    key, encoded = _preprocessed(scoring, rows, task, folder, columns, scratch=scratch, quiet=quiet)
    kept, notes = _unseen(encoded, barred, name, "validation data", "selection")
    fingerprint = hashlib.sha256(key.encode() + kept.tobytes()).hexdigest()
    prepared = PreparedRows(asked.title, scoring, tuple(notes), fingerprint, name, encoded, kept, labels)
    dataset = task.dataset(prepared)
    if (column := scoring.cluster_column) is not None:
        shown = table.select_columns([column]) if column in table.column_names else table
        dataset = in_clusters(dataset, column, shown.select(kept))
    return dataset, encoded.digests


def prepare_calibration_dataset(
    examples: CalibrationData,
    tests: Sequence[Scoring],
    *,
    folder: Path,
    config: Mapping[str, Any],
    token: str | bool | None = None,
    quiet: bool = False,
) -> CalibrationDataset:
    """Read and preprocess the examples of a recipe.

    Rows of the test data are refused, and rows that equal one in content dropped: nothing may look at test data before
    the end.

    Args:
        examples: The recipe's.
        tests: The data that nothing may look at before.
        folder, config, token, quiet: As in `prepare_datasets`.

    Raises:
        ResolveError: A data set cannot be found or reached.
        ScoringError: A data set cannot be used.
    """
    if examples.task != "causal-lm":
        _require_classes(config)
    name = data.name_of(examples)
    barred: set[bytes] = set()
    with tempfile.TemporaryDirectory(prefix="hf-soup-data-") as cache:
        scratch = Path(cache)
        (pinned, rows), *others = data.load([examples, *tests], scratch, token)
        for report, (_, theirs) in zip(tests, others, strict=True):
            data.refuse_overlap((name, rows), (data.name_of(report), theirs), "examples")

        def of(scoring: Scoring, its: data.DatasetRows) -> tuple[Task, str, EncodedRows]:
            task = task_named(scoring.task)(scoring, folder, config)
            columns = data.input_columns(scoring, data.name_of(scoring), its.table, task.columns, task.most_columns)
            return task, *_preprocessed(scoring, its, task, folder, columns, scratch=scratch, quiet=quiet)

        for scoring, theirs in others:
            barred.update(of(scoring, theirs)[2].digests)
        task, key, found = of(pinned, rows)
    kept, dropped = _unseen(found, barred, name, "examples", "a method")
    notes = tuple(f"{name}: {note}" for note in dropped)
    assert isinstance(pinned, CalibrationData)
    fingerprint = hashlib.sha256(key.encode() + kept.tobytes()).hexdigest()
    return CalibrationDataset(pinned, len(kept), notes, fingerprint, task.inputs(found, kept))


def _require_classes(config: Mapping[str, Any]) -> None:
    """Refuse models that do not answer with a distribution over classes."""
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise ScoringError(f"The model's problem type is {config['problem_type']}; it has no one label to draw.")
    if len(label_map.model_classes(config)) < 2:
        raise ScoringError("The model has one output: a regression, which has no labels to draw.")


def _unseen(rows: EncodedRows, barred: Set[bytes], name: str, what: str, who: str) -> tuple[Ints, list[str]]:
    """The rows that are in no test data, and what is to be said of those that are."""
    kept, every = np.flatnonzero([digest not in barred for digest in rows.digests]), len(rows.digests)
    if not len(kept):
        raise ScoringError(
            f"Every row of the {what} '{name}' is in the test data too.",
            hint=f"What {who} has looked at cannot test it: use other rows.",
        )
    note = f"{every - len(kept):,} of {every:,} rows equal a test row in content and were dropped"
    return kept, [note] if len(kept) < every else []


def _preprocessed(
    scoring: Scoring,
    rows: data.DatasetRows,
    task: Task,
    folder: Path,
    columns: Sequence[str],
    *,
    scratch: Path,
    quiet: bool,
) -> tuple[str, EncodedRows]:
    """All rows of data, preprocessed once and kept; and the key under which they are.

    Args:
        scoring: Pinned.
        rows: Those that it names.
        task: Reads and preprocesses them.
        folder: The donor's: its tokenizer or image processor.
        columns: That hold the inputs.
        scratch: Where files go when the user's cache cannot be written.
        quiet: No progress bar.

    Raises:
        ScoringError: A row cannot be read, or is no input.
    """
    name, table = data.name_of(scoring), rows.table.select_columns(list(columns))

    def make(numbers: range) -> Chunk:
        contents: list[Any] = []
        for row in numbers:
            try:
                values = table[row]
                contents.append(task.read([values[key] for key in columns]))
            except Exception as error:  # of Pillow on broken files and bombs, too: no common class
                raise ScoringError(
                    f"Cannot read row {row} of {name} ({', '.join(columns)}): {first_line(error)}",
                    hint="Remove the row, or name other `input_columns`.",
                ) from error
        try:
            chunk = Chunk([digest(content) for content in contents], *task.preprocess(name, contents))
        except ValueError as error:  # of examples, whose labels nobody has read
            raise ScoringError(
                f"Cannot read rows {numbers.start} to {numbers.stop - 1} of {name}: {error}",
                hint="Leave out what the donor's chat template cannot read, or name other `input_columns`.",
            ) from error
        for row, content, made in zip(numbers, contents, chunk.rows, strict=True):
            if not made.size:
                raise ScoringError(
                    f"Row {row} of {name} is {' + '.join(map(repr, content))}, no token to the donor's tokenizer.",
                    hint="Remove the row: this tokenizer adds no token of its own to an empty text.",
                )
        return chunk

    # A file's name says how it is read; the rest of what a split names follows from the revision.
    kind = Path(scoring.dataset).suffix if not rows.origin.dataset else ""
    code = [Path(inspect.getfile(each)) for each in type(task).__mro__ if issubclass(each, Task)]
    key = key_of([scoring.task, task.depends_on, rows.origin, kind, scoring.split, columns], folder, code)
    chunks = [range(start, min(start + task.chunk, len(table))) for start in range(0, len(table), task.chunk)]
    return key, stored(key, name, chunks, make, scratch=scratch, threads=task.threads, quiet=quiet)
