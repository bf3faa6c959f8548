"""What models answer to data: each asked once, by all processes together, and remembered on disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_soup._util.progress import bar
from hf_soup.checkpoint import ITEM_BYTES
from hf_soup.errors import ScoringError, SoupError
from hf_soup.evaluation.batch_statistics import BatchNormStatistics, BatchStatistics, put
from hf_soup.evaluation.dataset import EvalDataset, Logits
from hf_soup.evaluation.model import ReusableModel
from hf_soup.hub import own_cache_folder, prune
from hf_soup.merging import Layout, Materializer, Plan, ProcessGroup, Run, sources_of
from hf_soup.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: What is remembered in all; beyond it, what was not used for longest goes.
MAX_BYTES = 2_000_000_000


class SavedModel(NamedTuple):
    """A soup in files, and their digest."""

    folder: Path
    digest: str


class Candidates:
    """Models of one kind, one at a time in memory, and what they answer.

    In a world, every process makes the model and answers its share of the batches. The first one asks; the others
    `answer_along`.

    Args:
        benches: The data.
        layout: All sources, under the names of the soup.
        paths: For every source, its weight files.
        config: The bytes of the soup's ``config.json``.
        device: Where models run.
        quiet: No progress bar.
        world: The processes that answer together.
        statistics: Those of batch normalisation, collected again for what is mixed.
        learn: Gives a plan what is learned of its ingredients together; called with that, and ``before``, which lets go
            of the model and the running sum.
    """

    def __init__(
        self,
        benches: Sequence[EvalDataset],
        layout: Layout,
        paths: Sequence[Mapping[str, Path]],
        config: bytes,
        device: str = "cpu",
        *,
        quiet: bool = False,
        world: ProcessGroup | None = None,
        statistics: BatchStatistics | None = None,
        learn: Callable[..., Plan] | None = None,
    ) -> None:
        self._statistics = statistics
        self._learn = learn
        self._benches, self._layout, self._config, self._quiet = benches, layout, config, quiet
        self._world = world or ProcessGroup()
        self._device = device
        if device == "cuda" and self._world.size > 1:
            self._device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        self._stack = ExitStack()
        self._materializer, self._keys = Materializer(layout, paths), AnswerKeys(layout)
        self._stack.callback(self._materializer.close)
        self._kitchen = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-soup-")))
        self._resident: tuple[bytes, ReusableModel] | None = None
        self._versions = [version(name) for name in ("hf-soup", "torch", "transformers")]
        self._folder = own_cache_folder() / "logits"
        if self._world.rank == 0 and self._world.size > 1:
            self._world.broadcast((benches, layout, paths, config, device))

    def close(self) -> None:
        """Close the files, and remove what is too much and was not used for longest."""
        self._stack.close()
        prune(self._folder, MAX_BYTES)

    def release(self) -> None:
        """Let go of the model and the running sum: what follows needs their memory. The next one is built anew."""
        self._resident = None
        self._materializer.forget()

    def outputs(
        self,
        model: Plan | SavedModel,
        benches: Sequence[EvalDataset],
        name: str,
        *,
        config: bytes | None = None,
        alone: bool = False,
    ) -> dict[str, Logits]:
        """What a model answers to some data, by its title.

        Args:
            model: Of the layout's sources, or of files.
            benches: The data.
            name: What progress and errors call the model.
            config: The bytes of its ``config.json``, where they are not those of the others.
            alone: It is an ingredient, though it may be made of several: it has its own statistics of batch
                normalisation.

        Raises:
            ScoringError: The tensors make no model, or it fails.
            MergeError: A source's file cannot be read, or holds NaN.
        """
        if self._learn and isinstance(model, Plan):
            model = self._learn(model, before=self.release)
        weights = model.digest if isinstance(model, SavedModel) else self._keys.of(model)
        statistics = None if alone else self._again(model)
        if statistics:
            weights = sha256_of([weights, statistics.key])
        notes = {bench.title: self._note(weights, bench, config) for bench in benches}
        different: dict[Path, EvalDataset] = {}
        for bench in benches:
            different.setdefault(notes[bench.title], bench)  # the same rows in another metric are answered once
        found = {note: logits for note, bench in different.items() if (logits := _noted(note, bench)) is not None}
        missing = [bench for note, bench in different.items() if note not in found]
        if missing:
            if self._world.size > 1:
                known = [self._benches.index(bench) if bench in self._benches else bench for bench in missing]
                self._world.broadcast((model, known, config, alone))
            rows = sum(bench.n for bench in missing) // self._world.size
            with bar(f"Scoring {name}", rows, unit="row", quiet=self._quiet) as shown:
                try:
                    new = self._answer(model, missing, config, statistics, shown.update)
                except ScoringError as error:
                    raise ScoringError.of(error, f"{name}: {error.message}") from None
            for bench, logits in zip(missing, new, strict=True):
                found[notes[bench.title]] = logits
                _keep(notes[bench.title], logits)
        return {bench.title: found[notes[bench.title]] for bench in benches}

    def _answer(
        self,
        model: Plan | SavedModel,
        benches: Sequence[EvalDataset],
        config: bytes | None,
        statistics: BatchStatistics | None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Logits]:
        """The part of all processes: the model is made, or fails, in each, and each has all answers."""
        failed: SoupError | None = None
        found: dict[str, BatchNormStatistics] = {}
        try:
            made = self._made(model, benches[0].scoring.task, config or self._config, statistics)
            if statistics:
                found = statistics.collect(made)
        except SoupError as error:
            failed = error
        for each in self._world.gather(failed):
            if each is not None:
                raise each
        put(made, self._world.broadcast(found))  # the first one's
        return [bench.logits(made, device=self._device, progress=progress, world=self._world) for bench in benches]

    def _again(self, model: Plan | SavedModel) -> BatchStatistics | None:
        """What collects the statistics of a model, where it is mixed; one ingredient has its own."""
        if isinstance(model, SavedModel) or (len(model.weights) == 1 and self._layout.base is None):
            return None
        return self._statistics

    def _made(
        self, model: Plan | SavedModel, task: str, config: bytes, statistics: BatchStatistics | None
    ) -> PreTrainedModel:
        tensors: dict[str, Tensor] = {}
        if isinstance(model, SavedModel):
            for file in sorted(model.folder.glob("model*.safetensors")):
                tensors |= load_file(file)
        else:
            tensors = self._materializer.materialize(model)
        if statistics and not statistics.modules:
            self._resident = None  # or there would be two models
            statistics.model_of(tensors)
        if self._resident is None or self._resident[0] != config:
            (self._kitchen / "config.json").write_bytes(config)
            self._resident = config, ReusableModel(self._kitchen, task, getattr(torch, self._layout.dtype))
        return self._resident[1].load(tensors)

    def _note(self, weights: str, bench: EvalDataset, config: bytes | None) -> Path:
        """Where it is remembered what some weights answer to some data, named by all that this depends on."""
        data = [bench.fingerprint, bench.scoring.batch_size, bench.scoring.task, self._device.partition(":")[0]]
        return self._folder / f"{sha256_of([weights, (config or self._config).hex(), data, self._versions])}.npy"


def answer_along(world: ProcessGroup, between: Callable[[], object]) -> None:
    """The part that every process but the first has in a cook: answer what it asks, merge with it, answer again.

    Args:
        world: This process's.
        between: What is to be done when all candidates are answered.
    """
    own: Candidates | None = None
    with ExitStack() as stack:
        for then in (between, stack.close):
            while (asked := world.broadcast(None)) is not None:
                if own is None:  # first of all it says which models and data there are
                    own = Candidates(*asked, quiet=True, world=world)
                    stack.callback(own.close)
                    continue
                model, known, config, alone = asked
                benches = [own._benches[each] if isinstance(each, int) else each for each in known]
                with suppress(SoupError):  # all processes have the same one, and the first says it
                    own._answer(model, benches, config, None if alone else own._again(model))
            then()


class AnswerKeys:
    """What identifies the numbers of what plans of one layout make: the sources that go in, and no others."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sources: dict[int, str] = {}

    def of(self, plan: Plan) -> str:
        """The sha256 of all that decides the numbers of what is made."""
        layout, mixture = self._layout, plan.mixture
        parts = [[self._source(source), share] for source, share in plan.weights.items()]
        how: list[object] = []  # of one ingredient, which is itself
        if not mixture.is_linear or list(plan.weights.values()) != [1.0]:
            shown = [{kind: [names.get(each) for each in mixture.weights]} for kind, names in plan.statistics.items()]
            how = [mixture.methods, list(mixture.tensor_methods), mixture.seed, mixture.tensor_weights, shown]
        if layout.base is not None and any(METHODS[call.method].needs_base for call in mixture.methods):
            parts.append([self._source(layout.base), 0.0])
        rows = [line for run in layout.runs if run.patched for line in self._rows(plan, run)]
        return sha256_of([how, parts, rows])

    def _source(self, source: int) -> str:
        """Where the tensors of a source lie that it has as a whole, and what becomes of them."""
        if source not in self._sources:
            lines: list[object] = [self._layout.states[source]]
            for number, tensor in enumerate(self._layout.tensors):
                run = self._layout.run_of(number) if tensor.size else None
                lines.append([tensor.name, tensor.dtype, tensor.shape])
                lines.append(run and not run.patched and run.segments[0].extents[source])
                lines.append(run and all(ITEM_BYTES[dtype] == 2 for dtype in run.dtypes))  # how wide sums are
            self._sources[source] = sha256_of(lines)
        return self._sources[source]

    def _rows(self, plan: Plan, run: Run) -> Iterator[object]:
        """Where the rows of a tensor come from; those that none of the sources have, from whoever has them."""
        for segment in run.segments:
            places = [(segment.extents[n], self._layout.states[n]) for n in sources_of(plan, run, segment)]
            yield [segment.begin, segment.end, places]


def sha256_of(values: object) -> str:
    """Of plain data."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _noted(note: Path, bench: EvalDataset) -> Logits | None:
    """What was remembered, if it can still be read; it counts as used now."""
    with suppress(OSError):
        whole = note.read_bytes()
        if hashlib.sha256(memoryview(whole)[:-32]).digest() != whole[-32:]:
            return None
        found: Logits = np.load(io.BytesIO(whole), allow_pickle=False)
        right = found.dtype == np.float32 and found.shape == (bench.n, len(bench.class_names))
        if right and np.isfinite(found).all():
            os.utime(note)
            return found
    return None


def _keep(note: Path, logits: Logits) -> None:
    with suppress(OSError):  # a home that cannot be written costs nothing but this
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}")
        try:
            with partial.open("w+b") as file:
                np.save(file, logits, allow_pickle=False)
                file.seek(0)
                file.write(hashlib.file_digest(file, "sha256").digest())
            partial.replace(note)
        finally:
            partial.unlink(missing_ok=True)
