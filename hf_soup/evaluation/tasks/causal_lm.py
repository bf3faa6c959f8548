"""Texts and conversations that a language model predicts token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation.chat_template import ChatTemplateError, rendered
from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.inputs import TextInputs
from hf_soup.evaluation.language import BEGINS, LANGUAGE_METRICS, PREDICTED, LanguageDataset
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks.language import LanguageTask
from hf_soup.evaluation.tasks.task import PreparedRows
from hf_soup.recipe import Scoring


class CausalLM(LanguageTask):
    """Texts, or conversations, which the donor's chat template makes texts of; see `LanguageDataset`.

    With ``assistant_only`` the answers in a conversation count alone, each after what stands before it, as the template
    has it when that answer is asked for.
    """

    columns: ClassVar[Sequence[tuple[str, ...]]] = (
        ("messages",),
        ("text",),
        ("content",),
        ("sentence",),
        ("document",),
    )
    metrics: ClassVar[Sequence[str]] = tuple(LANGUAGE_METRICS)
    unread: ClassVar[Sequence[str]] = ("labels", "label_column")

    def __init__(self, scoring: Scoring, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(scoring, folder, config)
        self._assistant_only = scoring.assistant_only
        self.depends_on = [*self.depends_on, self._assistant_only]

    def labels(self, scoring: Scoring, name: str, table: Any, columns: Sequence[str]) -> Ints:
        """``(rows,)``: the bytes in UTF-8 of what counts of each row."""
        (column,), sizes = columns, []
        for batch in table.select_columns([column]).iter(1000):
            for value in batch[column]:
                try:
                    parts = self._parts(self.read([value]))
                    sizes.append(sum(len(counted.encode()) for _, counted in parts))
                except ValueError as error:
                    raise ScoringError(
                        f"Cannot read row {len(sizes)} of {name} ({column}): {error}",
                        hint="Put a chat_template.jinja that fits beside the donor's weights, or name a column of "
                        "texts as `input_columns`."
                        if isinstance(error, ChatTemplateError)
                        else "Remove the row, or name other `input_columns`.",
                    ) from error
        return np.array(sizes, dtype=np.int64)

    def read(self, values: Sequence[Any]) -> tuple[str, ...]:
        """One text; or a conversation as JSON, behind its column's usual name."""
        (value,) = values
        if isinstance(value, str) and not self._assistant_only:
            return (value,)
        messages: list[Any] = value if isinstance(value, list) else []
        if not messages or not all(
            isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in messages
        ):
            wanted = "" if self._assistant_only else "a text, or "
            raise ValueError(f"{value!r:.200} where {wanted}a list of messages with `role` and `content`, should be")
        # Tables fill in what some messages have and others do not.
        plain = [{key: each[key] for key in each if each[key] is not None} for each in messages]
        return "messages", json.dumps(plain, ensure_ascii=False, sort_keys=True)

    def _parts(self, content: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """What is read up to what counts, and what counts, text after text."""
        if len(content) == 1:
            yield "", content[0]
            return
        messages = json.loads(content[1])
        if not self._assistant_only:
            yield "", rendered(self._reads, messages)
            return
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                whole = rendered(self._reads, messages[: number + 1])
                # Some templates begin an answer otherwise than they ask for it.
                begin = _alike(whole, rendered(self._reads, messages[:number], add_generation_prompt=True))
                yield whole[:begin], whole[begin:]

    def preprocess(self, title: str, contents: Sequence[tuple[str, ...]]) -> tuple[list[str], list[NDArray[Any]]]:
        """Each text as ``(1, 1 + tokens)`` int32, with the token before it; or as `LanguageDataset` has answers."""
        if self._assistant_only:
            return ["input_ids", "predicted"], [self._answers(title, content) for content in contents]
        rows = []
        for content in contents:
            ((_, text),) = self._parts(content)
            chat = len(content) > 1  # which may be rendered with the token before it
            (row,) = self.encode(title, [text], add_special_tokens=False) if chat else self.encode(title, [text])
            rows.append(np.array([row if chat and row[:1] == [self.before] else [self.before, *row]], dtype=np.int32))
        return ["input_ids"], rows

    def _answers(self, title: str, content: tuple[str, ...]) -> NDArray[np.int32]:
        """``(2, tokens)``: a conversation up to its last answer, and up to those that it does not begin with."""
        sequences: list[tuple[list[int], list[int]]] = []
        for before, counted in reversed(list(self._parts(content))):
            context, whole = self.encode(title, [before, before + counted], add_special_tokens=False)
            if not (begin := _alike(context, whole)):  # else it has what the template shows, and nothing more
                begin, whole = 1, [self.before, *whole]
            said = next((said for tokens, said in sequences if tokens[: len(whole)] == whole), None)
            if said is None:
                said = [BEGINS, *[0] * (len(whole) - 1)]
                sequences.append((whole, said))
            said[begin : len(whole)] = [PREDICTED] * (len(whole) - begin)
        lines = sequences or [([self.before], [BEGINS])]  # no answer
        return np.concatenate([np.array(each, dtype=np.int32) for each in lines], axis=1)

    def inputs(self, encoded: EncodedRows, kept: Ints) -> TextInputs:
        """As `Task.inputs`."""
        return TextInputs(encoded, kept, longest=self.longest, vocabulary=self.vocabulary)

    def dataset(self, rows: PreparedRows) -> LanguageDataset:
        """As `Task.dataset`."""
        if self._assistant_only:
            counts = [
                int((row[1] & PREDICTED).sum()) for number in rows.kept for row in rows.encoded.rows(np.array([number]))
            ]
        else:
            counts = (rows.encoded.sizes[rows.kept] - 1).tolist()
        sizes = np.stack([rows.labels[rows.kept], counts], axis=1)
        if not sizes.all(axis=1).any():
            what = "conversations without an answer" if self._assistant_only else "empty"
            raise ScoringError(
                f"All {len(sizes):,} texts of {rows.name} are {what}.", hint="Name other `input_columns`."
            )
        return LanguageDataset(
            rows.title, rows.scoring, rows.notes, rows.fingerprint, rows.name, rows.encoded, rows.kept, self.longest,
            self.vocabulary, sizes,
        )  # fmt: skip


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many letters or tokens two begin with alike.

    >>> _alike("abc", "abd"), _alike([1], [1, 2])
    (2, 1)
    """
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
