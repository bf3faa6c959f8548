"""One `Scoring`, prepared once, for every model of a recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.recipe import Scoring
from hf_soup.scoring import data, labels, metrics
from hf_soup.scoring.statistics import Comparison, Ints, Score, mcnemar, paired_bootstrap, paired_interval
from hf_soup.scoring.tasks import TASKS, Inputs, Task, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: (n, classes) float32, row i for row i of the data.
Logits = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Bench:
    """One `Scoring` with its rows preprocessed and held in memory.

    Images take ``4 * channels * height * width`` bytes a row (0.6 MB at 224 x 224 in colour), texts their
    token numbers. `prepare` makes them.

    Args:
        title: What the score is called in tables.
        scoring: With ``revision`` pinned: the commit of a Hub data set, ``sha256:…`` of local data.
        n: Rows.
        notes: Warnings that a reader of the score should see.
        class_names: In the order of the model's outputs.
        label_map: For each class of the data, in its order, the number of the model's output.
        references: ``(n,)`` int64, the right output for each row.
        inputs: The preprocessed rows.
    """

    title: str
    scoring: Scoring
    n: int
    notes: tuple[str, ...]
    class_names: tuple[str, ...]
    label_map: tuple[int, ...]
    references: Ints = field(repr=False)
    inputs: Inputs = field(repr=False)
    _labels: labels.LabelMap = field(repr=False)
    _name: str = field(repr=False)

    def logits(
        self, model: PreTrainedModel, *, device: str = "cpu", progress: Callable[[int], object] | None = None
    ) -> Logits:
        """What a model answers, row by row.

        The model is moved to ``device`` and left there, in eval mode. Another batch size gives the same
        numbers up to the rounding of its matrix products: about 1e-5 of the largest logit in float32, 1e-2
        in 16 bits.

        Args:
            model: A classifier of this task.
            device: Where to run it.
            progress: Called with the number of rows done since the last call.

        Returns:
            ``(n, classes)`` float32 in row order.

        Raises:
            ScoringError: The model fails, or an output is NaN, infinite, or of another number of classes.
        """
        import torch

        model.eval()  # type: ignore[no-untyped-call]
        model.to(device)  # type: ignore[arg-type]  # transformers types its wrapper as taking no string
        found: Logits | None = None
        with torch.inference_mode():
            for rows, batch in self.inputs.batches(self.scoring.batch_size):
                placed = {
                    name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
                    for name, value in batch.items()
                }
                try:
                    answers = model(**placed).logits.to(torch.float32).cpu().numpy()  # (rows, classes)
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    shapes = {name: tuple(value.shape) for name, value in placed.items()}
                    raise ScoringError(
                        f"The model fails on '{self._name}' ({shapes}): {first_line(error)}",
                        hint="Do the donor's tokenizer or image processor and its config belong to these weights? "
                        "Out of memory: a smaller `batch_size`.",
                    ) from error
                if found is None:
                    found = np.empty((self.n, answers.shape[-1]), dtype=np.float32)
                found[rows] = answers
                if progress is not None:
                    progress(len(rows))
        assert found is not None, "prepare refuses empty data"
        self._check(found)
        return found

    def score(self, logits: Logits) -> Score:
        """The scoring's metric with its 95 % interval: Wilson's for accuracy, the bootstrap's for others.

        Args:
            logits: ``(n, classes)``; the answer is the largest, the first of equal ones.

        Raises:
            ScoringError: The metric is no number, or the logits do not belong to this data.
        """
        answers = self.answers(logits)
        return metrics.score(self.scoring.metric, self.references, answers, logits.shape[1])

    def answers(self, logits: Logits) -> Ints:
        """``(n,)`` int64: the output that each row's logits name."""
        self._check(logits)
        return np.asarray(logits.argmax(axis=1), dtype=np.int64)

    def refuse_worse_than_majority(self, name: str, logits: Logits) -> None:
        """Refuse an ingredient whose outputs are evidently in another order than the labels.

        Two things must hold, against the share of the most frequent class, by one-sided exact binomial
        tests: the ingredient answers fewer rows correctly (p < 0.001), and with the best permutation of its
        outputs it would answer more (p < 0.05). The second spares a model that learned nothing, or
        collapsed into one rare class: no order of the labels would help it, and selection is there to leave
        it out.

        Args:
            name: The ingredient, for the error.
            logits: ``(n, classes)``.

        Raises:
            ScoringError: It is so; the message shows the permutation that fits best.
        """
        from scipy.optimize import linear_sum_assignment
        from scipy.stats import binom

        answers, classes = self.answers(logits), logits.shape[1]
        confusion = np.zeros((classes, classes), dtype=np.int64)  # (label, answer)
        np.add.at(confusion, (self.references, answers), 1)
        correct, most = int(np.trace(confusion)), confusion.sum(axis=1).max()
        share = float(most) / self.n
        if binom.cdf(correct, self.n, share) >= 0.001:
            return
        _, permutation = linear_sum_assignment(confusion, maximize=True)
        permuted = int(confusion[np.arange(classes), permutation].sum())
        if binom.sf(permuted - 1, self.n, share) >= 0.05:
            return
        majority = self.class_names[int(confusion.sum(axis=1).argmax())]
        moved = [
            f"  '{self.class_names[output]}' is answered as '{self.class_names[answer]}' "
            f"({confusion[output, answer]:,} of {confusion[output].sum():,} rows)"
            for output, answer in enumerate(permutation)
            if output != answer
        ]
        order = labels.suggestion(self._labels, [int(answer) for answer in permutation])
        raise ScoringError(
            "\n".join(
                [
                    f"{name} answers {correct / self.n:.1%} of the {self.n:,} rows of '{self._name}' correctly; "
                    f"always answering '{majority}' gets {share:.1%}.",
                    f"With its outputs in another order it would get {permuted / self.n:.1%}:",
                    *moved[:20],
                    *([f"  … {len(moved) - 20} more"] if len(moved) > 20 else []),
                ]
            ),
            hint=(
                f"If all ingredients are so, say the order: `labels: [{', '.join(order)}]`. "
                if order
                else "Its config names its classes wrongly. "
            )
            + "If it is only this one, leave it out.",
        )

    def _check(self, logits: Logits) -> None:
        if logits.ndim != 2 or len(logits) != self.n:
            raise ScoringError(f"'{self._name}' has {self.n:,} rows; these logits are {logits.shape}.")
        if logits.shape[1] != len(self.class_names):
            raise ScoringError(
                f"The model has {logits.shape[1]} outputs, and the config names {len(self.class_names)} classes "
                f"for '{self._name}'.",
                hint="The config does not belong to these weights.",
            )
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise ScoringError(
                f"The model's output for row {row} of '{self._name}' is {logits[row]}.",
                hint="A merge that is not finite: look at the ingredients' weights, and at the dtype "
                "(float16 overflows at 65,504).",
            )


def prepare(
    scorings: Sequence[tuple[str, Scoring]],
    *,
    folder: Path,
    config: Mapping[str, Any],
    token: str | bool | None = None,
) -> list[Bench]:
    """Read, check and preprocess all held-out and report data of a recipe.

    They are given together because rule 9 is about them together: held-out rows that are report rows too
    are refused, and held-out rows that equal a report row elsewhere in content are dropped, with a note.

    Args:
        scorings: ``("score" or "report", scoring)``.
        folder: The donor's: its ``config.json`` and tokenizer or image processor.
        config: The donor's ``config.json``.
        token: For gated and private data sets.

    Returns:
        One bench for each scoring, in their order.

    Raises:
        ResolveError: A data set cannot be found or reached.
        ScoringError: A data set cannot be used: the message says why and what there is instead.
    """
    for _, scoring in scorings:
        metrics.find(scoring.metric)
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise ScoringError(f"The model's problem type is {config['problem_type']}; only one label a row can be scored.")
    model_names = labels.model_classes(config)
    if len(model_names) < 2:
        raise ScoringError("The model has one output: a regression, which cannot be scored as classes.")
    tasks: dict[str, Task] = {}
    with tempfile.TemporaryDirectory(prefix="hf-soup-data-") as cache:
        loaded = data.load([scoring for _, scoring in scorings], Path(cache), token)
        names = [data.name_of(scoring) for _, scoring in scorings]
        roles = [role for role, _ in scorings]
        for i, role in enumerate(roles):
            for j, other in enumerate(roles):
                if role == "score" and other == "report":
                    data.refuse_overlap((names[i], loaded[i][1]), (names[j], loaded[j][1]))
        benches: dict[int, Bench] = {}
        reported: set[bytes] = set()
        # Reports first: what they hold is what held-out may not hold.
        for place in sorted(range(len(loaded)), key=lambda place: roles[place] != "report"):
            scoring, rows = loaded[place]
            if scoring.task not in tasks:
                tasks[scoring.task] = TASKS[scoring.task](folder, config)
            benches[place] = _prepare_one(
                names[place],
                scorings[place][1].title,
                scoring,
                rows.table,
                tasks[scoring.task],
                model_names,
                reported=reported,
                is_report=roles[place] == "report",
            )
    return [benches[place] for place in range(len(loaded))]


def _prepare_one(
    name: str,
    title: str,
    scoring: Scoring,
    table: Any,
    task: Task,
    model_names: tuple[str, ...],
    *,
    reported: set[bytes],
    is_report: bool,
) -> Bench:
    """One bench; ``reported`` holds the hashes of all report rows, and grows by those of this report."""
    label_name = data.label_column(scoring, name, table, len(model_names))
    columns = data.input_columns(scoring, name, table, task.columns)
    column = labels.clean(name, data.read_column(table, label_name), label_name)
    mapped = labels.match(name, model_names, column, data.declared_classes(table, label_name), scoring.labels)
    references = labels.to_outputs(mapped, column, name)
    contents = _contents(name, table, columns, task)
    digests = [task.digest(content) for content in contents]
    if is_report:
        reported.update(digests)
    notes = [mapped.note] if mapped.note else []
    kept = [row for row, digest in enumerate(digests) if is_report or digest not in reported]
    if len(kept) < len(contents):
        dropped = len(contents) - len(kept)
        notes.append(f"{name}: {dropped:,} of {len(contents):,} rows equal a report row in content and were dropped")
        if not kept:
            raise ScoringError(
                f"Every row of the held-out data '{name}' is in the report too.",
                hint="What selection has looked at cannot test it: use other rows.",
            )
    references = references[kept]
    if len(np.unique(references)) == 1:
        raise ScoringError(
            f"All {len(kept):,} rows of {name} have the label '{column[kept[0]]}'; a score would mean nothing.",
            hint="Use rows of several classes; a slice of a sorted split may hold only one.",
        )
    return Bench(
        title=title,
        scoring=scoring,
        n=len(kept),
        notes=tuple(notes),
        class_names=mapped.class_names,
        label_map=mapped.outputs,
        references=references,
        inputs=task.preprocess(name, [contents[row] for row in kept]),
        _labels=mapped,
        _name=name,
    )


def _contents(title: str, table: Any, names: tuple[str, ...], task: Task) -> list[Any]:
    inputs = table.select_columns(list(names))
    contents = []
    for row in range(len(inputs)):
        try:
            values = inputs[row]
            contents.append(task.read([values[name] for name in names]))
        except Exception as error:  # of Pillow on broken files and bombs, too: no common class
            raise ScoringError(
                f"Cannot read row {row} of {title} ({', '.join(names)}): {first_line(error)}",
                hint="Remove the row, or name other `input_columns`.",
            ) from error
    return contents


def compare(bench: Bench, logits_a: Logits, logits_b: Logits) -> Comparison:
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
    metric = bench.scoring.metric
    first, second = bench.answers(logits_a), bench.answers(logits_b)
    if metric == "accuracy":
        right, other = first == bench.references, second == bench.references
        b, c = int(np.sum(right & ~other)), int(np.sum(other & ~right))
        low, high = paired_interval(b, c, bench.n)
        return Comparison(metric, (b - c) / bench.n, low, high, mcnemar(b, c), bench.n)
    difference = metrics.compute(metric, bench.references, first) - metrics.compute(metric, bench.references, second)
    low, high, p = paired_bootstrap(
        bench.references, first, second, logits_a.shape[1], metrics.find(metric).from_counts
    )
    return Comparison(metric, difference, low, high, p, bench.n)


def ensemble(logits_list: Sequence[Logits]) -> Logits:
    r"""The logits of the probability ensemble, :math:`\log\frac1k\sum_i \operatorname{softmax}(x_i)`.

    Args:
        logits_list: One or more arrays, ``(n, classes)`` each.

    Returns:
        ``(n, classes)`` float32.

    Raises:
        ScoringError: There are none, or their shapes differ.

    >>> ensemble([np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.1, 0.9]]))]).round(3)
    array([[-1.204, -0.357]], dtype=float32)
    """
    from scipy.special import log_softmax, logsumexp

    shapes = {logits.shape for logits in logits_list}
    if len(shapes) != 1:
        raise ScoringError(f"An ensemble needs logits of one shape, not {sorted(shapes)}.")
    every = np.stack([log_softmax(np.asarray(logits, dtype=np.float64), axis=-1) for logits in logits_list])
    # Through logarithms: a probability of zero in every model would be minus infinity.
    return np.asarray(logsumexp(every, axis=0) - np.log(len(every)), dtype=np.float32)
