"""Messages of the package, which whoever uses it may show."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from hf_soup._util.text import printable
from hf_soup.errors import presentable

#: The level of messages about what would refuse or warn, and was allowed: above notes, below warnings.
ALLOWED = 25
logging.addLevelName(ALLOWED, "ALLOWED")


class PrintableLogger(logging.LoggerAdapter[logging.Logger]):
    """A module's logger: a stranger's text in a message must not reach a terminal as commands to it."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        """The message as it may be shown."""
        return printable(presentable(str(msg))), kwargs
