"""Where every element of the output lies in the sources: output files, runs of tensors, pieces, units of work.

All of it comes from headers, before the first weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from hf_soup.checkpoint import DTYPES, FLOATS, ITEM_BYTES, RowRange, TensorInfo
from hf_soup.errors import IncompatibleError
from hf_soup.recipe import MethodCall


@dataclass(frozen=True, slots=True)
class Part:
    """Where the elements of a run lie in one source.

    Args:
        file: In which.
        offset: Of the first.
        dtype: Their type there.
        rows: Where rows of the run's one tensor come from, if not all of them from the same place: alignments move
            rows, and not every source has all of them.
    """

    file: str
    offset: int
    dtype: str
    rows: tuple[RowRange, ...] = ()


class Piece(NamedTuple):
    """Elements of a run that lie together in all sources that have them: source number → offset of the first."""

    begin: int
    end: int
    offsets: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors that follow each other in the output and in every source, so that they are read and written as one.

    A model of a hundred thousand small tensors that all sources store alike is a run for each file.

    Args:
        first, stop: Numbers of its tensors, none of them empty, all of one dtype.
        dtype: As written.
        file: Which output file it is in.
        offset: Of its first byte in that file.
        elements: How many numbers it holds.
        parts: Where it lies in every source; None in those that do not have it.
        row: How many numbers a row has, where parts speak of rows.
        whole: Whether its one tensor is worked on at once.
    """

    first: int
    stop: int
    dtype: str
    file: int
    offset: int
    elements: int
    parts: tuple[Part | None, ...]
    row: int = 1
    whole: bool = False

    @property
    def averaged(self) -> bool:
        """As its tensors."""
        return self.dtype in FLOATS

    @property
    def patched(self) -> bool:
        """Whether sources lack some of it, or hold its rows in another order."""
        return any(part is None or part.rows for part in self.parts)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types in the sources that have it."""
        return tuple([part.dtype for part in self.parts if part])

    def reach(self, part: Part, end: int) -> int:
        """Up to where a source's file must be here for the elements before ``end``; for moved rows, all of them."""
        last = max(rows.source + rows.count for rows in part.rows) * self.row if part.rows else end
        return part.offset + last * ITEM_BYTES[part.dtype]

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """The elements from ``begin`` to ``end`` in pieces."""
        cuts = {begin, end}
        for part in self.parts:
            for rows in part.rows if part else ():
                edges = (rows.target * self.row, (rows.target + rows.count) * self.row)
                cuts.update(edge for edge in edges if begin < edge < end)
        for start, stop in pairwise(sorted(cuts)):
            offsets = {}
            for number, part in enumerate(self.parts):
                if part is not None and (element := self._element(part, start)) is not None:
                    offsets[number] = part.offset + element * ITEM_BYTES[part.dtype]
            yield Piece(start, stop, offsets)

    def slices(self, begin: int, end: int, step: int) -> Iterator[list[Piece]]:
        """The elements from ``begin`` to ``end`` in slices of at most ``step``, each of one piece, or where all sources
        have all pieces, as of a tensor that is worked on whole, of several.
        """
        if self.whole:
            yield from (list(self.pieces(start, min(end, start + step))) for start in range(begin, end, step))
            return
        for piece in self.pieces(begin, end):
            for start in range(piece.begin, piece.end, step):
                moved = {
                    source: offset + (start - piece.begin) * ITEM_BYTES[part.dtype]
                    for source, offset in piece.offsets.items()
                    if (part := self.parts[source])
                }
                yield [Piece(start, min(piece.end, start + step), moved)]

    def _element(self, part: Part, element: int) -> int | None:
        """Which element of a source's tensor an element of the run is."""
        if not part.rows:
            return element
        row = element // self.row
        rows = part.rows[bisect_right(part.rows, row, key=lambda rows: rows.target) - 1]
        if not rows.target <= row < rows.target + rows.count:
            return None
        return element + (rows.source - rows.target) * self.row


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Blocks of a run that are finished, noted and checked together: 16 MiB, or what is left of the run.

    Args:
        run: Its number.
        begin, end: Elements of the run.
        tensor, block: Where its first block belongs.
        size: In bytes, as written.
    """

    run: int
    begin: int
    end: int
    tensor: int
    block: int
    size: int


#: Name and type of a tensor of the output, its places where there are any, and its place in every source.
Laid = tuple[str, str, tuple[TensorInfo, ...], Sequence[TensorInfo | None]]


#: What tensors of one run have in common: shares of their own, how they are combined, and what kind of method that is.
Own = tuple[Sequence[float] | None, MethodCall, str]


def cut(laid: Sequence[Laid], max_file_bytes: int) -> list[list[Laid]]:
    """Tensors in files: a new one where the next tensor would not fit."""
    groups: list[list[Laid]] = [[]]
    held = 0
    for entry in laid:
        size = math.prod(entry[2][0].shape) * ITEM_BYTES[entry[1]]
        if groups[-1] and held + size > max_file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    return groups


def runs_of(group: Sequence[Laid], file: int, first: int, offset: int, own: Callable[[str, str], Own]) -> list[Run]:
    """The runs of one output file, whose first tensor has the number ``first`` and begins at ``offset``."""
    runs: list[Run] = []
    begin = elements = 0
    ends: tuple[tuple[str, int, str], ...] = ()  # where the run ends in every source
    common: Own | None = None

    def close(stop: int) -> None:
        nonlocal offset, elements
        if stop > begin:
            _, written, having, places = group[begin]
            parts = tuple([Part(at.file, at.offset, at.dtype, at.rows) if at else None for at in places])
            row = math.prod(having[0].shape[1:])
            run = Run(first + begin, first + stop, written, file, offset, elements, parts, row)
            if common is not None and common[2] == "whole":
                # One that some lack, or some rows of which, is averaged.
                whole = all(len(piece.offsets) == len(parts) for piece in run.pieces(0, elements))
                run = replace(run, whole=whole)
            runs.append(run)
            offset += elements * ITEM_BYTES[written]
        elements = 0

    for number, (name, written, parts, places) in enumerate(group):
        if not parts[0].size:
            close(number)
            begin, ends = number + 1, ()
            continue
        starts = tuple([(part.file, part.offset, part.dtype) for part in parts])
        whole = places is parts
        mine = own(name, written)
        if not whole or starts != ends or written != group[begin][1] or mine != common or mine[2]:
            close(number)
            begin, common = number, mine
        elements += math.prod(parts[0].shape)
        # Nothing continues a tensor whose rows come from several places.
        ends = tuple([(part.file, part.offset + part.size, part.dtype) for part in parts]) if whole else ()
    close(len(group))
    return runs


def plain(run: Run) -> list[Any]:
    """A run as plain data."""
    parts = [
        part and [part.file, part.offset, part.dtype, [[rows.source, rows.target, rows.count] for rows in part.rows]]
        for part in run.parts
    ]
    return [run.first, run.stop, run.dtype, run.file, run.offset, run.elements, parts, run.row, run.whole]


def run_from(values: Sequence[Any]) -> Run:
    """The inverse of `plain`."""
    first, stop, dtype, file, offset, elements, parts, row, whole = values
    made = [part and Part(part[0], part[1], part[2], tuple(RowRange(*rows) for rows in part[3])) for part in parts]
    return Run(first, stop, dtype, file, offset, elements, tuple(made), row, whole)


#: Bytes of output that are hashed as one; part of the definition of the digest, so it never changes.
BLOCK_BYTES = 4 << 20
#: Bytes of output that a thread finishes before it notes them.
UNIT_BYTES = 16 << 20
#: Output files are cut at this size, whatever the number of processes.
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output.

    Args:
        name: Its name, the donor's.
        dtype: As written.
        shape: Its shape.
        file: Which output file it is in.
        offset: Of its first byte in that file.
        elements: How many numbers it holds.
        size: In bytes, as written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    elements: int
    size: int

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
        sources: What errors call every source, in the order of the recipe.
        states: What identifies their bytes: ``model@revision``, or the state of a folder's weight files.
        weights: Their shares, as given.
        method: Its name.
        parameters: Its parameters.
        files: In order.
        tensors: All of them, in the order of the output.
        runs: In that order too.
        layers: Shares of tensors that have their own: name → one for each source.
        with_base: Whether the last source is the ancestor, for a method that works on task vectors.
        overrides: How tensors are combined that have a method or parameters of their own.
        seed: Of random numbers; 0 where no method needs any.
        statistics: Where methods ask for them, by kind and number of examples, the identity of every source's.
    """

    sources: tuple[str, ...]
    states: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    parameters: Mapping[str, Any]
    files: tuple[OutputFile, ...]
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    runs: tuple[Run, ...] = field(repr=False)
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    with_base: bool = False
    overrides: Mapping[str, MethodCall] = field(default_factory=dict, repr=False)
    seed: int = 0
    statistics: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def mixing(self, run: Run) -> MethodCall:
        """How a run is combined, all of whose tensors are combined alike."""
        own = self.overrides.get(self.tensors[run.first].name) if self.overrides else None
        return own or MethodCall(self.method, self.parameters)

    @property
    def mixings(self) -> tuple[MethodCall, ...]:
        """Every way of combining that there is in it."""
        return (MethodCall(self.method, self.parameters), *self.overrides.values())

    def shares(self, run: Run) -> tuple[float, ...]:
        """The share of every source in a run, all of whose tensors have the same."""
        return self.layers.get(self.tensors[run.first].name, self.weights)

    @property
    def size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)

    @cached_property
    def units(self) -> tuple[WorkUnit, ...]:
        """The pieces in which the work is done, the same for any number of threads and processes."""
        units = []
        for number, run in enumerate(self.runs):
            item = ITEM_BYTES[run.dtype]
            begin = end = 0
            head = (run.first, 0)
            if run.whole:
                units.append(WorkUnit(number, 0, run.elements, *head, run.elements * item))
                continue
            for tensor, block, size in self.blocks(run.first, 0):
                if tensor >= run.stop:  # what stands between may be empty, and have no block
                    break
                if (end - begin) * item + size > UNIT_BYTES and end > begin:
                    units.append(WorkUnit(number, begin, end, *head, (end - begin) * item))
                    begin, head = end, (tensor, block)
                end += size // item
            units.append(WorkUnit(number, begin, end, *head, (end - begin) * item))
        return tuple(units)

    def blocks(self, tensor: int, block: int) -> Iterator[tuple[int, int, int]]:
        """``(tensor number, block number, size in bytes)`` of all blocks from one on."""
        for number in range(tensor, len(self.tensors)):
            size = self.tensors[number].size
            for start in range(block * BLOCK_BYTES, size, BLOCK_BYTES):
                yield number, start // BLOCK_BYTES, min(BLOCK_BYTES, size - start)
            block = 0

    def blocks_of(self, unit: WorkUnit) -> list[tuple[int, int, int]]:
        """Those of a unit."""
        found, left = [], unit.size
        for entry in self.blocks(unit.tensor, unit.block):
            if not left:
                break
            found.append(entry)
            left -= entry[2]
        return found

    def run_of(self, tensor: int) -> Run:
        """A tensor, which must not be empty, as a run of its own."""
        run = self.runs[bisect_right(self.runs, tensor, key=lambda run: run.first) - 1]
        found = self.tensors[tensor]
        before = (found.offset - run.offset) // ITEM_BYTES[run.dtype]
        parts = tuple(p and Part(p.file, p.offset + before * ITEM_BYTES[p.dtype], p.dtype, p.rows) for p in run.parts)
        return Run(tensor, tensor + 1, run.dtype, run.file, found.offset, found.elements, parts, run.row, run.whole)

    @property
    def dtype(self) -> str:
        """torch's name of the commonest floating-point type that is written."""
        held: dict[str, int] = {}
        for run in self.runs:
            if run.averaged:
                held[run.dtype] = held.get(run.dtype, 0) + run.elements
        spelled = {value: key for key, value in DTYPES.items()}
        return spelled[max(held, key=lambda dtype: held[dtype])] if held else "float32"

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of everything that decides the bytes of the output."""
        found = hashlib.sha256(json.dumps(self.outline(), sort_keys=True).encode())
        for file in self.files:
            found.update(file.header)
        for run in self.runs:
            found.update(json.dumps(plain(run)).encode())
        return found.hexdigest()

    def outline(self) -> dict[str, Any]:
        """The plan without its tensors, as plain data: enough to tell in what another one differs."""
        return {
            "sources": list(self.sources),
            "states": list(self.states),
            "weights": list(self.weights),
            "method": self.method,
            "parameters": dict(self.parameters),
            "layers": {name: list(shares) for name, shares in self.layers.items()},
            "with_base": self.with_base,
            "overrides": {name: [mixing.method, dict(mixing.parameters)] for name, mixing in self.overrides.items()},
            "seed": self.seed,
            "statistics": {kind: list(names) for kind, names in self.statistics.items()},
            "files": [{"name": file.name, "size": file.size} for file in self.files],
        }

    def to_dict(self) -> dict[str, Any]:
        """All of the plan as plain data, for the other processes of a world."""
        files = [{"name": file.name, "header": file.header.decode("latin-1"), "size": file.size} for file in self.files]
        return {**self.outline(), "files": files, "runs": [plain(run) for run in self.runs]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        files = tuple(OutputFile(f["name"], f["header"].encode("latin-1"), f["size"]) for f in values["files"])
        return cls(
            tuple(values["sources"]),
            tuple(values["states"]),
            tuple(values["weights"]),
            values["method"],
            dict(values["parameters"]),
            files,
            tuple(_tensors_of(files)),
            tuple(run_from(run) for run in values["runs"]),
            {name: tuple(shares) for name, shares in values["layers"].items()},
            values["with_base"],
            {name: MethodCall(*mixing) for name, mixing in values["overrides"].items()},
            values["seed"],
            {kind: tuple(names) for kind, names in values["statistics"].items()},
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
    states: Sequence[str] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    patched: Collection[str] = (),
    layers: Mapping[str, Sequence[float]] | None = None,
    with_base: bool = False,
    overrides: Mapping[str, MethodCall] | None = None,
    seed: int = 0,
) -> Plan:
    """Lay out the output.

    Args:
        sources: What errors call every source.
        tensors: For every source, its tensors under the names that the output will use.
        weights: Their shares.
        method, parameters: How they are combined.
        dtype: torch's name of the type to write; by default each tensor's common one, or the widest.
        states: What identifies the bytes of every source; by default its name.
        max_file_bytes: Where output files are cut.
        patched: Tensors that some sources do not have, or not all rows of, or in other places: averaged over those
            who have them. All sources have all others.
        layers: Shares of tensors that have their own.
        with_base: Whether the last source is the ancestor.
        overrides: How tensors are combined that have a method or parameters of their own.
        seed: Of random numbers.

    Raises:
        IncompatibleError: A tensor is missing in a source, or has another shape.
    """
    laid: list[Laid] = []
    counted = len(tensors) - with_base  # the ancestor has no say in what is written
    names: Collection[str] = tensors[0].keys()
    if any(source is not tensors[0] and source.keys() != names for source in tensors[1:]):
        names = dict.fromkeys(name for source in tensors for name in source)
        for name in names:
            lacking = [label for label, source in zip(sources, tensors, strict=True) if name not in source]
            if lacking and name not in patched:
                raise IncompatibleError(
                    f"Cannot average '{name}': {lacking[0]} does not have it.", subjects=lacking[:1]
                )
    for name in names:
        if name in patched:
            places = tuple([source.get(name) for source in tensors])
            having = tuple([place for place in places if place])
            laid.append((name, _written(name, [place for place in places[:counted] if place], dtype), having, places))
            continue
        parts = tuple([source[name] for source in tensors])
        shape = parts[0].shape
        # Counted by identity first: sources that were saved alike share what their headers say.
        if parts.count(parts[0]) < len(parts) and any(part.shape != shape for part in parts):
            shown = "\n".join(f"  {label}  {part.shape}" for label, part in zip(sources, parts, strict=True))
            raise IncompatibleError(
                f"Cannot average '{name}': the ingredients disagree on its shape.\n{shown}", subjects=sources
            )
        laid.append((name, _written(name, parts[:counted], dtype), parts, parts))
    # The donor's own order, so that inputs are read forwards; wide types first, so that every tensor is aligned; empty
    # tensors where they interrupt no run.
    laid.sort(key=lambda entry: (-ITEM_BYTES[entry[1]], not entry[2][0].size, entry[2][0].file, entry[2][0].offset))
    groups = cut(laid, max_file_bytes)
    given = overrides or {}
    usual = MethodCall(method, dict(parameters or {}))
    kinds = {each.method: _kind(each.method) for each in (usual, *given.values())}

    def own(name: str, dtype: str) -> Own:
        mixing = given.get(name, usual)
        kind = kinds[mixing.method] if dtype in FLOATS else ""
        return (layers or {}).get(name), mixing, kind

    files: list[OutputFile] = []
    planned: list[PlannedTensor] = []
    runs: list[Run] = []
    for number, group in enumerate(groups):
        sizes = [math.prod(parts[0].shape) * ITEM_BYTES[written] for _, written, parts, _ in group]
        ends = list(accumulate(sizes))
        # Spelled entry by entry: as one mapping, a hundred thousand of them would be most of what a merge holds.
        entries = [
            f'{json.dumps(name)}:{{"dtype":"{written}","shape":[{",".join(map(str, parts[0].shape))}],'
            f'"data_offsets":[{end - size},{end}]}}'
            for (name, written, parts, _), size, end in zip(group, sizes, ends, strict=True)
        ]
        text = "".join(['{"__metadata__":{"format":"pt"}', *(f",{entry}" for entry in entries), "}"]).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        title = "model.safetensors"
        if len(groups) > 1:
            title = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        files.append(OutputFile(title, header, len(header) + (ends[-1] if ends else 0)))
        runs += runs_of(group, number, len(planned), len(header), own)
        planned += [
            PlannedTensor(
                name, written, parts[0].shape, number, len(header) + end - size, size // ITEM_BYTES[written], size
            )
            for (name, written, parts, _), size, end in zip(group, sizes, ends, strict=True)
        ]
    return Plan(
        tuple(sources),
        tuple(states or sources),
        tuple(weights),
        method,
        dict(parameters or {}),
        tuple(files),
        tuple(planned),
        tuple(runs),
        {name: tuple(shares) for name, shares in (layers or {}).items()},
        with_base,
        dict(given),
        seed,
    )


def _kind(method: str) -> str:
    """Empty for a method of elements, "apart" where it has to know whose they are, "whole" for one of tensors."""
    if method == "linear":
        return ""
    from hf_soup.methods import METHODS  # late, as torch takes a second to import and a plan of an average needs none

    found = METHODS[method]
    return "whole" if found.whole else "apart" if found.given else ""


def _tensors_of(files: Sequence[OutputFile]) -> Iterator[PlannedTensor]:
    """What the headers say."""
    for number, file in enumerate(files):
        entries = json.loads(file.header[8:])
        del entries["__metadata__"]
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            size, dtype = end - begin, entry["dtype"]
            offset, elements = len(file.header) + begin, size // ITEM_BYTES[dtype]
            yield PlannedTensor(name, dtype, tuple(entry["shape"]), number, offset, elements, size)


def _written(name: str, parts: Sequence[TensorInfo], dtype: str | None) -> str:
    """The type in which a tensor is written."""
    alike = parts.count(parts[0]) == len(parts)
    found = [parts[0].dtype] if alike else list(dict.fromkeys(part.dtype for part in parts))
    if all(each in FLOATS for each in found):
        if dtype is not None:
            return DTYPES[dtype]
        # Of the two 16-bit types bfloat16 has the range of both; a wider one would double the model.
        return max(found, key=lambda each: (ITEM_BYTES[each], each == "BF16"))
    if len(found) > 1:
        raise IncompatibleError(f"Cannot combine '{name}': its element types are {', '.join(found)}.")
    return found[0]
