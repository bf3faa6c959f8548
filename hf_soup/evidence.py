"""What weights say about where models come from, beside what cards say; where the two disagree, weights win."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hf_soup import kinship, parameters, siblings
from hf_soup.alignment import Alignment, head_tensors
from hf_soup.ancestry import Ancestor, Claims
from hf_soup.checkpoint import Checkpoint
from hf_soup.compatibility import Reason, some
from hf_soup.errors import IncompatibleError
from hf_soup.headers import FLOATS, ITEM_BYTES, TensorInfo
from hf_soup.kinship import Kinship

_FOUNDERS = 6  # of different ancestors that cards name, so that they cannot ask for a thousand requests


@dataclass(frozen=True)
class Judgement:
    """What came out of comparing weights with what is said about them.

    Args:
        ancestor: Where one is known.
        proven: Whether every ingredient says that it comes from it, and the weights of each agree.
        evidence: The comparisons.
        reasons: What was found.
    """

    ancestor: Ancestor | None
    proven: bool
    evidence: tuple[Kinship, ...]
    reasons: tuple[Reason, ...]


def judge(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    alignment: Alignment,
    claims: Claims,
    seek: Callable[[], Sequence[Checkpoint]],
    *,
    comparable: bool = True,
    heads_correspond: bool = True,
) -> Judgement:
    """Compare rows of the ingredients with each other and with those that they may come from.

    Args:
        checkpoints: The ingredients.
        names: What they are called.
        alignment: Their tensors.
        claims: Where they say that they come from.
        seek: Gives models on the Hub that may be their ancestor, where nobody names one that is.
        comparable: False where they are different architectures, so that only what they say can be judged.
        heads_correspond: False where labels or shapes were found to differ: what heads were initialised with is then
            beside the point.
    """
    court = _Court(checkpoints, names, alignment, claims, seek)
    if comparable:
        court.look_at_ingredients(heads_correspond)
    court.name_ancestor()
    evidence = tuple(each for each in (court.bodies, court.heads) if each is not None)
    return Judgement(court.ancestor, court.proven, evidence, tuple(court.reasons))


class _Court:
    """A judgement in the making."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        names: Sequence[str],
        alignment: Alignment,
        claims: Claims,
        seek: Callable[[], Sequence[Checkpoint]],
    ) -> None:
        self.checkpoints, self.names, self.claims, self.seek = checkpoints, names, claims, seek
        self.count = len(checkpoints)
        self.reasons: list[Reason] = []
        self.ancestor: Ancestor | None = None
        self.proven = self.refused = False
        self.tensors, self.patched, self.untied = alignment.tensors, alignment.patched, alignment.untied
        self.donor, self.whose = checkpoints[alignment.donor], names[alignment.donor]
        self.first = self.tensors[alignment.donor]
        self.bodies: Kinship | None = None
        self.heads: Kinship | None = None
        self.body: dict[str, tuple[int, ...]] = {}
        self.picks: list[kinship.Pick] = []
        self.sampled: list[Mapping[str, kinship.Array]] = []
        self.founders: dict[str, Checkpoint] = {}

    # ---- weights ----------------------------------------------------------------------------------------------

    def look_at_ingredients(self, heads_correspond: bool) -> None:
        """The ingredients with each other."""
        # Where embeddings are tied in some, only the others store what predicts tokens by itself.
        kinds = zip(self.checkpoints, self.names, self.tensors, strict=True)
        every = kinds if self.untied else [(self.donor, self.whose, self.first)]
        in_head: set[str] = set()
        for checkpoint, called, tensors in every:
            own = head_tensors(checkpoint, called)
            in_head |= {output for output, info in tensors.items() if info.name in own}
        others = [set(each) for each in self.tensors if each is not self.first]
        common = set(self.first).intersection(*others)
        shapes = {name: info.shape for name, info in self.first.items() if name in common}
        self.body = {name: shape for name, shape in shapes.items() if name not in in_head}
        # Those that can be compared are sampled with the ingredients, so that all requests go out together.
        named = {model: (founder, self._as_named(founder)) for model, founder in self._founders().items()}
        self.founders = {model: founder for model, (founder, _) in named.items()}
        wanted = [*zip(self.checkpoints, self.tensors, strict=True), *named.values()]
        stored = {info.dtype for mine in self.tensors for info in mine.values()}
        item = max((ITEM_BYTES[dtype] for dtype in stored if dtype in FLOATS), default=4)
        self.picks = kinship.choose(self.body, models=len(wanted), item=item)
        head = {name: shape for name, shape in shapes.items() if name not in self.body}
        of_head = kinship.choose(head, kinship.HEAD, models=len(wanted), item=item) if heads_correspond else []
        samples = kinship.sample(wanted, [*self.picks, *of_head], kinship.BODY + kinship.HEAD)
        picked = {pick.name for pick in self.picks}
        self.sampled = [{name: rows for name, rows in each.items() if name in picked} for each in samples]
        self.bodies = kinship.compare(self.sampled, [*self.names, *self.founders], "body")
        mine = samples[: self.count]
        if heads_correspond:
            pins = [(checkpoint.model, checkpoint.identity) for checkpoint in self.checkpoints]
            self.reasons += siblings.copies(kinship.compare(mine, self.names, "all"), self.names, pins)
        self.reasons += siblings.strangers(self.bodies, self.names)
        self.reasons += siblings.parts_apart(self.bodies, self.names, len(self.founders))
        if of_head and not any(reason.refuses for reason in self.reasons):
            heads = [{name: rows for name, rows in each.items() if name not in picked} for each in mine]
            self.heads = kinship.compare(heads, self.names, "head")
            self.reasons += siblings.heads_apart(self.heads, self.names)
        self.refused = any(reason.refuses for reason in self.reasons)

    def _founders(self) -> dict[str, Checkpoint]:
        """Models that somebody names as an ancestor and whose weights can be compared, by name."""
        claims = self.claims
        if claims.base is not None:
            return {claims.base.model: claims.base}
        if claims.shared:
            first = self._readable(claims)
            return {first.model: first} if first else {}
        nearest = [claims.nearest(number) for number in range(self.count)]
        found = {seen.checkpoint.model: seen.checkpoint for seen in nearest if seen and seen.checkpoint}
        return dict(list(found.items())[:_FOUNDERS])

    def _readable(self, claims: Claims) -> Checkpoint | None:
        """The nearest ancestor that all have and whose weights can be read."""
        return next((seen.checkpoint for name in claims.shared if (seen := claims.look(name)).checkpoint), None)

    def _as_named(self, founder: Checkpoint, *, tried: bool = False) -> Mapping[str, TensorInfo]:
        """A founder's tensors under the soup's names, where they correspond; none where that cannot be found out."""
        donor = self.donor
        found: Mapping[str, TensorInfo] = founder.tensors
        if not self.body.keys() <= founder.tensors.keys():
            try:
                by_key = self._by_key(founder)
                ours = self._by_key(donor)
            except IncompatibleError as error:
                if not tried:
                    self.warn("ancestor-unreadable", f"{founder.model} cannot be compared: {error.message}")
                return {}
            at = {info.name: name for name, info in self.first.items() if name in self.body}
            found = {at[info.name]: by_key[key] for key, info in ours.items() if key in by_key and info.name in at}
        return {
            name: info
            for name, shape in self.body.items()
            # Of a vocabulary that grew, the rows that both have.
            if (info := found.get(name))
            and info.shape[1:] == shape[1:]
            and (info.shape == shape or name in self.patched)
        }

    def _by_key(self, checkpoint: Checkpoint) -> dict[str, TensorInfo]:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        found = parameters.correspondence(self.donor.config, shapes, checkpoint.model)
        return {key: checkpoint.tensors[disk] for disk, key in found.parameters.items()}

    def _add(self, founders: Sequence[Checkpoint], *, tried: bool = False) -> None:
        """Compare with more of them, which are only ``tried`` where nobody names them."""
        fresh = {each.model: each for each in founders if each.model not in self.founders}
        named = [(each, self._as_named(each, tried=tried)) for each in fresh.values()]
        self.sampled += kinship.sample(named, self.picks)
        self.founders |= fresh
        self.bodies = kinship.compare(self.sampled, [*self.names, *self.founders], "body")

    def _place(self, founder: str) -> int:
        return self.count + list(self.founders).index(founder)

    def _links(self, founder: str) -> list[bool | None]:
        """Whether each ingredient is kin to a founder."""
        if self.bodies is None or founder not in self.founders:
            return [None] * self.count
        return [self.bodies.kin(number, self._place(founder)) for number in range(self.count)]

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
        if self.ancestor and self.ancestor.model in self.founders and self.bodies is not None:
            self._doubt(self.ancestor.model)
            self._equal_to(self.ancestor.model)

    def _as_the_user_says(self, base: Checkpoint) -> None:
        self.ancestor = Ancestor(base.model, "recipe", base)
        contradicted = []
        for number, chain in enumerate(self.claims.chains):
            if chain and base.model not in (*chain, self.checkpoints[number].model):
                contradicted.append(number)
                message = f"{self.names[number]} says that it comes from {chain[0]}, not from {base.model}"
                self.warn("base-contradicted", f"{message}; its weights decide.", self.names[number])
        links = self._links(base.model)
        if all(link is False for link in links):
            self._wrong_base(base.model, "recipe")
        else:
            self._outsiders(base.model, links)
        self.proven = all(links) and not contradicted

    def _as_cards_say(self, claims: Claims, liars: Collection[int] = ()) -> None:
        founder = self._readable(claims)
        if who := [self.names[number] for number in claims.silent if number not in liars]:
            message = f"{some(who)} {'names' if len(who) == 1 else 'name'} no ancestor; the weights decide."
            self.warn("ancestor-undeclared", message, *who)
        if founder is None:
            name = claims.shared[0]
            error = claims.look(name).error
            self.ancestor = Ancestor(name, "card")
            message = f"The ancestor {name} cannot be compared: {error.message if error else 'unknown'}"
            self.warn("ancestor-unreadable", message)
            return
        model = founder.model
        if self.bodies is not None:
            self._add([founder])
        links = self._links(model)
        if all(link is False for link in links) and not self.refused:
            found = self._nearest_on_hub()
            if found is None:
                self.ancestor = Ancestor(model, "card", founder)
                self._wrong_base(model, "card")
                return
            self.ancestor = Ancestor(found.model, "weights", found)
            self.warn(
                "card-wrong",
                f"The cards say that the models come from {model}, but their weights have nothing in common with it; "
                f"they agree with {found.model}'s ({self._range(found.model)}). The weights count.",
                *self.names,
            )
            return
        self.ancestor = Ancestor(model, "card", founder)
        self._outsiders(model, links)
        self.proven = all(links) and not claims.silent

    def _as_cards_differ(self) -> None:
        """Whose card is contradicted by the weights does not count; the others have to agree."""
        claims = self.claims
        liars = {}
        for number in range(self.count):
            nearest = claims.nearest(number)
            founder = nearest.checkpoint.model if nearest and nearest.checkpoint else None
            if founder and self._links(founder)[number] is False:
                liars[number] = founder
        rest = claims.without(liars, [checkpoint.model for checkpoint in self.checkpoints])
        agreed = bool(rest.shared) or self._copies_of_one(rest)
        for number, founder in liars.items():
            whose = [name for name in self.founders if self._links(name)[number]]
            message = (
                f"{self.names[number]} says that it comes from {founder}, but its weights have nothing in common with "
                f"it (cosine {self.cosine(number, founder):.3f}). "
            )
            if whose:
                near = max(whose, key=lambda name: self.cosine(number, name))
                message += f"They agree with {near}'s ({self.cosine(number, near):.3f}), and the weights count."
            self.warn("card-wrong", message.rstrip(), self.names[number])
        if agreed:
            rest = rest if rest.shared else replace(rest, shared=(self._first_founder(rest),))
            self._as_cards_say(rest, liars)
            self.proven = self.proven and not liars
        elif not any(rest.chains):
            self._seek()
        else:
            speaking = [number for number, chain in enumerate(rest.chains) if chain]
            who = [self.names[number] for number in speaking]
            lines = some([f"{self.names[number]} from {rest.chains[number][0]}" for number in speaking], 12)
            if claims.offline and not all(claims.look(rest.chains[number][0]).found for number in speaking):
                # One ancestor may have two names, and only the Hub knows.
                message = f"The Hub was not reached, so it is not known whether these are one ancestor: {lines}."
                self.warn("ancestor-unreadable", message, *who)
                return
            self.refuse(
                "ancestors-differ",
                f"The models say that they come from different ancestors: {lines}. Weights that look alike do not show "
                "that they are one, as ancestors that began from the same random numbers do so too. If the cards are "
                "wrong, name the right one with --base.",
                *who,
            )

    def _first_founder(self, claims: Claims) -> str:
        nearest = (claims.nearest(number) for number in range(self.count))
        return next(seen.name for seen in nearest if seen)

    def _copies_of_one(self, claims: Claims) -> bool:
        """Whether the ancestors that are named are one model under several names, as mirrors are."""
        nearest = [claims.nearest(number) for number, chain in enumerate(claims.chains) if chain]
        named = list(dict.fromkeys(seen.checkpoint.model for seen in nearest if seen and seen.checkpoint))
        if self.bodies is None or not named or not all(nearest) or not set(named) <= self.founders.keys():
            return False
        places = [self._place(name) for name in named]
        if not all(self.bodies.same[places[0], place] for place in places):
            return False
        self.warn("ancestor-copied", f"{some(named)} are equal in every number that was read: one ancestor.")
        return True

    def _seek(self) -> None:
        """Nobody says anything that holds."""
        found = self._nearest_on_hub() if self.bodies is not None and not self.refused else None
        same = "Ancestors that began from the same random numbers look alike in this, and only a measured barrier "
        same += "(`check --recipe RECIPE --barrier`) can tell them apart."
        if found is None and self.refused:
            self.warn("ancestor-unknown", "No card or config names an ancestor.", *self.names)
            return
        if found is None:
            self.warn(
                "ancestor-unknown",
                f"No card or config names an ancestor, so only the weights speak. {same} Name it with --base.",
                *self.names,
            )
            return
        self.ancestor = Ancestor(found.model, "weights", found)
        self.warn(
            "ancestor-found",
            f"No card or config names an ancestor; of the models on the Hub the weights agree with {found.model}'s "
            f"({self._range(found.model)}). {same}",
            *self.names,
        )

    def _nearest_on_hub(self) -> Checkpoint | None:
        """Whom all ingredients are kin to, and nearest."""
        if self.bodies is None:
            return None
        candidates = [each for each in self.seek() if each.model not in self.founders]
        self._add(candidates, tried=True)
        kin = [each for each in candidates if all(self._links(each.model))]
        others = [each.model for each in candidates if each not in kin]
        nearest = max(kin, key=lambda each: self._lowest(each.model), default=None)
        others += [each.model for each in kin if each is not nearest]
        # Those that were only tried are no evidence.
        keep = [*range(self.count), *(self._place(name) for name in self.founders if name not in others)]
        self.sampled = [self.sampled[place] for place in keep]
        self.founders = {name: each for name, each in self.founders.items() if name not in others}
        self.bodies = kinship.compare(self.sampled, [*self.names, *self.founders], "body")
        return nearest

    def _wrong_base(self, model: str, source: str) -> None:
        if self.refused:
            return
        who = "The models are siblings, but" if self.count > 1 else f"{self.names[0]}:"
        self.refuse(
            "base-wrong",
            f"{who} {model} is not their ancestor: their weights have nothing in common with it "
            f"({self._range(model)}). The {source} is wrong; name the right base with --base.",
            *self.names,
        )

    def _outsiders(self, model: str, links: Sequence[bool | None]) -> None:
        who = [number for number, link in enumerate(links) if link is False]
        if who:
            shown = some([f"{self.names[number]} (cosine {self.cosine(number, model):.3f})" for number in who])
            message = f"{shown}: the weights have nothing in common with those of the ancestor, {model}. Leave "
            message += "it out." if len(who) == 1 else "them out."
            self.refuse("not-from-base", message, *[self.names[number] for number in who])
        unknown = [self.names[number] for number, link in enumerate(links) if link is None]
        if unknown and self.bodies is not None:
            message = f"{model} shares no tensor with {some(unknown)} that could be compared."
            self.warn("ancestor-unreadable", message, *unknown)

    def _doubt(self, model: str) -> None:
        assert self.bodies is not None
        moved = self.bodies.moved(range(self.count), self._place(model))
        if moved and moved[0] > kinship.WRONG_BASE and moved[1] > kinship.FAR_FROM_BASE and not self.refused:
            self.proven = False
            self.warn(
                "base-doubtful",
                f"Measured from {model} the models all moved far ({moved[1]:.0%} of its size) and the same way (cosine "
                f"{moved[0]:.2f} or more): they share a later ancestor, or this is not theirs.",
                *self.names,
            )

    def _equal_to(self, model: str) -> None:
        assert self.bodies is not None
        place = self._place(model)
        equal = [self.names[number] for number in range(self.count) if self.bodies.same[number, place]]
        if equal:
            message = (
                f"{some(equal)}: the body is equal to {model}'s in every number that was read, so it is the ancestor "
                "itself, or only its head was trained. It counts like every other and draws the soup back."
            )
            self.warn("identical", message, *equal)

    def cosine(self, number: int, founder: str) -> float:
        """Of an ingredient and a founder."""
        assert self.bodies is not None
        return float(self.bodies.cosines[number, self._place(founder)])

    def _lowest(self, founder: str) -> float:
        return min(self.cosine(number, founder) for number in range(self.count))

    def _range(self, founder: str) -> str:
        found = [self.cosine(number, founder) for number in range(self.count)]
        low, high = min(found), max(found)
        return f"cosine {low:.3f}" if len(found) == 1 else f"cosines {low:.3f} to {high:.3f}"

    def warn(self, code: str, message: str, *who: str) -> None:
        """Something to know."""
        self.reasons.append(Reason(code, message, who))

    def refuse(self, code: str, message: str, *who: str) -> None:
        """Something that forbids to average."""
        self.refused = True
        self.reasons.append(Reason(code, message, who, refuses=True))
