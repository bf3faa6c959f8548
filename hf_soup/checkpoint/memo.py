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
from hf_soup.hub import keep_note, own_cache_folder

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
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return _answer(json.loads(note.read_text())["answer"])  # type: ignore[no-any-return]
    said = answer()
    keep_note(note, json.dumps({"answer": said}))
    return said


def _answer(kept: Any) -> Any:
    """What was kept, as it was given; raises ValueError for anything else."""
    if isinstance(kept, bool):
        return kept
    if not isinstance(kept, list) or not all(
        isinstance(text, str) for each in kept for text in (each if isinstance(each, list) else [each])
    ):
        raise ValueError("it was written by another program")
    return [tuple(each) if isinstance(each, list) else each for each in kept]


@cache
def _asked() -> list[str]:
    """Who answers: the library's version, and the code that asks it."""
    here = Path(__file__).parent
    code = b"".join((here / name).read_bytes() for name in ("config.py", "labels.py", "parameters.py"))
    return [version("transformers"), hashlib.sha256(code).hexdigest()]
