"""Texts or pairs of texts, each of one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup._util.text import first_line
from hf_soup.checkpoint import panics_as_errors
from hf_soup.errors import ScoringError
from hf_soup.evaluation.tasks.heads import HeadTask
from hf_soup.evaluation.tasks.task import donors_tokenizer
from hf_soup.recipe import Scoring


class TextClassification(HeadTask):
    """Texts, or pairs of texts, through the donor's tokenizer, cut at the longest that the model reads."""

    columns: ClassVar[Sequence[tuple[str, ...]]] = (
        ("premise", "hypothesis"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text",),
        ("sentence",),
        ("content",),
    )
    head: ClassVar[str] = "ForSequenceClassification"
    models: ClassVar[str] = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"
    chunk: ClassVar[int] = 1000

    def __init__(self, scoring: Scoring, folder: Path, config: Mapping[str, Any]) -> None:
        self.config = config
        self.tokenizer = donors_tokenizer(folder)
        self.depends_on = [type(self.tokenizer).__name__, self._longest(), config.get("vocab_size")]

    def read(self, values: Sequence[Any]) -> tuple[str, ...]:
        """One text or two."""
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"{value!r} where a text should be")
        return tuple(values)

    def preprocess(self, title: str, contents: Sequence[tuple[str, ...]]) -> tuple[list[str], list[NDArray[Any]]]:
        """The names of the model's arguments, and each row as ``(names, tokens)`` int32, all of tokens it knows."""
        columns = [list(column) for column in zip(*contents, strict=True)]
        try:
            with panics_as_errors():
                made = self.tokenizer(*columns, truncation=True, max_length=self._longest())
        except Exception as error:  # a stranger's file, and no common class; tokenizers raises Exception itself
            raise ScoringError(
                f"The donor's tokenizer cannot read {title}: {first_line(error)}",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            ) from error
        vocabulary = self.config.get("vocab_size")
        highest = max(max(ids, default=0) for ids in made["input_ids"])
        if isinstance(vocabulary, int) and highest >= vocabulary:
            raise ScoringError(
                f"The donor's tokenizer gives token {highest} on {title}, and the model has {vocabulary} tokens.",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            )
        return list(made), [np.array(lines, dtype=np.int32) for lines in zip(*made.values(), strict=True)]

    def _longest(self) -> int:
        """Tokens that the model reads: the tokenizer's word, or else the model's position embeddings."""
        positions = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if not isinstance(positions, int) or positions < 1:
            positions = 4096
        # The RoBERTa family counts positions from after the padding token's number.
        elif any(family in str(self.config.get("model_type")) for family in ("roberta", "camembert")):
            positions -= int(self.config.get("pad_token_id", 1)) + 1
        return min(int(self.tokenizer.model_max_length), positions)
