"""What weights say about where models come from, beside what cards say; where the two disagree, weights win."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hf_soup._util.text import some
from hf_soup.checkpoint import Checkpoint
from hf_soup.lineage import similarity
from hf_soup.lineage.alignment import AlignedModels
from hf_soup.lineage.comparison import WeightComparison
from hf_soup.lineage.declared_bases import BaseReference, DeclaredBases
from hf_soup.lineage.similarity import Similarity
from hf_soup.recipe import Finding

_ANCESTORS = 24  # of different ancestors that cards name, so that they cannot ask for a thousand requests


@dataclass(frozen=True)
class Verdict:
    """What came out of comparing weights with what is said about them.

    Args:
        ancestor: Where one is known.
        proven: Whether every ingredient says that it comes from it, and the weights of each agree.
        evidence: The comparisons.
        reasons: What was found.
    """

    ancestor: BaseReference | None
    proven: bool
    evidence: tuple[Similarity, ...]
    reasons: tuple[Finding, ...]


def decide_verdict(
    models: AlignedModels,
    claims: DeclaredBases,
    seek: Callable[[], Sequence[Checkpoint]],
    *,
    comparable: bool = True,
    heads_correspond: bool = True,
) -> Verdict:
    """Compare rows of the ingredients with each other and with those that they may come from.

    Args:
        models: The ingredients.
        claims: Where they say that they come from.
        seek: Gives models on the Hub that may be their ancestor, where nobody names one that is.
        comparable: False where they are different architectures, so that only what they say can be judged.
        heads_correspond: False where labels or shapes were found to differ: what heads were initialised with is then
            beside the point.
    """
    court = _Decision(models, claims, seek)
    if comparable:
        court.look_at_weights(heads_correspond=heads_correspond)
    court.name_ancestor()
    weights = court.weights
    evidence = tuple(each for each in (weights.bodies, weights.heads) if each is not None) if weights else ()
    reasons = (*(weights.reasons if weights else ()), *court.reasons)
    return Verdict(court.ancestor, court.proven and not court.refused, evidence, reasons)


class _Decision:
    """A judgement in the making."""

    def __init__(self, models: AlignedModels, claims: DeclaredBases, seek: Callable[[], Sequence[Checkpoint]]) -> None:
        self.models, self.claims, self.seek = models, claims, seek
        self.names, self.count = models.names, len(models.ingredients)
        self.weights: WeightComparison | None = None
        self.reasons: list[Finding] = []
        self.ancestor: BaseReference | None = None
        self.proven = False
        self.tried = 0

    @property
    def refused(self) -> bool:
        """Whether the weights or what is said forbid to average."""
        found = [*self.reasons, *(self.weights.reasons if self.weights else ())]
        return any(reason.refuses for reason in found)

    def look_at_weights(self, *, heads_correspond: bool) -> None:
        """The ingredients with each other, and with those whom somebody names."""
        claims = self.claims
        if claims.base is not None:
            ancestors: list[Checkpoint] = [claims.base]
        elif claims.shared:
            ancestors = [ancestor] if (ancestor := self._readable(claims)) else []
        else:
            nearest = [claims.nearest(number) for number in range(self.count)]
            ancestors = [seen.checkpoint for seen in nearest if seen and seen.checkpoint]
        distinct = list({each.model: each for each in ancestors}.values())[:_ANCESTORS]
        self.weights = WeightComparison(
            self.models,
            distinct,
            needed=claims.base is not None,
            agreed=claims.base is not None or bool(claims.shared),
            heads_correspond=heads_correspond,
        )

    def _readable(self, claims: DeclaredBases) -> Checkpoint | None:
        """The nearest ancestor that all have and whose weights can be read."""
        return next((seen.checkpoint for name in claims.shared if (seen := claims.look(name)).checkpoint), None)

    def _links(self, ancestor: str) -> Sequence[bool | None]:
        """Whether each ingredient is kin to an ancestor."""
        return self.weights.links(ancestor) if self.weights else [None] * self.count

    # ---- against what is said ---------------------------------------------------------------------------------

    def name_ancestor(self) -> None:
        """Who the ancestor is, by what is said and by the weights."""
        claims = self.claims
        if claims.base is not None:
            self._as_the_user_says(claims.base)
        elif claims.shared:
            self._as_cards_say(claims)
        elif any(claims.chains):
            self._as_cards_differ()
        else:
            self._seek()
        weights, model = self.weights, self.ancestor.model if self.ancestor else ""
        if weights is None:
            return
        known = model in weights.ancestors and model not in weights.unread
        if not self.refused:
            found = similarity.parts_apart(
                weights.bodies, self.names, weights.place(model) if known else None, named=bool(model)
            )
            self.proven = self.proven and not any(each.code == "base-tensors-unrelated" for each in found)
            self.reasons += found
        if not self.refused and weights.heads is not None:
            self.reasons += similarity.heads_apart(weights.heads, self.names)
        if known:
            self._doubt(weights, model)
            self._equal_to(weights, model)

    def _as_the_user_says(self, base: Checkpoint) -> None:
        self.ancestor = BaseReference(base.model, "recipe", base)
        contradicted = []
        for number, chain in enumerate(self.claims.chains):
            if chain and base.model not in (*chain, self.models.ingredients[number].checkpoint.model):
                contradicted.append(number)
                message = f"{self.names[number]} says that it comes from {chain[0]}, not from {base.model}"
                self.warn("base-contradicted", f"{message}{self._decide}", self.names[number])
        links = self._links(base.model)
        if all(link is False for link in links):
            self._wrong_base(base.model, "recipe")
        else:
            self._outsiders(base.model, links)
        self.proven = all(links) and not contradicted and not self.refused

    def _as_cards_say(self, claims: DeclaredBases, liars: Collection[int] = ()) -> None:
        ancestor = self._readable(claims)
        if who := [self.names[number] for number in claims.silent if number not in (*liars, *claims.lost)]:
            message = (
                f"{some(who)} {'names' if len(who) == 1 else 'name'} no ancestor that could be found{self._decide}"
            )
            self.warn("base-undeclared", message, *who)
        if ancestor is None:
            name = claims.shared[0]
            seen = claims.look(name)
            error = seen.error
            self.ancestor = BaseReference(name, "card", stated=seen.card)
            message = f"The ancestor {name} cannot be compared: {error.message if error else 'unknown'}"
            self.warn("base-unreadable", message)
            return
        model = ancestor.model
        if self.weights:
            self.weights.add([ancestor])
        links = self._links(model)
        if all(link is False for link in links) and not self.refused:
            found = self._nearest_on_hub()
            if found is None or self.weights is None:
                self.ancestor = BaseReference(model, "card", ancestor)
                self._wrong_base(model, "card")
                return
            self.ancestor = BaseReference(found.model, "weights", found)
            self.warn(
                "card-wrong",
                f"The cards say that the models come from {model}, but their weights have nothing in common with it "
                f"({self.weights.range(model)}); they agree with {found.model}'s ({self.weights.range(found.model)}). "
                "The weights count.",
                *self.names,
            )
            return
        self.ancestor = BaseReference(model, "card", ancestor)
        self._outsiders(model, links)
        self.proven = all(links) and not claims.silent and not claims.loops and not self.refused

    def _as_cards_differ(self) -> None:
        """Whose card is contradicted by the weights does not count; the others have to agree."""
        claims = self.claims
        liars = {}
        for number in range(self.count):
            nearest = claims.nearest(number)
            ancestor = nearest.checkpoint.model if nearest and nearest.checkpoint else None
            if ancestor and self._links(ancestor)[number] is False:
                liars[number] = ancestor
        rest = claims.without(liars, [checkpoint.model for checkpoint in self.models.checkpoints])
        shared = rest.shared or self._copies_of_one(rest)
        for number, ancestor in liars.items():
            assert self.weights, "they say who lies"
            whose = [name for name in self.weights.ancestors if self._links(name)[number]]
            message = (
                f"{self.names[number]} says that it comes from {ancestor}, but its weights have nothing in common with "
                f"it ({self.weights.near(number, ancestor)}). "
            )
            if whose:
                near = max(whose, key=partial(self.weights.cosine, number))
                message += f"They agree with {near}'s ({self.weights.near(number, near)}), and the weights count."
            self.warn("card-wrong", message.rstrip(), self.names[number])
        if shared:
            self._as_cards_say(replace(rest, shared=shared), liars)
            self.proven = self.proven and not liars
        elif not any(rest.chains):
            self._seek()
        else:
            speaking = [number for number, chain in enumerate(rest.chains) if chain]
            who = [self.names[number] for number in speaking]
            numbers = self.weights.numbers if self.weights else lambda number: ""
            lines = some([f"{self.names[n]} from {rest.chains[n][0]}{numbers(n)}" for n in speaking], 8)
            if claims.offline and not all(claims.look(rest.chains[number][0]).found for number in speaking):
                # One ancestor may have two names, and only the Hub knows.
                message = f"The Hub was not reached, so it is not known whether these are one ancestor: {lines}."
                self.warn("base-unreadable", message, *who)
                return
            self.refuse(
                "bases-differ",
                f"The models say that they come from different ancestors: {lines}. Weights that look alike do not show "
                "that they are one, as ancestors that began from the same random numbers do so too. If the cards are "
                "wrong, name the right one with --base.",
                *who,
            )

    def _copies_of_one(self, claims: DeclaredBases) -> tuple[str, ...]:
        """The first of the ancestors that are named, where they are one model under several names, as mirrors are."""
        nearest = [claims.nearest(number) for number, chain in enumerate(claims.chains) if chain]
        named = list(dict.fromkeys(seen.checkpoint.model for seen in nearest if seen and seen.checkpoint))
        weights = self.weights
        if weights is None or not named or not all(nearest) or not set(named) <= weights.ancestors.keys():
            return ()
        places = [weights.place(name) for name in named]
        if weights.unread.intersection(named) or not all(weights.bodies.same[places[0], place] for place in places):
            return ()
        self.warn("base-copied", f"{some(named)} are equal in every number that was read: one ancestor.")
        return (named[0],)

    def _seek(self) -> None:
        """Nobody says anything that holds."""
        found = None if self.refused else self._nearest_on_hub()
        same = (
            "Ancestors that began from the same random numbers look alike in this, and only a measured barrier "
            "(`check --recipe RECIPE --barrier`) can tell them apart."
        )
        said = "No card or config names an ancestor"
        if any(self.claims.chains):
            said += " that the weights agree with"
        if self.weights is None or self.refused:
            self.warn("base-unknown", f"{said}.", *self.names)
            return
        if found is None:
            tried = f", and none of the {self.tried} that were tried on the Hub is one" if self.tried else ""
            message = f"{said}{tried}, so only the weights speak. {same} Name it with --base."
            self.warn("base-unknown", message, *self.names)
            return
        self.ancestor = BaseReference(found.model, "weights", found)
        self.warn(
            "base-inferred",
            f"{said}; of {self.tried} models on the Hub that were tried the weights agree with {found.model}'s "
            f"({self.weights.range(found.model)}). {same}",
            *self.names,
        )

    def _nearest_on_hub(self) -> Checkpoint | None:
        """Whom all ingredients are kin to, and nearest."""
        weights = self.weights
        if weights is None:
            return None
        candidates = [each for each in self.seek() if each.model not in weights.ancestors]
        self.tried = len(candidates)
        weights.add(candidates, tried=True)
        kin = [each for each in candidates if all(self._links(each.model))]
        lowest = {each.model: min(weights.cosine(number, each.model) for number in range(self.count)) for each in kin}
        nearest = max(kin, key=lambda each: lowest[each.model], default=None)
        weights.drop([each.model for each in candidates if each is not nearest])
        return nearest

    def _wrong_base(self, model: str, source: str) -> None:
        if self.refused or self.weights is None:
            return
        who = "The models are siblings, but" if self.count > 1 else f"{self.names[0]}:"
        self.refuse(
            "base-wrong",
            f"{who} {model} is not their ancestor: their weights have nothing in common with it "
            f"({self.weights.range(model)}). {'The card is wrong; name' if source == 'card' else 'Name'} the right "
            "base with --base.",
            *self.names,
        )

    def _outsiders(self, model: str, links: Sequence[bool | None]) -> None:
        if self.weights is None:
            return
        who = [number for number, link in enumerate(links) if link is False]
        if who:
            shown = some([f"{self.names[number]} ({self.weights.near(number, model)})" for number in who])
            self.refuse(
                "not-from-base",
                f"{shown}: the weights have nothing in common with those of the ancestor, {model}. Leave "
                f"{'it' if len(who) == 1 else 'them'} out.",
                *[self.names[number] for number in who],
            )
        unknown = [self.names[number] for number, link in enumerate(links) if link is None]
        if unknown and model not in self.weights.unread:
            message = f"{model} shares no tensor with {some(unknown)} that could be compared."
            self.warn("base-unreadable", message, *unknown)

    def _doubt(self, weights: WeightComparison, model: str) -> None:
        moved = weights.bodies.moved(range(self.count), weights.place(model))
        if moved and moved[0] > similarity.WRONG_BASE and moved[1] > similarity.FAR_FROM_BASE and not self.refused:
            self.proven = False
            self.warn(
                "base-doubtful",
                f"Measured from {model} the models all moved far ({moved[1]:.0%} of its size) and the same way (cosine "
                f"{moved[0]:.2f} or more): they share a later ancestor, or this is not theirs.",
                *self.names,
            )

    def _equal_to(self, weights: WeightComparison, model: str) -> None:
        place = weights.place(model)
        equal = [self.names[number] for number in range(self.count) if weights.bodies.same[number, place]]
        if equal:
            message = (
                f"{some(equal)}: the body is equal to {model}'s in every number that was read, so it is the ancestor "
                "itself, or only its head was trained. It counts like every other and draws the soup back."
            )
            self.warn("identical", message, *equal)

    @property
    def _decide(self) -> str:
        return "." if self.weights is None else "; the weights decide."

    def warn(self, code: str, message: str, *who: str) -> None:
        """Something to know."""
        self.reasons.append(Finding(code, message, who))

    def refuse(self, code: str, message: str, *who: str) -> None:
        """Something that forbids to average."""
        self.reasons.append(Finding(code, message, who, refuses=True))
