"""Questions with choices, and which one a language model finds likeliest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation.dataset import MeanOfRows
from hf_soup.evaluation.language import PREDICTED, LikelihoodDataset
from hf_soup.evaluation.statistics import Floats, Ints
from hf_soup.merging import ProcessGroup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CHOICE_METRICS = ("accuracy", "accuracy_by_length")


@dataclass(frozen=True, eq=False)
class ChoiceDataset(MeanOfRows, LikelihoodDataset):
    r"""Questions, each with choices, one of which is right.

    The answer of a model is the choice of the greatest log-likelihood after the question,
    :math:`\arg\max_c \log p(c \mid q)`; with the metric ``accuracy_by_length`` each is divided by the number of
    letters of the choice, which are ``acc`` and ``acc_norm`` of lm-evaluation-harness. Of equal ones it is the first.

    Args:
        encoded: ``(2, tokens)`` a row: question and choice for each choice, one after the other, and in the second line
            which of them are predicted, and where a question begins.
        kept, longest, vocabulary: As in `LikelihoodDataset`.
        references: ``(n,)``: which choice is right.
        lengths: ``(n, choices)``: letters of each choice; 0 where a question has fewer.
    """

    scaled: ClassVar[bool] = True

    references: Ints = field(repr=False)
    lengths: Ints = field(repr=False)

    @property
    def learned_as(self) -> tuple[object, ...]:
        """The questions, their answers, and what log-likelihoods are divided by."""
        return self.fingerprint, self.references.tobytes(), self.scoring.metric

    @property
    def strata(self) -> Ints:
        """Which choice is right."""
        return self.references

    @property
    def row_weights(self) -> Floats:
        """All questions alike."""
        return np.full(len(self.references), 1 / len(self.references))

    def batches(self, rows: Ints) -> list[Ints]:
        """The windows of some questions, those of one in one batch."""
        windows = [numbers for row in rows if len(numbers := self._of_rows(np.array([row])))]
        step = max(1, self.scoring.batch_size // self.lengths.shape[1])
        return [np.concatenate(windows[begin : begin + step]) for begin in range(0, len(windows), step)]

    def by_row(self, answers: Tensor, numbers: Ints) -> tuple[Tensor, Ints]:
        """``(questions, choices)``, next to nothing where a question has fewer."""
        import torch

        whose = self.windows[numbers, 0]
        rows, place = np.unique(whose, return_inverse=True)
        choice = numbers - np.searchsorted(self.windows[:, 0], whose)  # the windows of a question stand together
        # Not minus infinity, whose product with a scale has no derivative.
        outputs = torch.full((len(rows), self.lengths.shape[1]), -1e300, dtype=answers.dtype, device=answers.device)
        return outputs.index_put((torch.from_numpy(place), torch.from_numpy(choice)), answers), rows

    def row_losses(self, outputs: Tensor, rows: Ints) -> Tensor:
        """The cross-entropy of the softmax over the choices, by length where the metric is."""
        import torch

        by, right = torch.from_numpy(self._by[rows]), torch.from_numpy(self.references[rows])
        return torch.nn.functional.cross_entropy(
            outputs / by.to(outputs.device), right.to(outputs.device), reduction="none"
        )

    @property
    def _by(self) -> Ints:
        """What log-likelihoods are divided by: ``(n, choices)``."""
        return (
            np.maximum(self.lengths, 1) if self.scoring.metric == "accuracy_by_length" else np.ones_like(self.lengths)
        )

    @cached_property
    def windows(self) -> Ints:
        """As `LikelihoodDataset.windows`: one for each choice. What is too long loses the beginning of its question."""
        found = []
        for place, first, said in self._sequences():
            end, predicted = first + len(said), int((said & PREDICTED).sum())
            if predicted > self.longest:
                raise ScoringError(
                    f"A choice of row {self.kept[place]} of '{self.name}' has {predicted:,} tokens, and the model "
                    f"reads {self.longest:,}.",
                    hint="Leave the row out: choices are compared whole.",
                )
            found.append((place, max(first, end - self.longest - 1), end - 1, predicted))
        return np.array(found, dtype=np.int64)

    def outputs(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Floats:
        """``(n, choices)`` float64: the log-likelihood of each choice, minus infinity where a question has fewer.

        Raises:
            ScoringError: The model fails, or gives NaN.
        """
        found = np.full(self.lengths.shape, -np.inf)
        found[self.lengths > 0] = self.likelihoods(model, device, progress, world)
        return found

    def fits(self, outputs: Floats) -> bool:
        """Whether remembered log-likelihoods can be those of a model."""
        return bool(
            outputs.dtype == np.float64
            and outputs.shape == self.lengths.shape
            and np.array_equal(np.isfinite(outputs), self.lengths > 0)
        )

    def answers(self, outputs: Floats) -> Ints:
        """``(n,)``: which choice each answer is."""
        return np.asarray((outputs / self._by).argmax(axis=1), dtype=np.int64)

    def row_values(self, answers: Ints) -> Floats:
        """1 for each question whose answer is right, else 0."""
        return np.asarray(answers == self.references, dtype=float)
