"""Rows that belong together, as questions about one article, and are drawn together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation.dataset import EvalDataset

#: Clusters below which the bootstrap's intervals hold the truth less often than they say.
_FEW = 10
_Data = TypeVar("_Data", bound=EvalDataset)


def in_clusters(
    data: _Data, column: str, rows: Iterable[Mapping[str, Any]], tasks: Sequence[int] | None = None
) -> _Data:
    """The data with intervals and tests of clusters: of rows that have equal values in a column.

    Args:
        data: Whose rows stand for themselves.
        column: The name of the column.
        rows: All rows that count, in their order.
        tasks: Of which task each row is, where there are several; what two tasks call alike is not one thing.

    Raises:
        ScoringError: There is no such column, or nothing in it, or all rows are one cluster.
    """
    numbers: dict[tuple[int, str], int] = {}
    clusters = []
    hint = "Name a column that tells documents apart as `cluster_column`, or leave it out."
    for number, row in enumerate(rows):
        if column not in row:
            columns = ", ".join(f"'{name}'" for name in row)
            raise ScoringError(f"The rows of {data.name} have no '{column}'; they have {columns}.", hint=hint)
        if row[column] in (None, "") or row[column] != row[column]:  # NaN
            raise ScoringError(f"Row {number} of {data.name} has nothing in '{column}'.", hint=hint)
        try:
            value = json.dumps(row[column], sort_keys=True)
        except TypeError:
            kind = type(row[column]).__name__
            raise ScoringError(
                f"Row {number} of {data.name} has a {kind} in '{column}', and no text or number.", hint=hint
            ) from None
        clusters.append(numbers.setdefault((tasks[number] if tasks else 0, value), len(numbers)))
    if len(numbers) == 1:
        raise ScoringError(f"{data.name} has one value in '{column}' ({len(clusters):,} rows).", hint=hint)
    few = [f"of {len(numbers)} clusters, the rows with equal '{column}', intervals are too narrow"]
    notes = (*data.notes, *(few if len(numbers) < _FEW else ()))
    return replace(data, clusters=np.array(clusters, dtype=np.int64), notes=notes)
