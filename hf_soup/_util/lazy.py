"""Rooms that load their parts when they are used, so that starting is light."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import get_data
from typing import Any


def lazy_exports(room: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that exports what it imports under ``TYPE_CHECKING``.

    Type checkers, import-linter and people read these imports; here they are followed when a name is first asked for.

    Args:
        room: The ``__name__`` of the package.
    """
    places = {
        alias.asname or alias.name: node.module or ""
        for block in ast.parse(get_data(room, "__init__.py") or b"").body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module '{room}' has no attribute '{name}'")
        value = getattr(import_module(places[name]), name)
        setattr(sys.modules[room], name, value)
        return value

    return find, lambda: sorted({*vars(sys.modules[room]), *places})
