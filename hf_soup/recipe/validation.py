"""Refuses methods, selections and parameters that do not exist or may not have their values."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_soup._util.registry import Registry
from hf_soup._util.text import near
from hf_soup.errors import RecipeError
from hf_soup.recipe.mixture import DEPTH, methods_of
from hf_soup.recipe.schema import Named, Recipe, renamed

if TYPE_CHECKING:
    from hf_soup.methods import Method


#: More values of parameters than that are not tried.
MAX_POINTS = 1000


def require_methods(recipe: Recipe) -> None:
    """Refuse unknown methods and parameters, and values that they may not have.

    Raises:
        RecipeError: With the value, and what is allowed.
    """
    from hf_soup.methods import METHODS

    require_named("method", recipe.method, METHODS, lists=True, depth=True)
    for override in recipe.overrides:
        require_named(f"overrides: '{override.tensors}'", override.method, METHODS, depth=True)
    count = sum(each.weight != 0 for each in recipe.ingredients)
    for method in methods_of(recipe):
        if count < method.least or (method.most is not None and count > method.most):
            without = " that has a weight" if count == 1 else " that have a weight"
            raise RecipeError(
                f"{method.name} is defined for {method.takes} ingredients, and there "
                f"{'is' if count == 1 else 'are'} {count}{without if count < len(recipe.ingredients) else ''}.",
                hint="`hf-soup methods` says what each method takes.",
            )
    both = [name for name, value in recipe.method.parameters.items() if isinstance(value, Mapping)]
    if both and any(isinstance(value, list) for value in recipe.method.parameters.values()):
        raise RecipeError(
            f"`method` has values to choose from and '{both[0]}' that changes over the layers; it takes one of the two."
        )
    weights = [each.weight for each in recipe.ingredients if each.weight]
    every = (recipe.method, *(override.method for override in recipe.overrides))
    points = ((METHODS[named.name], point) for named in every for point in _points(named))
    # A stranger's recipe may have a thousand overrides of a thousand values each. What is beyond is met in the merge.
    for method, point in itertools.islice(points, MAX_POINTS):
        _require_together(method, weights, point)


def _points(named: Named) -> Iterator[dict[str, Any]]:
    """Every combination of the values that its parameters take."""
    along = [value[DEPTH] if isinstance(value, Mapping) else value for value in named.parameters.values()]
    values = [value if isinstance(value, list) else [value] for value in along]
    for point in itertools.product(*values):
        yield dict(zip(named.parameters, point, strict=True))


def _require_together(method: Method, weights: Sequence[float], parameters: Mapping[str, Any]) -> None:
    """Refuse parameters and weights that do not fit together, by trying the method on a few numbers."""
    import torch

    from hf_soup.methods import METHODS, Slices

    if min(weights) < 0 and not method.sums:
        return  # refused as that, by whoever knows whether the method divides
    generator = torch.Generator().manual_seed(0)
    tensors = list(torch.randn(len(weights), 4, 4, generator=generator).double())
    given: dict[str, object] = {}
    if "random" in method.given:
        given["random"] = [torch.full((4, 4), 0.5) for _ in tensors]
    if "cutoffs" in method.given:
        given["cutoffs"] = [0.0] * len(tensors)
    if method.statistics:
        given["statistics"] = [torch.eye(4) for _ in tensors]
    try:
        if method.measure:
            settings = {**method.parameters, **parameters}
            given["measured"] = method.measure(Slices.of(tensors), weights, **settings)
        with METHODS.failures(method.name):
            method.combine(tensors, weights, **given, **parameters)
    except ValueError as error:
        shown = ", ".join(f"{name}: {value!r}" for name, value in parameters.items())
        raise RecipeError(f"{method.name} with {shown or 'its defaults'}: {error}") from None


def require_named(
    title: str, wanted: Named, registry: Registry[Any], *, lists: bool = False, depth: bool = False
) -> None:
    """Refuse a method or selection that does not exist, and parameters that it does not have.

    Args:
        title: The key of the recipe.
        wanted: What stands there.
        registry: What there is.
        lists: Whether a number may be a list of those to choose from.
        depth: Whether one may change over the layers.
    """
    known = registry.get(wanted.name)
    if known is None:
        hint = f"Known are: {', '.join(sorted(registry))}. Others need the package that they are of."
        other = renamed(wanted.name) or near(wanted.name, registry)
        raise RecipeError(f"`{title}` is '{wanted.name}'{other}.", hint=hint)
    unknown = set(wanted.parameters) - set(known.parameters)
    if unknown:
        hint = f"It takes: {', '.join(known.parameters) or 'none'}."
        if unknown & Recipe.model_fields.keys():
            hint += f" A recipe has '{min(unknown & Recipe.model_fields.keys())}' beside `method`."
        other = near(min(unknown), known.parameters)
        raise RecipeError(f"{wanted.name} has no parameter '{min(unknown)}'{other}.", hint=hint)
    for name, value in wanted.parameters.items():
        default, allowed = known.parameters[name], known.allowed.get(name)
        numeric = type(default) in (int, float)
        values = [value]
        if numeric and depth and isinstance(value, Mapping):
            points = value.get(DEPTH)
            if set(value) != {DEPTH} or not isinstance(points, list) or len(points) < 2 or type(default) is int:
                raise RecipeError(
                    f"{wanted.name}: '{name}' is {value!r}; what changes over the layers is a number that need not be "
                    f"whole, written `{{{DEPTH}: [first, …, last]}}`."
                )
            values = points
        elif numeric and lists and isinstance(value, list) and value:
            values = value
        for each in values:
            _require_value(wanted.name, name, each, default, allowed, lists=lists and numeric)


def _require_value(owner: str, name: str, value: object, default: object, allowed: Any, *, lists: bool) -> None:
    fits = isinstance(value, int | float) if type(default) is float else type(value) is type(default)
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise RecipeError(f"{owner}: '{name}' is {value!r}; it is a finite number, such as {default!r}.")
    words = isinstance(allowed, tuple)
    if not words and (not fits or (isinstance(value, bool) and type(default) is not bool)):
        more = ", or several in a list, to take what is best on validation data" if lists else ""
        kind = type(default).__name__
        raise RecipeError(f"{owner}: '{name}' is {value!r}; it is of type {kind}, such as {default!r}{more}.")
    if allowed is not None and value not in allowed:
        which = f"one of {', '.join(allowed)}" if words else f"in {allowed}"
        raise RecipeError(f"{owner}: '{name}' is {value!r}{renamed(str(value))}; it is {which}.")
