"""The labels of rows with a number each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation import data, label_map
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.regression import RegressionDataset
from hf_soup.evaluation.statistics import Floats
from hf_soup.evaluation.tasks.task import PreparedRows
from hf_soup.recipe import Scoring

_USUAL = ("label", "labels", "score")


class Numbers(NamedTuple):
    """Of all rows: the numbers, and what the model calls its output."""

    values: Floats
    name: str

    def dataset(self, rows: PreparedRows, inputs: Inputs) -> RegressionDataset:
        """As `Task.dataset`."""
        references = self.values[rows.kept]
        if not np.ptp(references):
            raise ScoringError(
                f"All {len(references):,} rows of {rows.name} have the label {references[0]:g}; a score would mean "
                "nothing.",
                hint="Use rows with several labels. In test splits they may be hidden; then use another split.",
            )
        return RegressionDataset(
            rows.title, rows.scoring, rows.notes, rows.fingerprint, rows.name, (self.name,), references, inputs
        )


def read_numbers(scoring: Scoring, name: str, table: Any, config: Mapping[str, Any]) -> Numbers:
    """The number of each row.

    Raises:
        ScoringError: Some label is none.
    """
    (output,) = label_map.model_classes(config)
    column = data.label_column(scoring, name, table, 1, _USUAL)
    values = table.select_columns([column])[:][column]
    for row, value in enumerate(values):
        # NaN is not below anything; beyond it float32 ends, in which such heads are trained.
        if not isinstance(value, int | float) or not abs(value) < 3e38:
            raise ScoringError(
                f"Row {row} of {name} has {value!r} as '{column}', where a number should be: the model's head is "
                "regression.",
                hint="Remove such rows, or name another `label_column`.",
            )
    return Numbers(np.array(values, dtype=np.float64), output)
