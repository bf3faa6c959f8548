"""The weights of ingredients beside those of models that may be their base: samples of rows, compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

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
from hf_soup.errors import IncompatibleError, SoupError
from hf_soup.lineage import similarity
from hf_soup.lineage.aligned_model import tensors_of_base
from hf_soup.lineage.alignment import AlignedModels
from hf_soup.lineage.similarity import Similarity, group_numbers
from hf_soup.recipe import Finding

Shapes = dict[str, tuple[int, ...]]


class WeightComparison:
    """Ingredients, and models that may be their base.

    Args:
        models: The ingredients.
        bases: Models that somebody names as a base.
        needed: Whether it is an error where a base cannot be read; else it is a finding.
        with_heads: Whether heads are compared too.

    Attributes:
        bodies: Ingredients and then bases, each with each.
        heads: The ingredients, where their heads can be compared.

    Raises:
        ResolveError: An ingredient cannot be read.
    """

    def __init__(self, models: AlignedModels, bases: Sequence[Checkpoint], *, needed: bool, with_heads: bool) -> None:
        self.models, self.names, self.count = models, models.names, len(models.ingredients)
        self._bases: dict[str, dict[str, Array]] = {}  # what was read of each
        self._unreadable: dict[str, str] = {}  # bases of which nothing can be said, and why
        self._other_shapes: set[str] = set()  # bases that have no tensor of the same shape
        self._body, head = _shared_shapes(models)
        # Bases are sampled with the ingredients, so that all requests go out together.
        named = {base.model: (base, self._tensors_of(base)) for base in bases}
        wanted = [*((model.checkpoint, model.tensors) for model in models.ingredients), *named.values()]
        stored = {info.dtype for _, tensors in wanted for info in tensors.values()}
        item = max((ITEM_BYTES[dtype] for dtype in stored if dtype in FLOATS), default=4)
        self._picks = choose_rows(self._body, models=len(wanted), item=item)
        of_head = choose_rows(head, HEAD_TENSORS, models=len(wanted), item=item) if with_heads else []
        picks, required = [*self._picks, *of_head], self.count + (len(named) if needed else 0)
        read, failed = read_samples(wanted, picks, BODY_TENSORS + HEAD_TENSORS, needed=required)
        self._not_finite = list(_not_finite(self.names, picks, read[: self.count]))
        self._samples = [_only(rows, self._picks) for rows in read[: self.count]]
        self._keep(named, read[self.count :], {place - self.count: error for place, error in failed.items()})
        self.heads: Similarity | None = None
        if of_head:
            heads = [_only(rows, of_head) for rows in read[: self.count]]
            self.heads = similarity.measure_similarity(heads, self.names, "head")

    @property
    def reasons(self) -> list[Finding]:
        """What was found: numbers that are not finite, and bases that cannot be compared."""
        reasons = list(self._not_finite)
        for base in self._bases:
            if base in self._unreadable:
                message = f"The base {base} cannot be compared: {self._unreadable[base]}"
                reasons.append(Finding("base-unreadable", message))
        return reasons

    def add(self, bases: Sequence[Checkpoint]) -> None:
        """Compare with more models that may be the base."""
        named = {base.model: (base, self._tensors_of(base)) for base in bases if base.model not in self._bases}
        if named:  # each with each takes a thousand models ten seconds
            self._keep(named, *read_samples(list(named.values()), self._picks, needed=0))

    def nearest(self, candidates: Sequence[Checkpoint]) -> Checkpoint | None:
        """The one of several models that all ingredients are related to, and most; the others are dropped."""
        before = dict(self._bases)
        self.add(candidates)
        lowest = {
            base.model: float(self.bodies.cosines[: self.count, self.place(base.model)].min())
            for base in candidates
            if all(self.links(base.model))
        }
        nearest = max(lowest, key=lowest.__getitem__, default=None)
        if candidates:
            self._bases = {name: rows for name, rows in self._bases.items() if name in before or name == nearest}
            self._measure()
        return next((base for base in candidates if base.model == nearest), None)

    def place(self, base: str) -> int:
        """Where a base stands in ``bodies``."""
        return self.count + list(self._bases).index(base)

    def links(self, base: str) -> list[bool | None]:
        """Whether each ingredient is related to a base, or to an ingredient that is; None where that is not known."""
        if not self.compared(base):
            return [None] * self.count
        places = [*range(self.count), self.place(base)]
        *groups, own = group_numbers(self.bodies.related[places][:, places]).tolist()
        known = np.isfinite(self.bodies.cosines[: self.count, places[-1]]) | (base in self._other_shapes)
        return [group == own if comparable else None for group, comparable in zip(groups, known, strict=True)]

    def compared(self, base: str) -> bool:
        """Whether anything of a base could be compared."""
        return base in self._bases and base not in self._unreadable

    def equal(self, bases: Sequence[str]) -> bool:
        """Whether bases are equal in every number that was read."""
        places = [self.place(base) for base in bases if self.compared(base)]
        return len(places) == len(bases) and all(self.bodies.same[places[0], place] for place in places)

    def cosines(self, ingredients: Sequence[int], base: str) -> str:
        """How near ingredients are to a base, in words."""
        cosines = self.bodies.cosines[list(ingredients), self.place(base)]
        if np.isnan(cosines).all():
            return "no tensor of the same shape"
        low, high = f"{np.nanmin(cosines):.3f}", f"{np.nanmax(cosines):.3f}"
        return f"cosine {low}" if low == high else f"cosines {low} to {high}"

    def _keep(
        self,
        named: Mapping[str, tuple[Checkpoint, Mapping[str, TensorInfo]]],
        read: Sequence[dict[str, Array]],
        failed: Mapping[int, SoupError],
    ) -> None:
        """Bases whose rows were read, without numbers that are not finite."""
        for number, (base, (_, tensors)) in enumerate(named.items()):
            broken = [tensor for tensor, rows in read[number].items() if not np.isfinite(rows).all()]
            rows = self._bases[base] = {tensor: rows for tensor, rows in read[number].items() if tensor not in broken}
            if broken:
                self._unreadable[base] = f"it has NaN or Inf in {some(broken)}."
            elif number in failed:
                self._unreadable[base] = failed[number].message
            elif self._picks and base not in self._unreadable and not any(len(e.shape) > 1 for e in tensors.values()):
                self._other_shapes.add(base)
            elif len(rows) < max(1, len(self._picks) // 4):
                few = f"only {len(rows)} of the {len(self._picks)} tensors that were read are there."
                self._unreadable.setdefault(base, few)
        self._measure()

    def _measure(self) -> None:
        names = [*self.names, *self._bases]
        bodies = similarity.measure_similarity([*self._samples, *self._bases.values()], names, "body")
        # What is read of an adapter is its base.
        whole = np.array(
            [model.checkpoint.base is None for model in self.models.ingredients] + [True] * len(self._bases)
        )
        self.bodies = replace(bodies, same=bodies.same & whole & whole[:, None])

    def _tensors_of(self, base: Checkpoint) -> Mapping[str, TensorInfo]:
        """A base's tensors under the soup's names, where they correspond; none where that cannot be found out."""
        named: Mapping[str, TensorInfo] = base.tensors
        donor = self.models.donor
        if not self._body.keys() <= named.keys():
            outputs = {info.name: name for name, info in donor.tensors.items() if name in self._body}
            try:
                named = tensors_of_base(base, donor.checkpoint, outputs)
            except IncompatibleError as error:
                self._unreadable[base.model] = error.message
                return {}
        return {
            name: info
            for name, shape in self._body.items()
            # Of a vocabulary that grew, the rows that both have.
            if (info := named.get(name))
            and info.shape[1:] == shape[1:]
            and (info.shape == shape or name in self.models.patched)
        }


def _shared_shapes(models: AlignedModels) -> tuple[Shapes, Shapes]:
    """The tensors that all ingredients have, with their shapes: of the body, and of the head."""
    heads: set[str] = set()
    # Where embeddings are tied in some, only the others store what predicts tokens by itself.
    for model in models.ingredients if models.untied else [models.donor]:
        own = head_tensors(model.checkpoint, model.name)
        heads |= {output for output, info in model.tensors.items() if info.name in own}
    first = models.donor.tensors
    others = [set(model.tensors) for model in models.ingredients if model.tensors is not first]
    common = set(first).intersection(*others)
    shapes = {name: info.shape for name, info in first.items() if name in common}
    for name in models.patched & shapes.keys() - heads:
        # Of a vocabulary that grew, rows that all have.
        ends = [
            max((rows.target + rows.count for rows in model.tensors[name].rows), default=0)
            for model in models.ingredients
        ]
        shapes[name] = (min([*filter(None, ends), shapes[name][0]]), *shapes[name][1:])
    body = {name: shape for name, shape in shapes.items() if name not in heads}
    return body, {name: shape for name, shape in shapes.items() if name in heads}


def _only(samples: Mapping[str, Array], picks: Sequence[RowSample]) -> dict[str, Array]:
    """What was read for some picks."""
    wanted = {pick.name for pick in picks}
    return {name: rows for name, rows in samples.items() if name in wanted}


def _not_finite(
    names: Sequence[str], picks: Sequence[RowSample], read: Sequence[dict[str, Array]]
) -> Iterator[Finding]:
    """Numbers that are not finite, which are taken out of the samples."""
    starts = {pick.name: pick.start for pick in picks}
    for name, samples in zip(names, read, strict=True):
        broken = {tensor: rows for tensor, rows in samples.items() if not np.isfinite(rows).all()}
        for tensor in broken:
            del samples[tensor]
        if broken:
            tensor, rows = next(iter(broken.items()))
            row, column = np.argwhere(~np.isfinite(rows))[0]
            more = f", and {len(broken) - 1} more tensors such numbers" if len(broken) > 1 else ""
            message = (
                f"'{tensor}' of {name} holds {rows[row, column]} at [{starts[tensor] + row}, {column}]{more}. They "
                "would be in every average; leave it out."
            )
            yield Finding("not-finite", message, (name,), refuses=True)
