"""What models answer to data: each asked once, by all processes together, and remembered on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_soup.blend import Blend
from hf_soup.client import own_cache_folder
from hf_soup.errors import ScoringError, SoupError
from hf_soup.headers import ITEM_BYTES
from hf_soup.plan import Plan
from hf_soup.progress import bar
from hf_soup.scoring import Bench, Logits, Resident
from hf_soup.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What is remembered in all; beyond it, what was not used for longest goes.
MAX_BYTES = 2_000_000_000


class Mixture(NamedTuple):
    """A soup that is not written.

    Args:
        weights: Source number → share, in the order in which they are added up.
        layers: Shares of tensors that have their own.
        parameters: Of the method, in place of the plan's.
        mean: Whether it is the mean, whatever the method; of one source, that source.
    """

    weights: Mapping[int, float]
    layers: Mapping[str, Mapping[int, float]] | None = None
    parameters: Mapping[str, Any] | None = None
    mean: bool = False


class Written(NamedTuple):
    """A soup in files, and their digest."""

    folder: Path
    digest: str


class Answering:
    """Models of one kind, one at a time in memory, and what they answer.

    In a world, every process makes the model and answers its share of the batches. The first one asks; the others
    `answer_along`.

    Args:
        benches: The data.
        plan: All sources, under the names of the soup.
        paths: For every source, its weight files.
        config: The bytes of the soup's ``config.json``.
        device: Where models run.
        quiet: No progress bar.
        world: The processes that answer together.
    """

    def __init__(
        self,
        benches: Sequence[Bench],
        plan: Plan,
        paths: Sequence[Mapping[str, Path]],
        config: bytes,
        device: str = "cpu",
        *,
        quiet: bool = False,
        world: World | None = None,
    ) -> None:
        self._benches, self._plan, self._config, self._quiet = benches, plan, config, quiet
        self._world = world or World()
        self._device = device
        if device == "cuda" and self._world.size > 1:
            self._device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        self._stack = ExitStack()
        self._blend = Blend(plan, paths)
        self._stack.callback(self._blend.close)
        self._kitchen = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-soup-")))
        self._resident: tuple[bytes, Resident] | None = None
        self._versions = [version(name) for name in ("hf-soup", "torch", "transformers")]
        self._folder = own_cache_folder() / "logits"
        if self._world.rank == 0 and self._world.size > 1:
            self._world.share((benches, plan, paths, config, device))

    def close(self) -> None:
        """Close the files, and remove what is too much and was not used for longest."""
        self._stack.close()
        with suppress(OSError):
            states = [(path.stat(), path) for path in self._folder.iterdir()]
            found = sorted((state.st_mtime, state.st_size, path) for state, path in states)
            held = sum(size for _, size, _ in found)
            for _, size, path in found:
                if held <= MAX_BYTES:
                    break
                path.unlink(missing_ok=True)
                held -= size

    def ask(
        self, model: Mixture | Written, benches: Sequence[Bench], name: str, config: bytes | None = None
    ) -> dict[str, Logits]:
        """What a model answers to some data, by its title.

        Args:
            model: Of the plan's sources, or of files.
            benches: The data.
            name: What progress and errors call the model.
            config: The bytes of its ``config.json``, where they are not those of the others.

        Raises:
            ScoringError: The tensors make no model, or it fails.
            MergeError: A source's file cannot be read, or holds NaN.
        """
        weights = model.digest if isinstance(model, Written) else mixture_key(self._plan, model)
        notes = {bench.title: self._note(weights, bench, config) for bench in benches}
        found = {bench.title: logits for bench in benches if (logits := _noted(notes[bench.title], bench)) is not None}
        missing = [bench for bench in benches if bench.title not in found]
        if missing:
            if self._world.size > 1:
                known = [self._benches.index(bench) if bench in self._benches else bench for bench in missing]
                self._world.share((model, known, config))
            rows = sum(bench.n for bench in missing) // self._world.size
            with bar(f"Scoring {name}", rows, unit="row", quiet=self._quiet) as shown:
                try:
                    new = self._answer(model, missing, config, shown.update)
                except ScoringError as error:
                    raise ScoringError(f"{name}: {error.message}", hint=error.hint) from None
            for bench, logits in zip(missing, new, strict=True):
                found[bench.title] = logits
                _keep(notes[bench.title], logits)
        return found

    def _answer(
        self,
        model: Mixture | Written,
        benches: Sequence[Bench],
        config: bytes | None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Logits]:
        """The part of all processes: the model is made, or fails, in each, and each has all answers."""
        failed: SoupError | None = None
        try:
            made = self._made(model, benches[0].scoring.task, config or self._config)
        except SoupError as error:
            failed = error
        for each in self._world.gather(failed):
            if each is not None:
                raise each
        return [bench.logits(made, device=self._device, progress=progress, world=self._world) for bench in benches]

    def _made(self, model: Mixture | Written, task: str, config: bytes) -> PreTrainedModel:
        tensors: dict[str, Tensor] = {}
        if isinstance(model, Written):
            for file in sorted(model.folder.glob("model*.safetensors")):
                tensors |= load_file(file)
        elif model.mean:
            tensors = self._blend.mean(model.weights)
        else:
            tensors = self._blend.tensors(model.weights, layers=model.layers, parameters=model.parameters)
        if self._resident is None or self._resident[0] != config:
            (self._kitchen / "config.json").write_bytes(config)
            self._resident = config, Resident(self._kitchen, task, getattr(torch, self._plan.dtype))
        return self._resident[1].load(tensors)

    def _note(self, weights: str, bench: Bench, config: bytes | None) -> Path:
        """Where it is remembered what some weights answer to some data, named by all that this depends on."""
        data = [bench.fingerprint, bench.scoring.batch_size, bench.scoring.task, self._device.partition(":")[0]]
        return self._folder / f"{_sha256([weights, (config or self._config).hex(), data, self._versions])}.npy"


def answer_along(world: World, between: Callable[[], object]) -> None:
    """The part that every process but the first has in a cook: answer what it asks, merge with it, answer again.

    Args:
        world: This process's.
        between: What is to be done when all candidates are answered.
    """
    own: Answering | None = None
    with ExitStack() as stack:
        for then in (between, stack.close):
            while (asked := world.share(None)) is not None:
                if own is None:  # first of all it says which models and data there are
                    own = Answering(*asked, quiet=True, world=world)
                    stack.callback(own.close)
                    continue
                model, known, config = asked
                benches = [own._benches[each] if isinstance(each, int) else each for each in known]
                with suppress(SoupError):  # all processes have the same one, and the first says it
                    own._answer(model, benches, config)
            then()


def mixture_key(plan: Plan, model: Mixture) -> str:
    """The sha256 of all that decides the numbers of a soup: of the sources that go in, and of no others."""
    weights = dict(model.weights)
    how: list[object] = [plan.method, dict(plan.parameters) if model.parameters is None else dict(model.parameters)]
    if model.mean and list(weights.values()) == [1.0]:
        how = []
    elif model.mean and plan.method != "linear":
        how = ["linear", {}]
    elif plan.with_base:
        weights[len(plan.sources) - 1] = 0.0
    found = hashlib.sha256(_sha256([how, list(weights.values())]).encode())
    for number, tensor in enumerate(plan.tensors):
        run = plan.run_of(number) if tensor.size else None
        shares = (model.layers or {}).get(tensor.name, {})
        lines: list[object] = [tensor.name, tensor.dtype, tensor.shape, [shares.get(source) for source in weights]]
        if run:
            lines.append(all(ITEM_BYTES[dtype] == 2 for dtype in run.dtypes))  # how wide sums are
        for begin, end, offsets in run.pieces(0, run.elements) if run else ():
            # What none of them has comes from the others, whoever they are.
            for source in [each for each in weights if each in offsets] or offsets:
                part = run and run.parts[source]
                lines.append([begin, end, plan.states[source], part and [part.file, part.dtype], offsets[source]])
        found.update(json.dumps(lines).encode())
    return found.hexdigest()


def _sha256(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _noted(note: Path, bench: Bench) -> Logits | None:
    """What was remembered, if it can still be read; it counts as used now."""
    with suppress(OSError, ValueError, EOFError):
        found: Logits = np.load(note, allow_pickle=False)
        right = found.dtype == np.float32 and found.shape == (bench.n, len(bench.class_names))
        if right and np.isfinite(found).all():
            os.utime(note)
            return found
    return None


def _keep(note: Path, logits: Logits) -> None:
    with suppress(OSError):  # a home that cannot be written costs nothing but this
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}")
        with partial.open("wb") as file:
            np.save(file, logits, allow_pickle=False)
        partial.replace(note)
