"""What the ingredients showed on a recipe's examples: statistics in files, read by position."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_soup._util.io import ShortReadError, open_file, read_all
from hf_soup._util.text import printable
from hf_soup.checkpoint import TensorInfo, bytes_of, read_header, reader_of
from hf_soup.errors import MergeError, ResolveError
from hf_soup.hub import own_cache_folder
from hf_soup.merging.plan import Plan
from hf_soup.methods import METHODS
from hf_soup.recipe import MethodCall

#: What is kept in all; beyond it, what was not used for longest goes.
MAX_STATISTICS_BYTES = 20_000_000_000
#: What a file is that is none.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ResolveError)


class _File(NamedTuple):
    descriptor: int
    places: Mapping[str, TensorInfo]
    transposed: frozenset[str]  # weights that are stored as (in, out)


class StatisticsStore:
    """The statistics that a plan names, opened.

    Args:
        plan: With the identity of every ingredient's.

    Raises:
        MergeError: A file is gone, or is none.
    """

    def __init__(self, plan: Plan) -> None:
        self._stack = ExitStack()
        numbers = plan.layout.numbers
        self._files = {
            kind: {
                numbers[name]: _opened(self._stack, statistics_path(identity))
                for name, identity in identities.items()
                if name in plan.mixture.weights
            }
            for kind, identities in plan.statistics.items()
        }

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, call: MethodCall, source: int, tensor: str, begin: int, count: int) -> Tensor | None:
        """What a source showed of a tensor, for its method: of some elements, flat, or of the whole; None if nothing.

        Args:
            call: How the tensor is combined.
            source: Its number.
            tensor: Its name.
            begin, count: The elements; a statistic of another shape is read as a whole.
        """
        file = self._files[statistics_kind(call)][source]
        place = file.places.get(tensor)
        if place is None:
            return None
        shape: tuple[int, ...] = (count,)
        if METHODS[call.method].statistics != "fisher":
            begin, shape = 0, place.shape
        values = torch.empty(shape)
        try:
            read_all(file.descriptor, bytes_of(values.view(-1).view(torch.uint8)), place.offset + 4 * begin)
        except ShortReadError:
            raise _lost("it was cut off") from None
        return values

    def transposed(self, call: MethodCall, tensor: str) -> bool:
        """Whether a weight is stored as (in, out)."""
        return any(tensor in file.transposed for file in self._files[statistics_kind(call)].values())

    def held_bytes(self, call: MethodCall, tensor: str) -> int:
        """What combining a tensor holds beside what any method does."""
        if METHODS[call.method].statistics != "gram":
            return 0
        files = self._files[statistics_kind(call)].values()
        places = [file.places[tensor] for file in files if tensor in file.places]
        return sum(8 * place.shape[0] ** 2 for place in places[:1]) * 3 + sum(4 * each.shape[0] ** 2 for each in places)

    def lacking(self, plan: Plan) -> Iterator[str]:
        """Tensors whose method asks for statistics, and that some source has none of."""
        for run in plan.layout.tensor_runs:
            call, name = plan.method_of(run), plan.layout.tensors[run.first].name
            files = self._files[statistics_kind(call)] if run.averaged and needs_statistics(call) else {}
            if any(name not in file.places for file in files.values()):
                yield name


def needs_statistics(call: MethodCall) -> bool:
    """Whether a method asks for statistics."""
    return bool(METHODS[call.method].statistics)


def statistics_kind(call: MethodCall) -> str:
    """Which statistics a method asks for, and of how many examples: ``fisher-256``."""
    method = METHODS[call.method]
    return f"{method.statistics}-{call.parameters.get('examples', method.parameters['examples'])}"


def statistics_folder() -> Path:
    """Where statistics are kept."""
    return own_cache_folder() / "statistics"


def statistics_path(name: str) -> Path:
    """Where statistics lie, by their identity."""
    return statistics_folder() / f"{name}.safetensors"


def _opened(stack: ExitStack, path: Path) -> _File:
    try:
        return _File(open_file(stack, path), *read_contents(path))
    except UNREADABLE as error:
        raise _lost(printable(str(error))) from None


def read_contents(path: Path) -> tuple[dict[str, TensorInfo], frozenset[str]]:
    """What a file holds, as in `_File`; raises `UNREADABLE`."""
    read = reader_of(path)
    header = read_header(read, path.name, path.stat().st_size, "a soup's examples")
    length = int.from_bytes(read(path.name, 0, 8), "little")
    about = json.loads(read(path.name, 8, 8 + length))["__metadata__"]
    places = {tensor.name: tensor for tensor in header}
    return places, frozenset(json.loads(about["turned"]))


def _lost(reason: str) -> MergeError:
    return MergeError(
        f"A file of statistics in the cache cannot be read: {reason}.",
        hint=f"Delete the folder '{statistics_folder()}', and run this again.",
    )
