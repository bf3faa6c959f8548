"""The labels of rows of one class each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation import data, label_map
from hf_soup.evaluation.classification import ClassificationDataset
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks.task import PreparedRows
from hf_soup.recipe import Scoring


class ClassLabels(NamedTuple):
    """Of all rows: the data's own labels, which outputs they are, and how that is known."""

    column: Sequence[int] | Sequence[str]
    outputs: Ints
    mapped: label_map.LabelMap

    def dataset(self, rows: PreparedRows, inputs: Inputs) -> ClassificationDataset:
        """As `Task.dataset`."""
        references, mapped = self.outputs[rows.kept], self.mapped
        if len(np.unique(references)) == 1:
            raise ScoringError(
                f"All {len(rows.kept):,} rows of {rows.name} have the label '{self.column[rows.kept[0]]}'; a score "
                "would mean nothing.",
                hint="Use rows of several classes; a slice of a sorted split may hold only one.",
            )
        notes = (mapped.note, *rows.notes) if mapped.note else rows.notes
        return ClassificationDataset(
            rows.title, rows.scoring, notes, rows.fingerprint, rows.name, mapped.class_names, references, inputs, mapped
        )


def read_classes(scoring: Scoring, name: str, table: Any, config: Mapping[str, Any]) -> ClassLabels:
    """The right output for each row.

    Raises:
        ScoringError: Some label is none of the model's classes.
    """
    names = label_map.model_classes(config)
    label_name = data.label_column(scoring, name, table, len(names))
    column = label_map.clean(name, table.select_columns([label_name])[:][label_name], label_name)
    mapped = label_map.match(name, names, column, data.declared_classes(table, label_name), scoring.labels)
    return ClassLabels(column, label_map.to_outputs(mapped, column, name), mapped)
