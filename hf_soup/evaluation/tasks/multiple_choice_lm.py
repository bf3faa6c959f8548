"""Questions with choices, of which a language model takes the likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation.choices import CHOICE_METRICS, ChoiceDataset
from hf_soup.evaluation.language import BEGINS, PREDICTED
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks.language import LanguageTask
from hf_soup.evaluation.tasks.task import PreparedRows
from hf_soup.recipe import Scoring

_LABEL_COLUMNS = ("label", "answer", "answerKey", "answer_key", "gold", "target")


class Choices(NamedTuple):
    """Of all rows: which choice is right, and the letters of each, 0 where a question has fewer."""

    right: Ints
    lengths: Ints


class MultipleChoiceLM(LanguageTask):
    """A question and its choices, in a column with a list, or one column for each; see `ChoiceDataset`.

    A choice stands behind its question with a space between them.
    """

    columns: ClassVar[Sequence[tuple[str, ...]]] = (
        ("question", "choices"),
        ("ctx", "endings"),
        ("context", "endings"),
        ("query", "choices"),
        ("question", "options"),
        ("prompt", "choices"),
        ("goal", "sol1", "sol2"),
    )
    metrics: ClassVar[Sequence[str]] = CHOICE_METRICS
    most_columns: ClassVar[int] = 27

    def labels(self, scoring: Scoring, name: str, table: Any, columns: Sequence[str]) -> Choices:
        """Which choice is right: its number from 0 on, its letter, its name, or the choice itself."""
        shown = f"its columns are {', '.join(table.column_names)}"
        if len(columns) < 2:
            raise ScoringError(
                f"`task: {scoring.task}` reads a question and its choices, and '{columns[0]}' is one column; {shown}.",
                hint="Name the question and a column with a list, or one column for each choice.",
            )
        usual = [column for column in _LABEL_COLUMNS if column in table.column_names and column not in columns]
        if (column := scoring.label_column or next(iter(usual), None)) not in table.column_names:
            raise ScoringError(
                f"{name} has no column that says which choice is right; {shown}.", hint="Name it: `label_column: …`."
            )
        rows = (
            row
            for batch in table.select_columns([*columns, column]).iter(1000)
            for row in zip(*(batch[each] for each in (*columns, column)), strict=True)
        )
        right: list[int] = []
        lengths: list[list[int]] = []
        for number, (_, *given, label) in enumerate(rows):
            choices, names = _choices(given)
            meant = _right(label, choices, names)
            if len(meant) != 1:
                count = f"may be two of its {len(choices)}" if meant else f"is none of its {len(choices)}"
                raise ScoringError(
                    f"Row {number} of {name} has {label!r} as '{column}', which {count} choices.",
                    hint="It is the number of a choice from 0 on, its letter from A on, or the choice itself.",
                )
            right.append(*meant)
            lengths.append([len(str(choice)) for choice in choices])
        most = max(map(len, lengths))
        return Choices(np.array(right), np.array([[*each, *[0] * (most - len(each))] for each in lengths]))

    def read(self, values: Sequence[Any]) -> tuple[str, ...]:
        """The question and its choices."""
        question, (choices, _) = values[0], _choices(values[1:])
        for value in (question, *choices):
            if not isinstance(value, str):
                raise ValueError(f"{value!r} where a text should be")
        if len(choices) < 2 or not all(choices):
            raise ValueError(f"the choices {list(choices)}; there should be two or more, and none empty")
        return (question, *choices)

    def preprocess(self, title: str, contents: Sequence[tuple[str, ...]]) -> tuple[list[str], list[NDArray[Any]]]:
        """Each row as ``(2, tokens)`` int32, as `ChoiceDataset` has it."""
        rows = []
        for question, *choices in contents:
            # Spaces at the end belong to the choice, as tokenizers have them in front of words.
            context, spaces = question.rstrip(), question[len(question.rstrip()) :]
            lines: list[list[int]] = [[], []]
            for before, predicted in self._pairs(title, context, [f"{spaces} {choice}" for choice in choices]):
                lines[0] += [*before, *predicted]
                lines[1] += [BEGINS, *[0] * (len(before) - 1), *[PREDICTED] * len(predicted)]
            rows.append(np.array(lines, dtype=np.int32))
        return ["input_ids", "predicted"], rows

    def _pairs(self, title: str, context: str, choices: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens of a question and those of each choice behind it."""
        if not context:
            for row in self.encode(title, choices, add_special_tokens=False):
                yield ([self.before], row) if row[:1] != [self.before] else (row[:1], row[1:])
            return
        (before,), wholes = self.encode(title, [context]), self.encode(title, [context + each for each in choices])
        for whole, choice in zip(wholes, choices, strict=True):
            if len(whole) <= len(before):
                raise ScoringError(
                    f"The donor's tokenizer makes no token of the choice {choice!r} of {title} behind its question.",
                    hint="Its tokens run together with those of the question; write the question otherwise.",
                )
            yield before, whole[len(before) :]

    def dataset(self, rows: PreparedRows) -> ChoiceDataset:
        """As `Task.dataset`."""
        choices: Choices = rows.labels
        found = ChoiceDataset(
            rows.title, rows.scoring, rows.notes, rows.fingerprint, rows.name, rows.encoded, rows.kept, self.longest,
            self.vocabulary, choices.right[rows.kept], choices.lengths[rows.kept],
        )  # fmt: skip
        _ = found.windows  # a choice that is too long is found now
        return found


def _choices(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The choices in a row's columns, and what the data call them where it says so.

    >>> _choices(["no", "yes"]), _choices([["no", "yes"]]), _choices([{"text": ["no", "yes"], "label": ["1", "2"]}])
    ((['no', 'yes'], ()), (['no', 'yes'], ()), (['no', 'yes'], ['1', '2']))
    """
    if len(values) > 1 or isinstance(values[0], str):
        return list(values), ()
    (given,) = values
    if isinstance(given, Mapping):
        return list(given.get("text") or ()), list(given.get("label") or ())
    return list(given or ()), ()


def _right(label: object, choices: Sequence[Any], names: Sequence[Any]) -> set[int]:
    """The numbers of the choices that a label may mean.

    >>> [_right(label, ["no", "yes"], ()) for label in (1, "1", "B", "yes", 1.0, 2)]
    [{1}, {1}, {1}, {1}, {1}, set()]
    >>> _right("1", ["no", "yes"], ["1", "2"])
    {0}
    >>> _right("1", ["2", "1", "4"], ()), _right("1", ["1", "2", "4"], ())
    ({1}, {0, 1})
    """
    if names:
        return {list(names).index(label)} if label in names else set()
    meant = {list(choices).index(label)} if isinstance(label, str) and label in choices else set()
    if isinstance(label, float) and label.is_integer():  # what a table makes of whole numbers beside a gap
        label = int(label)
    if isinstance(label, str) and len(label) == 1 and label.isascii() and label.isupper():
        meant.add(ord(label) - ord("A"))
    elif (isinstance(label, str) and label.isdecimal()) or (isinstance(label, int) and not isinstance(label, bool)):
        meant.add(int(label))
    return {number for number in meant if 0 <= number < len(choices)}
