"""One way of showing long work: a bar at a terminal, lines elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

#: Seconds between lines where there is no terminal.
_PAUSE = 10.0


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that several threads may move."""

    def update(self, n: float | None = 1) -> bool | None:
        """Move on by ``n``."""
        with self.get_lock():  # type: ignore[no-untyped-call]
            return super().update(n)


class _Lines(_Bar):
    """A bar as lines for a log: the first after ten seconds, so that short work says nothing."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print what a bar would show, without the bar."""
        now = self.format_dict
        if now["elapsed"] >= _PAUSE and msg != "":
            line = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
            if now["total"] is None:
                line = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} so far"
            print(self.format_meter(**{**now, "bar_format": line}), file=sys.stderr, flush=True)  # noqa: T201


def bar(desc: str, total: int | None, *, quiet: bool, unit: str = "B", initial: int = 0) -> tqdm[Any]:
    """Progress of ``total`` bytes (or other units) to stderr, with rate and time left.

    Args:
        desc: What is done.
        total: How much there is; None where that is not known before.
        quiet: Show nothing.
        unit: ``B`` is shown with its multiples.
        initial: How much is done already.
    """
    # The setting that huggingface_hub's own bars follow.
    unwanted = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    lines = not sys.stderr.isatty()
    kind = _Lines if lines else _Bar
    return kind(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit == "B",
        desc=desc,
        disable=quiet or total == 0 or unwanted,
        leave=False,
        mininterval=_PAUSE if lines else 0.1,
        miniters=1,
    )
