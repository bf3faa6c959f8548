"""What a model's files say before any weight is read: safetensors headers, indexes, configs, cards.

All of it is strangers' text, so it is bounded and validated before it is believed.
"""

from __future__ import annotations

import json
import math
import re
import struct
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, chain
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from hf_soup._util.text import is_writable, some
from hf_soup._util.yaml import parse_yaml
from hf_soup.errors import ResolveError
from hf_soup.hub import MAX_TEXT

#: safetensors' names of element types that can be averaged or passed through → bytes an element.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
#: Those that are averaged.
FLOATS = ("F64", "F32", "F16", "BF16")
#: What torch calls the number of batches of which a layer of batch normalisation has statistics.
COUNT = "num_batches_tracked"
#: Those that only quantised checkpoints use; known so that they can be refused by name.
_QUANTISED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")

_MAX_HEADER = 100_000_000  # safetensors' own limit
_MAX_INDEX = 1 << 25  # 300,000 tensors
_MAX_NAME, _MAX_DIMENSIONS = 500, 32
#: Which safetensors takes for no whole number, and json for 0.
_MINUS_ZERO = re.compile(rb"[\[,]\s*-0\s*[\],]")
FIRST_READ = 100_000  # nearly every header fits, so nearly every file costs one request

#: ``read(file, start, stop)``: bytes of a file, wherever it is.
Read = Callable[[str, int, int], bytes]


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of a tensor that lie next to each other in a file and in the output: which, where they go, how many."""

    source: int
    target: int
    count: int


class Factor(NamedTuple):
    """A factor of a low-rank update: the byte at which it begins in its file, its type and shape.

    Of one that stands in every so many columns of a matrix, as of experts that are stacked, ``step`` says how many; and
    of some columns of one, ``width`` says how many there are.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]
    step: int = 1
    width: int = 0


class LowRankUpdate(NamedTuple):
    r"""What an adapter adds to a matrix: :math:`\Delta W = s\,LR`, of ``(rows, rank)`` and ``(rank, columns)``.

    Of a DoRA each row of :math:`W + \Delta W` is then scaled to a length, or each column where ``turned`` (Liu et al.,
    arXiv:2402.09353).

    Args:
        file: Where the factors lie.
        left, right: :math:`L` and :math:`R`; stored the other way round where ``turned``, as of a layer whose weight
            is stored as (in, out).
        scale: :math:`s`.
        turned: Whether it is so.
        lengths: Of a DoRA, those of the rows, or columns.
    """

    file: str
    left: Factor
    right: Factor
    scale: float
    turned: bool
    lengths: Factor | None = None


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
        rows: Where rows go in the output, in its order, if not each to its own place; shape and size are then the
            output's, and rows of it that are not among these are ones that this model does not have.
        update: What is added to what lies there, of an adapter.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size: int
    rows: tuple[RowRange, ...] = ()
    update: LowRankUpdate | None = None

    def moved(self, rows: Sequence[RowRange], length: int) -> TensorInfo:
        """The same tensor as seen from an output of ``length`` rows.

        >>> TensorInfo("head", "F32", (2, 8), "m", 64, 64).moved([RowRange(1, 0, 1), RowRange(0, 1, 1)], 2).rows
        (RowRange(source=1, target=0, count=1), RowRange(source=0, target=1, count=1))
        """
        shape = (length, *self.shape[1:])
        size = math.prod(shape) * ITEM_BYTES[self.dtype]
        return replace(self, shape=shape, size=size, rows=tuple(rows))


class Header(tuple[TensorInfo, ...]):
    """The tensors of a file, in order. Files of one name with the same header share one object, which is told apart
    from others as that, as comparing a hundred thousand tensors would take longer than reading them."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        """Whether it is the same object."""
        return self is other


def reader_of(path: Path) -> Read:
    """Reads the one file at a path, whatever it is called in its model."""

    def read(_: str, start: int, stop: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    return read


def read_header(read: Read, file: str, size: int, name: str) -> Header:
    """The tensors of a safetensors file, validated: bounded, in range, without holes or overlaps.

    Args:
        read: Gives bytes of a file.
        file: Its path.
        size: Its size in bytes.
        name: What errors call the model.

    Raises:
        ResolveError: The header is not one that safetensors would write.
    """
    try:
        return _parsed_header(read, file, size, name)
    except _InvalidError as error:
        raise ResolveError(
            f"{name}: {file} is not a valid safetensors file: {error}.",
            hint="It is damaged or was cut off; download or upload it again.",
        ) from None


def _parsed_header(read: Read, file: str, size: int, name: str) -> Header:
    if size < 10:
        raise _InvalidError(f"it has {size} bytes")
    start = read(file, 0, min(size, FIRST_READ))
    (length,) = struct.unpack("<Q", start[:8])
    if length > _MAX_HEADER or length + 8 > size:
        raise _InvalidError(f"its header says it is {length:,} bytes long, in a file of {size:,}")
    if len(start) < length + 8:
        start += read(file, len(start), length + 8)
    text = start[8 : 8 + length]
    return _once(("header", file, size, sha256(text).digest()), lambda: _tensors(text, file, size, name))


_PARSING = threading.Lock()
_parsed: OrderedDict[object, Any] = OrderedDict()
_T = TypeVar("_T")


def _once(key: object, parse: Callable[[], _T]) -> _T:
    """What a text says, by its sha256: fine-tunes of one ancestor mostly have the same, and share what was read."""
    with _PARSING:
        if key not in _parsed:
            _parsed[key] = parse()
            if len(_parsed) > 128:
                _parsed.popitem(last=False)
        return _parsed[key]  # type: ignore[no-any-return]


class _InvalidError(Exception):
    """Why a header is none that safetensors would write."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping; where a key stands twice in it, readers do not agree on which of the two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise _InvalidError(f"its header has {twice!r:.80} twice")
    return found


def _is_texts(value: object) -> bool:
    """Whether it is a mapping from texts to texts, without halves of characters: what safetensors reads."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        return False
    return is_writable("".join((*value, *value.values())))


def _tensors(text: bytes, file: str, size: int, name: str) -> Header:
    """The tensors of a header."""
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once_each)
    except (ValueError, RecursionError):
        raise _InvalidError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _InvalidError("its header is not a mapping")
    if _MINUS_ZERO.search(text):
        raise _InvalidError("its header has a number -0")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_texts(metadata):
        raise _InvalidError("its '__metadata__' is no mapping from texts to texts")
    data, tensors = 8 + len(text), []
    for tensor, entry in header.items():
        if len(tensor) > _MAX_NAME:
            raise _InvalidError(f"a tensor's name has {len(tensor):,} characters")
        if not tensor.isprintable():
            raise _InvalidError(f"a tensor's name is {tensor!r}")
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            known = len(entry) == 3  # what else stood there could be what safetensors cannot read
        except (TypeError, KeyError, ValueError):
            known = False
        if not known or not isinstance(dtype, str) or len(shape) > _MAX_DIMENSIONS:
            raise _InvalidError(f"the entry of '{tensor}' is {json.dumps(entry)[:80]}")
        if dtype in _QUANTISED:
            raise ResolveError(
                f"{name} is quantised: '{tensor}' is stored as {dtype}.",
                hint="Averages need the weights before quantisation; use the original model.",
                code="quantised",
            )
        if dtype not in ITEM_BYTES:
            raise _InvalidError(f"'{tensor}' has the element type {dtype[:80]!r}")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise _InvalidError(f"the shape or offsets of '{tensor}' are not whole numbers: {json.dumps(entry)[:80]}")
        if 0 in shape and max(accumulate(shape, mul)) >= 2**64:
            raise _InvalidError(f"the shape of '{tensor}' is {shape}, too large to be counted")
        expected = math.prod(shape) * ITEM_BYTES[dtype]
        if end - begin != expected:
            raise _InvalidError(
                f"'{tensor}' of shape {shape} and type {dtype} needs {expected:,} bytes, not {end - begin:,}"
            )
        tensors.append(TensorInfo(tensor, dtype, shape, file, data + begin, expected))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size))
    position = data
    for info in tensors:
        if info.offset != position:
            relation = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise _InvalidError(f"'{info.name}' {relation}")
        position += info.size
    if position != size:
        raise _InvalidError(f"its header describes {position:,} bytes, the file has {size:,}")
    return Header(tensors)


def joined(headers: tuple[Header, ...], name: str) -> dict[str, TensorInfo]:
    """The tensors of all files of a model, which ``name`` says, by their names.

    Raises:
        ResolveError: Two have the same name.
    """

    def join() -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for tensor in chain(*headers):
            one = tensors.setdefault(tensor.name, tensor)
            if one is not tensor:
                raise ResolveError(
                    f"{name} has the tensor '{one.name}' twice: in {one.file} and {tensor.file}.",
                    hint="The upload mixes two versions of the model; ask its owner.",
                )
        return tensors

    return _once(("joined", headers), join)


def _read_whole(read: Read, file: str, files: Mapping[str, int], name: str, most: int) -> bytes:
    """A file from its first byte to its last, so that it is compared with what the Hub states."""
    if files[file] > most:
        raise ResolveError(
            f"{name}: {file} has {files[file]:,} bytes, more than any such file needs; at most {most:,} are read."
        )
    return read(file, 0, files[file])


def read_json_value(read: Read, file: str, files: Mapping[str, int], name: str) -> Any:
    """What a small JSON file holds."""
    text = _read_whole(read, file, files, name, MAX_TEXT)
    try:
        value = json.loads(text.decode()) if text else None  # as the libraries read it: in UTF-8, without a mark
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters could not be written again
    except (ValueError, RecursionError) as error:
        raise ResolveError(f"{name}: {file} is not valid JSON ({error}).") from None
    return value


def read_json(read: Read, file: str, files: Mapping[str, int], name: str) -> dict[str, Any]:
    """A small JSON file that must be a mapping."""
    value = read_json_value(read, file, files, name)
    if not isinstance(value, dict):
        raise ResolveError(f"{name}: {file} is not a mapping but {type(value).__name__}.")
    return value


def read_index(read: Read, file: str, files: Mapping[str, int], name: str) -> dict[str, str]:
    """The weight file of each tensor by an index; all of them are there."""
    text = _read_whole(read, file, files, name, _MAX_INDEX)
    try:
        places: dict[str, str] = json.loads(text)["weight_map"]
        valid = all(isinstance(shard, str) for shard in places.values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ResolveError(f"{name}: {file} has no weight_map from tensors to files.")
    # Only files that the listing shows are ever opened, so a path that leads elsewhere ends here as well.
    absent = sorted(set(places.values()) - set(files))
    if absent:
        raise ResolveError(
            f"{name}: {file} names {len(absent)} files that are not there: {some(absent)}.",
            hint="The upload is incomplete; ask its owner, or name another revision.",
        )
    return places


def front_matter(data: bytes) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; a card that cannot be parsed says nothing."""
    found = re.match(r"\A\s*---\r?\n(.*?)\r?\n---", data.decode("utf-8-sig", "replace"), re.DOTALL)
    try:
        value = parse_yaml(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


#: torch's names of what can be written → safetensors' names.
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
