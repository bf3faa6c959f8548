"""Labelled rows, each of one class: what classifiers answer to them, and what is measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation import label_map
from hf_soup.evaluation.ensembles import Logits
from hf_soup.evaluation.formulas import CLASS_METRICS
from hf_soup.evaluation.heads import HeadDataset
from hf_soup.evaluation.statistics import Ints, Metric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ClassificationDataset(HeadDataset):
    """A `HeadDataset` whose ``references`` are ``(n,)`` int64: the right output for each row."""

    kind: ClassVar[str] = "one class a row"
    scaled: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = CLASS_METRICS

    _labels: label_map.LabelMap = field(repr=False)

    @property
    def strata(self) -> Ints:
        """The labels."""
        return self.references

    def row_losses(self, outputs: Tensor, rows: Ints) -> Tensor:
        """The cross-entropy of each row, in nats."""
        import torch

        labels = torch.from_numpy(self.references[rows]).to(outputs.device)
        return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    def predictions(self, outputs: Logits) -> Ints:
        """``(n,)`` int64: the largest of each row's logits, the first of equal ones."""
        return np.asarray(outputs.argmax(axis=1), dtype=np.int64)

    def ranking(self, outputs: Logits) -> NDArray[Any]:
        """``(n,)`` float64: the log-odds of class 1 among two; else ``(n, classes)`` float32: logarithms of shares.

        Near 1, where probabilities round to equal ones, these still differ.
        """
        from scipy.special import log_softmax

        logits = outputs.astype(np.float64)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else log_softmax(logits, axis=1).astype(np.float32)

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
        confusion = confusion_matrix(
            self.references, self.predictions(logits), labels=range(len(names))
        )  # (label, answer)
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

        n, classes, answers = self.n, len(self.class_names), self.predictions(logits)
        labelled, answered = (np.bincount(each, minlength=classes).astype(float) for each in (self.references, answers))
        right, both = int(np.sum(answers == self.references)), labelled * answered
        mean = both.sum() / n
        variance = (both.sum() - (both * (labelled + answered)).sum() / n + mean**2) / max(n - 1, 1)
        half = 1.0 if np.count_nonzero(labelled + answered) == 2 else 0.5
        p = float(norm.sf((right - half - mean) / variance**0.5)) if variance > 1e-9 else 1.0
        return right / n, float(mean / n), p
