"""The preprocessed rows of data, as models take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.statistics import Ints

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes that the logits of a batch may take, in float32; a row alone may take more.
_LOGIT_BYTES = 1 << 29


@dataclass(frozen=True)
class Inputs:
    """The rows of ``kept`` as a model takes them: pixels, ``(channels, height, width)`` float32 a row, or token
    numbers, ``(names, tokens)`` int32 a row, which the tokenizer pads when a batch is made.
    """

    stored: EncodedRows
    kept: Ints
    tokenizer: Any = None

    @property
    def can_pad(self) -> bool:
        """Whether rows of several lengths can be in one batch; pixels are all of one shape."""
        return self.tokenizer is None or self.tokenizer.pad_token_id is not None

    @property
    def sizes(self) -> Ints:
        """``(rows,)``: numbers in each row."""
        return self.stored.sizes[self.kept]

    def batch(self, places: Ints, device: str = "cpu") -> dict[str, Tensor]:
        """The model's keyword arguments for places in ``kept``, in their order; of texts padded to the longest."""
        import torch

        rows = self.stored.rows(self.kept[places])
        if self.tokenizer is None:
            return {"pixel_values": torch.from_numpy(np.stack(rows)).to(device)}
        lines = [row.tolist() for row in rows]
        chosen = {name: [row[line] for row in lines] for line, name in enumerate(self.stored.names)}
        return {name: value.to(device) for name, value in self.tokenizer.pad(chosen, return_tensors="pt").items()}

    def batches(self, places: Ints, size: int) -> list[Ints]:
        """Places in their order, in batches of a size; one at a time where the tokenizer cannot pad."""
        step = size if self.can_pad else 1
        return [places[begin : begin + step] for begin in range(0, len(places), step)]

    @property
    def answers(self) -> Ints:
        """``(rows,)``: how many answers, each a distribution over classes, a model gives to each row."""
        return np.ones(len(self.kept), dtype=np.int64)

    def logit_bytes(self, places: Ints) -> int:
        """What a model's answers to one of some rows take in float32; next to nothing where it gives one to each."""
        return 0

    def log_probabilities(self, given: Any, places: Ints) -> Tensor:
        """``(answers, classes)`` float32: what a model says to some rows, in their order."""
        logs: Tensor = given.logits.float().log_softmax(-1)
        return logs


@dataclass(frozen=True)
class TextInputs(Inputs):
    """Texts as a causal language model takes them, from the first token on, as far as it reads.

    Its answers are the distributions of the next token: one after each token.

    Args:
        stored: Token numbers, ``(1, tokens)`` a row, with the one that begins texts before them.
        longest: How many tokens the model reads.
        vocabulary: How many it knows.
    """

    longest: int = field(kw_only=True)
    vocabulary: int = field(kw_only=True)

    @property
    def can_pad(self) -> bool:
        """What stands to the right of a token changes nothing there."""
        return True

    @property
    def sizes(self) -> Ints:
        """``(rows,)``: tokens that are read of each."""
        return np.minimum(super().sizes, self.longest)

    @property
    def answers(self) -> Ints:
        """One for each token."""
        return self.sizes

    def batch(self, places: Ints, device: str = "cpu") -> dict[str, Tensor]:
        """As `Inputs.batch`, filled up with token 0 on the right."""
        return {
            "input_ids": right_padded([row[0, : self.longest] for row in self.stored.rows(self.kept[places])]).to(
                device
            )
        }

    def batches(self, places: Ints, size: int) -> list[Ints]:
        """Places in their order, in batches of a size whose logits have room."""
        longest = int(self.sizes[places].max(initial=1))
        return super().batches(places, rows_with_room(longest, self.vocabulary, size))

    def logit_bytes(self, places: Ints) -> int:
        """Of the longest text."""
        return 4 * int(self.sizes[places].max(initial=0)) * self.vocabulary

    def log_probabilities(self, given: Any, places: Ints) -> Tensor:
        """Those of all tokens of a text, text after text."""
        import torch

        texts = zip(given.logits, self.sizes[places].tolist(), strict=True)
        return torch.cat([logits[:size] for logits, size in texts]).float().log_softmax(-1)


def right_padded(rows: Sequence[NDArray[Any]]) -> Tensor:
    """``(rows, longest)`` int64: token numbers, filled up with 0 on the right, which a causal model does not see."""
    import torch

    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for line, tokens in zip(padded, rows, strict=True):
        line[: len(tokens)] = tokens
    return torch.from_numpy(padded)


def rows_with_room(length: int, vocabulary: int, most: int) -> int:
    """How many rows of so many tokens may be in one batch, at most ``most``: logits have a bound of bytes."""
    return max(1, min(most, _LOGIT_BYTES // (4 * length * vocabulary)))
