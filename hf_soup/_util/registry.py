"""What recipes name, and other packages offer too: functions, with what their signatures say of them, and tasks.

Another package offers a function by an entry point whose name is the function's and whose value is the module that
defines it, in the group ``hf_soup.methods`` or ``hf_soup.selections``; a task by one whose value is ``module:Class``,
in the group ``hf_soup.tasks``. It is imported when a recipe first names it, or ``hf-soup methods`` lists it.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from hf_soup._util.users_code import users_code
from hf_soup.errors import RecipeError, SoupError


@dataclass(frozen=True)
class Within:
    """The numbers that a parameter may have, as an interval in brackets: ``Annotated[float, Within("(0, 1]")]``.

    >>> 0 in Within("(0, 1]"), 1 in Within("(0, 1]"), 7 in Within("[0, inf)")
    (False, True, True)
    """

    interval: str

    def __contains__(self, value: float) -> bool:
        found = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", self.interval)
        assert found, f"{self.interval} is no interval"
        low, high = float(found[2]), float(found[3])
        return (low <= value if found[1] == "[" else low < value) and (
            value <= high if found[4] == "]" else value < high
        )

    def __str__(self) -> str:
        return self.interval


@dataclass(frozen=True)
class Registered:
    """A function that recipes name; its keyword-only parameters with a default are what a recipe may set.

    Args:
        name: As recipes spell it, that of the function.
        function: The function.
    """

    name: str
    function: Callable[..., Any]

    @cached_property
    def _signature(self) -> Mapping[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters
        return {name: each for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        return {name: each.default for name, each in self._signature.items() if each.default is not each.empty}

    @property
    def given(self) -> tuple[str, ...]:
        """What the engine hands in: parameters without a default."""
        return tuple(name for name, each in self._signature.items() if each.default is each.empty)

    @cached_property
    def allowed(self) -> dict[str, Within | tuple[str, ...]]:
        """The interval or the words that a parameter may have, where it may not have any value of its type."""
        found: dict[str, Within | tuple[str, ...]] = {}
        for name, hint in get_type_hints(self.function, include_extras=True).items():
            if typing.get_origin(hint) is typing.Literal:
                found[name] = typing.get_args(hint)
            for each in getattr(hint, "__metadata__", ()):
                if isinstance(each, Within):
                    found[name] = each
        return found


def offered_by_packages(kind: str) -> dict[str, metadata.EntryPoint]:
    """What installed packages offer of a kind (``method``, ``selection``, ``task``), by name; nothing is imported."""
    return {each.name: each for each in metadata.entry_points(group=f"hf_soup.{kind}s")}


def load_offered(kind: str, offered: metadata.EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        RecipeError: Several packages offer it, or it cannot be imported.
    """
    same = metadata.entry_points(group=offered.group, name=offered.name)
    packages = sorted({each.dist.name for each in same if each.dist})
    if len(packages) > 1:
        raise RecipeError(
            f"Several packages offer the {kind} '{offered.name}': {', '.join(packages)}.",
            hint="Uninstall all but one of them.",
        )
    owner = f"The package '{offered.dist.name if offered.dist else offered.value}' offers the {kind} '{offered.name}'"
    with users_code(f"{owner}, and cannot be imported", RecipeError, "Upgrade the package, or uninstall it."):
        return offered.load()


T = TypeVar("T", bound=Registered)


class Registry(Mapping[str, T], Generic[T]):
    """All functions of one kind by name, in alphabetical order; those of other packages are loaded when asked for.

    Args:
        kind: What one is called: ``method`` or ``selection``. The group of entry points is ``hf_soup.methods`` or
            ``hf_soup.selections``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        #: What is loaded, by name.
        self.loaded: dict[str, T] = {}
        #: Names of those that this package has itself.
        self.built_in: tuple[str, ...] = ()

    def add(self, entry: T) -> None:
        """Register a function; a built-in name is not given away."""
        self.loaded.setdefault(entry.name, entry)

    def load_package(self, package: str) -> None:
        """Import all public modules of a package, whose functions register themselves."""
        folder = Path(str(import_module(package).__file__)).parent
        for file in sorted(folder.glob("[a-z]*.py")):
            import_module(f"{package}.{file.stem}")
        self.loaded = dict(sorted(self.loaded.items()))  # not as they import each other
        self.built_in = tuple(self.loaded)

    @cached_property
    def _offered(self) -> Mapping[str, metadata.EntryPoint]:
        return offered_by_packages(self.kind)

    def distribution(self, name: str) -> tuple[str, str] | None:
        """The package that offers a function, and its version; None of a built-in one."""
        offered = None if name in self.built_in else self._offered.get(name)
        return (offered.dist.name, offered.dist.version) if offered and offered.dist else None

    @contextmanager
    def failures(self, name: str) -> Iterator[None]:
        """Raise what goes wrong in a function of another package as an error that names the package.

        What a method says against tensors or parameters, a ``ValueError``, stays; so does what is wrong here.
        """
        try:
            yield
        except SoupError:
            raise
        except Exception as error:  # a stranger's function may raise anything
            package = self.distribution(name)
            if package is None or (self.kind == "method" and isinstance(error, ValueError)):
                raise
            raise RecipeError(
                f"The {self.kind} '{name}' of the package '{package[0]}' {package[1]} failed: "
                f"{type(error).__name__}: {error}",
                hint=f"Tell those who wrote it, or use another {self.kind}.",
            ) from error

    def __getitem__(self, name: str) -> T:
        if name not in self.loaded:
            self._load(self._offered[name])
        return self.loaded[name]

    def _load(self, offered: metadata.EntryPoint) -> None:
        load_offered(self.kind, offered)
        owner = f"The package '{offered.dist.name if offered.dist else offered.value}' offers the {self.kind}"
        if offered.name not in self.loaded:
            raise RecipeError(
                f"{owner} '{offered.name}', and {offered.value} defines none of that name.",
                hint=f"The entry point has the name of the function that is registered as a {self.kind}.",
            )
        annotations = f"{owner} '{offered.name}', and its annotations cannot be read"
        with users_code(annotations, RecipeError, "Upgrade the package, or uninstall it."):
            _ = self.loaded[offered.name].allowed

    def __contains__(self, name: object) -> bool:
        return name in self.loaded or name in self._offered

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.loaded, *self._offered}))

    def __len__(self) -> int:
        return len({*self.loaded, *self._offered})
