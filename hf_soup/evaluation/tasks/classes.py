"""What tasks whose rows have one class each do alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation import data, label_map, metrics
from hf_soup.evaluation.classification import ClassificationDataset
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks.task import PreparedRows
from hf_soup.recipe import Scoring


class Labels(NamedTuple):
    """Of all rows: the data's own labels, which outputs they are, and how that is known."""

    column: Sequence[int] | Sequence[str]
    outputs: Ints
    mapped: label_map.LabelMap


def require_classes(scoring: Scoring, config: Mapping[str, Any]) -> None:
    """Refuse a metric that there is not, and models whose rows have no one label.

    Raises:
        ScoringError: It is so.
    """
    metrics.find(scoring.metric, scoring.trust_remote_code)
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise ScoringError(f"The model's problem type is {config['problem_type']}; only one label a row can be scored.")
    if len(label_map.model_classes(config)) < 2:
        raise ScoringError("The model has one output: a regression, which cannot be scored as classes.")


def read_labels(scoring: Scoring, name: str, table: Any, config: Mapping[str, Any]) -> Labels:
    """The right output for each row.

    Raises:
        ScoringError: Some label is none of the model's classes.
    """
    names = label_map.model_classes(config)
    label_name = data.label_column(scoring, name, table, len(names))
    column = label_map.clean(name, table.select_columns([label_name])[:][label_name], label_name)
    mapped = label_map.match(name, names, column, data.declared_classes(table, label_name), scoring.labels)
    return Labels(column, label_map.to_outputs(mapped, column, name), mapped)


def classification_dataset(rows: PreparedRows, tokenizer: Any) -> ClassificationDataset:
    """The data with its labels.

    Raises:
        ScoringError: All rows have one label.
    """
    labels: Labels = rows.labels
    references, mapped = labels.outputs[rows.kept], labels.mapped
    if len(np.unique(references)) == 1:
        raise ScoringError(
            f"All {len(rows.kept):,} rows of {rows.name} have the label '{labels.column[rows.kept[0]]}'; a score would "
            "mean nothing.",
            hint="Use rows of several classes; a slice of a sorted split may hold only one.",
        )
    notes = (mapped.note, *rows.notes) if mapped.note else rows.notes
    inputs = Inputs(rows.encoded, rows.kept, tokenizer)
    return ClassificationDataset(
        rows.title, rows.scoring, notes, rows.fingerprint, rows.name, len(rows.kept), mapped.class_names, references,
        inputs, mapped,
    )  # fmt: skip
