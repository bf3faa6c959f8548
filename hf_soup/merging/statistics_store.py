"""What the ingredients showed on a recipe's examples: statistics in files, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from hf_soup.errors import MergeError
from hf_soup.hub import is_intact, own_cache_folder
from hf_soup.merging.plan import Plan
from hf_soup.methods import METHODS
from hf_soup.recipe import MethodCall

#: What is kept in all; beyond it, what was not used for longest goes.
MAX_STATISTICS_BYTES = 20_000_000_000


class StatisticsFile:
    """What is in a file of statistics.

    Raises:
        MergeError: It is gone, or damaged.
    """

    def __init__(self, path: Path) -> None:
        if not is_intact(path):
            raise MergeError(f"A file of statistics in the cache is gone or damaged: '{path}'.", hint="Run this again.")
        self.path = path
        with safe_open(path, "pt") as file:
            self.shapes: dict[str, list[int]] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
        #: Weights that are stored as (in, out).
        self.transposed: frozenset[str] = frozenset(json.loads(about["turned"]))


class StatisticsStore:
    """The statistics that a plan names.

    Args:
        plan: With the identity of every ingredient's.

    Raises:
        MergeError: A file is gone, or is none.
    """

    def __init__(self, plan: Plan) -> None:
        numbers = plan.layout.numbers
        self._files = {
            kind: {
                numbers[name]: StatisticsFile(statistics_path(identity))
                for name, identity in identities.items()
                if name in plan.mixture.weights
            }
            for kind, identities in plan.statistics.items()
        }

    def read(self, call: MethodCall, source: int, tensor: str, begin: int, count: int) -> Tensor | None:
        """What a source showed of a tensor, for its method: of some elements, flat, or of the whole; None if nothing.

        Args:
            call: How the tensor is combined.
            source: Its number.
            tensor: Its name.
            begin, count: The elements; a statistic of another shape is read as a whole.
        """
        file = self._files[statistics_kind(call)][source]
        if tensor not in file.shapes:
            return None
        # Opened each time: as long as a file is open, all that was read of it counts as this process's memory.
        with safe_open(file.path, "pt") as opened:
            if METHODS[call.method].statistics == "fisher":
                values: Tensor = opened.get_slice(tensor)[begin : begin + count]
            else:
                values = opened.get_tensor(tensor)
        return values

    def transposed(self, call: MethodCall, tensor: str) -> bool:
        """Whether a weight is stored as (in, out)."""
        return any(tensor in file.transposed for file in self._files[statistics_kind(call)].values())

    def held_bytes(self, call: MethodCall, tensor: str) -> int:
        """What combining a tensor holds beside what any method does."""
        if METHODS[call.method].statistics != "gram":
            return 0
        files = self._files[statistics_kind(call)].values()
        sides = [file.shapes[tensor][0] for file in files if tensor in file.shapes]
        return sum(8 * side**2 for side in sides[:1]) * 3 + sum(4 * side**2 for side in sides)

    def lacking(self, plan: Plan) -> Iterator[str]:
        """Tensors whose method asks for statistics, and that some source has none of."""
        for run in plan.layout.tensor_runs:
            call, name = plan.method_of(run), plan.layout.tensors[run.first].name
            files = self._files[statistics_kind(call)] if run.averaged and needs_statistics(call) else {}
            if any(name not in file.shapes for file in files.values()):
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
