"""The HTTP library under the Hub's client: httpx up to huggingface_hub 1, httpx2 since; we use what both have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from huggingface_hub.errors import HfHubHTTPError

if TYPE_CHECKING:
    import httpx2 as httpx
else:
    # Both may be installed, and only the errors of one are raised: that of the client's own errors.
    httpx = import_module(HfHubHTTPError.__bases__[0].__module__)

__all__ = ["httpx"]
