"""What a check finds: a code for scripts, a sentence for people, and whether it forbids to average."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Args:
        code: For scripts, such as ``labels-unknown``.
        message: For people, with the values and what to do.
        ingredients: Whom it is about.
        refuses: Whether it alone forbids to average.
        allowed: Whether the recipe accepts it.
    """

    code: str
    message: str
    ingredients: tuple[str, ...] = ()
    refuses: bool = False
    allowed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        severity = "refusal" if self.refuses else "allowed" if self.allowed else "warning"
        return {
            "code": self.code,
            "severity": severity,
            "message": self.message,
            "ingredients": list(self.ingredients),
        }


def with_allowed(reasons: Sequence[Finding], allow: Collection[str]) -> list[Finding]:
    """What was found, where a recipe accepts some codes.

    >>> [reason.refuses for reason in with_allowed([Finding("unrelated", "…", refuses=True)], ["unrelated"])]
    [False]
    """
    return [replace(each, refuses=False, allowed=True) if each.code in allow else each for each in reasons]


def ingredients_set_apart(reason: Finding, names: Sequence[str]) -> set[str]:
    """Whom a reason sets apart from the rest: of a pair with the first model the other; nobody where it names all."""
    who = set(reason.ingredients)
    if reason.code == "not-from-base":
        return who
    if who >= set(names):
        return set()
    return who - {names[0]} or who
