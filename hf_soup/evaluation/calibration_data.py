"""Inputs without labels, on which methods look at what the ingredients do."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation import data, label_map, tasks
from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.preprocessing import preprocessed
from hf_soup.evaluation.statistics import Ints
from hf_soup.recipe import Examples, Scoring


@dataclass(frozen=True)
class CalibrationDataset:
    """The examples of a recipe, preprocessed; `prepare_examples` makes them.

    Args:
        examples: With ``revision`` pinned.
        n: Rows.
        notes: Warnings.
        fingerprint: The sha256 of what decides which inputs a model sees.
    """

    examples: Examples
    n: int
    notes: tuple[str, ...]
    fingerprint: str
    _inputs: tasks.ImageInputs | tasks.TextInputs = field(repr=False)

    def drawn(self, count: int, seed: int) -> Ints:
        """So many rows at random, all where there are fewer, in their order: a split may be sorted by label."""
        return np.sort(self.shuffled(seed)[:count])

    def shuffled(self, seed: int) -> Ints:
        """All rows in a random order."""
        from hf_soup.merging import uniform  # late, as it takes torch

        order: Ints = np.argsort(uniform(seed, "examples", 0, 0, self.n).numpy(), kind="stable")
        return order

    def alike(self, rows: Ints) -> list[Ints]:
        """Rows in batches of inputs of one size, so that nothing is padded: long ones first, those of one as given."""
        inputs, batches = self._inputs, []
        sizes = inputs.stored.sizes[inputs.kept[rows]]
        step = self.examples.batch_size if inputs.can_pad else 1
        for size in np.unique(sizes)[::-1]:
            mine = rows[sizes == size]
            batches += [mine[begin : begin + step] for begin in range(0, len(mine), step)]
        return batches

    def padded(self, rows: Ints) -> list[Ints]:
        """Rows in batches in their order, to be padded; of one size each where the tokenizer cannot pad."""
        if not self._inputs.can_pad:
            return self.alike(rows)
        step = self.examples.batch_size
        return [rows[begin : begin + step] for begin in range(0, len(rows), step)]

    def batch(self, rows: Ints) -> dict[str, Any]:
        """The model's keyword arguments for some rows, in their order."""
        return self._inputs.batch(rows)


_Task = tasks.ImageClassification | tasks.TextClassification


def prepare_calibration_dataset(
    examples: Examples,
    reports: Sequence[Scoring],
    *,
    folder: Path,
    config: Mapping[str, Any],
    token: str | bool | None = None,
    quiet: bool = False,
) -> CalibrationDataset:
    """Read and preprocess the examples of a recipe.

    Rows of a report are refused, and rows that equal one in content dropped: a report is looked at once, at the end.

    Args:
        examples: The recipe's.
        reports: The data that nothing may look at before.
        folder, config, token, quiet: As in `hf_soup.evaluation.prepare_datasets`.

    Raises:
        ResolveError: A data set cannot be found or reached.
        ScoringError: A data set cannot be used.
    """
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise ScoringError(f"The model's problem type is {config['problem_type']}; it has no one label to draw.")
    if len(label_map.model_classes(config)) < 2:
        raise ScoringError("The model has one output: a regression, which has no labels to draw.")
    name = data.name_of(examples)
    barred: set[bytes] = set()
    with tempfile.TemporaryDirectory(prefix="hf-soup-data-") as cache:
        scratch = Path(cache)
        (pinned, rows), *others = data.load([examples, *reports], scratch, token)
        for report, (_, theirs) in zip(reports, others, strict=True):
            data.refuse_overlap((name, rows), (data.name_of(report), theirs), "examples")

        def of(scoring: Scoring, its: data.DatasetRows) -> tuple[_Task, str, EncodedRows]:
            task = tasks.TASKS[scoring.task](folder, config)
            columns = data.input_columns(scoring, data.name_of(scoring), its.table, task.columns)
            return task, *preprocessed(scoring, its, task, folder, columns, scratch=scratch, quiet=quiet)

        for scoring, theirs in others:
            barred.update(of(scoring, theirs)[2].digests)
        task, key, found = of(pinned, rows)
    kept = np.flatnonzero([digest not in barred for digest in found.digests])
    notes: tuple[str, ...] = ()
    dropped = len(found.digests) - len(kept)
    if dropped:
        notes = (f"{name}: {dropped:,} of {len(found.digests):,} rows equal a report row in content and were dropped",)
    if not len(kept):
        raise ScoringError(
            f"Every row of the examples '{name}' is in the report too.",
            hint="What a method has looked at cannot test it: use other rows.",
        )
    assert isinstance(pinned, Examples)
    fingerprint = hashlib.sha256(key.encode() + kept.tobytes()).hexdigest()
    return CalibrationDataset(pinned, len(kept), notes, fingerprint, task.inputs(found, kept))


def require_variance(inputs: CalibrationDataset) -> None:
    """Refuse one row, where running statistics of batch normalisation are to be collected.

    Raises:
        ScoringError: It is one.
    """
    if inputs.n < 2:
        raise ScoringError(
            f"The examples '{inputs.examples.title}' are one row, which has no variance for batch normalisation.",
            hint="Use more rows: a few hundred of the training data or more.",
        )
