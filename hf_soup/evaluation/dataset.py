"""Data of a recipe, prepared once for all its models: to score them, and without labels, to be looked at."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation.batch_limit import BatchLimit
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.model import answers
from hf_soup.evaluation.statistics import (
    PERMUTATIONS,
    Floats,
    Ints,
    Metric,
    accuracy_of,
    bootstrap,
    compare_accuracies,
    comparison_of,
    mean,
    paired_bootstrap,
    resampled,
)
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import AnyScoring, CalibrationData, Comparison, Score, Scoring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

#: What a model gives, and all that is remembered of it: a line of numbers, or a number, for each row; or one number.
Outputs = NDArray[Any]


@dataclass(frozen=True, eq=False)
class EvalDataset(ABC):
    """What models are scored on: what each gives, and what that is worth.

    Args:
        title: What the score is called in tables.
        scoring: As the recipe names it, pinned.
        notes: Warnings that a reader of the score should see, without the name of the data.
        fingerprint: The sha256 of what decides which inputs a model sees, and in which order; of no label.
        name: What errors and notes call the data, whatever is measured on them.
        clusters: ``(rows,)``: which rows belong together, as numbers from 0 on; None where each stands for itself.
    """

    #: Whether outputs are kept on the disk from one cook to the next.
    remembered: ClassVar[bool] = True

    title: str
    scoring: AnyScoring
    notes: tuple[str, ...]
    fingerprint: str
    name: str
    clusters: Ints | None = field(default=None, kw_only=True, repr=False)

    @property
    def share(self) -> bool:
        """Whether the value is a share of one, which people read in percent."""
        return True

    @property
    def looked_at_as(self) -> tuple[object, ...]:
        """What else outputs depend on, as plain data."""
        return ()

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """How many rows there are, where it is known before a model is asked."""

    @property
    def steps(self) -> int:
        """How many steps of progress a model takes: rows, or what else there is."""
        return self.rows or 1

    @abstractmethod
    def outputs(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Outputs:
        """What a model gives.

        The model is moved to ``device`` and left there, in eval mode.

        Args:
            model: Of the recipe's models.
            device: Where to run it.
            progress: Called with the number of rows done since the last call.
            world: Processes with equal models that share the work; all of them are given all outputs.

        Raises:
            ScoringError: The model fails, or gives NaN.
        """

    @abstractmethod
    def fits(self, outputs: Outputs) -> bool:
        """Whether remembered outputs can be those of a model."""

    def answers(self, outputs: Outputs) -> NDArray[Any]:
        """What the metric looks at, which is smaller."""
        return outputs

    @property
    def measure(self) -> str:
        """What the value is called beside it."""
        return self.scoring.measure

    @property
    def permutations(self) -> int:
        """How many exchanges a permutation test makes; fewer where the metric takes one draw at a time."""
        return PERMUTATIONS

    @property
    def less_is_better(self) -> bool:
        """Whether it is so of the value, as it is of losses."""
        return False

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """The value of draws, of references and answers."""

    @abstractmethod
    def columns(self, answers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """What the metric takes, a line for each row: what answers are held against, and the answers."""

    def right(self, answers: NDArray[Any]) -> NDArray[np.bool_] | None:
        """``(rows,)``: whether each row is right, where the value is the share of those; None where it is another."""
        return None

    def row_values(self, answers: NDArray[Any]) -> Floats | None:
        """``(rows,)``: numbers whose mean is what `judge` gives; None where it is the mean of none."""
        return None

    def value(self, answers: NDArray[Any], rows: Ints | None = None) -> float:
        """The value of answers, or of those to some rows, without an interval.

        Raises:
            ScoringError: It is no number.
        """
        against, given = (column if rows is None else column[rows] for column in self.columns(answers))
        return float(self.metric(against, given, np.ones((1, len(given)), dtype=np.int64))[0])

    def judge(self, answers: NDArray[Any], rows: Ints | None = None) -> float:
        """`value`, or its negative where less is better: more is better."""
        value = self.value(answers, rows)
        return -value if self.less_is_better else value

    @property
    def _gain(self) -> Metric:
        metric = self.metric
        return (lambda *drawn: -metric(*drawn)) if self.less_is_better else metric

    def score(self, outputs: Outputs) -> Score:
        """The value with its 95 % interval: Wilson's where rows are right or wrong, else the bootstrap's.

        Raises:
            ScoringError: It is no number.
        """
        answers = self.answers(outputs)
        right = self.right(answers)
        if right is not None:
            return accuracy_of(right, self.measure, self.clusters)
        value, columns = self.value(answers), self.columns(answers)
        low, high = bootstrap(*columns, self.metric, self.clusters)
        return Score(
            self.measure, value, min(low, value), max(high, value), len(columns[0]), share=self.share,
            less_is_better=self.less_is_better,
        )  # fmt: skip

    def compare(self, first: Outputs, second: Outputs) -> Comparison:
        """Is the first model better than the second, on the same rows?

        Returns:
            The difference, first minus second, and a sentence that claims it only where it can be seen: by
            `compare_accuracies` where rows are right or wrong, else by the paired bootstrap and a permutation test.
        """
        one, other = (self.answers(each) for each in (first, second))
        right, others = self.right(one), self.right(other)
        if right is not None and others is not None:
            return compare_accuracies(self.measure, right, others, self.clusters)
        columns = (*self.columns(one), self.columns(other)[1])
        low, high, p = paired_bootstrap(*columns, self._gain, self.clusters, self.permutations)
        return comparison_of(
            self.measure, self.judge(one) - self.judge(other), low, high, p, len(columns[0]), share=self.share,
            clusters=self.clusters, least=1 / (1 + self.permutations),
        )  # fmt: skip

    def resampled(self, outputs: Outputs) -> Floats:
        """``(500,)``: what `judge` gives over resamples of the rows, the same ones for every model, for paired
        intervals.

        Raises:
            ScoringError: There are no rows.
        """
        return resampled(*self.columns(self.answers(outputs)), self._gain, self.clusters)


class MeanOfRows(EvalDataset):
    """Data whose metric is the mean of a number for each row; more is better."""

    metric = staticmethod(mean)

    @abstractmethod
    def row_values(self, answers: NDArray[Any]) -> Floats:
        """``(rows,)``: the numbers."""

    def columns(self, answers: NDArray[Any]) -> tuple[Floats, Floats]:
        """Nothing, and the numbers."""
        values = self.row_values(answers)
        return np.zeros(len(values)), values

    def right(self, answers: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Of shares of one, where each row is right or wrong."""
        values = self.row_values(answers)
        return values == 1 if self.share and np.isin(values, (0, 1)).all() else None

    def value(self, answers: NDArray[Any], rows: Ints | None = None) -> float:
        """Their mean, over all rows or some."""
        values = self.row_values(answers)
        return math.fsum(chosen := values if rows is None else values[rows]) / len(chosen)


class LearnableDataset(EvalDataset):
    """Rows that a model answers in batches, and whose loss has a gradient.

    A batch is some numbers: of rows, or of parts of rows that the model is given one by one.
    """

    scoring: Scoring
    #: Whether the loss is that of logits, whose scale can be learned too.
    scaled: ClassVar[bool]

    @property
    @abstractmethod
    def learned_as(self) -> tuple[object, ...]:
        """What the loss depends on: of two data sets that are alike in it, the loss is the same."""

    @property
    @abstractmethod
    def strata(self) -> Ints:
        """``(rows,)``: what each row is, to split them evenly."""

    @property
    @abstractmethod
    def row_weights(self) -> Floats:
        """``(rows,)``: the share of each row in the loss; they sum to one."""

    @abstractmethod
    def batches(self, rows: Ints) -> list[Ints]:
        """The numbers of some rows, in batches."""

    @abstractmethod
    def batch(self, numbers: Ints) -> dict[str, Tensor]:
        """The model's keyword arguments for some numbers."""

    @abstractmethod
    def read(self, given: Any, numbers: Ints) -> Tensor:
        """What counts of a model's output for some numbers, in their order."""

    def by_row(self, answers: Tensor, numbers: Ints) -> tuple[Tensor, Ints]:
        """What was read of some numbers as what `row_losses` takes, and the rows."""
        return answers, numbers

    @abstractmethod
    def row_losses(self, outputs: Tensor, rows: Ints) -> Tensor:
        """``(rows,)``: the loss of each row, from what `outputs` gives of it; of parts of rows, that of each part."""


def answered_together(
    data: LearnableDataset,
    model: PreTrainedModel,
    batches: Sequence[Ints],
    device: str,
    progress: Callable[[int], object],
    world: ProcessGroup | None,
) -> list[NDArray[Any]]:
    """What a model answers to batches, in their order; each process of a world takes its share, and has all answers.

    Args:
        data: That makes them.
        model, device, progress: As in `hf_soup.evaluation.model.answers`.
        batches: The numbers in each.
        world: The processes.

    Raises:
        ScoringError: The model fails, in any of them.
    """
    world = world or ProcessGroup()

    def read(given: Any, numbers: Ints) -> NDArray[Any]:
        values: NDArray[Any] = data.read(given, numbers).cpu().numpy()
        return values

    try:
        answered = answers(
            model,
            data.batch,
            batches[world.rank :: world.size],
            device,
            progress,
            read,
            BatchLimit.of(data, data.title),
        )
    except ScoringError as error:
        raise ScoringError.of(error, f"The model fails on '{data.name}' {error.message}") from None
    everyones = world.gather(answered)
    return [everyones[place % world.size][place // world.size] for place in range(len(batches))]


@dataclass(frozen=True)
class CalibrationDataset:
    """The examples of a recipe, preprocessed; `prepare_calibration_dataset` makes them.

    Args:
        data: With ``revision`` pinned.
        n: Rows.
        notes: Warnings.
        fingerprint: The sha256 of what decides which inputs a model sees.
        inputs: The rows, preprocessed.
    """

    data: CalibrationData
    n: int
    notes: tuple[str, ...]
    fingerprint: str
    inputs: Inputs = field(repr=False)

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
        sizes, batches = self.inputs.sizes[rows], []
        for size in np.unique(sizes)[::-1]:
            batches += self.inputs.batches(rows[sizes == size], self.data.batch_size)
        return batches

    def padded(self, rows: Ints) -> list[Ints]:
        """Rows in batches in their order, to be padded; of one size each where the tokenizer cannot pad."""
        return self.inputs.batches(rows, self.data.batch_size) if self.inputs.can_pad else self.alike(rows)

    def answers(self, rows: Ints) -> int:
        """How many answers a model gives to some rows: one to each, or one after each token of a text."""
        return int(self.inputs.answers[rows].sum())

    def uniform(self, row: int, seed: int) -> Tensor:
        """``(answers,)``: a number in [0, 1) for each answer to a row, to draw a class by."""
        from hf_soup.merging import uniform  # late, as it takes torch

        counts = self.inputs.answers
        return uniform(seed, "labels", 0, int(counts[:row].sum()), int(counts[row]))
