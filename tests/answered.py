"""Metrics of answers that are there already: the values, intervals and tests of a `HeadDataset` without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_soup.evaluation.formulas import CLASS_METRICS
from hf_soup.evaluation.heads import HeadDataset
from hf_soup.evaluation.statistics import Metric
from hf_soup.recipe import Score, Scoring


class Answered(HeadDataset):
    """Labels, and what a model said of them in the place of its outputs."""

    def predictions(self, outputs: Any) -> Any:
        return outputs

    def answers(self, outputs: Any) -> Any:
        return outputs

    def row_losses(self, outputs: Any, rows: Any) -> Any:
        return outputs


def answered(metric: str, labels: Any, built_in: Mapping[str, Metric] = CLASS_METRICS) -> Answered:
    class OfThese(Answered):
        metrics = built_in

    scoring = Scoring(task="text-classification", dataset="acme/rows", metric=metric)
    inputs: Any = None
    return OfThese("rows", scoring, (), "", "rows", (), labels, inputs)


def value(metric: str, labels: Any, answers: Any, built_in: Mapping[str, Metric] = CLASS_METRICS) -> float:
    return answered(metric, labels, built_in).value(answers)


def score(metric: str, labels: Any, answers: Any, built_in: Mapping[str, Metric] = CLASS_METRICS) -> Score:
    return answered(metric, labels, built_in).score(answers)
