"""Texts that a language model predicts token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup._util.text import first_line
from hf_soup.checkpoint import panics_as_errors
from hf_soup.errors import ScoringError
from hf_soup.evaluation.language import LANGUAGE_METRICS, LanguageDataset
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks.task import TOKENIZER_FILES, PreparedRows, Task, of_donor
from hf_soup.recipe import Scoring

_USUAL_LONGEST = 2048


class CausalLM(Task):
    """Texts through the donor's tokenizer, with the tokens that it adds; see `LanguageDataset`."""

    columns: ClassVar[Sequence[tuple[str, ...]]] = (("text",), ("content",), ("sentence",), ("document",))
    head: ClassVar[str] = "ForCausalLM"
    models: ClassVar[str] = "MODEL_FOR_CAUSAL_LM_MAPPING"
    chunk: ClassVar[int] = 200

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from transformers import AutoTokenizer

        self._reads = of_donor(folder, "tokenizer", TOKENIZER_FILES, AutoTokenizer)
        text = config.get("text_config") or config
        positions = next(filter(None, map(text.get, ("n_positions", "max_position_embeddings", "n_ctx"))), None)
        most = int(self._reads.model_max_length)
        self.longest = int(positions or (most if most < 1 << 30 else _USUAL_LONGEST))
        self.vocabulary = int(text.get("vocab_size") or len(self._reads))
        begins = self._reads.bos_token_id
        self.before = self._reads.eos_token_id if begins is None else begins
        if self.before is None:
            raise ScoringError(
                "The donor's tokenizer has no token that begins or ends texts, from which the first one is predicted.",
                hint="Name one as `bos_token` or `eos_token` in its tokenizer_config.json.",
            )
        self.depends_on = [type(self._reads).__name__, self.before, self.vocabulary]

    @staticmethod
    def require(scoring: Scoring, config: Mapping[str, Any]) -> None:
        """Refuse a metric that there is not, and keys of labels."""
        if scoring.metric not in LANGUAGE_METRICS:
            raise ScoringError(
                f"`task: causal-lm` has no metric '{scoring.metric}'.", hint=f"It has {', '.join(LANGUAGE_METRICS)}."
            )
        if labelled := next((key for key in ("labels", "label_column") if getattr(scoring, key)), None):
            raise ScoringError(f"`task: causal-lm` reads texts without labels, so it has no `{labelled}`.")

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
        known = self._reads.decode([self.before])
        try:
            with panics_as_errors():
                # A text that has the first token written out gets no second one.
                asked = [{"add_special_tokens": False} if text.startswith(known) else {} for (text,) in contents]
                rows = [
                    self._reads.encode(text, verbose=False, **each)
                    for (text,), each in zip(contents, asked, strict=True)
                ]
        except Exception as error:  # a stranger's file, and no common class; tokenizers raises Exception itself
            raise ScoringError(
                f"The donor's tokenizer cannot read {title}: {first_line(error)}",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            ) from error
        highest = max((max(row, default=0) for row in rows), default=0)
        if max(highest, self.before) >= self.vocabulary:
            raise ScoringError(
                f"The donor's tokenizer gives token {max(highest, self.before)} on {title}, and the model has "
                f"{self.vocabulary} tokens.",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            )
        return ["input_ids"], [np.array([[self.before, *row]], dtype=np.int32) for row in rows]

    def dataset(self, rows: PreparedRows) -> LanguageDataset:
        """As `Task.dataset`."""
        sizes = np.stack([rows.labels[rows.kept], rows.encoded.sizes[rows.kept] - 1], axis=1)
        if not sizes.all(axis=1).any():
            raise ScoringError(
                f"All {len(sizes):,} texts of {rows.name} are empty.", hint="Name other `input_columns`."
            )
        return LanguageDataset(
            rows.title, rows.scoring, rows.notes, rows.fingerprint, rows.name, rows.encoded, rows.kept, sizes,
            self.longest, self.vocabulary,
        )  # fmt: skip
