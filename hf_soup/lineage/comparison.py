"""The weights of ingredients beside those of models that may be their ancestor: samples, compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from hf_soup._util.text import some
from hf_soup.checkpoint import (
    BODY_TENSORS,
    FLOATS,
    HEAD_TENSORS,
    ITEM_BYTES,
    Array,
    Checkpoint,
    RowSample,
    TensorInfo,
    choose_rows,
    head_tensors,
    read_samples,
)
from hf_soup.errors import IncompatibleError
from hf_soup.lineage import similarity
from hf_soup.lineage.aligned_model import tensors_of_ancestor
from hf_soup.lineage.alignment import AlignedModels
from hf_soup.lineage.similarity import Similarity, families
from hf_soup.recipe import Finding


class WeightComparison:
    """Ingredients, and models that they may come from: their ancestors.

    Args:
        models: The ingredients.
        ancestors: Models that somebody names as one.
        needed: Whether an error where an ancestor cannot be read is to be raised; else it is a reason.
        agreed: Whether there is one that all ingredients are said to come from.
        heads_correspond: False where heads are not to be compared.

    Attributes:
        bodies: Ingredients and then ancestors, each with each.
        heads: The ingredients, where their heads can be compared.
        ancestors: By name, in the order of ``bodies``.
        unread: Ancestors of which nothing can be said.
        reasons: What was found.

    Raises:
        ResolveError: An ingredient cannot be read.
    """

    def __init__(
        self,
        models: AlignedModels,
        ancestors: Sequence[Checkpoint],
        *,
        needed: bool,
        agreed: bool,
        heads_correspond: bool,
    ) -> None:
        self.names, self.count = models.names, len(models.ingredients)
        self.reasons: list[Finding] = []
        self.ancestors: dict[str, Checkpoint] = {}
        self.unread: set[str] = set()
        self._foreign: set[str] = set()  # ancestors that have no tensor of the same shape
        self._patched = models.patched
        self._donor, self._first = models.donor.checkpoint, models.donor.tensors
        in_head: set[str] = set()
        # Where embeddings are tied in some, only the others store what predicts tokens by itself.
        for model in models.ingredients if models.untied else [models.donor]:
            own = head_tensors(model.checkpoint, model.name)
            in_head |= {output for output, info in model.tensors.items() if info.name in own}
        others = [set(model.tensors) for model in models.ingredients if model.tensors is not self._first]
        common = set(self._first).intersection(*others)
        shapes = {name: info.shape for name, info in self._first.items() if name in common}
        self._body = {name: shape for name, shape in shapes.items() if name not in in_head}
        # Those that can be compared are sampled with the ingredients, so that all requests go out together.
        named = {each.model: (each, self._as_named(each)) for each in ancestors}
        wanted = [*((model.checkpoint, model.tensors) for model in models.ingredients), *named.values()]
        # Of a vocabulary that grew, rows that all have.
        for name in self._patched & self._body.keys():
            ends = [
                max((rows.target + rows.count for rows in model.tensors[name].rows), default=0)
                for model in models.ingredients
            ]
            self._body[name] = (min([*filter(None, ends), self._body[name][0]]), *self._body[name][1:])
        stored = {info.dtype for _, mine in wanted for info in mine.values()}
        item = max((ITEM_BYTES[dtype] for dtype in stored if dtype in FLOATS), default=4)
        self._picks = choose_rows(self._body, models=len(wanted), item=item)
        head = {name: shape for name, shape in shapes.items() if name in in_head}
        of_head = choose_rows(head, HEAD_TENSORS, models=len(wanted), item=item) if heads_correspond else []
        required = self.count + (len(named) if needed else 0)
        found, failed = read_samples(wanted, [*self._picks, *of_head], BODY_TENSORS + HEAD_TENSORS, needed=required)
        self._broken([*self._picks, *of_head], found[: self.count])
        self._without_broken(list(named), found[self.count :])
        picked = {pick.name for pick in self._picks}
        self._sampled = [{name: rows for name, rows in each.items() if name in picked} for each in found]
        self.ancestors = {model: ancestor for model, (ancestor, _) in named.items()}
        for place, error in failed.items():
            self._unreadable(list(named)[place - self.count], error.message)
        self._too_thin()
        self.bodies = similarity.measure_similarity(self._sampled, [*self.names, *self.ancestors], "body")
        self.heads: Similarity | None = None
        if of_head:
            heads = [{name: rows for name, rows in each.items() if name not in picked} for each in found[: self.count]]
            self.heads = similarity.measure_similarity(heads, self.names, "head")
        if heads_correspond:
            pins = [(model.checkpoint.model, model.state) for model in models.ingredients]
            same = (
                self.bodies.same
                if self.heads is None
                else self.bodies.same[: self.count, : self.count] & self.heads.same
            )
            self.reasons += similarity.copies(same, self.names, pins)
        # Several ancestors contradict each other; one is what everybody names.
        trusted = self.count if len(self.ancestors) == 1 and agreed else None
        self.reasons += similarity.strangers(self.bodies, self.names, trusted)

    def _broken(self, picks: Sequence[RowSample], found: Sequence[dict[str, Array]]) -> None:
        """Numbers that are none: said, and kept out of the statistics."""
        starts = {pick.name: pick.start for pick in picks}
        for name, mine in zip(self.names, found, strict=True):
            broken = [tensor for tensor, rows in mine.items() if not np.isfinite(rows).all()]
            where = []
            for tensor in broken:
                rows = mine.pop(tensor)
                row, column = np.argwhere(~np.isfinite(rows))[0]
                where.append(f"{rows[row, column]} at [{starts[tensor] + row}, {column}]")
            if broken:
                more = f", and {len(broken) - 1} more tensors such numbers" if len(broken) > 1 else ""
                message = (
                    f"'{broken[0]}' of {name} holds {where[0]}{more}. They would be in every average; leave it out."
                )
                self.reasons.append(Finding("not-finite", message, (name,), refuses=True))

    def _without_broken(self, called: Sequence[str], found: Sequence[dict[str, Array]], *, tried: bool = False) -> None:
        """The same of ancestors, of which nothing goes into an average."""
        for model, mine in zip(called, found, strict=True):
            broken = [tensor for tensor, rows in mine.items() if not np.isfinite(rows).all()]
            for tensor in broken:
                del mine[tensor]
            if broken and not tried:
                message = f"The ancestor {model} has NaN or Inf in {some(broken)}, which are not compared."
                self.reasons.append(Finding("base-unreadable", message))

    def _too_thin(self, *, tried: bool = False) -> None:
        """Ancestors of which so little could be read that nothing follows."""
        for number, model in enumerate(self.ancestors):
            held = len(self._sampled[self.count + number])
            if model not in self.unread | self._foreign and held < max(1, len(self._picks) // 4):
                why = f"only {held} of the {len(self._picks)} tensors that were read are there."
                self.unread.add(model) if tried else self._unreadable(model, why)

    def _unreadable(self, model: str, why: str) -> None:
        self.unread.add(model)
        self.reasons.append(Finding("base-unreadable", f"The ancestor {model} cannot be compared: {why}"))

    def _as_named(self, ancestor: Checkpoint, *, tried: bool = False) -> Mapping[str, TensorInfo]:
        """An ancestor's tensors under the soup's names, where they correspond; none where that cannot be found out."""
        found: Mapping[str, TensorInfo] = ancestor.tensors
        if not self._body.keys() <= ancestor.tensors.keys():
            outputs = {info.name: name for name, info in self._first.items() if name in self._body}
            try:
                found = tensors_of_ancestor(ancestor, self._donor, outputs)
            except IncompatibleError as error:
                self.unread.add(ancestor.model)
                if not tried:
                    self._unreadable(ancestor.model, error.message)
                return {}
        fitting = {
            name: info
            for name, shape in self._body.items()
            # Of a vocabulary that grew, the rows that both have.
            if (info := found.get(name))
            and info.shape[1:] == shape[1:]
            and (info.shape == shape or name in self._patched)
        }
        if not any(len(info.shape) > 1 for info in fitting.values()):
            wide = sum(len(info.shape) > 1 for info in ancestor.tensors.values())
            # Of one with no more than a matrix or two it cannot be said what else it would have.
            self._foreign.add(ancestor.model) if wide > 2 else None
        return fitting

    def add(self, ancestors: Sequence[Checkpoint], *, tried: bool = False) -> None:
        """Compare with more of them, which are only ``tried`` where nobody names them."""
        fresh = {each.model: each for each in ancestors if each.model not in self.ancestors}
        if not fresh:
            return  # each with each takes a thousand models ten seconds
        named = [(each, self._as_named(each, tried=tried)) for each in fresh.values()]
        found, failed = read_samples(named, self._picks, needed=0)
        self._without_broken(list(fresh), found, tried=tried)
        self._sampled += found
        self.ancestors |= fresh
        for place, error in failed.items():
            model = list(fresh)[place]
            self.unread.add(model) if tried else self._unreadable(model, error.message)
        self._too_thin(tried=tried)
        self.bodies = similarity.measure_similarity(self._sampled, [*self.names, *self.ancestors], "body")

    def drop(self, ancestors: Collection[str]) -> None:
        """Those that were only tried are no evidence."""
        if not ancestors:
            return
        keep = [*range(self.count), *(self.place(name) for name in self.ancestors if name not in ancestors)]
        self._sampled = [self._sampled[place] for place in keep]
        self.ancestors = {name: each for name, each in self.ancestors.items() if name not in ancestors}
        self.bodies = similarity.measure_similarity(self._sampled, [*self.names, *self.ancestors], "body")

    def place(self, ancestor: str) -> int:
        """Where an ancestor stands in ``bodies``."""
        return self.count + list(self.ancestors).index(ancestor)

    def links(self, ancestor: str) -> list[bool | None]:
        """Whether each ingredient is kin to an ancestor, or to an ingredient that is."""
        if ancestor not in self.ancestors or ancestor in self.unread:
            return [None] * self.count
        if ancestor in self._foreign:
            return [False] * self.count
        place = self.place(ancestor)
        direct = [self.bodies.kin(number, place) for number in range(self.count)]
        groups = families(self.bodies.related[: self.count, : self.count])
        linked = {number for group in groups if any(direct[n] for n in group) for number in group}
        return [link if link is None else number in linked for number, link in enumerate(direct)]

    def cosine(self, number: int, ancestor: str) -> float:
        """Of an ingredient and an ancestor."""
        return float(self.bodies.cosines[number, self.place(ancestor)])

    def near(self, number: int, ancestor: str) -> str:
        """How near an ingredient is to an ancestor, in words."""
        cosine = self.cosine(number, ancestor)
        if np.isnan(cosine):
            return "no tensor of the same shape"
        rows = self.bodies.rows[number, self.place(ancestor)]
        return f"cosine {cosine:.3f}" + (f", rows {rows:.0%}" if rows < similarity.SAME_ROWS <= cosine else "")

    def range(self, ancestor: str) -> str:
        """The cosines of all ingredients with an ancestor, in words."""
        found = [cosine for n in range(self.count) if not np.isnan(cosine := self.cosine(n, ancestor))]
        if not found:
            return "no tensor of the same shape"
        low, high = f"{min(found):.3f}", f"{max(found):.3f}"
        return f"cosine {low}" if low == high else f"cosines {low} to {high}"

    def numbers(self, number: int) -> str:
        """An ingredient's cosines with the first ancestors, in brackets."""
        readable = [name for name in self.ancestors if name not in self.unread]
        near = ", ".join(f"{self.near(number, name)} with {name}" for name in readable[:3])
        return f" ({near})" if near else ""
