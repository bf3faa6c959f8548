"""What is kept on disk from one run to the next.

What transformers once said about a config is: importing it takes longer than averaging a small model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hf_soup._util.version import version
from hf_soup.hub import keep_note, own_cache_folder, read_note

_T = TypeVar("_T")


def remembered(question: str, about: object, answer: Callable[[], _T]) -> _T:
    """``answer()``, or what it was when the same was asked before of the same transformers and the same code of ours.

    Args:
        question: Its name.
        about: All that the answer depends on, as plain data.
        answer: Gives yes or no, or a list of texts or of tuples of texts. What it raises is raised, and not remembered.
    """
    text = json.dumps([question, about, _asked()], sort_keys=True)
    note = own_cache_folder() / "transformers" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError):
        kept: Any = json.loads(read_note(note))
        if isinstance(kept, list):
            kept = [tuple(each) if isinstance(each, list) else each for each in kept]
        return kept  # type: ignore[no-any-return]
    said = answer()
    keep_note(note, json.dumps(said))
    return said


@cache
def _asked() -> list[str]:
    """Who answers: the library's version, and the code that asks it."""
    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in ("config.py", "labels.py", "parameters.py"))
    return [version("transformers"), hashlib.sha256(code).hexdigest()]
