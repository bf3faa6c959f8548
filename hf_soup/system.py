"""What operating systems do not have alike."""

from __future__ import annotations

import os
import sys

from hf_soup.errors import SoupError


def usable_cores() -> int:
    """How many cores this process may run on; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_supported() -> None:
    """Refuse Windows.

    It has no file locks, positioned reads and writes, and renames of what is open, as they are needed here.

    Raises:
        SoupError: This is Windows.
    """
    if sys.platform == "win32":
        raise SoupError(
            "hf-soup does not run on Windows: it needs locks, reads and renames of files that Windows does not have.",
            hint="Use it in WSL, the Windows Subsystem for Linux: `wsl --install`, and install hf-soup there.",
        )
