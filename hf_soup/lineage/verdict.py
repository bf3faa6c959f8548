"""From declared bases and from weights to a verdict: which base, what was found, and whether it is proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hf_soup._util.text import some
from hf_soup.checkpoint import Checkpoint
from hf_soup.lineage import similarity
from hf_soup.lineage.alignment import AlignedModels
from hf_soup.lineage.comparison import WeightComparison
from hf_soup.lineage.declared_bases import BaseReference, DeclaredBases, shared_base
from hf_soup.lineage.similarity import Similarity
from hf_soup.recipe import Finding

_MOST_BASES = 24  # that are compared, so that cards cannot ask for a thousand requests
_ALIKE = (
    "Bases that began from the same random numbers look alike in this, and only a measured barrier can tell them apart."
)


@dataclass(frozen=True)
class Verdict:
    """What came out of comparing weights with what is declared.

    Args:
        base: Where one is known.
        proven: Whether every ingredient declares it, or the user names it and no card another, and the weights agree.
        evidence: The comparisons.
        reasons: What was found.
    """

    base: BaseReference | None = None
    proven: bool = False
    evidence: tuple[Similarity, ...] = ()
    reasons: tuple[Finding, ...] = ()


def decide_verdict(
    models: AlignedModels,
    declared: Sequence[DeclaredBases],
    named: BaseReference | None,
    candidates: Callable[[], Sequence[Checkpoint]],
    *,
    with_heads: bool,
) -> Verdict:
    """Compare rows of the ingredients with each other and with the bases that somebody names.

    Args:
        models: The ingredients, of one architecture.
        declared: The bases that each declares.
        named: The base that the user names, which counts before all others.
        candidates: Gives models on the Hub that may be the base, where nobody names one that is.
        with_heads: False where labels or shapes were found to differ: what heads were initialised with is then beside
            the point.
    """
    decision = _Decision(models, declared, named, with_heads=with_heads)
    if named is not None:
        decision.compare_cards_with(named)
    else:
        decision.choose_base()
    decision.compare_models()
    if decision.base is None and not any(each.bases for each in decision.declared):
        decision.ask_the_hub(candidates)
    decision.compare_tensors()
    if with_heads:
        decision.find_copies()
    return decision.verdict()


class _Decision:
    """A verdict in the making."""

    def __init__(
        self, models: AlignedModels, declared: Sequence[DeclaredBases], named: BaseReference | None, *, with_heads: bool
    ) -> None:
        self.names, self.declared = models.names, list(declared)
        self.own = [model.checkpoint.model for model in models.ingredients]
        self.reasons: list[Finding] = []
        self.agreed = True  # that it is the base: nothing that is declared or computed casts doubt on it
        self.base = named or shared_base(self.declared, self.own)
        bases = [self.base] if self.base and not named else [named, *(each.nearest for each in self.declared)]
        opened = {base.model: base.checkpoint for base in bases if base and base.checkpoint}
        self.weights = WeightComparison(
            models, list(opened.values())[:_MOST_BASES], needed=named is not None, with_heads=with_heads
        )

    @property
    def refused(self) -> bool:
        """Whether anything that was found forbids to average."""
        return any(reason.refuses for reason in [*self.reasons, *self.weights.reasons])

    def warn(self, code: str, message: str, *who: str) -> None:
        """Something to know."""
        self.reasons.append(Finding(code, message, who))

    def refuse(self, code: str, message: str, *who: str) -> None:
        """Something that forbids to average."""
        self.reasons.append(Finding(code, message, who, refuses=True))

    # ---- which base -------------------------------------------------------------------------------------------

    def compare_cards_with(self, base: BaseReference) -> None:
        """Name those who declare another base than the one that the user names."""
        for name, own, each in zip(self.names, self.own, self.declared, strict=True):
            if each.bases and not each.further and base.model not in (*each.models, own):
                if self.weights.equal([base.model, each.models[0]]):
                    continue  # a copy under another name, as in a folder
                self.agreed = False
                message = f"{name} says that it comes from {each.models[0]}, not from {base.model}."
                self.warn("base-contradicted", message, name)

    def choose_base(self) -> None:
        """The nearest base that all declare, where the weights do not contradict."""
        compared = [next(filter(self.weights.compared, each.models), None) for each in self.declared]
        links = {base: self.weights.links(base) for base in {*compared} if base}
        wrong = {n: base for n, base in enumerate(compared) if base and links[base][n] is False}
        self.declared = [DeclaredBases() if n in wrong else each for n, each in enumerate(self.declared)]
        self.base = shared_base(self.declared, self.own)
        if self.base is None and any(each.bases for each in self.declared):
            self._compare_bases()
        common = self.base.model if self.base else None
        for base in dict.fromkeys(wrong.values()):
            if base != common:  # else it is said that these are not from the base
                self._name_wrong_cards(base, [n for n, theirs in wrong.items() if theirs == base])
        silent = [n for n, each in enumerate(self.declared) if not each.bases and self.own[n] != common]
        self.agreed = not silent
        if common and (numbers := [number for number in silent if number not in wrong]):
            who, verb = [self.names[number] for number in numbers], "names" if len(numbers) == 1 else "name"
            message = f"{some(who)} {verb} no base that can be found{self._missing(numbers)}; the weights decide."
            self.warn("base-undeclared", message, *who)

    def _missing(self, numbers: Iterable[int]) -> str:
        """The bases that some ingredients name and that nobody can find, in brackets."""
        missing = dict.fromkeys(name for number in numbers for name in self.declared[number].missing)
        return f" ({some(list(missing))} {'is' if len(missing) == 1 else 'are'} not there)" if missing else ""

    def _compare_bases(self) -> None:
        """Bases of different names are one where their weights are equal, as those of a mirror are."""
        speaking = [number for number, each in enumerate(self.declared) if each.bases]
        nearest = [self.declared[number].nearest for number in speaking]
        copies = list(dict.fromkeys(base.model for base in nearest if base))
        if all(nearest) and self.weights.equal(copies):
            self.base = nearest[0]
            self.warn("base-copied", f"{some(copies)} are equal in every number that was read: one base.")
            return
        who = [self.names[number] for number in speaking]
        listed = some([f"{self.names[n]} from {self.declared[n].models[0]}{self._near(n)}" for n in speaking], 8)
        if any(self.declared[number].further for number in speaking):
            message = (
                f"The models have no base in common that is at most three steps back: {listed}. What is further is not "
                "looked at, so it is not known. Name the base with --base."
            )
            self.warn("base-unknown", message, *who)
            return
        self.refuse(
            "bases-differ",
            f"The models say that they come from different bases: {listed}. Weights that look alike do not show that "
            "they are one, as bases that began from the same random numbers do so too. If the cards are wrong, name "
            "the right one with --base.",
            *who,
        )

    def _near(self, number: int) -> str:
        """How near an ingredient is to the nearest base that it declares, in brackets."""
        base = self.declared[number].nearest
        return f" ({self.weights.cosines([number], base.model)})" if base and self.weights.compared(base.model) else ""

    def _name_wrong_cards(self, base: str, numbers: Sequence[int]) -> None:
        who = [self.names[number] for number in numbers]
        self.warn(
            "card-wrong",
            f"{some(who)} {'says' if len(who) == 1 else 'say'} to come from {base}, but the weights have nothing in "
            f"common with it ({self.weights.cosines(numbers, base)}). The weights count.",
            *who,
        )

    # ---- what the weights say ---------------------------------------------------------------------------------

    def compare_models(self) -> None:
        """Are all related to the base, and to each other?"""
        bodies, base = self.weights.bodies, self.base
        if base is not None and base.checkpoint is None:
            why = base.error.message if base.error else "unknown"
            self.warn("base-unreadable", f"The base {base.model} cannot be compared: {why}")
        elif base is not None and base.checkpoint is not None:
            self.weights.add([base.checkpoint])
        links = self.weights.links(base.model) if base else []
        outside = [number for number, link in enumerate(links) if link is False]
        if base is not None and any(links) and outside:
            who = [self.names[number] for number in outside]
            self.refuse(
                "not-from-base",
                f"{some(who)}: the weights have nothing in common with those of the base, {base.model} "
                f"({self.weights.cosines(outside, base.model)}). Leave {'it' if len(who) == 1 else 'them'} out.",
                *who,
            )
        elif found := similarity.unrelated(bodies, self.names):
            self.reasons += found
        elif base is not None and links and len(outside) == len(links):
            subject = "The models are related to each other, but" if len(links) > 1 else f"{self.names[0]}:"
            self.refuse(
                "base-wrong",
                f"{subject} {base.model} is not their base: their weights have nothing in common with it "
                f"({self.weights.cosines(outside, base.model)}). Name the right base with --base.",
                *self.names,
            )
        else:
            self.reasons += similarity.drifted(bodies, self.names)

    def ask_the_hub(self, candidates: Callable[[], Sequence[Checkpoint]]) -> None:
        """Nobody declares a base that holds: the most used models of the kind may be it."""
        if self.refused:
            return
        tried = candidates()
        nearest = self.weights.nearest(tried)
        nobody = f"No card or config names a base that holds{self._missing(range(len(self.names)))}"
        if nearest is None:
            among = f", and none of the {len(tried)} that were tried on the Hub is one" if tried else ""
            message = f"{nobody}{among}, so only the weights speak. {_ALIKE} Name it with --base."
            self.warn("base-unknown", message, *self.names)
            return
        self.base = BaseReference(nearest.model, "weights", nearest)
        self.warn(
            "base-inferred",
            f"{nobody}; of {len(tried)} models on the Hub that were tried the weights agree with "
            f"{nearest.model}'s ({self.weights.cosines(range(len(self.names)), nearest.model)}). {_ALIKE}",
            *self.names,
        )

    def compare_tensors(self) -> None:
        """Single tensors and heads, and whether the base is the nearest one."""
        bodies, heads, names = self.weights.bodies, self.weights.heads, self.names
        model = self.base.model if self.base and self.weights.compared(self.base.model) else None
        place = self.weights.place(model) if model else None
        if not self.refused:
            self.reasons += similarity.unrelated_tensors(bodies, names, place)
        if place is not None:
            self.reasons += similarity.equal_to_base(bodies, names, place)
        if not self.refused:
            self.reasons += similarity.unrelated_heads(heads, names) if heads is not None else []
            doubts = [] if place is None else list(similarity.doubts_about_base(bodies, names, place))
            self.reasons += doubts
            self.agreed = self.agreed and not doubts

    def find_copies(self) -> None:
        """Ingredients that are equal, heads included."""
        count, heads = len(self.names), self.weights.heads
        same = self.weights.bodies.same[:count, :count]
        self.reasons += similarity.identical(same if heads is None else same & heads.same, self.names)

    def verdict(self) -> Verdict:
        """What came out."""
        base, weights = self.base, self.weights
        links = weights.links(base.model) if base else [None]
        proven = base is not None and base.declared and all(links) and self.agreed and not self.refused
        evidence = (weights.bodies, *([weights.heads] if weights.heads is not None else []))
        return Verdict(base, proven, evidence, (*weights.reasons, *self.reasons))
