"""Scores of ingredients, of candidate soups that were never written, and of the soup that was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_soup._util.progress import bar
from hf_soup.errors import ScoringError
from hf_soup.evaluation.classification import ClassificationDataset
from hf_soup.evaluation.dataset import EvalDataset, LearnableDataset, Outputs
from hf_soup.evaluation.ensembles import calibration, diversity, ensemble, greedy_ensemble, logit_ensemble
from hf_soup.evaluation.evaluation_data import EvaluationData, require_halves
from hf_soup.evaluation.guard import Breach, breach
from hf_soup.evaluation.looks import Chance, beside_chance, by_chance
from hf_soup.evaluation.model import one_thread
from hf_soup.evaluation.model_answers import ModelAnswers, SavedModel
from hf_soup.evaluation.report import ENSEMBLE, GREEDY_ENSEMBLE, LAST, LOGIT_ENSEMBLE, SOUP, EvaluationReport
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.template import scored_with
from hf_soup.merging import Layout, Plan, RunContext
from hf_soup.recipe import Comparison, Mixture, Score

if TYPE_CHECKING:
    from hf_soup.evaluation.entropy import EntropyLoss
    from hf_soup.evaluation.gradients import ValidationLoss

#: Row numbers of every data set that a selection may look at.
RowSubset = Sequence[Ints]


class Candidates:
    """Scores of mixtures of one layout, of its ingredients, and of the soup that was written.

    An ingredient is run once on the validation data, and once more at the end on the test data, which nothing looks at
    before; what was run in an earlier cook is remembered. Held in memory at a time: one model, its tensors, and the
    running sum of the soup.

    Args:
        layout: All sources, under the names of the soup.
        paths: For every source, its weight files.
        data: What is scored on.
        context: The device, and the processes that answer together.
        ingredients: What the recipe names, each of which may be the mean of several sources; by default the sources.
    """

    def __init__(
        self,
        layout: Layout,
        paths: Sequence[Mapping[str, Path]],
        data: EvaluationData,
        context: RunContext,
        ingredients: Mapping[str, Mixture] | None = None,
    ) -> None:
        self.ingredients = ingredients or {name: Mixture({name: 1.0}) for name in layout.names}
        self._layout, self._paths, self._data, self._context = layout, paths, data, context
        self._models = ModelAnswers(layout, paths, data, context)
        self._outputs: dict[tuple[str, str], Outputs] = {}
        self._answers: dict[str, list[Outputs]] = {}
        self._in_order: set[str] = set()
        self._looked_at: dict[str, None] = {}  # keys of mixtures that were compared on all rows
        self._refused: tuple[float, str, Breach] | None = None

    def __enter__(self) -> Candidates:
        return self

    def __exit__(self, *_: object) -> None:
        self._models.close()

    @property
    def share(self) -> bool:
        """Whether validation scores are shares of one, which people read in percent."""
        return all(bench.share for bench in self._data.validation)

    def score(self, mixture: Mixture, rows: RowSubset | None = None, *, guarded: bool = True) -> float:
        """The validation score of a soup that is not written.

        Over several data sets it is the mean of their metrics, by the recipe's weights.

        Args:
            mixture: Of sources of the layout.
            rows: Of each data set those that count; by default all.
            guarded: Whether one that breaks a guard ranks below all that do not.
        """
        key = Plan(self._layout, mixture).in_order.key  # the order of a sum shows in its last bits only
        if key not in self._answers:
            self._answers[key] = self._answered(self.outputs(mixture))
        if rows is None:
            self._looked_at[key] = None
        return self._ranked(self._answers[key], rows, " + ".join(mixture.weights), guarded)

    def score_alone(self, name: str, rows: RowSubset | None = None, *, guarded: bool = True) -> float:
        """That of an ingredient.

        Raises:
            ScoringError: It answers as if its labels were in another order.
        """
        return self._ranked(self._answered(self.outputs_alone(name)), rows, name, guarded)

    @property
    def guarded(self) -> bool:
        """Whether some validation data have a guard."""
        return any(bench.scoring.at_least for bench in self._data.validation)

    def breach(self, answers: Sequence[Outputs], rows: RowSubset | None = None) -> Breach | None:
        """How a model with these answers breaks the guards."""
        alone = [self._values(self._answered(self.outputs_alone(name)), rows) for name in self.ingredients]
        return breach(self._data.validation, self._values(answers, rows), np.max(alone, axis=0).tolist())

    def _ranked(self, answers: Sequence[Outputs], rows: RowSubset | None, name: str, guarded: bool) -> float:
        value = self._mean_score(answers, rows)
        if not guarded or not self.guarded or (broken := self.breach(answers, rows)) is None:
            return value
        if rows is None and (self._refused is None or value > self._refused[0]):
            self._refused = value, name, broken
        return broken.rank

    def refused(self, score: float) -> list[str]:
        """A sentence about the best candidate that a guard refused, where it scores more than this."""
        if self._refused is None or self._refused[0] <= score:
            return []
        value, name, broken = self._refused
        return [
            f"Without `at_least`, {name} would score {value:.4g} on the validation data, and not {score:.4g}; it is "
            f"{broken.text}."
        ]

    def require_guards(self, outputs: Sequence[Outputs], select: str) -> None:
        """Refuse what was chosen, where it breaks a guard.

        Raises:
            ScoringError: It is so.
        """
        answers = self._answered(outputs)
        if self.guarded and (broken := self.breach(answers)):
            raise ScoringError(
                f"Nothing that `select: {select}` tried keeps `at_least`: what comes nearest scores "
                f"{self._mean_score(answers):.4g} on the validation data, and is {broken.text}.",
                hint="Allow more, leave ingredients out, or try another `select` or `method`.",
            )

    def outputs(self, mixture: Mixture) -> list[Outputs]:
        """What a soup that is not written answers to the validation data."""
        plan, validation = Plan(self._layout, mixture), self._data.validation
        answers = self._models.outputs(plan, validation, f"{len(mixture.weights)} ingredients")
        return [answers[bench.title] for bench in validation]

    def outputs_alone(self, name: str) -> list[Outputs]:
        """What an ingredient answers to it, as `score_alone`."""
        return self._alone(name, self._data.validation)

    def _answered(self, outputs: Sequence[Outputs]) -> list[Outputs]:
        return [bench.answers(each) for bench, each in zip(self._data.validation, outputs, strict=True)]

    def _values(self, answers: Sequence[Outputs], rows: RowSubset | None = None) -> list[float]:
        return [
            bench.judge(each, rows[number] if rows else None)
            for number, (bench, each) in enumerate(zip(self._data.validation, answers, strict=True))
        ]

    def _mean_score(self, answers: Sequence[Outputs], rows: RowSubset | None = None) -> float:
        shares, values = [bench.scoring.weight for bench in self._data.validation], self._values(answers, rows)
        return math.fsum(share * value for share, value in zip(shares, values, strict=True)) / math.fsum(shares)

    def objective(self, outputs: Sequence[Outputs]) -> float:
        """The mean of the validation metrics of a model's answers, by the recipe's weights."""
        return self._mean_score(self._answered(outputs))

    def random_halves(self, seed: int) -> tuple[RowSubset, RowSubset]:
        """The rows of every validation data set in two random halves, the same for the same number."""
        generator = np.random.Generator(np.random.Philox(key=seed))
        validation = self._data.validation
        clusters = {}
        for bench, outputs in zip(validation, self.outputs_alone(next(iter(self.ingredients))), strict=True):
            count = outputs.size if bench.rows is None else bench.rows
            require_halves(bench, count)
            if bench.clusters is not None or bench.fingerprint not in clusters:
                clusters[bench.fingerprint] = np.arange(count) if bench.clusters is None else bench.clusters
        # The same rows in another metric are in the same half, and so are all rows of a cluster.
        kinds = {fingerprint: _halved(numbers, generator) for fingerprint, numbers in clusters.items()}
        halves = [kinds[bench.fingerprint] for bench in validation]
        return tuple([first for first, _ in halves]), tuple([second for _, second in halves])

    def release(self) -> None:
        """Let go of the model in memory: another one comes."""
        self._models.release()

    def _alone(self, name: str, benches: Sequence[EvalDataset]) -> list[Outputs]:
        """What an ingredient answers, once asked."""
        missing = [bench for bench in benches if (name, bench.title) not in self._outputs]
        if missing:
            plan = Plan(self._layout, self.ingredients[name])
            answers = self._models.outputs(plan, missing, name, alone=True)
            self._remember(name, answers)
            # With another's head a model may answer anything, and so may one that does well on its own task's data on
            # those of another; that says nothing of its labels.
            doubts = [bench.doubt_of_order(name, answers[bench.title]) for bench in _of_classes(missing)]
            if not all(doubts) or self._data.template.head_of not in (None, name):
                self._in_order.add(name)
            elif doubts and doubts[0] and name not in self._in_order:
                raise doubts[0]
        return [self._outputs[name, bench.title] for bench in benches]

    def _remember(self, name: str, answers: Mapping[str, Outputs]) -> None:
        self._outputs |= {(name, title): outputs for title, outputs in answers.items()}

    def require_better_than_chance(self, names: Sequence[str]) -> None:
        """Where nobody has learned anything, the order of scores is luck, and so is what is selected by it.

        Raises:
            ScoringError: It is so, or an ingredient answers as if its labels were in another order.
        """
        head_of = self._data.template.head_of
        if not (classes := _of_classes(self._data.validation)):
            return  # of nothing else it is known what chance gives
        bench, place = classes[0], self._data.validation.index(classes[0])
        found = {name: bench.better_than_chance(self.outputs_alone(name)[place]) for name in names}
        if head_of is not None or any(accuracy > chance for accuracy, chance, _ in found.values()):
            return
        name = max(found, key=lambda name: found[name][0] - found[name][1])
        raise ScoringError(
            f"No ingredient is better than chance on '{bench.title}': the best, {name}, answers {found[name][0]:.1%} "
            f"of {bench.n:,} rows correctly, and its answers in random order would get {found[name][1]:.1%}.",
            hint="Are these its inputs and its labels? `select: uniform` averages without looking.",
        )

    def _warnings(self) -> list[str]:
        if not (classes := _of_classes(self._data.scored)):
            return []
        bench = classes[0]
        found = [bench.better_than_chance(self._outputs[name, bench.title])[2] for name in self.ingredients]
        if min(found) < 0.05:
            return []
        return [f"No ingredient can be told from chance on '{bench.title}' (n = {bench.n:,}, p >= {min(found):.2g})."]

    def _losses(self, best: Mapping[str, str], comparisons: Mapping[str, Comparison]) -> list[str]:
        """What a soup lost against its best ingredient on the data that it was chosen on."""
        lost = [
            bench.title
            for bench in self._data.validation
            if bench.title in comparisons
            and comparisons[bench.title].significant
            and comparisons[bench.title].difference < 0
        ]
        if not lost:
            return []
        soup, single = (self.outputs_alone(name) for name in (SOUP, best[lost[0]]))
        advice = "Its weighted mean over all validation data is not lower."
        if self.objective(soup) < self.objective(single):
            advice = "Use that one, or another `select` or `method`: greedy keeps no ingredient that hurts the soup."
        return [
            f"The soup is worse on '{title}' than {best[title]} alone: {comparisons[title].sentence}. {advice}"
            for title in lost
        ]

    @contextmanager
    def descent(self, names: Sequence[str], rows: RowSubset | None = None) -> Iterator[ValidationLoss]:
        """The validation loss of soups of some ingredients and its gradient, for a selection that learns."""
        from hf_soup.evaluation.gradients import ValidationLoss

        alone = [self.outputs_alone(name) for name in names]
        learnable = [bench for bench in self._data.validation if isinstance(bench, LearnableDataset)]
        self.release()  # or there would be its model beside the one that learns
        made_of, config = {name: _shares(self.ingredients[name]) for name in names}, self._data.template.config
        with (
            bar("Learning weights", None, unit="row", quiet=self._context.quiet) as shown,
            closing(
                ValidationLoss(
                    self._layout, self._paths, made_of, config, learnable, alone, rows, self._context.device,
                    shown.update,
                )
            ) as loss,
        ):  # fmt: skip
            yield loss

    @contextmanager
    def entropy(self, weights: Mapping[str, float], steps: int) -> Iterator[EntropyLoss]:
        """How sure soups of some ingredients are of their answers to the calibration data, and its gradient.

        On the CPU by one thread, as torch's division of a matrix product among threads shows in its last bits, and
        every step would add to that.

        Args:
            weights: Of the ingredients.
            steps: How many will be shown as done.
        """
        from hf_soup.evaluation.entropy import EntropyLoss

        calibration = self._data.calibration
        assert calibration is not None, "the recipe was checked: who learns from examples has some"
        with (
            bar("Learning coefficients", steps, unit="step", quiet=self._context.quiet) as shown,
            closing(EntropyLoss(self._layout, self._paths, weights, calibration, shown.update)) as loss,
            one_thread(),
        ):
            yield loss

    def scores_alone(self) -> dict[str, dict[str, Score]]:
        """The scores of every ingredient on all data, whatever the order of its labels seems to be."""
        scored, scores = self._data.scored, {}
        for name, mixture in self.ingredients.items():
            outputs = self._models.outputs(Plan(self._layout, mixture), scored, name, alone=True)
            scores[name] = {bench.title: bench.score(outputs[bench.title]) for bench in scored}
        return scores

    def evaluate(
        self,
        soup: SavedModel,
        own: EvaluationData,
        points: Sequence[Mixture] = (),
        last: Mixture | None = None,
    ) -> EvaluationReport:
        """Score the soup that was written, and every ingredient, on all data; the test data for the first time.

        Args:
            soup: As it was written.
            own: The same data as the soup itself reads them.
            points: What was tried with other parameters of the method; it is scored on the test data now.
            last: The last version, of which the soup is an update.
        """
        names, every = list(self.ingredients), self._data.scored
        for name in names:
            self._alone(name, every)
        if soup.template is None and (own.validation is not self._data.validation or own.test is not self._data.test):
            soup = soup._replace(template=own.template)  # it has another tokenizer than the candidates had
        self._remember(SOUP, self._models.outputs(soup, own.scored, SOUP))
        if last is not None:
            self._remember(LAST, self._models.outputs(Plan(self._layout, last), every, LAST))
        in_ensemble = self._ensembles() if len(names) > 1 else ()
        models = list(dict.fromkeys([SOUP, *names, *(name for name, _ in self._outputs)]))
        answered = self._outputs
        scores = {
            name: {b.title: b.score(answered[name, b.title]) for b in every if (name, b.title) in answered}
            for name in models
        }
        classes = _of_classes(every)
        calibrated = {
            name: {b.title: calibration(answered[name, b.title], b.references) for b in classes} for name in models
        }
        errors = {b.title: diversity({name: answered[name, b.title] for name in names}, b.references) for b in classes}
        each = {name: self.objective(self.outputs_alone(name)) for name in names if self._data.validation}

        def worth(name: str, bench: EvalDataset) -> float:
            return each[name] if each else bench.judge(bench.answers(answered[name, bench.title]))

        broken = {name for name in names if self.guarded and self.breach(self._answered(self.outputs_alone(name)))}
        kept = [name for name in names if name not in broken] or names
        best = {bench.title: max(kept, key=partial(worth, bench=bench)) for bench in every}
        comparisons = {b.title: b.compare(answered[SOUP, b.title], answered[best[b.title], b.title]) for b in every}
        for bench, chance in zip(self._data.validation, self._by_chance(comparisons), strict=False):
            comparisons[bench.title] = beside_chance(comparisons[bench.title], chance, share=bench.share)
        if all(np.array_equal(answered[SOUP, b.title], answered[best[b.title], b.title]) for b in every):
            comparisons = {}  # of a model with itself
        since = {b.title: b.compare(answered[SOUP, b.title], answered[LAST, b.title]) for b in every if last}
        curve = []
        for number, point in enumerate(points):
            answers = self._models.outputs(Plan(self._layout, point), every, f"point {number + 1} of {len(points)}")
            curve.append({bench.title: bench.score(answers[bench.title]) for bench in every})
        notes = (*self._data.notes, *scored_with(self._data.template.head_of))
        warnings = (*self._warnings(), *self._losses(best, comparisons))
        return EvaluationReport(
            scores, best, comparisons, since, calibrated, errors, in_ensemble, tuple(curve), notes, warnings
        )

    def _by_chance(self, comparisons: Mapping[str, Comparison]) -> list[Chance]:
        """What the choice among all candidates gains by chance on each of the validation data, where that is known."""
        validation, names = self._data.validation, list(self.ingredients)
        if not self._looked_at:
            return []
        every = [self._answered(self.outputs_alone(name)) for name in names]
        every += [self._answers[key] for key in self._looked_at]
        values = [[bench.row_values(answers[number]) for answers in every] for number, bench in enumerate(validation)]
        columns = [[each for each in own if each is not None] for own in values]
        if any(len(own) < len(every) for own in columns):
            return []
        return by_chance(
            [np.stack(own, axis=1) for own in columns], [bench.scoring.weight for bench in validation], len(names),
            [comparisons[bench.title].difference for bench in validation], [bench.clusters for bench in validation],
        )  # fmt: skip

    def _ensembles(self) -> tuple[str, ...]:
        """Work out what ensembles of the ingredients answer, where there are classes; the members of the greedy one."""
        members: tuple[str, ...] = ()
        names, validation = list(self.ingredients), self._data.validation
        classes = _of_classes(self._data.scored)
        if validation and all(bench in classes for bench in validation):
            each = {name: self.outputs_alone(name) for name in names}
            members = greedy_ensemble(each, self.objective)
        for bench in classes:
            alone = {name: self._outputs[name, bench.title] for name in names}
            self._outputs[ENSEMBLE, bench.title] = ensemble(list(alone.values()))
            self._outputs[LOGIT_ENSEMBLE, bench.title] = logit_ensemble(list(alone.values()))
            if members:
                self._outputs[GREEDY_ENSEMBLE, bench.title] = logit_ensemble([alone[name] for name in members])
        return members


def _halved(clusters: Ints, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """Two random halves of rows, without cutting through a cluster: as near to halves as that goes."""
    places = np.argsort(generator.permutation(clusters.max() + 1))[clusters]
    order = np.argsort(places, kind="stable")
    edges = np.flatnonzero(np.diff(places[order])) + 1
    cut = edges[np.abs(edges - len(order) // 2).argmin()]
    return np.sort(order[cut:]), np.sort(order[:cut])


def _of_classes(benches: Sequence[EvalDataset]) -> list[ClassificationDataset]:
    """Those whose rows have one class each, of which there are probabilities."""
    return [bench for bench in benches if isinstance(bench, ClassificationDataset)]


def _shares(mixture: Mixture) -> dict[str, float]:
    """Shares that sum to 1, as nearly as they can be given."""
    whole = all(float(weight).is_integer() for weight in mixture.weights.values())
    total = math.fsum(mixture.weights.values()) if whole else 1.0  # else they do so already
    return {name: weight / total for name, weight in mixture.weights.items()}
