"""Labelled rows, each of one class: what classifiers answer to them, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation import label_map, metrics
from hf_soup.evaluation.dataset import LearnableDataset, answered_together
from hf_soup.evaluation.ensembles import Logits
from hf_soup.evaluation.inputs import Inputs
from hf_soup.evaluation.statistics import Floats, Ints, compare_accuracies, comparison_of, paired_bootstrap, resampled
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import Comparison, Score, Scoring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class ClassificationDataset(LearnableDataset):
    """One `Scoring` with its rows preprocessed and kept on disk; `prepare_datasets` makes them.

    Images take ``4 * channels * height * width`` bytes a row (0.6 MB at 224 x 224 in colour), texts their
    token numbers.

    Args:
        title, notes, fingerprint, name: As in `EvalDataset`.
        scoring: With ``revision`` pinned: the commit of a Hub data set, ``sha256:…`` of local data.
        n: Rows.
        class_names: In the order of the model's outputs.
        references: ``(n,)`` int64, the right output for each row.
        inputs: The preprocessed rows.
    """

    scaled: ClassVar[bool] = True

    scoring: Scoring
    n: int
    class_names: tuple[str, ...]
    references: Ints = field(repr=False)
    inputs: Inputs = field(repr=False)
    _labels: label_map.LabelMap = field(repr=False)

    @property
    def looked_at_as(self) -> tuple[object, ...]:
        """The size of batches, which shows in the last bits, and the task."""
        return self.scoring.batch_size, self.scoring.task

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.n

    @property
    def learned_as(self) -> tuple[object, ...]:
        """The inputs and their labels."""
        return self.fingerprint, self.references.tobytes()

    @property
    def strata(self) -> Ints:
        """The labels."""
        return self.references

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
        """The logits, float32."""
        logits: Tensor = given.logits.float()
        return logits

    def row_losses(self, outputs: Tensor, rows: Ints) -> Tensor:
        """The cross-entropy of the softmax of logits."""
        import torch

        right = torch.from_numpy(self.references[rows]).to(outputs.device)
        return torch.nn.functional.cross_entropy(outputs, right, reduction="none")

    def outputs(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Logits:
        """The logits of a classifier of this task, row by row; the processes of a world share the batches.

        On the CPU each batch is one thread's, so that the numbers are the same for any number of threads and processes.
        Another batch size gives the same ones up to the rounding of its matrix products: about 1e-5 of the largest
        logit in float32, 1e-2 in 16 bits. Models of text that see the padding, as FNet does without an attention mask,
        and ConvBERT a little, answer otherwise in other batches: score them at one batch size.

        Returns:
            ``(n, classes)`` float32 in row order.

        Raises:
            ScoringError: The model fails, or an output is NaN, infinite, or of another number of classes.
        """
        # Long rows first: a batch too big for the memory fails at once. Stable: ties stay in row order.
        order = np.argsort(-self.inputs.sizes, kind="stable")
        batches = self.batches(order)
        every = answered_together(self, model, batches, device, progress, world)
        outputs, classes = every[0].shape[1], len(self.class_names)
        if outputs != classes:
            raise ScoringError(
                f"The model has {outputs} outputs, and the config names {classes} classes for '{self.name}'.",
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
        """Whether remembered logits can be those of a model."""
        right = outputs.dtype == np.float32 and outputs.shape == (self.n, len(self.class_names))
        return bool(right and np.isfinite(outputs).all())

    def score(self, logits: Logits) -> Score:
        """The scoring's metric with its 95 % interval: Wilson's for accuracy, the bootstrap's for others.

        Raises:
            ScoringError: The metric is no number.
        """
        found = metrics.score(
            self.scoring.metric, self.references, self.answers(logits), self.scoring.trust_remote_code
        )
        return replace(found, metric=self.scoring.measure)

    def judge(self, answers: Ints, rows: Ints | None = None) -> float:
        """The metric of answers to all rows, or of those to some, without the interval."""
        scoring, chosen = self.scoring, slice(None) if rows is None else rows
        return metrics.value(scoring.metric, self.references[chosen], answers[chosen], scoring.trust_remote_code)

    def compare(self, first: Logits, second: Logits) -> Comparison:
        """As `EvalDataset.compare`: `compare_accuracies`, or the paired bootstrap and a permutation test."""
        name, one, other = self.scoring.measure, self.answers(first), self.answers(second)
        if self.scoring.metric == "accuracy":
            return compare_accuracies(name, one == self.references, other == self.references)
        metric = metrics.find(self.scoring.metric, self.scoring.trust_remote_code)
        low, high, p = paired_bootstrap(self.references, one, other, metric)
        return comparison_of(name, self.judge(one) - self.judge(other), low, high, p, self.n)

    def resampled(self, logits: Logits) -> NDArray[np.float64]:
        """``(500,)``: the metric over resamples of the rows, the same ones for every model, for paired intervals."""
        metric = metrics.find(self.scoring.metric, self.scoring.trust_remote_code)
        return resampled(self.references, self.answers(logits), metric)

    def answers(self, logits: Logits) -> Ints:
        """``(n,)`` int64: the largest of each row's logits, the first of equal ones."""
        return np.asarray(logits.argmax(axis=1), dtype=np.int64)

    def doubt_of_order(self, name: str, logits: Logits) -> ScoringError | None:
        """What refuses an ingredient whose outputs are evidently in another order than the labels.

        Two things must hold, against the share of the most frequent class, by one-sided exact binomial
        tests: the ingredient answers fewer rows correctly (p < 0.001), and with the best permutation of its
        outputs it would answer more (p < 0.05). The second spares a model that learned nothing, or collapsed
        into one rare class: no order of the labels would help it, and selection is there to leave it out.

        Returns:
            None where it is not so; else an error that shows the permutation that fits best.
        """
        from scipy.optimize import linear_sum_assignment
        from scipy.stats import binom
        from sklearn.metrics import confusion_matrix

        names, n = self.class_names, self.n
        confusion = confusion_matrix(self.references, self.answers(logits), labels=range(len(names)))  # (label, answer)
        support, correct = confusion.sum(axis=1), int(np.trace(confusion))
        share = float(support.max()) / n
        _, permutation = linear_sum_assignment(confusion, maximize=True)
        permuted = int(confusion[np.arange(len(names)), permutation].sum())
        if binom.cdf(correct, n, share) >= 0.001 or binom.sf(permuted - 1, n, share) >= 0.05:
            return None
        moved = [
            f"  '{names[output]}' is answered as '{names[answer]}' "
            f"({confusion[output, answer]:,} of {support[output]:,} rows)"
            for output, answer in enumerate(permutation)
            if output != answer
        ]
        if len(moved) > 20:
            moved[20:] = [f"  … {len(moved) - 20} more"]
        order = label_map.suggestion(self._labels, [int(answer) for answer in permutation])
        said = f"If all ingredients are so, say the order: `labels: [{', '.join(order)}]`." if order else ""
        return ScoringError(
            f"{name} answers {correct / n:.1%} of the {n:,} rows of '{self.name}' correctly; "
            f"always answering '{names[support.argmax()]}' gets {share:.1%}.\n"
            f"With its outputs in another order it would get {permuted / n:.1%}:\n" + "\n".join(moved),
            hint=f"{said or 'Its config names its classes wrongly.'} If it is only this one, leave it out.",
        )

    def better_than_chance(self, logits: Logits) -> tuple[float, float, float]:
        r"""Accuracy, what chance would give, and a one-sided p that this is chance.

        Chance is the same labels and the same answers in random order. With :math:`n_k` rows of class k,
        :math:`m_k` answers k, :math:`S = \sum_k n_k m_k` and :math:`s = S/n`, the number of right answers then has
        mean s and variance :math:`(S - \sum_k n_k m_k (n_k + m_k)/n + s^2)/(n-1)`. p is that of the normal
        distribution, corrected for continuity by half a step (a row, of two classes two); 1 where all labels or
        all answers are one class.

        Args:
            logits: ``(n, classes)``.

        Returns:
            Accuracy and expected accuracy as shares, and p.

        Reference:
            Cohen, A coefficient of agreement for nominal scales, 1960: what chance gives.
            Hoeffding, A combinatorial central limit theorem, 1951: the variance, and that it tends to the normal.
        """
        from scipy.stats import norm

        n, classes, answers = self.n, len(self.class_names), self.answers(logits)
        labelled, answered = (np.bincount(each, minlength=classes).astype(float) for each in (self.references, answers))
        right, both = int(np.sum(answers == self.references)), labelled * answered
        mean = both.sum() / n
        variance = (both.sum() - (both * (labelled + answered)).sum() / n + mean**2) / max(n - 1, 1)
        half = 1.0 if np.count_nonzero(labelled + answered) == 2 else 0.5
        p = float(norm.sf((right - half - mean) / variance**0.5)) if variance > 1e-9 else 1.0
        return right / n, float(mean / n), p
