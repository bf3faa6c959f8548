"""Running Python of the user's, or of another package: whatever it raises is one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hf_soup._util.text import first_line
from hf_soup.errors import ScoringError, SoupError


@contextmanager
def users_code(message: str, error: type[SoupError] = ScoringError, hint: str = "") -> Iterator[None]:
    """Raise what goes wrong in a function of the user's as one error that begins with ``message``.

    Errors of this package stay as they are, and so does Ctrl-C.

    >>> with users_code("The function 'mine:score' fails"):
    ...     {}["accuracy"]
    Traceback (most recent call last):
    hf_soup.errors.ScoringError: The function 'mine:score' fails: KeyError: 'accuracy'
    """
    try:
        yield
    except (SoupError, KeyboardInterrupt):
        raise
    except BaseException as caught:  # a user's code may raise anything, SystemExit and classes of its own too
        raise error(f"{message}: {type(caught).__name__}: {first_line(caught)}", hint) from caught
