"""What is refused because of the system or its settings, before anything else happens."""

from __future__ import annotations

import os
import sys
from urllib.parse import urlsplit

from hf_soup.errors import ResolveError, SoupError


def require_endpoint() -> None:
    """Refuse a ``HF_ENDPOINT`` that is no address, which the client would fail at while it is imported.

    Raises:
        ResolveError: It is none.
    """
    address = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(address).port
    except ValueError:
        shown = address.rpartition("@")[2]  # what stands before is nobody's business
        raise ResolveError(
            f"HF_ENDPOINT is no address: '{shown}'.",
            hint="Unset it for huggingface.co, or set it to one such as http://127.0.0.1:8000.",
        ) from None


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
