"""One pinned model: where every tensor lies (file, offset, dtype, shape), on the Hub or in a folder."""

from __future__ import annotations

from dataclasses import dataclass

#: safetensors' names of element types → bytes an element; whatever is not here cannot be averaged.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies, from a safetensors header.

    Args:
        name: Its name in the file.
        dtype: As safetensors spells it, such as ``BF16``.
        shape: Its shape.
        file: The file's path in the repo or folder.
        offset: Of its first byte, counted from the start of the file.
        size: In bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int
