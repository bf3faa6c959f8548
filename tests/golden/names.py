"""What things were called in records of before, and are called now: the one table by which records are compared.

A recipe of a golden case has the names of now; of a package that has those of before it is written with these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Keys of recipes.
RECIPE_KEYS = {
    "base": "base_model",
    "examples": "calibration",
    "layers": "tensor_weights",
    "repeats": "stability_repeats",
    "report": "test",
    "score": "validation",
}
#: Keys of ``soup.json``.
REPORT_KEYS = {"calibration": "calibration_errors", "held_out": "validation", "report": "test"}
#: Names that a Python program imports.
PUBLIC_NAMES = {
    "Barriers": "ConnectivityReport",
    "Foraged": "SearchResult",
    "Lineage": "LineageReport",
    "Verified": "VerificationReport",
    "barriers": "connectivity",
    "forage": "search",
}
#: Words in texts.
WORDS = {
    **{f"`{old}`": f"`{new}`" for old, new in RECIPE_KEYS.items()},
    "by: layer": "by: tensor",
    "forage": "search",
    "foraged": "searched",
    "held-out": "validation",
    "Held-out": "Validation",
    "report rows": "test rows",
    "the report '": "the test data '",
}
#: Codes of findings.
CODES = {
    "ancestor-apart": "base-tensors-unrelated",
    "ancestor-copied": "base-copied",
    "ancestor-found": "base-inferred",
    "ancestor-undeclared": "base-undeclared",
    "ancestor-unknown": "base-unknown",
    "ancestor-unreadable": "base-unreadable",
    "ancestors-differ": "bases-differ",
    "ancestors-loop": "base-undeclared",
    "heads-apart": "heads-unrelated",
    "no-donor": "file-unexplained",
    "parts-apart": "tensors-unrelated",
    "parts-drifted": "tensors-drifted",
    "scored-on-train": "evaluated-on-train",
    "second-order": "soup-expanded",
    "selected-on-report": "selected-on-test",
    "strangers": "unrelated",
}
WORDS |= {f"[{old}]": f"[{new}]" for old, new in CODES.items()}
_WORD = re.compile("|".join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True)))


def translated(value: Any, where: str = "") -> Any:
    """A record with the names of now.

    >>> translated({"soup.yaml": {"score": "the held-out rows"}})
    {'soup.yaml': {'validation': 'the validation rows'}}
    """
    if isinstance(value, str):
        if where == "code":
            return CODES.get(value, value)
        return _WORD.sub(lambda match: WORDS[match[0]], value)
    if isinstance(value, list):
        if where == "order of soup.yaml":
            return [RECIPE_KEYS.get(each, each) for each in value]
        return [translated(each) for each in value]
    if isinstance(value, dict):
        keys = {"soup.yaml": RECIPE_KEYS, "soup.json": REPORT_KEYS, "batch_norm": {"examples": "data"}}.get(where, {})
        return {keys.get(key, translated(key)): translated(each, key) for key, each in value.items()}
    return value


def as_before(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of now for a package of before."""
    keys = {new: old for old, new in RECIPE_KEYS.items()}
    return {keys.get(key, key): value for key, value in recipe.items()}
