"""Soups of soups: an ingredient that is a mean of others is replaced by what it is the mean of.

So every leaf is rounded once and counts once, with the sum of its shares, however many soups it came in. What is not
such a mean, or cannot be told to be one, stays one ingredient, and a note says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from hf_soup import hub
from hf_soup._util.parallel import in_parallel
from hf_soup._util.text import some
from hf_soup.checkpoint import (
    DTYPES,
    FLOATS,
    Checkpoint,
    RowSample,
    choose_rows,
    distinct_names,
    head_tensors,
    label_names,
    label_order,
    label_rows,
    open_all,
    open_checkpoint,
    read_samples,
)
from hf_soup.errors import RecipeError, ResolveError, SoupError
from hf_soup.hub import Token, may_pass
from hf_soup.ingredients.published import read_recipe
from hf_soup.recipe import MAX_INGREDIENTS, Ingredient, Recipe, Scoring, is_average, with_dataset

_DEEPEST = 20
#: A mean has no shares by tensor, so its recipe is short; a longer one is not parsed, as it is a stranger's.
_MOST_BYTES = 1 << 20
#: What a soup's recipe may say; any other key may make it something else than the mean of its leaves.
_HARMLESS = {"base_model", "ingredients", "validation", "test", "seed", "allow_pickle", "labels", "dtype", "allow"}
#: How far rounding may take a mean, in parts of its terms' sizes.
_ROUNDED = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-20, "F64": 2.0**-20}
#: Shares up to this are whole numbers where they can be, as products of them with 16-bit numbers are exact in float32.
_WHOLE = 1 << 12

Shares = Mapping[str, Fraction]


@dataclass(frozen=True)
class ResolvedIngredients:
    """A recipe whose soups were replaced by their leaves.

    Args:
        recipe: With a pinned leaf for each ingredient; the recipe as it was, where nothing was replaced.
        checkpoints: Its ingredients, opened.
        groups: For each ingredient as it was asked for, by the name that tables and files give it: number of the leaf
            → its share, which sum to 1.
        notes: A sentence for each soup, and for each leaf that came in several ways.
        seen: Soups, and the data that each was selected on.
    """

    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...] = field(repr=False)
    groups: Mapping[str, Mapping[int, Fraction]]
    notes: tuple[str, ...] = ()
    seen: tuple[tuple[str, Scoring], ...] = ()

    def flatten(self, weights: Mapping[str, float], *, mean: bool = True) -> dict[int, float]:
        r"""The shares of the leaves in a soup of groups, by their numbers.

        .. math:: v_j = c \sum_i w_i s_{ij}

        worked out in fractions; :math:`c` makes them whole numbers where those are small, else it is 1. Where no
        soup was replaced the weights are as they were.

        Args:
            weights: The share of each group that is in the soup.
            mean: Whether the shares will be divided by their sum; else :math:`c` is 1.

        >>> halves, third = {0: Fraction(1, 2), 1: Fraction(1, 2)}, {n: Fraction(1, 3) for n in range(3)}
        >>> recipe = Recipe(ingredients=["a", "b", "c"])
        >>> ResolvedIngredients(recipe, (), {"x": halves, "y": third}).flatten({"x": 1, "y": 1})
        {0: 5.0, 1: 5.0, 2: 2.0}
        """
        if all(list(shares) == [number] for number, shares in enumerate(self.groups.values())):
            return {next(iter(self.groups[name])): weight for name, weight in weights.items()}
        found: dict[int, Fraction] = defaultdict(Fraction)
        for name, weight in weights.items():
            for leaf, share in self.groups[name].items():
                found[leaf] += Fraction(weight) * share
        whole = lcm(*(each.denominator for each in found.values()))
        scale = whole if mean and whole * max(found.values()) <= _WHOLE else 1
        return {leaf: float(share * scale) for leaf, share in found.items()}


def resolve_ingredients(recipe: Recipe, *, token: Token = None) -> ResolvedIngredients:
    """Open the ingredients of a recipe, and replace soups by their leaves.

    A soup has ``soup.yaml`` beside its weights. It is replaced where both recipes are weighted means,
    nothing else in them makes its leaves mean something else here, all leaves can be had, and its weights are the mean
    of theirs in a sample. Where nothing is a soup this costs nothing beyond opening the ingredients.

    Args:
        recipe: As it was asked for.
        token: As everywhere in huggingface_hub.

    Raises:
        ResolveError: An ingredient cannot be opened, the Hub cannot be reached, or a soup is in itself.
        RecipeError: There are more than 1,000 leaves.
    """
    opened = open_all(recipe.ingredients, allow_pickle=recipe.allow_pickle, token=token, base=recipe.base_model)
    names = distinct_names(opened)
    soups = _Soups(recipe, dict(zip(names, opened, strict=True)), token)
    reached = [soups.leaves(checkpoint) for checkpoint in opened]
    if not soups.replaced:
        groups = {name: {number: Fraction(1)} for number, name in enumerate(names)}
        return ResolvedIngredients(recipe, tuple(opened), groups, tuple(soups.notes), tuple(soups.seen))
    order = list(dict.fromkeys(leaf for shares in reached for leaf in shares))
    leaves = tuple(soups.known[leaf] for leaf in order)
    notes = list(soups.notes)
    for leaf in order:
        ways = [
            "itself" if opened[number].identity == leaf else f"in {name}"
            for number, name in enumerate(names)
            if leaf in reached[number]
        ]
        if len(ways) > 1:
            notes.append(f"{soups.name(leaf)} is in it {len(ways)} times: {' and '.join(ways)}; its shares are added.")
    groups = {
        name: {order.index(leaf): share for leaf, share in shares.items()}
        for name, shares in zip(names, reached, strict=True)
    }
    weights = {name: each.weight for name, each in zip(names, recipe.ingredients, strict=True)}
    found = ResolvedIngredients(recipe, leaves, groups, tuple(notes))
    given = {each.identity: one for each, one in zip(opened, recipe.ingredients, strict=True)}
    ingredients = tuple(
        Ingredient(model=leaf.model, revision=leaf.revision, weight=weight)
        if leaf.source.commit
        else given[leaf.identity].model_copy(update={"weight": weight})
        for leaf, (_, weight) in zip(leaves, sorted(found.flatten(weights).items()), strict=True)
    )
    changes: dict[str, object] = {"ingredients": ingredients}
    if isinstance(recipe.head, int) and (kept := opened[recipe.head]).source.commit:
        changes["heads"] = f"{kept.model}@{kept.revision}"
    if soups.nameless:
        changes["labels"] = soups.wanted
    return ResolvedIngredients(recipe.model_copy(update=changes), leaves, groups, tuple(notes), tuple(soups.seen))


def with_base_apart(recipe: Recipe, *, token: Token = None) -> Recipe:
    """A recipe of an adapter with its base apart: where none is named it is the first model, unless that is an adapter.

    Args:
        recipe: As it was asked for.
        token: As everywhere in huggingface_hub.
    """
    first, *others = recipe.ingredients
    if recipe.output != "adapter" or recipe.base_model is not None or not others:
        return recipe
    try:
        if open_checkpoint(first, allow_pickle=recipe.allow_pickle, token=token).base:
            return recipe
    except ResolveError:
        return recipe  # a run, or it is told with all others that cannot be opened
    return recipe.model_copy(update={"base_model": str(first), "ingredients": tuple(others)})


class _StaysError(Exception):
    """Why a soup stays one ingredient."""


class _Soups:
    """What was found out about soups on the way.

    Args:
        recipe: As it was asked for.
        opened: Its ingredients by their names.
        token: As in `resolve_ingredients`.
    """

    def __init__(self, recipe: Recipe, opened: Mapping[str, Checkpoint], token: Token) -> None:
        self.recipe, self._token = recipe, token
        self._opened = list(opened.values())
        self.known = {each.identity: each for each in self._opened}
        self._names = {each.identity: name for name, each in opened.items()}
        self.notes: list[str] = []
        #: Whether any soup was replaced, and leaves of one name no labels; what soups were selected on.
        self.replaced = self.nameless = False
        self.seen: list[tuple[str, Scoring]] = []
        self._asked: dict[str, Checkpoint | SoupError] = {}
        self._found: dict[str, Shares] = {}

    @cached_property
    def wanted(self) -> tuple[str, ...] | None:
        """The order of the outputs, which is that of the soups and not of their leaves."""
        named = (label_names(each.config, each.model) for each in self._opened)
        return self.recipe.labels or next((names for names in named if names), None)

    def name(self, identity: str) -> str:
        """What notes call a model."""
        return self._names.get(identity) or str(self.known[identity])

    def leaves(self, checkpoint: Checkpoint, within: tuple[str, ...] = ()) -> Shares:
        """What a model is the mean of, by identity, with shares that sum to 1: itself, where it is no soup.

        Raises:
            ResolveError: It is in itself, or too deep in other soups.
        """
        me = checkpoint.identity
        if me in within or len(within) > _DEEPEST:
            chain = " → ".join(self.name(each) for each in (*within[-3:], me))
            raise ResolveError(
                f"A soup is in itself, or more than {_DEEPEST} deep in others: {chain}.",
                hint="Leave it out, or name its leaves in its place.",
            )
        if me not in self._found:
            self._found[me] = {me: Fraction(1)}
            if "soup.yaml" in checkpoint.source.files:
                try:
                    self._found[me] = self._replaced(checkpoint, (*within, me))
                except _StaysError as reason:
                    self.notes.append(f"{self.name(me)} is a soup and stays one ingredient: {reason}.")
        return self._found[me]

    def _replaced(self, soup: Checkpoint, within: tuple[str, ...]) -> Shares:
        recipe = self._recipe_of(soup)
        used = [each for each in recipe.ingredients if each.weight > 0]
        opened = self._open(used)
        total = sum(Fraction(each.weight) for each in used)
        parts = [_bounded(Fraction(each.weight) / total) for each in used]
        nameless = self._require_meaning(soup, recipe, opened)
        if not _is_mean(soup, opened, parts):
            raise _StaysError("its weights are not the mean of those that its soup.yaml names, as after more training")
        shares: dict[str, Fraction] = defaultdict(Fraction)
        for leaf, part in zip(opened, parts, strict=True):
            for each, share in self.leaves(leaf, within).items():
                shares[each] += part * share
        self.nameless |= nameless
        self.replaced = True
        self.notes.append(
            f"{self.name(within[-1])} is a soup; its leaves go in: {some([str(each) for each in opened])}."
        )
        return shares

    def _recipe_of(self, soup: Checkpoint) -> Recipe:
        """The recipe of a soup that may be replaced."""
        try:
            recipe = read_recipe(soup.source, max_bytes=_MOST_BYTES)
        except RecipeError as error:
            raise _StaysError(" ".join(error.message.split())[:300].rstrip(".")) from None
        looked_at = (*with_dataset(recipe.validation), *([recipe.calibration] if recipe.calibration else []))
        self.seen += [(self.name(soup.identity), scoring) for scoring in looked_at]
        if not _averages(self.recipe):
            key = "tensor_weights" if self.recipe.tensor_weights else "overrides" if self.recipe.overrides else "method"
            raise _StaysError(f"with this `{key}` the recipe makes no weighted mean, the same for all tensors")
        if isinstance(self.recipe.head, int) and soup.identity == self._opened[self.recipe.head].identity:
            raise _StaysError("its head is the one that is kept")
        if any(each.weight < 0 for each in recipe.ingredients):
            raise _StaysError("its recipe has weights below zero, which no mean has")
        other = recipe.to_dict().keys() - _HARMLESS
        other -= {"method"} if _averages(recipe) else set()
        other -= {"heads"} if self.recipe.heads is not None else set()  # the soup's own head is left out
        if other:
            raise _StaysError(f"its recipe has `{min(other)}`, which a mean of its leaves would not have")
        if folder := next((each.model for each in recipe.ingredients if not hub.within_repo(each.model)), None):
            raise _StaysError(f"{folder!r}, which is in it, is not on the Hub")
        if not recipe.resolved:
            raise _StaysError("its soup.yaml does not say which commits its leaves were")
        return recipe

    def _open(self, ingredients: Sequence[Ingredient]) -> list[Checkpoint]:
        """The leaves of a soup, each opened once, however many soups it is in."""

        def attempt(ingredient: Ingredient) -> Checkpoint | SoupError:
            known = self.known.get(str(ingredient))  # a repo's identity is its id and commit
            try:
                return known or open_checkpoint(
                    ingredient, allow_pickle=self.recipe.allow_pickle, token=self._token, on_hub=True
                )
            except SoupError as error:
                return error

        new = list({str(each): each for each in ingredients if str(each) not in self._asked}.values())
        if len(self._asked) + len(new) > MAX_INGREDIENTS:
            raise RecipeError(
                f"The soups in the recipe come from more than {MAX_INGREDIENTS:,} models.", hint="Leave some out."
            )
        for each, found in zip(new, in_parallel(attempt, new), strict=True):
            self._asked[str(each)] = found
        opened = []
        for each in ingredients:
            found = self._asked[str(each)]
            if isinstance(found, SoupError):
                if may_pass(found):
                    raise found
                raise _StaysError(f"a leaf of it cannot be had. {' '.join(str(found).split())}".rstrip("."))
            opened.append(self.known.setdefault(found.identity, found))
        return opened

    def _require_meaning(self, soup: Checkpoint, recipe: Recipe, leaves: Sequence[Checkpoint]) -> bool:
        """Refuse leaves that would mean something else here; whether the outputs of some have no names."""
        types = {dtype for leaf in leaves for dtype in leaf.dtypes}
        if recipe.dtype and not self.recipe.dtype and types != {DTYPES[recipe.dtype]}:
            raise _StaysError(
                f"its recipe has `dtype: {recipe.dtype}`, its leaves are stored as {', '.join(sorted(types))}, and the "
                "recipe that it goes into does not say what it shall be"
            )
        if self.recipe.heads is not None:
            return False
        if all(label_names(leaf.config, leaf.model) for leaf in leaves):
            return False
        # Outputs without names are matched by number, so they have to be in the soup's order already.
        names = label_names(soup.config, soup.model)
        if names and self.wanted and label_order(self.wanted, names) != list(range(len(names))):
            raise _StaysError("leaves of it name no labels, and the labels stand in another order here")
        return self.wanted is not None


def _averages(recipe: Recipe) -> bool:
    """Whether it makes a weighted mean, the same for all tensors."""
    return is_average(recipe) and not recipe.tensor_weights


def _bounded(share: Fraction) -> Fraction:
    """A share as it is where that is short, as with equal weights, else the nearest float; so that sums stay short."""
    return share if share.denominator < 1 << 53 else Fraction(float(share))


def _is_mean(soup: Checkpoint, leaves: Sequence[Checkpoint], shares: Sequence[Fraction]) -> bool:
    """Whether a soup's weights are the mean of its leaves', in samples of its body, and its head.

    Rows of labels are not looked at where not all have the labels in one order, as the soup's were moved.
    """
    every = (soup, *leaves)
    shapes = {
        name: tensor.shape
        for name, tensor in soup.tensors.items()
        if {(found.shape, found.dtype in FLOATS) if (found := each.tensors.get(name)) else None for each in every}
        == {(tensor.shape, True)}
    }
    heads = head_tensors(soup, soup.model)
    if len({label_names(each.config, each.model) for each in every}) > 1:
        heads = {name for name in heads if name in set(label_rows(soup, soup.model))}
        shapes = {name: shape for name, shape in shapes.items() if name not in heads}
    own_head = {name: shape for name, shape in shapes.items() if name in heads}
    picks = choose_rows({n: s for n, s in shapes.items() if n not in heads}, models=len(every))
    picks += choose_rows(own_head, models=len(every))
    picks += [RowSample(name, 0, shape[0], 1) for name, shape in own_head.items() if len(shape) == 1 and shape[0]]
    (own, *theirs), _ = read_samples([(each, each.tensors) for each in every], picks, len(picks))
    names = own.keys() & set.intersection(*(set(each) for each in theirs))
    for name in names:
        terms = [float(share) * each[name].astype(np.float64) for share, each in zip(shares, theirs, strict=True)]
        bound = _ROUNDED[soup.tensors[name].dtype] * sum(np.abs(term) for term in terms) + 2.0**-24
        if not (np.abs(own[name] - sum(terms)) <= bound).all():
            return False
    return bool(names)
