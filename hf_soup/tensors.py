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
