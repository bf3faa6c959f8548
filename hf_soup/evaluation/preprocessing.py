"""The inputs of rows, as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_soup.errors import ScoringError
from hf_soup.evaluation import data, tasks
from hf_soup.evaluation.encoded_rows import Chunk, EncodedRows, key_of, stored
from hf_soup.recipe import Scoring


def preprocessed(
    scoring: Scoring,
    rows: data.DatasetRows,
    task: tasks.ImageClassification | tasks.TextClassification,
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
                    f"Cannot read row {row} of {name} ({', '.join(columns)}): {tasks.first_line(error)}",
                    hint="Remove the row, or name other `input_columns`.",
                ) from error
        chunk = Chunk([tasks.digest(content) for content in contents], *task.preprocess(name, contents))
        for row, content, made in zip(numbers, contents, chunk.rows, strict=True):
            if not made.size:
                raise ScoringError(
                    f"Row {row} of {name} is {' + '.join(map(repr, content))}, no token to the donor's tokenizer.",
                    hint="Remove the row: this tokenizer adds no token of its own to an empty text.",
                )
        return chunk

    # A file's name says how it is read; the rest of what a split names follows from the revision.
    kind = Path(scoring.dataset).suffix if not rows.origin.dataset else ""
    key = key_of([scoring.task, task.depends_on, rows.origin, kind, scoring.split, columns], folder)
    chunks = [range(start, min(start + task.chunk, len(table))) for start in range(0, len(table), task.chunk)]
    return key, stored(key, name, chunks, make, scratch=scratch, threads=task.threads, quiet=quiet)
