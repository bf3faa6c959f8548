"""One `Scoring`, prepared once, for every model of a recipe."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation import data, label_map, metrics, tasks
from hf_soup.evaluation.model import answers
from hf_soup.evaluation.preprocessing import preprocessed
from hf_soup.evaluation.statistics import Ints, comparison, mcnemar, paired_bootstrap, paired_interval
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import Comparison, Score, Scoring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


#: (n, classes) float32, row i for row i of the data.
Logits = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EvalDataset:
    """One `Scoring` with its rows preprocessed and kept on disk; `prepare` makes them.

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
    """

    title: str
    scoring: Scoring
    n: int
    notes: tuple[str, ...]
    class_names: tuple[str, ...]
    references: Ints = field(repr=False)
    inputs: tasks.ImageInputs | tasks.TextInputs = field(repr=False)
    fingerprint: str
    _labels: label_map.LabelMap = field(repr=False)
    _name: str = field(repr=False)

    def logits(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] | None = None,
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
        mine = itertools.islice(self.inputs.batches(self.scoring.batch_size), world.rank, None, world.size)
        parts: list[tuple[Ints, Logits]] | ScoringError
        try:
            parts = answers(model, mine, device, progress)
        except ScoringError as error:
            parts = ScoringError.of(error, f"The model fails on '{self._name}' {error.message}")
        everyones = world.gather(parts)
        for part in everyones:
            if isinstance(part, ScoringError):  # of any process, so that all end alike
                raise part
        every = [part for parts in everyones for part in parts]
        found = np.empty((self.n, every[0][1].shape[-1]), dtype=np.float32)
        for rows, logits in every:
            found[rows] = logits
        self._check(found)
        return found

    def batch(self, rows: Ints) -> dict[str, Tensor]:
        """The model's keyword arguments for some rows, in their order."""
        return self.inputs.batch(rows)

    def score(self, logits: Logits) -> Score:
        """The scoring's metric with its 95 % interval: Wilson's for accuracy, the bootstrap's for others.

        Raises:
            ScoringError: The metric is no number, or the logits do not belong to this data.
        """
        found = metrics.score(
            self.scoring.metric, self.references, self.answers(logits), self.scoring.trust_remote_code
        )
        return replace(found, metric=self.scoring.measure)

    def value(self, logits: Logits) -> float:
        """The metric alone, without the interval, for whoever asks it of many candidates."""
        return self.judge(self.answers(logits))

    def judge(self, answers: Ints, rows: Ints | None = None) -> float:
        """The metric of answers to all rows, or of those to some."""
        scoring, chosen = self.scoring, slice(None) if rows is None else rows
        return metrics.value(scoring.metric, self.references[chosen], answers[chosen], scoring.trust_remote_code)

    def resampled(self, logits: Logits) -> NDArray[np.float64]:
        """``(500,)``: the metric over resamples of the rows, the same ones for every model, for paired intervals."""
        return metrics.resampled(
            self.scoring.metric, self.references, self.answers(logits), self.scoring.trust_remote_code
        )

    def answers(self, logits: Logits) -> Ints:
        """``(n,)`` int64: the largest of each row's logits, the first of equal ones."""
        self._check(logits)
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
            f"{name} answers {correct / n:.1%} of the {n:,} rows of '{self._name}' correctly; "
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

    def _check(self, logits: Logits) -> None:
        if len(logits) != self.n:
            raise ScoringError(f"'{self._name}' has {self.n:,} rows; these logits are {logits.shape}.")
        outputs, classes = logits.shape[1], len(self.class_names)
        if outputs != classes:
            raise ScoringError(
                f"The model has {outputs} outputs, and the config names {classes} classes for '{self._name}'.",
                hint="The config does not belong to these weights.",
            )
        for row in np.flatnonzero(~np.isfinite(logits).all(axis=1)):
            raise ScoringError(
                f"The model's output for row {row} of '{self._name}' is {logits[row]}.",
                hint="Look at the ingredients' weights, and at the dtype (float16 overflows at 65,504).",
            )


def prepare_datasets(
    scorings: Sequence[tuple[str, Scoring]],
    *,
    folder: Path,
    config: Mapping[str, Any],
    token: str | bool | None = None,
    quiet: bool = False,
) -> list[EvalDataset]:
    """Read, check and preprocess all held-out and report data of a recipe.

    What was preprocessed once is read from the disk the next time, where the data, the donor's tokenizer or image
    processor, and the libraries are the same. Neither images nor their numbers are ever all in memory.

    They are given together because rule 9 is about them together: held-out rows that are report rows too
    are refused, and held-out rows that equal a report row elsewhere in content are dropped, with a note.

    Args:
        scorings: ``("score" or "report", scoring)``.
        folder: The donor's: its ``config.json`` and tokenizer or image processor.
        config: The donor's ``config.json``.
        token: For gated and private data sets.
        quiet: No progress bar.

    Returns:
        One bench for each scoring, in their order.

    Raises:
        ResolveError: A data set cannot be found or reached.
        ScoringError: A data set cannot be used: the message says why and what there is instead.
    """
    metrics.forget()
    for _, scoring in scorings:
        metrics.find(scoring.metric, scoring.trust_remote_code)
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise ScoringError(f"The model's problem type is {config['problem_type']}; only one label a row can be scored.")
    if len(label_map.model_classes(config)) < 2:
        raise ScoringError("The model has one output: a regression, which cannot be scored as classes.")
    names = [data.name_of(scoring) for _, scoring in scorings]
    reports = [place for place, (role, _) in enumerate(scorings) if role == "report"]
    held_out = [place for place, (role, _) in enumerate(scorings) if role == "score"]
    benches: dict[int, EvalDataset] = {}
    reported: set[bytes] = set()
    with tempfile.TemporaryDirectory(prefix="hf-soup-data-") as cache:
        scratch = Path(cache)
        loaded = data.load([scoring for _, scoring in scorings], scratch, token)
        for place, other in itertools.product(held_out, reports):
            data.refuse_overlap((names[place], loaded[place][1]), (names[other], loaded[other][1]))
        # Reports first: what they hold is what held-out may not hold.
        for place in reports + held_out:
            barred = reported if place in held_out else set()
            benches[place], digests = _prepare_one(
                scorings[place][1], *loaded[place], folder, config, barred, scratch, quiet
            )
            if place in reports:
                reported.update(digests)
        for place, other in itertools.combinations(held_out, 2):
            if benches[place].fingerprint != benches[other].fingerprint:
                data.refuse_partial_overlap((names[place], loaded[place][1]), (names[other], loaded[other][1]))
    return [benches[place] for place in range(len(loaded))]


def _prepare_one(
    asked: Scoring,
    scoring: Scoring,
    rows: data.DatasetRows,
    folder: Path,
    config: Mapping[str, Any],
    barred: Set[bytes],
    scratch: Path,
    quiet: bool,
) -> tuple[EvalDataset, Sequence[bytes]]:
    """A bench of the rows that are not ``barred``, and the hash of every row."""
    task, name, table = tasks.TASKS[scoring.task](folder, config), data.name_of(asked), rows.table
    model_names = label_map.model_classes(config)
    label_name = data.label_column(scoring, name, table, len(model_names))
    columns = data.input_columns(scoring, name, table, task.columns)
    column = label_map.clean(name, data.read_column(table, label_name), label_name)
    mapped = label_map.match(name, model_names, column, data.declared_classes(table, label_name), scoring.labels)
    references = label_map.to_outputs(mapped, column, name)
    key, found = preprocessed(scoring, rows, task, folder, columns, scratch=scratch, quiet=quiet)
    kept = np.flatnonzero([digest not in barred for digest in found.digests])
    if not len(kept):
        raise ScoringError(
            f"Every row of the held-out data '{name}' is in the report too.",
            hint="What selection has looked at cannot test it: use other rows.",
        )
    notes, dropped = [mapped.note] if mapped.note else [], len(table) - len(kept)
    if dropped:
        notes.append(f"{dropped:,} of {len(table):,} rows equal a report row in content and were dropped")
    references = references[kept]
    if len(np.unique(references)) == 1:
        raise ScoringError(
            f"All {len(kept):,} rows of {name} have the label '{column[kept[0]]}'; a score would mean nothing.",
            hint="Use rows of several classes; a slice of a sorted split may hold only one.",
        )
    fingerprint = hashlib.sha256(key.encode() + kept.tobytes()).hexdigest()
    inputs, names = task.inputs(found, kept), mapped.class_names
    bench = EvalDataset(
        asked.title, scoring, len(kept), tuple(notes), names, references, inputs, fingerprint, mapped, name
    )
    return bench, found.digests


def notes_of(benches: Sequence[EvalDataset]) -> list[str]:
    """What to know of data, each once: where the same holds for several, they are named together."""
    whose: dict[str, dict[str, None]] = {}
    for bench in benches:
        for note in bench.notes:
            whose.setdefault(note, {})[bench._name] = None
    return [f"{', '.join(names)}: {note}" for note, names in whose.items()]


def compare(bench: EvalDataset, logits_a: Logits, logits_b: Logits) -> Comparison:
    """Is the first model better than the second, on the same rows?

    Accuracy: the exact McNemar test, and the interval of Agresti and Min for matched shares. Other metrics:
    the paired bootstrap, and a permutation test.

    Args:
        bench: The rows and the metric.
        logits_a, logits_b: ``(n, classes)``.

    Returns:
        The difference, first minus second, and a sentence that claims it only where it can be seen.

    Raises:
        ScoringError: The logits do not belong to this data.
    """
    name, first, second = bench.scoring.measure, bench.answers(logits_a), bench.answers(logits_b)
    if bench.scoring.metric == "accuracy":
        right, other = first == bench.references, second == bench.references
        b, c = int(np.sum(right & ~other)), int(np.sum(other & ~right))
        low, high = paired_interval(b, c, bench.n)
        return comparison(name, (b - c) / bench.n, low, high, mcnemar(b, c), bench.n)
    metric = metrics.find(bench.scoring.metric, bench.scoring.trust_remote_code)
    low, high, p = paired_bootstrap(bench.references, first, second, metric)
    return comparison(name, bench.value(logits_a) - bench.value(logits_b), low, high, p, bench.n)
