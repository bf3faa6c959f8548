"""What one merged model is, in names and numbers: what the shares, the method and the overrides of a recipe come to."""

from __future__ import annotations

import fnmatch
import itertools
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_soup._util.text import some
from hf_soup.errors import RecipeError
from hf_soup.recipe.schema import Named, Recipe
from hf_soup.selection import SELECTIONS

if TYPE_CHECKING:
    from hf_soup.methods import Method


class MethodCall(NamedTuple):
    """How tensors are combined: the name of a method, and its parameters."""

    method: str
    parameters: Mapping[str, Any]


#: The mean, or with ``normalize: false`` the sum.
LINEAR = MethodCall("linear", {})


@dataclass(frozen=True)
class Mixture:
    """What one merged model is: no file, no byte.

    Args:
        weights: Ingredient → its share, in the order in which means are added up.
        method: How tensors are combined.
        tensor_weights: The shares of tensors that have their own: name → one for each ingredient of ``weights``, in
            its order.
        tensor_methods: How tensors are combined that have a method or parameters of their own.
        seed: Of random numbers; 0 where no method needs any.
    """

    weights: Mapping[str, float]
    method: MethodCall = LINEAR
    tensor_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    tensor_methods: Mapping[str, MethodCall] = field(default_factory=dict, repr=False)
    seed: int = 0

    @classmethod
    def of(cls, recipe: Recipe, weights: Mapping[str, float], names: Iterable[str]) -> Mixture:
        """What a recipe makes of ingredients; of parameters with several values, the first.

        Args:
            recipe: Valid.
            weights: Of the ingredients.
            names: Of all tensors of the output.

        Raises:
            RecipeError: A pattern matches no tensor, or shares of a tensor are none for its method.
        """
        one = settled(recipe)
        listed = dict.fromkeys(sorted(names) if recipe.tensor_weights or not is_average(one) else ())
        usual = MethodCall(one.method.name, parameters_at(one.method.parameters, 0.0))
        own, methods = _weights_by_tensor(recipe, listed, len(weights)), methods_by_tensor(one, listed)
        for name in own if recipe.overrides else ():
            _require_shares(name, own[name], methods.get(name, usual))
        return cls(weights, usual, own, methods, random_seed(recipe))

    @property
    def methods(self) -> tuple[MethodCall, ...]:
        """Every way of combining that there is in it, that of most tensors first."""
        return (self.method, *self.tensor_methods.values())

    @property
    def is_linear(self) -> bool:
        """Whether every tensor is a weighted mean, or sum, with the same shares."""
        return self.method.method == "linear" and not self.tensor_methods and not self.tensor_weights


def with_method_of_selection(recipe: Recipe) -> Recipe:
    """The recipe with the method that its selection finds weights for, where it brings one."""
    method = SELECTIONS[recipe.select.name].method
    return recipe.model_copy(update={"method": Named(**method)}) if method else recipe


#: The key of a parameter that changes over the layers.
DEPTH = "depth"


def is_average(recipe: Recipe) -> bool:
    """Whether every tensor is the weighted mean of the ingredients', with the same shares or its own."""
    normalize = recipe.method.parameters.get("normalize", True)
    return recipe.method.name == "linear" and normalize is True and not recipe.overrides


def methods_of(recipe: Recipe) -> list[Method]:
    """The methods of a recipe: that of most tensors first, then those of overrides; unknown ones are left out."""
    from hf_soup.methods import METHODS  # late, as torch takes a second to import and a check needs none

    named = (recipe.method, *(each.method for each in recipe.overrides))
    return [METHODS[each.name] for each in named if each.name in METHODS]


def needs_base(recipe: Recipe) -> bool:
    """Whether the soup is made of what was learned since the base: by a method that works on task vectors, or as an
    adapter. Then one model alone will do.
    """
    if recipe.output == "adapter":
        return True
    return not is_average(recipe) and any(method.needs_base for method in methods_of(recipe))


def random_seed(recipe: Recipe) -> int:
    """The recipe's seed, or 0 where no method has random numbers, and the seed changes nothing."""
    if is_average(recipe):  # the check of an average imports no torch
        return 0
    return recipe.seed if any("random" in method.given for method in methods_of(recipe)) else 0


def methods_by_tensor(recipe: Recipe, names: Mapping[str, object]) -> dict[str, MethodCall]:
    """How tensors are combined that are not combined as most: by the first override that matches, or by their depth.

    Args:
        recipe: With one value for each parameter, or a value at each depth.
        names: Of all tensors of the output, in order.

    Raises:
        RecipeError: An override matches no tensor.
    """
    given: dict[str, Named] = {}
    for override in recipe.overrides:
        for name in _matching("overrides", override.tensors, names):
            given.setdefault(name, override.method)
    if varies_with_depth(recipe.method):
        given = {name: given.get(name, recipe.method) for name in names}
    where = depths(names) if any(map(varies_with_depth, given.values())) else {}
    return {
        name: MethodCall(named.name, parameters_at(named.parameters, where.get(name, 0.0)))
        for name, named in given.items()
    }


def _weights_by_tensor(recipe: Recipe, names: Mapping[str, object], count: int) -> dict[str, tuple[float, ...]]:
    """The shares of tensors that have their own, of as many ingredients."""
    shares: dict[str, tuple[float, ...]] = {}
    for pattern, weights in recipe.tensor_weights.items():
        assert len(weights) == count, "the recipe was checked, and one that has `tensor_weights` drops no ingredient"
        for name in _matching("tensor_weights", pattern, names):
            shares.setdefault(name, weights)
    return shares


def _require_shares(name: str, shares: Sequence[float], call: MethodCall) -> None:
    from hf_soup.methods import METHODS  # late, as torch takes a second to import and a check needs none

    divides = not METHODS[call.method].sums and call.parameters.get("normalize", True)
    if divides and (min(shares) < 0 or not any(shares)):
        raise RecipeError(
            f"`tensor_weights` gives '{name}' {', '.join(f'{share:g}' for share in shares)}, and {call.method}, which "
            "combines it, divides by the sum of the weights.",
            hint="Give it weights of zero or more, some above zero, or a method that sums, as `task_arithmetic` does.",
        )


def _matching(key: str, pattern: str, names: Mapping[str, object]) -> list[str]:
    """The tensors that a pattern of the recipe stands for."""
    matching = [pattern] if pattern in names else fnmatch.filter(names, pattern)
    if not matching:
        raise RecipeError(
            f"`{key}` names '{pattern}', and no tensor matches it.",
            hint=f"Tensors are called {some(names)}; `*` stands for anything.",
        )
    return matching


def grid(named: Named) -> list[dict[str, Any]]:
    """The points at which the parameters of a method or selection are to be tried: every combination of lists.

    >>> grid(Named(name="wise_ft", alpha=[0.0, 1.0]))
    [{'alpha': 0.0}, {'alpha': 1.0}]
    """
    parameters = named.parameters
    values = [value if isinstance(value, list) else [value] for value in parameters.values()]
    return [dict(zip(parameters, point, strict=True)) for point in itertools.product(*values)]


def searched(named: Named) -> list[str]:
    """Names of the parameters that are to be chosen on validation data."""
    return [name for name, value in named.parameters.items() if isinstance(value, list)]


def settled(recipe: Recipe, parameters: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe with one value for each parameter of its method: those given, or the first of every list."""
    chosen = grid(recipe.method)[0] if parameters is None else parameters
    return recipe.model_copy(update={"method": Named(name=recipe.method.name, **chosen)})


def varies_with_depth(named: Named) -> bool:
    """Whether a parameter changes over the layers."""
    return any(isinstance(value, Mapping) for value in named.parameters.values())


def parameters_at(parameters: Mapping[str, Any], depth: float) -> dict[str, Any]:
    """Parameters at a depth between 0 and 1, those that change interpolated between the values that are given.

    >>> parameters_at({"density": {"depth": [0.25, 0.75, 0.5]}, "scale": 1.0}, 0.25)
    {'density': 0.5, 'scale': 1.0}
    """
    return {
        name: _between(value[DEPTH], depth) if isinstance(value, Mapping) else value
        for name, value in parameters.items()
    }


def _between(points: Sequence[float], depth: float) -> float:
    place = depth * (len(points) - 1)
    before = min(int(place), len(points) - 2)
    share = place - before
    return (1 - share) * points[before] + share * points[before + 1]


def depths(names: Collection[str]) -> dict[str, float]:
    """Where tensors stand in a model: 0 in its first layer, 1 in its last.

    A layer is what has a number in its name, among those with the same words before it. What has none stands before
    the first layer where it is called an embedding, else behind the last one.

    >>> depths(["embed.weight", "layers.0.w", "layers.1.experts.7.w", "layers.2.w", "head.weight"])
    {'embed.weight': 0.0, 'layers.0.w': 0.0, 'layers.1.experts.7.w': 0.5, 'layers.2.w': 1.0, 'head.weight': 1.0}
    """
    numbered = {name: found for name in names if (found := re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", name))}
    groups: dict[str, list[int]] = {}
    for found in numbered.values():
        groups.setdefault(found[1], []).append(int(found[2]))
    ranked = {prefix: sorted(set(numbers)) for prefix, numbers in groups.items()}
    result = {}
    for name in names:
        if name in numbered:
            layers = ranked[numbered[name][1]]
            place = bisect_right(layers, int(numbered[name][2])) - 1
            result[name] = place / max(1, len(layers) - 1)
        else:
            result[name] = 0.0 if "embed" in name else 1.0
    return result
