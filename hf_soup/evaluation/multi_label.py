"""Rows with any number of labels each, and models that say yes or no to every one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.evaluation.ensembles import Logits
from hf_soup.evaluation.formulas import MULTI_LABEL_METRICS
from hf_soup.evaluation.heads import HeadDataset
from hf_soup.evaluation.statistics import Ints, Metric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class MultiLabelDataset(HeadDataset):
    """A `HeadDataset` whose ``references`` are ``(n, outputs)`` int64: 1 where a row has the label, else 0."""

    kind: ClassVar[str] = "multi-label"
    scaled: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = MULTI_LABEL_METRICS

    def row_losses(self, outputs: Tensor, rows: Ints) -> Tensor:
        """The mean binary cross-entropy over the labels of each row, in nats."""
        import torch

        labels = torch.from_numpy(self.references[rows]).to(outputs)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        return losses.mean(dim=1)

    def predictions(self, outputs: Logits) -> NDArray[Any]:
        """``(n, outputs)`` int8: 1 where a logit is above 0, which is a probability above one half."""
        return np.asarray(outputs > 0, dtype=np.int8)
