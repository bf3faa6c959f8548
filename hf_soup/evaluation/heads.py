"""Labelled rows, for models that end in a head with a few outputs a row: what they answer, and what is measured."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation import metrics
from hf_soup.evaluation.dataset import LearnableDataset, answered_together
from hf_soup.evaluation.ensembles import Logits
from hf_soup.evaluation.formulas import CORRELATIONS, LOSSES, rows_right
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.statistics import (
    PERMUTATIONS,
    RESAMPLES,
    Floats,
    Ints,
    Metric,
)
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import Scoring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class HeadDataset(LearnableDataset):
    """One `Scoring` with its rows preprocessed and kept on disk; `prepare_datasets` makes them.

    Images take ``4 * channels * height * width`` bytes a row (0.6 MB at 224 x 224 in colour), texts their
    token numbers.

    Args:
        title, notes, fingerprint, name: As in `EvalDataset`.
        scoring: With ``revision`` pinned: the commit of a Hub data set, ``sha256:…`` of local data.
        class_names: Of the model's outputs, in their order.
        references: What is right for each row, ``(n,)`` or ``(n, outputs)``.
        inputs: The preprocessed rows.
    """

    #: What errors call such a head, and its metrics.
    kind: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]

    scoring: Scoring
    class_names: tuple[str, ...]
    references: NDArray[Any] = field(repr=False)
    inputs: Inputs = field(repr=False)

    @property
    def share(self) -> bool:
        """Losses and correlations are none."""
        return self.scoring.metric not in (*LOSSES, *CORRELATIONS)

    @property
    def less_is_better(self) -> bool:
        """Of losses."""
        return self.scoring.metric in LOSSES

    @property
    def looked_at_as(self) -> tuple[object, ...]:
        """The size of batches, which shows in the last bits, and the task."""
        return self.scoring.batch_size, self.scoring.task

    @property
    def n(self) -> int:
        """How many rows there are."""
        return len(self.references)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.n

    @property
    def learned_as(self) -> tuple[object, ...]:
        """The inputs and what is right for them."""
        return self.fingerprint, self.references.tobytes()

    @property
    def strata(self) -> Ints:
        """Rows are of one kind."""
        return np.zeros(self.n, dtype=np.int64)

    @property
    def row_weights(self) -> Floats:
        """All rows alike."""
        return np.full(self.n, 1 / self.n)

    def batches(self, rows: Ints) -> list[Ints]:
        """Rows in their order."""
        return self.inputs.batches(rows, self.scoring.batch_size)

    def batch(self, numbers: Ints) -> dict[str, Tensor]:
        """The model's keyword arguments for some rows."""
        return self.inputs.batch(numbers)

    def read(self, given: Any, numbers: Ints) -> Tensor:
        """The outputs, float32."""
        logits: Tensor = given.logits.float()
        return logits

    @abstractmethod
    def predictions(self, outputs: Logits) -> NDArray[Any]:
        """What a model says of each row, in the form of the references."""

    def ranking(self, outputs: Logits) -> NDArray[Any]:
        """By what ``roc_auc`` orders rows: the logits."""
        return outputs

    def answers(self, outputs: Logits) -> NDArray[Any]:
        """What the metric looks at: the loss of each row, how sure a model is, or what it says."""
        if self.scoring.metric == "loss":
            import torch

            return np.asarray(self.row_losses(torch.from_numpy(outputs).double(), np.arange(self.n)).numpy())
        return self.ranking(outputs) if self.scoring.metric == "roc_auc" else self.predictions(outputs)

    def outputs(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Logits:
        """The outputs of a model of this task, row by row; the processes of a world share the batches.

        On the CPU each batch is one thread's, so that the numbers are the same for any number of threads and processes.
        Another batch size gives the same ones up to the rounding of its matrix products: about 1e-5 of the largest
        logit in float32, 1e-2 in 16 bits. Models of text that see the padding, as FNet does without an attention mask,
        and ConvBERT a little, answer otherwise in other batches: score them at one batch size.

        Returns:
            ``(n, outputs)`` float32 in row order.

        Raises:
            ScoringError: The model fails, or an output is NaN, infinite, or there are more or fewer of them.
        """
        # Long rows first: a batch too big for the memory fails at once. Stable: ties stay in row order.
        order = np.argsort(-self.inputs.sizes, kind="stable")
        batches = self.batches(order)
        every = answered_together(self, model, batches, device, progress, world)
        outputs, classes = every[0].shape[1], len(self.class_names)
        if outputs != classes:
            raise ScoringError(
                f"The model has {outputs} outputs, and the config names {classes} of them, for '{self.name}'.",
                hint="The config does not belong to these weights.",
            )
        found = np.empty((self.n, classes), dtype=np.float32)
        for rows, logits in zip(batches, every, strict=True):
            found[rows] = logits
        for row in np.flatnonzero(~np.isfinite(found).all(axis=1)):
            raise ScoringError(
                f"The model's output for row {row} of '{self.name}' is {found[row]}.",
                hint="Look at the ingredients' weights, and at the dtype (float16 overflows at 65,504).",
            )
        return found

    def fits(self, outputs: Logits) -> bool:
        """Whether remembered outputs can be those of a model."""
        right = outputs.dtype == np.float32 and outputs.shape == (self.n, len(self.class_names))
        return bool(right and np.isfinite(outputs).all())

    def row_values(self, answers: NDArray[Any]) -> Floats | None:
        """Whether each row is right, or the negative of its loss or error; None for metrics that are no mean."""
        metric = self.scoring.metric
        if metric == "accuracy":
            return rows_right(self.references, answers).astype(np.float64)
        if metric == "loss":
            return -np.asarray(answers, dtype=np.float64)
        errors = np.abs(answers - self.references) if metric in ("mse", "mae") else None
        return errors if errors is None else -(errors**2 if metric == "mse" else errors)

    @property
    def permutations(self) -> int:
        """As `EvalDataset.permutations`; functions and scripts take one draw at a time."""
        return PERMUTATIONS if self.scoring.metric in self.metrics else RESAMPLES

    def columns(self, answers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """What is right, and what the model says."""
        return self.references, answers

    def right(self, answers: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Of accuracy."""
        return rows_right(self.references, answers) if self.scoring.metric == "accuracy" else None

    @property
    def metric(self) -> Metric:
        """As the scoring names it."""
        return metrics.find(self.scoring.metric, self.scoring.trust_remote_code, self.metrics)
