"""What holds for every function that recipes name: how it is found, what its signature says, what its docstring has."""

from __future__ import annotations

import doctest
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st

from hf_soup.errors import RecipeError
from hf_soup.methods import METHODS, Within
from hf_soup.selection import SELECTIONS

#: Makes parameters to test with; a method's neutral ones go by the sum of the weights.
Choose = Callable[[float], dict[str, Any]]
Entry = TypeVar("Entry")
REGISTRIES: dict[str, Any] = {"method": METHODS, "selection": SELECTIONS}


def named_entries(kind: str, names: str | Sequence[str] | None) -> list[Any]:
    """The methods or selections that a test class names."""
    if not names:
        raise pytest.Collector.CollectError(f'The class names no {kind}: write `{kind} = "name"` into it.')
    entries = []
    for name in [names] if isinstance(names, str) else names:
        try:
            entries.append(REGISTRIES[kind][name])
        except KeyError:
            raise pytest.Collector.CollectError(
                f"There is no {kind} '{name}'. It is found when its package is installed with an entry point of that "
                f"name in the group hf_soup.{kind}s, or when the test file imports the module that defines it. After a "
                f"new entry point, install the package again: `pip install -e .`. "
                f"There are: {', '.join(REGISTRIES[kind])}."
            ) from None
        except RecipeError as error:
            raise pytest.Collector.CollectError(str(error)) from error
    return entries


def choices(entry: Any) -> dict[str, Choose]:
    """Parameters to test with: the defaults, the neutral ones, and every word and switch by itself."""
    found: dict[str, Choose] = {"default": lambda total: {}}
    if getattr(entry, "neutral", None):
        found["neutral"] = entry.neutral_for
    for name, default in entry.parameters.items():
        words = [not default] if isinstance(default, bool) else entry.allowed.get(name)
        for word in words if isinstance(words, list | tuple) else ():
            if word != default:
                found[f"{name}={word}"] = lambda total, name=name, word=word: {name: word}  # type: ignore[misc]
    return found


def parametrize(metafunc: pytest.Metafunc, kind: str, entries: Iterable[Any], **more: Callable[[Any], Any]) -> None:
    """Run a test for each entry, and where it takes them for each choice of parameters and each of ``more``.

    Args:
        kind: What a test calls the entry.
        more: Argument of a test → the values that it has for an entry, by title.
    """
    arguments = [name for name in (kind, *more) if name in metafunc.fixturenames]
    if kind not in arguments:
        return
    rows: list[tuple[list[Any], list[str]]] = [([entry], [entry.name]) for entry in entries]
    for argument in arguments[1:]:
        rows = [
            ([*values, value], [*titles, title])
            for values, titles in rows
            for title, value in more[argument](values[0]).items()
        ]
    metafunc.parametrize(arguments, [pytest.param(*values, id="-".join(titles)) for values, titles in rows])


def number(allowed: Within, default: float) -> st.SearchStrategy[float]:
    """Any that a parameter may be, but for the immensely large and small."""
    low, high = (float(part.strip("[]() ")) for part in allowed.interval.split(","))
    if isinstance(default, int):
        ends = int(max(low, -10)), int(min(high, 10))
        return st.integers(*ends).filter(lambda value: value in allowed)
    low, high = max(low, -10.0), min(high, 10.0)
    return st.floats(low if low in allowed else low + 1e-3, high if high in allowed else high - 1e-3)


def parameters_of(entry: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Parameters that a recipe may have."""
    strategies: dict[str, st.SearchStrategy[Any]] = {}
    for name, default in entry.parameters.items():
        allowed = entry.allowed.get(name)
        if isinstance(allowed, Within):
            strategies[name] = st.one_of(st.just(default), number(allowed, default))
        else:
            strategies[name] = st.sampled_from(allowed or [True, False])
    return st.fixed_dictionaries(strategies)


def check_that_recipes_find_it(kind: str, entry: Any) -> None:
    """It is built in, or an installed package offers it."""
    registry = REGISTRIES[kind]
    module = entry.function.__module__
    if module.startswith("hf_soup.") or registry.distribution(entry.name):
        return
    pytest.fail(
        f"No installed package offers the {kind} '{entry.name}', so no recipe finds it. "
        f"Install yours with this in its pyproject.toml:\n"
        f'[project.entry-points."hf_soup.{kind}s"]\n{entry.name} = "{module}"'
    )


def check_parameters(entry: Any) -> None:
    """Numbers say what they may be by an interval, words by a list; and the default is among it."""
    for name, default in entry.parameters.items():
        if isinstance(default, bool):
            continue
        assert name in entry.allowed, f"`{name}` needs Annotated[…, Within(…)] or Literal[…]"
        assert default in entry.allowed[name], f"the default of `{name}` is not what it may be"


def check_signature(entry: Any, *positional: str) -> None:
    """The first parameters, and whatever else by keyword only."""
    parameters = list(inspect.signature(entry.function).parameters.values())
    assert [each.name for each in parameters[: len(positional)]] == list(positional)
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in parameters[2:]), "a `*` is missing"


def check_documentation(entry: Any, parts: Sequence[str], examples: int) -> None:
    """A docstring with all parts, every parameter, and examples that run."""
    text = inspect.getdoc(entry.function) or ""
    assert text.partition("\n")[0].endswith("."), "the docstring begins with a line that is a sentence"
    missing = [part for part in parts if part not in text]
    missing += [f"{name}:" for name in (*entry.parameters, *entry.given) if f"{name}:" not in text]
    assert not missing, "what the docstring lacks"
    module = sys.modules[entry.function.__module__]
    tests = doctest.DocTestFinder().find(entry.function, entry.name, module=module, globs=vars(module).copy())
    assert sum(len(test.examples) for test in tests) >= examples, "the docstring shows too few examples (>>>)"
    for test in tests:
        printed: list[str] = []
        assert doctest.DocTestRunner().run(test, out=printed.append).failed == 0, "".join(printed)
