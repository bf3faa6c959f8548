"""Texts that a language model predicts token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation.language import LANGUAGE_METRICS, LanguageDataset
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks.language import LanguageTask
from hf_soup.evaluation.tasks.task import PreparedRows
from hf_soup.recipe import Scoring


class CausalLM(LanguageTask):
    """Texts; see `LanguageDataset`."""

    columns: ClassVar[Sequence[tuple[str, ...]]] = (("text",), ("content",), ("sentence",), ("document",))
    metrics: ClassVar[Sequence[str]] = tuple(LANGUAGE_METRICS)
    unread: ClassVar[Sequence[str]] = ("labels", "label_column")

    def labels(self, scoring: Scoring, name: str, table: Any, columns: Sequence[str]) -> Ints:
        """``(rows,)``: the bytes of each text in UTF-8."""
        (column,) = columns
        return np.array(
            [len(str(text).encode()) for batch in table.select_columns([column]).iter(1000) for text in batch[column]],
            dtype=np.int64,
        )

    def read(self, values: Sequence[Any]) -> tuple[str, ...]:
        """One text."""
        (value,) = values
        if not isinstance(value, str):
            raise ValueError(f"{value!r} where a text should be")
        return (value,)

    def preprocess(self, title: str, contents: Sequence[tuple[str, ...]]) -> tuple[list[str], list[NDArray[Any]]]:
        """Each text as ``(1, 1 + tokens)`` int32, with the token before it."""
        rows = self.encode(title, [text for (text,) in contents])
        return ["input_ids"], [np.array([[self.before, *row]], dtype=np.int32) for row in rows]

    def dataset(self, rows: PreparedRows) -> LanguageDataset:
        """As `Task.dataset`."""
        sizes = np.stack([rows.labels[rows.kept], rows.encoded.sizes[rows.kept] - 1], axis=1)
        if not sizes.all(axis=1).any():
            said = f"All {len(sizes):,} texts of {rows.name} are empty."
            raise ScoringError(said, hint="Name other `input_columns`.")
        return LanguageDataset(
            rows.title, rows.scoring, rows.notes, rows.fingerprint, rows.name, rows.encoded, rows.kept, self.longest,
            self.vocabulary, sizes,
        )  # fmt: skip
