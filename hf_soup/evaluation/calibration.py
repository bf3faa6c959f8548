"""What is told of a recipe's examples, and new statistics of batch normalisation of a written soup."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from hf_soup._util.text import some
from hf_soup.evaluation.batch_norm import batch_norms
from hf_soup.merging import Layout, Plan

if TYPE_CHECKING:
    from hf_soup.evaluation.evaluation_data import Calibration
    from hf_soup.merging import MergeResult


def recalibrate_batch_norm(
    merged: MergeResult, layout: Layout, folder: Path, calibration: Calibration | None
) -> MergeResult:
    """A merged soup with statistics of batch normalisation of its own, where it has any and there are examples.

    A soup of one model is that model, and keeps its own.

    Args:
        merged: From the engine.
        layout: Of what was merged.
        folder: The staged files.
        calibration: The examples as the soup itself reads them.

    Raises:
        ScoringError: The soup fails on the examples.
        ValuesError: The output's type cannot hold what was collected.
    """
    alone = len(layout.labels) == 1
    if calibration is None or alone or not batch_norms(tensor.name for tensor in layout.tensors):
        return merged
    from hf_soup.evaluation.batch_statistics import BatchStatistics, write_again

    return write_again(layout, merged, folder, BatchStatistics(layout, calibration), quiet=calibration.quiet)


def statistics_notes(plan: Plan) -> list[str]:
    """Sentences about what was learned, and which tensors are averaged, as some ingredient shows nothing of them."""
    if not plan.statistics:
        return []
    from hf_soup.merging import StatisticsStore, needs_statistics

    with closing(StatisticsStore(plan)) as collected:
        names, learned = list(collected.lacking(plan)), collected.learned()
    asked = " and ".join(dict.fromkeys(call.method for call in plan.mixture.methods if needs_statistics(call)))
    every = sum(tensor.averaged for tensor in plan.layout.tensors)
    said = f"{len(names)} of {every} tensors have nothing that {asked} goes by, and are averaged: {some(names)}."
    notes = [said] if names else []
    if learned:
        means, (before, after) = learned
        told = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(plan.layout.labels, means, strict=False))
        notes.append(
            f"The coefficients of the task vectors, in the mean over tensors: {told}. The entropy of the answers to "
            f"the examples was {before:.3f} where they began, and is {after:.3f}."
        )
    return notes
