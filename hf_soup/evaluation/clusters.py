"""Rows that belong together, as questions about one article, and are drawn together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation.dataset import EvalDataset

_Data = TypeVar("_Data", bound=EvalDataset)


def in_clusters(data: _Data, column: str, rows: Iterable[Mapping[str, Any]]) -> _Data:
    """The data with intervals and tests of clusters: of rows that have equal values in a column.

    Args:
        data: Whose rows stand for themselves.
        column: The name of the column.
        rows: All rows that count, in their order.

    Raises:
        ScoringError: There is no such column, or nothing in it, or all rows are one cluster.
    """
    numbers: dict[str, int] = {}
    clusters = []
    hint = "Name a column that tells documents apart as `cluster_column`, or leave it out."
    for number, row in enumerate(rows):
        if column not in row:
            columns = ", ".join(f"'{name}'" for name in row)
            raise ScoringError(f"The rows of {data.name} have no '{column}'; they have {columns}.", hint=hint)
        if row[column] is None:
            raise ScoringError(f"Row {number} of {data.name} has nothing in '{column}'.", hint=hint)
        value = json.dumps(row[column], sort_keys=True, default=str)
        clusters.append(numbers.setdefault(value, len(numbers)))
    if len(numbers) == 1:
        raise ScoringError(f"All {len(clusters):,} rows of {data.name} have one value in '{column}'.", hint=hint)
    note = f"intervals and tests are of {len(numbers):,} clusters, the rows with equal '{column}'"
    return replace(data, clusters=np.array(clusters, dtype=np.int64), notes=(*data.notes, note))
