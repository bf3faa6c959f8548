"""peft's rules of which modules an adapter changes, and with which alpha.

They are regular expressions that a stranger wrote, so their time is bounded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import regex  # as `re`, but its matches can be given a time

from hf_soup._util.text import strings
from hf_soup.errors import ResolveError

#: Seconds that all patterns of an adapter may take.
_SECONDS = 20


class PeftRules:
    """The rules of one adapter.

    Args:
        settings: ``adapter_config.json``.
        name: What errors call the adapter.
    """

    def __init__(self, settings: Mapping[str, Any], name: str) -> None:
        self._settings, self._name = settings, name
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._until = time.monotonic() + _SECONDS

    def is_target(self, module: str) -> bool:
        """Whether peft puts factors beside a module (its ``check_target_module_exists``)."""
        targets, excluded = self._settings.get("target_modules"), self._settings.get("exclude_modules")
        if excluded and self._names("exclude_modules", excluded, module):
            return False
        if targets is None or targets == "all-linear":  # the usual ones of the model
            return True
        return self._names("target_modules", targets, module) and self._is_in_layers(module)

    def alpha(self, module: str) -> object:
        r"""The :math:`\alpha` of a module: of the first pattern that its end matches, else ``lora_alpha``."""
        patterns = self._settings.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise refused(self._name, "alpha_pattern", patterns, "It should be a mapping of names to numbers.")
        matching = (a for key, a in patterns.items() if self._match("alpha_pattern", rf"(.*\.)?({key})$", module))
        return next(matching, self._settings.get("lora_alpha", 8))

    def _names(self, key: str, named: object, module: str) -> bool:
        """Whether a field means a module: an expression of its whole name, or a list of ends of names."""
        if isinstance(named, str):
            return self._match(key, rf"(?:{named})\Z", module) is not None
        if not isinstance(named, list):
            raise refused(self._name, key, named, "It should be a list of names, or one expression.")
        return any(f".{module}".endswith(f".{end}") for end in named)

    def _is_in_layers(self, module: str) -> bool:
        layers = self._settings.get("layers_to_transform")
        if layers is None or layers == [] or isinstance(self._settings.get("target_modules"), str):
            return True
        within = strings(self._settings.get("layers_pattern"))
        expressions = [rf"(?:^|.*?\.){each}\.(?P<idx>\d+)\." for each in within] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        numbers = (self._match("layers_pattern", each, module) for each in expressions)
        number = next((int(match["idx"]) for match in numbers if match), None)
        return number in (layers if isinstance(layers, list) else [layers])

    def _match(self, key: str, pattern: str, module: str) -> regex.Match[str] | None:
        try:
            if pattern not in self._compiled:
                re.compile(pattern)  # which is what peft takes; `regex` knows more
                if re.search(r"\{(?!\d*,?\d*\})", pattern):
                    raise re.error("a brace that counts nothing")
                self._compiled[pattern] = regex.compile(pattern)
            return self._compiled[pattern].match(module, timeout=max(1e-6, self._until - time.monotonic()))
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            hint = f"It is no regular expression ({error})."
        except TimeoutError:
            hint = f"To match its patterns took more than {_SECONDS} seconds."
        raise refused(self._name, key, self._settings.get(key), hint)


def require_ranks(settings: Mapping[str, Any], name: str) -> None:
    """Refuse ranks that peft refuses.

    Raises:
        ResolveError: One is no whole number above 0.
    """
    patterns = settings.get("rank_pattern") or {}
    ranks = list(patterns.values()) if isinstance(patterns, Mapping) else [patterns]
    for key, rank in (("r", settings.get("r", 8)), *(("rank_pattern", rank) for rank in ranks)):
        if type(rank) is not int or rank < 1:
            raise refused(name, key, rank, "A rank should be a whole number above 0.")


def refused(name: str, key: str, value: object, hint: str) -> ResolveError:
    """The error for a field of an adapter that cannot be followed."""
    return ResolveError(
        f"{name} is an adapter with `{key}: {value!r:.100}`, which is not known how to add up.",
        hint=hint,
        code="adapter",
    )
