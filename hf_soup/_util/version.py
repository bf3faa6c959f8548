"""Versions that go into soups, into what is remembered, and into what the Hub is told."""

import importlib.metadata
from functools import cache

__version__ = "0.1.0"

#: That of an installed package. Its metadata are parsed once, and not for every soup.
version = cache(importlib.metadata.version)
