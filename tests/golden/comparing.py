"""The differences between two records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from golden.names import translated

_MISSING = "<missing>"


def differences(before: Any, after: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place at which two values of JSON differ, with both."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            one, other = before.get(key, _MISSING), after.get(key, _MISSING)
            yield from differences(one, other, f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{where}/{number}")
    elif isinstance(before, list) and isinstance(after, list) and all(isinstance(each, str) for each in before + after):
        # Lines of a text: those that came or went, instead of all behind them.
        for kind, begin, end, other_begin, other_end in SequenceMatcher(None, before, after, False).get_opcodes():
            if kind != "equal":
                yield f"{where}/{begin}", before[begin:end], after[other_begin:other_end]
    elif type(before) is not type(after) or before != after:
        yield where, before, after


def compare(before: Path, after: Path) -> int:
    """Print how two records differ; 1 when they do."""
    one, other = (translated(json.loads(path.read_text())) for path in (before, after))
    count, touched = 0, set[str]()
    for where, was, now in differences(one, other):
        count += 1
        touched.add("/".join(where.split("/")[:3]))
        print(
            f"{where}\n  before: {json.dumps(was, ensure_ascii=False)}\n  after:  {json.dumps(now, ensure_ascii=False)}"
        )
    total = sum(len(one.get(title, {}).keys() | other.get(title, {}).keys()) for title in one.keys() | other.keys())
    print(f"{count} differences in {len(touched)} of {total} cases.")
    return int(count > 0)
