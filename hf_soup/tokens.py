"""How many tokens the tokenizers of several models have, and whether they are one tokenizer with tokens added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """What the tokenizers of ingredients have in common.

    Args:
        counts: How many tokens each has: the largest number, and one; all zero where they are the same files. Empty
            where not all bring a tokenizer that could be compared.
        difference: A sentence about what was added, where anything was.
    """

    counts: tuple[int, ...] = ()
    difference: str = ""

    @property
    def compared(self) -> bool:
        """Whether every ingredient's tokenizer is known to be the same, or the same with tokens added."""
        return bool(self.counts)

    @property
    def differ(self) -> bool:
        """Whether some have more tokens than others."""
        return len(set(self.counts)) > 1

    def speaker(self, vocabulary: str, rows: Sequence[int] | None = None) -> int:
        """Whose tokenizer a soup has: the largest for ``union``, the smallest for ``base``.

        >>> Tokens((5, 7, 7)).speaker("union", [8, 8, 9]), Tokens((5, 7, 7)).speaker("base")
        (2, 0)
        """
        sizes = list(zip(self.counts, rows or self.counts, strict=True))
        wanted = max(sizes) if vocabulary == "union" else min(sizes)
        return sizes.index(wanted)

    def known(self, number: int, speaker: int, rows: int) -> int:
        """How many rows of an ingredient stand for what the speaker's rows stand for."""
        return min(rows, self.counts[number]) if self.counts[number] < self.counts[speaker] else rows

    def only(self, kept: Sequence[int]) -> Tokens:
        """Those of some ingredients."""
        return Tokens(tuple(self.counts[number] for number in kept) if self.counts else (), self.difference)

    def shown(self, number: int) -> str:
        """How many an ingredient has, for a list."""
        return f"{self.counts[number]:,} tokens, " if any(self.counts) else ""
