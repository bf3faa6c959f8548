"""Bad inputs, as data."""

from __future__ import annotations

from typing import Any

from golden.recipes import ABC, A, B

#: Name → `recipe` that is cooked, or `line` (arguments); `files` are written before, `make` changes the folder.
FAULTS: dict[str, dict[str, Any]] = {
    "unknown key": {"recipe": {"ingredients": ABC, "metod": "linear"}},
    "no such folder": {"line": ["check", A, "nowhere", "--json"]},
    "unknown command": {"line": ["stir"]},
    "no such option": {"line": ["check", A, B, "--colour"]},
}
