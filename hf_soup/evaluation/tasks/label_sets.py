"""The labels of rows that have any number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_soup._util.text import some
from hf_soup.errors import ScoringError, shortened
from hf_soup.evaluation import data, label_map
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.multi_label import MultiLabelDataset
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks.task import PreparedRows
from hf_soup.recipe import Scoring


class LabelSets(NamedTuple):
    """Of all rows: ``(rows, outputs)``, 1 for each label that a row has; and how they are known."""

    outputs: Ints
    mapped: label_map.LabelMap

    def dataset(self, rows: PreparedRows, inputs: Inputs) -> MultiLabelDataset:
        """As `Task.dataset`."""
        references, mapped = self.outputs[rows.kept], self.mapped
        if (references == references[0]).all():
            shown = ", ".join(mapped.class_names[place] for place in np.flatnonzero(references[0])) or "none"
            raise ScoringError(
                f"All {len(references):,} rows of {rows.name} have the same labels ({shown}); a score would mean "
                "nothing.",
                hint="Use rows with different labels; a slice of a sorted split may hold only such.",
            )
        notes = (mapped.note, *rows.notes) if mapped.note else rows.notes
        return MultiLabelDataset(
            rows.title, rows.scoring, notes, rows.fingerprint, rows.name, mapped.class_names, references, inputs
        )


def read_label_sets(scoring: Scoring, name: str, table: Any, config: Mapping[str, Any]) -> LabelSets:
    """The labels of each row, from a column with lists of them, or from a column of 0 and 1 for each class.

    Raises:
        ScoringError: They are not so, or some label is none of the model's classes.
    """
    model = label_map.model_classes(config)
    declared: Sequence[str] | None
    if scoring.label_column is None and not set(data.LABEL_COLUMNS) & set(table.column_names):
        column, declared = "label", scoring.labels or model
        lists = _from_columns(name, table, scoring.labels or model, len(model))
    else:
        column = data.label_column(scoring, name, table, len(model))
        declared, lists = data.declared_classes(table, column), table.select_columns([column])[:][column]
        vectors = _are_vectors(lists, len(model))
        for row, each in enumerate(lists):
            if not (_is_vector(each, len(model)) if vectors else isinstance(each, list) and not _repeats(each)):
                raise ScoringError(
                    f"Row {row} of {name} has {shortened(repr(each), 200)} as '{column}', and the model's head is "
                    f"multi-label: it should be a list of different labels, or of 0 or 1 for each of its {len(model)}.",
                    hint="Name another `label_column`; or rename it, and have a column of 0 and 1 for each class.",
                )
        if vectors:  # whose names, where there are any, are no and yes
            declared, lists = None, [np.flatnonzero(each).tolist() for each in lists]
    rows = [row for row, each in enumerate(lists) for _ in each]
    if not rows:
        raise ScoringError(f"No row of {name} has a label.", hint="Name another `label_column`, or use other rows.")
    every = label_map.clean(name, [label for each in lists for label in each], column, rows)
    mapped = label_map.match(name, model, every, declared, scoring.labels)
    outputs = np.zeros((len(table), len(model)), dtype=np.int64)
    outputs[rows, label_map.to_outputs(mapped, every, name, rows)] = 1
    return LabelSets(outputs, mapped)


def _is_vector(value: object, length: int) -> bool:
    """Whether it says yes or no to each label, by numbers or booleans.

    >>> _is_vector([0, 1.0, True], 3), _is_vector([0, 2, 1], 3), _is_vector([0, 1], 3)
    (True, False, False)
    """
    return isinstance(value, list) and len(value) == length and all(each in (0, 1) for each in value)


def _repeats(labels: Sequence[Any]) -> bool:
    return any(labels.count(label) > 1 for label in labels)


def _are_vectors(lists: Sequence[Any], length: int) -> bool:
    """Whether lists say yes or no to each label: all look so, or one does that, as a list of labels, has some twice."""
    those = [_is_vector(each, length) for each in lists]
    return all(those) or any(_repeats(each) for each, looks in zip(lists, those, strict=True) if looks)


def _from_columns(title: str, table: Any, classes: Sequence[str], count: int) -> list[Any]:
    """The numbers of the classes of each row, which has a column for each of them."""
    spelled = {label_map.key(column): column for column in table.column_names}
    lacking = [name for name in classes if label_map.key(name) not in spelled]
    if lacking or len(classes) != count:
        raise ScoringError(
            f"{title} has neither a column with lists of labels ({', '.join(data.LABEL_COLUMNS)}) nor one for each of "
            f"the model's {count} classes (not for {some(lacking) or 'all'}); its columns are "
            f"{', '.join(table.column_names)}.",
            hint="Name it: `label_column: …`; or, where the model names no classes, name the columns in the order of "
            "its outputs: `labels: […]`.",
        )
    given = [table.select_columns([column])[:][column] for column in (spelled[label_map.key(name)] for name in classes)]
    for name, values in zip(classes, given, strict=True):
        for row, value in enumerate(values):
            if value not in (0, 1):
                raise ScoringError(
                    f"Row {row} of {title} has {value!r} as '{name}', where 0 or 1 should be.",
                    hint="Remove such rows. In test splits labels may be hidden; then use another split.",
                )
    return [np.flatnonzero(values).tolist() for values in zip(*given, strict=True)]
