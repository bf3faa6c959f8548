"""Scores of ingredients, of candidate soups that were never written, and of the soup that was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_soup.checkpoint import ITEM_BYTES
from hf_soup.errors import ScoringError
from hf_soup.evaluation.candidates import Candidates, SavedModel
from hf_soup.evaluation.dataset import EvalDataset, Logits, compare, notes_of
from hf_soup.evaluation.ensembles import calibration, diversity, ensemble, greedy_ensemble, logit_ensemble
from hf_soup.evaluation.statistics import Comparison, Ints
from hf_soup.merging import Layout, Plan, ProcessGroup
from hf_soup.recipe import CalibrationErrors, Diversity, MethodCall, Mixture, Score

if TYPE_CHECKING:
    from hf_soup.evaluation.batch_statistics import BatchStatistics
    from hf_soup.selection import Layers, Objective, Weights


#: Row numbers of every held-out bench.
RowSubset = Sequence[Ints]

SOUP, LAST = "soup", "last version"
#: Of probabilities, of logits, and of the logits of those that help.
ENSEMBLE, LOGIT_ENSEMBLE, GREEDY_ENSEMBLE = "ensemble", "logit ensemble", "greedy ensemble"


class Mix(NamedTuple):
    """What makes one soup of the ingredients: shares, those of single tensors, parameters of the method."""

    weights: tuple[tuple[str, float], ...]
    layers: tuple[tuple[str, tuple[float, ...]], ...]
    parameters: str

    @classmethod
    def of(cls, weights: Weights, layers: Layers | None, parameters: Mapping[str, Any] | None) -> Mix:
        """The same for equal soups."""
        asked = "" if parameters is None else repr(sorted(parameters.items()))
        # Per-tensor shares are in the order of the weights.
        order = tuple(weights.items()) if layers else tuple(sorted(weights.items()))
        return cls(order, tuple((name, tuple(shares)) for name, shares in (layers or {}).items()), asked)


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured; nothing, where the recipe names no data.

    Args:
        scores: Name of a model (every ingredient, the soup, ensembles) → title of the data → its score.
        best: The ingredient that is best on the held-out data; without such data, on each report by itself.
        comparisons: Title of the data → the soup against the best ingredient there.
        since: The same against the last version of the soup, where it is an update.
        calibration: As ``scores`` → how far probabilities can be believed.
        diversity: Title of the data → how differently the ingredients err.
        in_ensemble: The ingredients in the greedy ensemble, best first.
        curve: For each point that was tried, title of the data → its score.
        notes: About the data, and whose head the models have.
        warnings: About all of it.
    """

    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    best: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    since: Mapping[str, Comparison] = field(default_factory=dict)
    calibration: Mapping[str, Mapping[str, CalibrationErrors]] = field(default_factory=dict)
    diversity: Mapping[str, Diversity] = field(default_factory=dict)
    in_ensemble: tuple[str, ...] = ()
    curve: tuple[Mapping[str, Score], ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Evaluation:
    """Models of one kind on the benches of one recipe.

    An ingredient is run once on the held-out data, and once more at the end on the reports, which nothing looks at
    before; what was run in an earlier cook is remembered. Held in memory at a time: one model, its tensors, and the
    running sum of the soup.

    Args:
        benches: The held-out ones first.
        held_out: How many of them are held-out.
        names: The ingredients.
        plan: Of all sources, under the names of the soup: candidates are combined so, with weights of their own.
        paths: For every source, its weight files.
        config_folder: A folder with the soup's ``config.json``.
        device: Where models run.
        head_of: The ingredient whose head all have, where only bodies are averaged.
        leaves: Shares of sources, by number, from those of ingredients, where an ingredient is made of several; else
            each is the source of its number.
        quiet: No progress bar.
        world: The processes that answer together.
        statistics, learn: As in `hf_soup.evaluation.candidates.Candidates`.
    """

    def __init__(
        self,
        benches: Sequence[EvalDataset],
        *,
        held_out: int,
        names: Sequence[str],
        plan: Plan,
        paths: Sequence[Mapping[str, Path]],
        config_folder: Path,
        device: str = "cpu",
        head_of: str | None = None,
        leaves: Callable[..., dict[int, float]] | None = None,
        quiet: bool = False,
        world: ProcessGroup | None = None,
        statistics: BatchStatistics | None = None,
        learn: Callable[..., Plan] | None = None,
    ) -> None:
        self.benches = benches
        self.names = list(names)
        self._leaves = leaves or self._each
        self._judges = benches[:held_out]
        self._whole, self._layout = plan, plan.layout
        self._paths, self._config_folder, self._device = paths, config_folder, device
        config = (config_folder / "config.json").read_bytes()
        self._candidates = Candidates(
            benches, plan.layout, paths, config, device, quiet=quiet, world=world, statistics=statistics, learn=learn
        )
        self._head_of = head_of
        self._logits: dict[tuple[str, str], Logits] = {}
        self._answers: dict[Mix, list[Ints]] = {}
        self._in_order: set[str] = set()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(self, *_: object) -> None:
        self._candidates.close()

    def held_out(
        self,
        weights: Weights,
        *,
        layers: Layers | None = None,
        parameters: Mapping[str, Any] | None = None,
        rows: RowSubset | None = None,
    ) -> float:
        """The held-out score of a soup that is not written; of an ingredient when nothing but one is named.

        Over several held-out benches it is the mean of their metrics, by the recipe's weights.

        Args:
            weights: Share of every ingredient that goes in.
            layers: Shares of tensors that have their own, in that order.
            parameters: Of the method, in place of the recipe's.
            rows: Of each bench those that count; by default all.

        Raises:
            ScoringError: An ingredient answers as if its labels were in another order.
        """
        mix = Mix.of(weights, layers, parameters)
        if mix not in self._answers:
            found = self.logits(weights, layers=layers, parameters=parameters)
            self._answers[mix] = [bench.answers(each) for bench, each in zip(self._judges, found, strict=True)]
        return self._mean_score(self._answers[mix], rows)

    def _mean_score(self, answers: Sequence[Ints], rows: RowSubset | None = None) -> float:
        shares = [bench.scoring.weight for bench in self._judges]
        values = [
            bench.judge(each, rows[number] if rows else None)
            for number, (bench, each) in enumerate(zip(self._judges, answers, strict=True))
        ]
        return math.fsum(share * value for share, value in zip(shares, values, strict=True)) / math.fsum(shares)

    def objective(self, logits: Sequence[Logits]) -> float:
        """The mean of the held-out metrics of a model's answers, by the recipe's weights."""
        return self._mean_score([bench.answers(each) for bench, each in zip(self._judges, logits, strict=True)])

    def random_halves(self, seed: int) -> tuple[RowSubset, RowSubset]:
        """The rows of every held-out bench in two random halves, the same for the same number."""
        generator = np.random.Generator(np.random.Philox(key=seed))
        # The same rows in another metric are in the same half.
        kinds = {bench.fingerprint: generator.permutation(bench.n) for bench in self._judges}
        orders = [kinds[bench.fingerprint] for bench in self._judges]
        return tuple([np.sort(order[len(order) // 2 :]) for order in orders]), tuple(
            [np.sort(order[: len(order) // 2]) for order in orders]
        )

    def logits(
        self, weights: Weights, *, layers: Layers | None = None, parameters: Mapping[str, Any] | None = None
    ) -> list[Logits]:
        """What a soup that is not written, or an ingredient, answers to the held-out benches; as `held_out`.

        Raises:
            ScoringError: An ingredient answers as if its labels were in another order.
        """
        if len(weights) == 1 and not layers and parameters is None:
            return self._alone(next(iter(weights)), self._judges)
        plan = self._plan(weights, layers, parameters)
        found = self._candidates.outputs(plan, self._judges, f"{len(weights)} ingredients")
        return [found[bench.title] for bench in self._judges]

    def release(self) -> None:
        """Let go of the model in memory: another one comes."""
        self._candidates.release()

    def _plan(self, weights: Weights, layers: Layers | None, parameters: Mapping[str, Any] | None) -> Plan:
        """What a soup that is not written is made of."""
        leaves = self._leaves(weights)
        own = {}
        for tensor, shares in (layers or {}).items():
            mine = self._leaves(dict(zip(weights, shares, strict=True)), mean=False)
            own[tensor] = tuple([mine[source] for source in leaves])
        usual = self._whole.mixture
        call = usual.method if parameters is None else MethodCall(usual.method.method, parameters)
        names = {self._layout.names[source]: share for source, share in leaves.items()}
        mixture = replace(usual, weights=names, tensor_weights=own, method=call)
        return replace(self._whole, mixture=mixture)

    def _single(self, name: str) -> Plan:
        """An ingredient, which may be the mean of several leaves."""
        leaves = self._leaves({name: 1.0})
        return Plan(self._layout, Mixture({self._layout.names[source]: share for source, share in leaves.items()}))

    def _each(self, weights: Weights, *, mean: bool = True) -> dict[int, float]:
        return {self.names.index(name): share for name, share in weights.items()}

    def _alone(self, name: str, benches: Sequence[EvalDataset]) -> list[Logits]:
        """What an ingredient answers, once asked."""
        missing = [bench for bench in benches if (name, bench.title) not in self._logits]
        if missing:
            found = self._candidates.outputs(self._single(name), missing, name, alone=True)
            for title, logits in found.items():
                self._logits[name, title] = logits
            # With another's head a model may answer anything, and so may one that does well on its own task's data on
            # those of another; that says nothing of its labels.
            doubts = [bench.doubt_of_order(name, found[bench.title]) for bench in missing]
            if not all(doubts) or self._head_of not in (None, name):
                self._in_order.add(name)
            elif doubts[0] and name not in self._in_order:
                raise doubts[0]
        return [self._logits[name, bench.title] for bench in benches]

    def require_better_than_chance(self, names: Sequence[str]) -> None:
        """Where nobody has learned anything, the order of scores is luck, and so is what is selected by it.

        Raises:
            ScoringError: It is so, or an ingredient answers as if its labels were in another order.
        """
        bench = self._judges[0]
        found = {name: bench.better_than_chance(self._alone(name, self._judges)[0]) for name in names}
        if self._head_of is not None or any(accuracy > chance for accuracy, chance, _ in found.values()):
            return
        name = max(found, key=lambda name: found[name][0] - found[name][1])
        raise ScoringError(
            f"No ingredient is better than chance on '{bench.title}': the best, {name}, answers {found[name][0]:.1%} "
            f"of {bench.n:,} rows correctly, and its answers in random order would get {found[name][1]:.1%}.",
            hint="Are these its inputs and its labels? `select: uniform` averages without looking.",
        )

    def _warnings(self) -> list[str]:
        bench = self.benches[0]
        found = [bench.better_than_chance(self._logits[name, bench.title])[2] for name in self.names]
        if min(found) < 0.05:
            return []
        return [f"No ingredient can be told from chance on '{bench.title}' (n = {bench.n:,}, p >= {min(found):.2g})."]

    def _losses(self, best: Mapping[str, str], comparisons: Mapping[str, Comparison]) -> list[str]:
        """What a soup lost against its best ingredient on the data that it was chosen on."""
        lost = [
            bench.title
            for bench in self._judges
            if comparisons[bench.title].significant and comparisons[bench.title].difference < 0
        ]
        if not lost:
            return []
        soup, single = (self._alone(name, self._judges) for name in (SOUP, best[lost[0]]))
        advice = "In the mean of all held-out data, by their weights, it is not."
        if self.objective(soup) < self.objective(single):
            advice = "Use that one, or another `select` or `method`: greedy keeps no ingredient that hurts the soup."
        return [
            f"The soup is worse on '{title}' than {best[title]} alone: {comparisons[title].sentence}. {advice}"
            for title in lost
        ]

    @contextmanager
    def descent(self, names: Sequence[str], rows: RowSubset | None = None) -> Iterator[Objective]:
        """The held-out loss of soups of some ingredients and its gradient, for a selection that learns."""
        from hf_soup.evaluation.gradients import GroupedObjective, ValidationLoss

        alone = [self._alone(name, self._judges) for name in names]
        self._candidates.release()  # or there would be its model beside the one that learns
        # The loss of the same rows is the same, whatever is measured on them.
        benches: dict[str, EvalDataset] = {}
        for bench in self._judges:
            benches.setdefault(bench.fingerprint, bench)
        made_of = [self._leaves({name: 1.0}, mean=False) for name in names]
        sources = sorted({source for shares in made_of for source in shares})
        loss = ValidationLoss(
            self._layout,
            self._paths,
            {str(source): source for source in sources},
            self._config_folder,
            list(benches.values()),
            [math.fsum(b.scoring.weight for b in self._judges if b.fingerprint == kind) for kind in benches],
            self._device,
        )
        with closing(loss):
            starts = np.cumsum([0, *(bench.n for bench in benches.values())])
            places = [self._judges.index(bench) for bench in benches.values()]
            numbers = None
            if rows is not None:
                numbers = np.concatenate([start + rows[at] for start, at in zip(starts, places, strict=False)])
            groups = [[shares.get(source, 0.0) for source in sources] for shares in made_of]
            answers = [[logits[at] for at in places] for logits in alone]
            yield GroupedObjective(names, loss, groups, answers, numbers)

    def alone(self) -> dict[str, Score]:
        """The scores of the only model, on all benches."""
        logits = self._candidates.outputs(self._single(self.names[0]), self.benches, self.names[0], alone=True)
        return {bench.title: bench.score(logits[bench.title]) for bench in self.benches}

    def finish(
        self,
        folder: Path,
        digest: str,
        weights: Weights,
        points: Sequence[Mapping[str, Any]] = (),
        last: Plan | None = None,
        benches: Sequence[EvalDataset] | None = None,
        config_folder: Path | None = None,
    ) -> EvaluationReport:
        """Score the soup that was written, and every ingredient, on all benches; the reports for the first time.

        Args:
            folder: Where the soup was written.
            digest: Over its tensors.
            weights: Shares of the ingredients in it.
            points: Parameters of the method that were tried with them; they are scored on the reports now.
            last: The last version, of which the soup is an update.
            benches: The same rows, prepared for the soup, where it has another tokenizer than the candidates had.
            config_folder: A folder with the soup's own config, where it is another than the candidates'.
        """
        for name in self.names:
            self._alone(name, self.benches)
        config = (config_folder / "config.json").read_bytes() if config_folder else None
        for title, logits in self._candidates.outputs(
            SavedModel(folder, digest), benches or self.benches, SOUP, config=config
        ).items():
            self._logits[SOUP, title] = logits
        for title, logits in (self._candidates.outputs(last, self.benches, LAST) if last else {}).items():
            self._logits[LAST, title] = logits
        in_ensemble = self._ensembles() if len(self.names) > 1 else ()
        models = list(dict.fromkeys(name for name, _ in self._logits))
        models = [SOUP, *self.names, *(name for name in models if name not in (SOUP, *self.names))]
        scores: dict[str, dict[str, Score]] = {name: {} for name in models}
        calibrated: dict[str, dict[str, CalibrationErrors]] = {name: {} for name in models}
        each = {name: self.objective(self._alone(name, self._judges)) for name in self.names if self._judges}
        judged = max(each, key=lambda name: each[name]) if each else None
        best: dict[str, str] = {}
        comparisons: dict[str, Comparison] = {}
        errors: dict[str, Diversity] = {}
        for bench in self.benches:
            title = bench.title
            for name in models:
                scores[name][title] = bench.score(self._logits[name, title])
                calibrated[name][title] = CalibrationErrors(**calibration(self._logits[name, title], bench.references))
            answers = {name: self._logits[name, title] for name in self.names}
            errors[title] = Diversity(**diversity(answers, bench.references))
            best[title] = judged or max(self.names, key=lambda name: scores[name][title].value)
            comparisons[title] = compare(bench, self._logits[SOUP, title], self._logits[best[title], title])
        ours = {at: logits for (name, at), logits in self._logits.items() if name == SOUP}
        since = {b.title: compare(b, ours[b.title], self._logits[LAST, b.title]) for b in self.benches if last}
        curve = []
        for number, point in enumerate(points):
            plan = self._plan(weights, None, point)
            found = self._candidates.outputs(plan, self.benches, f"point {number + 1} of {len(points)}")
            curve.append({bench.title: bench.score(found[bench.title]) for bench in self.benches})
        notes = (*notes_of(self.benches), *scored_with(self._head_of))
        warnings = (*self._warnings(), *self._losses(best, comparisons))
        return EvaluationReport(
            scores, best, comparisons, since, calibrated, errors, in_ensemble, tuple(curve), notes, warnings
        )

    def _ensembles(self) -> tuple[str, ...]:
        """Work out what ensembles of the ingredients answer; the members of the greedy one."""
        members: tuple[str, ...] = ()
        if self._judges:
            each = {name: self._alone(name, self._judges) for name in self.names}
            members = greedy_ensemble(each, self.objective)
        for bench in self.benches:
            every = {name: self._logits[name, bench.title] for name in self.names}
            self._logits[ENSEMBLE, bench.title] = ensemble(list(every.values()))
            self._logits[LOGIT_ENSEMBLE, bench.title] = logit_ensemble(list(every.values()))
            if members:
                self._logits[GREEDY_ENSEMBLE, bench.title] = logit_ensemble([every[name] for name in members])
        return members


def scored_with(head_of: str | None) -> list[str]:
    """A sentence about scores of models that all have one's head, where it is so."""
    said = "so their scores are those of their bodies under it, not of the models as they were published"
    return [] if head_of is None else [f"Ingredients are scored with {head_of}'s head, {said}."]


def require_memory(layout: Layout, *, learns: bool = False) -> None:
    """Refuse a selection that would not fit into memory, before anything is fetched for it.

    The running sum takes the accumulator's 4 bytes a number for 16-bit weights and 8 for others; the candidate and
    the model that is built of it take what is stored, twice. Learning takes 12: `gradients.needed_bytes`.

    Raises:
        ScoringError: It does not fit.
    """
    need = sum(
        run.elements * ((4 if all(ITEM_BYTES[dtype] == 2 for dtype in run.dtypes) else 8) + 2 * ITEM_BYTES[run.dtype])
        for run in layout.runs
    )
    if learns:
        from hf_soup.evaluation.gradients import needed_bytes

        need = max(need, needed_bytes(layout))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return  # not Linux: nothing says how much is free
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), need)
    if need > free:
        raise ScoringError(
            f"Scoring candidates takes {need / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free.",
            hint="Use `select: uniform` without `score` and `report`, or a larger machine.",
            code="memory",
        )
