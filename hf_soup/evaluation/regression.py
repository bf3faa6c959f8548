"""Rows with a number each, such as how similar two texts are, and models that answer with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hf_soup.evaluation.ensembles import Logits
from hf_soup.evaluation.formulas import REGRESSION_METRICS
from hf_soup.evaluation.heads import HeadDataset
from hf_soup.evaluation.statistics import Ints, Metric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class RegressionDataset(HeadDataset):
    """A `HeadDataset` whose ``references`` are ``(n,)`` float64, and whose model has one output."""

    kind: ClassVar[str] = "regression"
    scaled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = REGRESSION_METRICS

    def row_losses(self, outputs: Tensor, rows: Ints) -> Tensor:
        """The squared error of each row."""
        import torch

        return (outputs[:, 0] - torch.from_numpy(self.references[rows]).to(outputs)) ** 2

    def predictions(self, outputs: Logits) -> Logits:
        """``(n,)``: the output."""
        return outputs[:, 0]
