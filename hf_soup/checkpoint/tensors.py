"""Between safetensors' bytes and torch's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Buffer


#: safetensors' names of element types → torch's.
TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def bytes_of(buffer: Tensor) -> memoryview:
    """A tensor's memory, for reading into and writing from."""
    # numpy's stubs do not say that an array is a buffer.
    return memoryview(cast("Buffer", buffer.numpy()))


def widened(values: Tensor, written: str) -> Tensor:
    """What is read for a tensor that is written in a type: where that is float64, all arithmetic is in it too.

    >>> widened(torch.ones(1, dtype=torch.bfloat16), "F64").dtype
    torch.float64
    """
    return values.double() if written == "F64" else values


def keep_freed() -> None:
    """Let the C library keep what is freed, as new pages for every slice would cost as much as the arithmetic.

    glibc maps what is larger than the largest that it has seen freed, up to 32 MiB, and gives it back at once.
    """
    torch.empty((32 << 20) - 8192, dtype=torch.uint8)
