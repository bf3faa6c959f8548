"""How many tokens the tokenizers of several models have, and whether they are one tokenizer with tokens added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tokens:
    """What the tokenizers of ingredients have in common.

    Args:
        counts: How many tokens each has: the largest number, and one; all zero where they are the same files. Empty
            where not all bring a tokenizer that could be compared.
        difference: A sentence about what was added, where anything was; where they were not compared, why not.
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
        """How many rows of an ingredient stand for what the speaker's rows stand for; padding is what both call so.

        >>> Tokens((18, 19)).known(1, 0, 24), Tokens((18, 18)).known(1, 0, 24)
        (18, 24)
        """
        ours, theirs = self.counts[number], self.counts[speaker]
        return rows if ours == theirs else min(rows, ours, theirs)

    def lacking(self, names: Sequence[str], rows: Sequence[int]) -> str:
        """A sentence about the first whose table is shorter than its tokenizer, if one's is.

        >>> Tokens((20, 18)).lacking(["a", "b"], [18, 18])
        'a has rows for 18 tokens, but its tokenizer has 20. Resize its embeddings, or leave it out.'
        """
        found = (each for each in zip(names, rows, self.counts, strict=True) if each[1] < each[2])
        name, has, count = next(found, ("", 0, 0))
        said = f"{name} has rows for {has:,} tokens, but its tokenizer has {count:,}."
        return f"{said} Resize its embeddings, or leave it out." if name else ""

    def only(self, kept: Sequence[int]) -> Tokens:
        """Those of some ingredients."""
        return Tokens(tuple(self.counts[number] for number in kept) if self.counts else (), self.difference)

    def shown(self, number: int) -> str:
        """How many an ingredient has, for a list."""
        return f"{self.counts[number]:,} tokens, " if any(self.counts) else ""


def token_ids(configs: Sequence[Mapping[str, Any]], speaker: int) -> str:
    """Which numbers of special tokens come with one config, where others have another.

    >>> token_ids([{"pad_token_id": 0, "eos_token_id": 3}, {"pad_token_id": 18, "eos_token_id": 3}], 1)
    ', with pad_token_id 18'
    """
    keys = sorted({key for config in configs for key in config if key.endswith("_token_id")})
    return "".join(
        f", with {key} {configs[speaker].get(key)}"
        for key in keys
        if any(config.get(key) != configs[speaker].get(key) for config in configs)
    )
