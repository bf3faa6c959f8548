"""What will be written, from headers alone: output files, their byte ranges, and where each comes from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from hf_soup.errors import IncompatibleError
from hf_soup.headers import FLOATS, ITEM_BYTES, TensorInfo

#: Bytes of output that are hashed as one; part of the definition of the digest, so it never changes.
BLOCK_BYTES = 4 << 20
#: Output files are cut at this size, whatever the number of processes.
MAX_FILE_BYTES = 5_000_000_000
#: torch's names of what can be written → safetensors' names.
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    Args:
        name: Its name, the donor's.
        dtype: As written.
        shape: Its shape.
        file: Which output file it is in.
        offset: Of its first byte in that file.
        parts: Where it lies in every source.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    parts: tuple[TensorInfo, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """In bytes, as written."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def averaged(self) -> bool:
        """False for integers and booleans, which pass when all sources agree."""
        return self.dtype in FLOATS

    @property
    def blocks(self) -> int:
        """How many blocks it is hashed in; an empty tensor has none."""
        return -(-self.size // BLOCK_BYTES)


@dataclass(frozen=True)
class OutputFile:
    """A file of the output: its name, its safetensors header (with the length before it) and its size in bytes."""

    name: str
    header: bytes = field(repr=False)
    size: int


@dataclass(frozen=True)
class Plan:
    """Output files and tensors, and what goes into them.

    Args:
        sources: ``model@revision`` of every source, in the order of the recipe.
        weights: Their shares, as given.
        method: Its name.
        parameters: Its parameters.
        tensors: In the order of the output.
        files: In order.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    parameters: Mapping[str, Any]
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    files: tuple[OutputFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)

    @property
    def dtype(self) -> str:
        """torch's name of the commonest floating-point type that is written."""
        held: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.averaged:
                held[tensor.dtype] = held.get(tensor.dtype, 0) + tensor.elements
        spelled = {value: key for key, value in DTYPES.items()}
        return spelled[max(held, key=lambda dtype: held[dtype])] if held else "float32"

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides the bytes of the output."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for the other processes of a world."""
        files = [{"name": file.name, "header": file.header.decode("latin-1"), "size": file.size} for file in self.files]
        return {**asdict(self), "files": files}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""

        def info(part: Mapping[str, Any]) -> TensorInfo:
            return TensorInfo(**{**part, "shape": tuple(part["shape"])})

        tensors = tuple(
            PlannedTensor(**{**t, "shape": tuple(t["shape"]), "parts": tuple(info(part) for part in t["parts"])})
            for t in values["tensors"]
        )
        files = tuple(OutputFile(f["name"], f["header"].encode("latin-1"), f["size"]) for f in values["files"])
        return cls(
            tuple(values["sources"]),
            tuple(values["weights"]),
            values["method"],
            dict(values["parameters"]),
            tensors,
            files,
        )

    def index(self) -> dict[str, Any] | None:
        """``model.safetensors.index.json``, or None for a single file."""
        if len(self.files) == 1:
            return None
        return {
            "metadata": {"total_size": sum(tensor.size for tensor in self.tensors)},
            "weight_map": {tensor.name: self.files[tensor.file].name for tensor in self.tensors},
        }


def make_plan(
    sources: Sequence[str],
    tensors: Sequence[Mapping[str, TensorInfo]],
    weights: Sequence[float],
    *,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Plan:
    """Lay out the output.

    Args:
        sources: ``model@revision`` of every source.
        tensors: For every source, its tensors under the names that the output will use; all have the same names.
        weights: Their shares.
        method, parameters: How they are combined.
        dtype: torch's name of the type to write; by default each tensor's common one, or the widest.
        max_file_bytes: Where output files are cut.

    Raises:
        IncompatibleError: A tensor is missing in a source, or has another shape.
    """
    laid: list[tuple[str, str, tuple[TensorInfo, ...]]] = []
    for name in dict.fromkeys(name for source in tensors for name in source):
        parts = tuple(source[name] for source in tensors if name in source)
        if len(parts) != len(tensors):
            lacking = next(label for label, source in zip(sources, tensors, strict=True) if name not in source)
            raise IncompatibleError(f"Cannot average '{name}': {lacking} does not have it.")
        if any(part.shape != parts[0].shape for part in parts):
            shown = "\n".join(f"  {label}  {part.shape}" for label, part in zip(sources, parts, strict=True))
            raise IncompatibleError(f"Cannot average '{name}': the ingredients disagree on its shape.\n{shown}")
        laid.append((name, _written(name, parts, dtype), parts))
    # The donor's own order, so that inputs are read forwards; wide types first, so that every tensor is aligned.
    laid.sort(key=lambda entry: (-ITEM_BYTES[entry[1]], entry[2][0].file, entry[2][0].offset, entry[0]))
    groups: list[list[tuple[str, str, tuple[TensorInfo, ...]]]] = [[]]
    held = 0
    for entry in laid:
        size = math.prod(entry[2][0].shape) * ITEM_BYTES[entry[1]]
        if groups[-1] and held + size > max_file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    planned, files = [], []
    for number, group in enumerate(groups):
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, written, parts in group:
            size = math.prod(parts[0].shape) * ITEM_BYTES[written]
            entries[name] = {
                "dtype": written,
                "shape": list(parts[0].shape),
                "data_offsets": [position, position + size],
            }
            position += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offset = len(header)
        for name, written, parts in group:
            planned.append(PlannedTensor(name, written, parts[0].shape, number, offset, parts))
            offset += planned[-1].size
        title = "model.safetensors"
        if len(groups) > 1:
            title = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        files.append(OutputFile(title, header, len(header) + position))
    return Plan(tuple(sources), tuple(weights), method, dict(parameters or {}), tuple(planned), tuple(files))


def _written(name: str, parts: Sequence[TensorInfo], dtype: str | None) -> str:
    """The type in which a tensor is written."""
    found = list(dict.fromkeys(part.dtype for part in parts))
    if all(each in FLOATS for each in found):
        if dtype is not None:
            return DTYPES[dtype]
        # Neither 16-bit type holds the other, so a mix of the two is written in the next wider one.
        return "F32" if set(found) == {"BF16", "F16"} else max(found, key=lambda each: ITEM_BYTES[each])
    if len(found) > 1:
        raise IncompatibleError(f"Cannot combine '{name}': its element types are {', '.join(found)}.")
    return found[0]
