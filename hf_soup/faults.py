"""What is wrong with a recipe, in the words of somebody who writes YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from hf_soup.errors import shortened, without_credentials

_MOST_FAULTS = 50
#: pydantic's words, and those of somebody who writes YAML.
_YAML_WORDS = {"Tuple": "List", "tuple": "list", "(dictionary|object)( or instance of [A-Za-z]+)?": "mapping"}


def explained(every: Sequence[Any], keys_at: Callable[[Sequence[int | str]], set[str]], name: str) -> str:
    """All faults of a recipe, a line each, with the key, the value and what is allowed.

    Args:
        every: As pydantic lists them.
        keys_at: The keys that a recipe may have where a fault lies.
        name: What the recipe is called.
    """
    lines = [f"Cannot read {name}:"]
    faults = every[:_MOST_FAULTS]
    for fault in faults:
        where = ".".join(shortened(str(part), 80) for part in fault["loc"]).replace("score.0", "score") or "recipe"
        message = fault["msg"].removeprefix("Value error, ")
        for theirs, ours in _YAML_WORDS.items():
            message = re.sub(theirs, ours, message)
        within = [other for other in faults if other["loc"][:-1][: len(fault["loc"])] == fault["loc"]]
        if fault["type"] == "too_short" and within:
            continue  # only because what is wrong in it was left out
        if fault["type"] == "extra_forbidden":
            known = sorted(keys_at(fault["loc"]))
            message = "unknown key" + (f"; known here: {', '.join(known)}" if known else "")
        elif fault["type"] != "value_error" and fault["type"] != "missing":
            message = f"{message} (it is {_shown(fault['input'])})"
        lines.append(f"  {where}: {shortened(message, 2000)}")
    if len(every) > len(faults):
        lines.append(f"  … and {len(every) - len(faults):,} more faults")
    return "\n".join(lines)


def _shown(value: object) -> str:
    try:
        # Before it is cut, as half an address is none.
        return without_credentials(json.dumps(value, default=str))[:80]
    except (ValueError, TypeError, RecursionError):  # a number of a million digits, keys that are none
        return f"a {type(value).__name__} that cannot be written down"
