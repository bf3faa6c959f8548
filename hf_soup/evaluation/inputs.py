"""The preprocessed rows of data, as models take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.statistics import Ints

if TYPE_CHECKING:
    from torch import Tensor


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
