"""Data sets, prepared once for every model of a recipe: with labels to score, and without, to be looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation import label_map, metrics, tasks
from hf_soup.evaluation.model import answers
from hf_soup.evaluation.statistics import Ints, comparison_of, paired_bootstrap, paired_interval, resampled
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import CalibrationData, Comparison, Score, Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: (n, classes) float32, row i for row i of the data.
Logits = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EvalDataset:
    """One `Scoring` with its rows preprocessed and kept on disk; `prepare_datasets` makes them.

    Images take ``4 * channels * height * width`` bytes a row (0.6 MB at 224 x 224 in colour), texts their
    token numbers.

    Args:
        title: What the score is called in tables.
        scoring: With ``revision`` pinned: the commit of a Hub data set, ``sha256:…`` of local data.
        n: Rows.
        notes: Warnings that a reader of the score should see, without the name of the data.
        class_names: In the order of the model's outputs.
        references: ``(n,)`` int64, the right output for each row.
        inputs: The preprocessed rows.
        fingerprint: The sha256 of what decides which inputs a model sees, and in which order; of no label.
        name: What errors and notes call the data, whatever is measured on them.
    """

    title: str
    scoring: Scoring
    n: int
    notes: tuple[str, ...]
    class_names: tuple[str, ...]
    references: Ints = field(repr=False)
    inputs: tasks.Inputs = field(repr=False)
    fingerprint: str
    _labels: label_map.LabelMap = field(repr=False)
    name: str

    def logits(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Logits:
        """What a model answers, row by row.

        The model is moved to ``device`` and left there, in eval mode. On the CPU each batch is one thread's, so that
        the numbers are the same for any number of threads and processes. Another batch size gives the same ones up to
        the rounding of its matrix products: about 1e-5 of the largest logit in float32, 1e-2 in 16 bits. Models of text
        that see the padding, as FNet does without an attention mask, and ConvBERT a little, answer otherwise in other
        batches: score them at one batch size.

        Args:
            model: A classifier of this task.
            device: Where to run it.
            progress: Called with the number of rows done since the last call.
            world: Processes with equal models that share the batches; all of them are given all answers.

        Returns:
            ``(n, classes)`` float32 in row order.

        Raises:
            ScoringError: The model fails, or an output is NaN, infinite, or of another number of classes.
        """
        world = world or ProcessGroup()
        # Long rows first: a batch too big for the memory fails at once. Stable: ties stay in row order.
        order = np.argsort(-self.inputs.sizes, kind="stable")
        batches = self.inputs.batches(order, self.scoring.batch_size)
        answered: list[Logits] | ScoringError
        try:
            answered = answers(model, self.inputs.batch, batches[world.rank :: world.size], device, progress)
        except ScoringError as error:
            answered = ScoringError.of(error, f"The model fails on '{self.name}' {error.message}")
        everyones = world.gather(answered)
        for part in everyones:
            if isinstance(part, ScoringError):  # of any process, so that all end alike
                raise part
        outputs, classes = everyones[0][0].shape[1], len(self.class_names)
        if outputs != classes:
            raise ScoringError(
                f"The model has {outputs} outputs, and the config names {classes} classes for '{self.name}'.",
                hint="The config does not belong to these weights.",
            )
        found = np.empty((self.n, classes), dtype=np.float32)
        for rank, parts in enumerate(everyones):
            for rows, logits in zip(batches[rank :: world.size], parts, strict=True):
                found[rows] = logits
        for row in np.flatnonzero(~np.isfinite(found).all(axis=1)):
            raise ScoringError(
                f"The model's output for row {row} of '{self.name}' is {found[row]}.",
                hint="Look at the ingredients' weights, and at the dtype (float16 overflows at 65,504).",
            )
        return found

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


@dataclass(frozen=True)
class CalibrationDataset:
    """The examples of a recipe, preprocessed; `prepare_calibration_dataset` makes them.

    Args:
        data: With ``revision`` pinned.
        n: Rows.
        notes: Warnings.
        fingerprint: The sha256 of what decides which inputs a model sees.
    """

    data: CalibrationData
    n: int
    notes: tuple[str, ...]
    fingerprint: str
    _inputs: tasks.Inputs = field(repr=False)

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
        sizes, batches = self._inputs.sizes[rows], []
        for size in np.unique(sizes)[::-1]:
            batches += self._inputs.batches(rows[sizes == size], self.data.batch_size)
        return batches

    def padded(self, rows: Ints) -> list[Ints]:
        """Rows in batches in their order, to be padded; of one size each where the tokenizer cannot pad."""
        return self._inputs.batches(rows, self.data.batch_size) if self._inputs.can_pad else self.alike(rows)

    def batch(self, rows: Ints, device: str = "cpu") -> dict[str, Any]:
        """The model's keyword arguments for some rows, in their order."""
        return self._inputs.batch(rows, device)


def compare(bench: EvalDataset, logits_a: Logits, logits_b: Logits) -> Comparison:
    """Is the first model better than the second, on the same rows?

    Accuracy: the exact two-sided test of McNemar (Note on the sampling error of the difference between correlated
    proportions, 1947), of the rows that just one of them gets right, and the interval of Agresti and Min for matched
    shares. Other metrics: the paired bootstrap, and a permutation test.

    Args:
        bench: The rows and the metric.
        logits_a, logits_b: ``(n, classes)``.

    Returns:
        The difference, first minus second, and a sentence that claims it only where it can be seen.
    """
    from scipy.stats import binomtest

    name, first, second = bench.scoring.measure, bench.answers(logits_a), bench.answers(logits_b)
    if bench.scoring.metric == "accuracy":
        right, other = first == bench.references, second == bench.references
        b, c = int(np.sum(right & ~other)), int(np.sum(other & ~right))
        low, high = paired_interval(b, c, bench.n)
        p = float(binomtest(b, b + c).pvalue) if b + c else 1.0
        return comparison_of(name, (b - c) / bench.n, low, high, p, bench.n)
    metric = metrics.find(bench.scoring.metric, bench.scoring.trust_remote_code)
    low, high, p = paired_bootstrap(bench.references, first, second, metric)
    return comparison_of(name, bench.judge(first) - bench.judge(second), low, high, p, bench.n)
