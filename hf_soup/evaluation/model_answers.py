"""What models answer to data: each asked once, by all processes together, and remembered on disk."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_soup._util.progress import bar
from hf_soup._util.version import version
from hf_soup.errors import ScoringError
from hf_soup.evaluation.batch_norm import batch_norms
from hf_soup.evaluation.batch_statistics import BatchStatistics, put
from hf_soup.evaluation.collection import collect_statistics, is_collected, sha256_of, with_statistics
from hf_soup.evaluation.dataset import EvalDataset, Outputs
from hf_soup.evaluation.evaluation_data import EvaluationData
from hf_soup.evaluation.model import ReusableModel
from hf_soup.evaluation.template import ModelTemplate
from hf_soup.hub import keep_note, own_cache_folder, prune, read_note
from hf_soup.merging import Layout, Materializer, Plan, ProcessGroup, RunContext
from hf_soup.recipe import HarnessScoring, Mixture, Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: What is remembered in all; beyond it, what was not used for longest goes.
MAX_BYTES = 2_000_000_000


class SavedModel(NamedTuple):
    """A soup in files, their digest, and its template where it is not that of the candidates; of an adapter also the
    layout of what it makes of its base, and the files of both.
    """

    folder: Path
    digest: str
    template: ModelTemplate | None = None
    over: tuple[Layout, Mapping[str, Path]] | None = None


class ModelAnswers:
    """Models of one kind, one at a time in memory, and what they answer.

    In a world, every process makes the model and answers its share of the batches. The first one asks; the others
    `answer_along`.

    Args:
        layout: All sources, under the names of the soup.
        paths: For every source, its weight files.
        data: What models answer to, and their template.
        context: The device, and the processes that answer together.
    """

    def __init__(
        self, layout: Layout, paths: Sequence[Mapping[str, Path]], data: EvaluationData, context: RunContext
    ) -> None:
        self._layout, self._paths, self._data, self._context = layout, paths, data, context
        self._world, self._device = context.processes, context.device
        if self._device == "cuda" and self._world.size > 1:
            self._device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        self._materializer = Materializer(layout, paths)
        self._batch_norm: BatchStatistics | None = None
        if data.calibration and batch_norms(tensor.name for tensor in layout.tensors):
            self._batch_norm = BatchStatistics(layout, data.calibration)
        self._resident: tuple[ModelTemplate, ReusableModel] | None = None
        self._asked: dict[Path, Outputs] = {}  # of what is not kept on the disk
        self._shapes: dict[str, tuple[int, ...]] = {}
        scorings = [bench.scoring for bench in data.scored]
        tasks = [each.task for each in scorings if isinstance(each, Scoring)]
        tasks += ["causal-lm" for each in scorings if isinstance(each, HarnessScoring)]
        self._task = tasks[0] if tasks else None  # a function takes a model of any class
        self._versions = [version(name) for name in ("hf-soup", "torch", "transformers")]
        self._folder = own_cache_folder() / "logits"
        if self._world.rank == 0 and self._world.size > 1:
            # Only the first one looks at examples.
            self._world.broadcast((layout, paths, replace(data, calibration=None), context.device))

    def close(self) -> None:
        """Close the files, and remove what is too much and was not used for longest."""
        self._materializer.close()
        prune(self._folder, MAX_BYTES)

    def release(self) -> None:
        """Let go of the model and the running sum: what follows needs their memory. The next one is built anew."""
        self._resident = None
        self._materializer.forget()

    def outputs(
        self, model: Plan | SavedModel, benches: Sequence[EvalDataset], name: str, *, alone: bool = False
    ) -> dict[str, Outputs]:
        """What a model answers to some data, by its title.

        Args:
            model: Of the layout's sources, or of files.
            benches: The data, as this model reads them.
            name: What progress and errors call the model.
            alone: It is an ingredient, though it may be made of several: it has its own statistics of batch
                normalisation.

        Raises:
            ScoringError: The tensors make no model, or it fails.
            MergeError: A source's file cannot be read, or holds NaN.
        """
        if isinstance(model, Plan):
            model = with_statistics(model, self._data.calibration)
        weights = model.key if isinstance(model, Plan) else model.digest
        mixed = isinstance(model, Plan) and (len(model.weights) > 1 or self._layout.base is not None)
        batch_norm = self._batch_norm if mixed and not alone else None  # one ingredient has its own
        if batch_norm:
            weights = sha256_of([weights, batch_norm.key])
        notes = {bench.title: self._note(weights, bench, self._template_of(model)) for bench in benches}
        different: dict[Path, EvalDataset] = {}
        for bench in benches:
            different.setdefault(notes[bench.title], bench)  # the same rows in another metric are answered once
        known = {
            note: outputs for note, bench in different.items() if (outputs := self._known(note, bench)) is not None
        }
        missing = [bench for note, bench in different.items() if note not in known]
        if missing:
            if isinstance(model, Plan) and not is_collected(model):
                self.release()
                collect_statistics(model, lambda: self._paths, self._data.calibration)
            if self._world.size > 1:
                scored = self._data.scored
                sent = (model.mixture, model.statistics) if isinstance(model, Plan) else model  # all have the layout
                self._world.broadcast((name, sent, [scored.index(b) if b in scored else b for b in missing]))
            rows = sum(bench.steps for bench in missing) // self._world.size
            with bar(f"Scoring {name}", rows, unit="row", quiet=self._context.quiet) as shown:
                new = self._answer(name, model, missing, batch_norm, shown.update)
            for bench, outputs in zip(missing, new, strict=True):
                known[notes[bench.title]] = outputs
                if bench.remembered:
                    _keep(notes[bench.title], outputs)
                    continue
                self._asked[notes[bench.title]] = outputs
                if outputs.shape != (first := self._shapes.setdefault(bench.title, outputs.shape)):
                    counts = " and ".join(
                        f"{shape[0]:,} rows" if shape else "one number" for shape in (first, outputs.shape)
                    )
                    raise ScoringError(
                        f"'{bench.title}' gives models {counts}; {name} has the latter.",
                        hint="Models are compared row by row: return as many numbers for each, in the same order.",
                    )
        return {bench.title: known[notes[bench.title]] for bench in benches}

    def _known(self, note: Path, bench: EvalDataset) -> Outputs | None:
        return _noted(note, bench) if bench.remembered else self._asked.get(note)

    def _answer(
        self,
        name: str,
        model: Plan | SavedModel,
        benches: Sequence[EvalDataset],
        batch_norm: BatchStatistics | None = None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Outputs]:
        """The part of all processes: the model is made, or fails, in each, and each has all answers."""
        try:
            made = self._made(model, batch_norm)
            put(made, self._world.broadcast(batch_norm.collect(made) if batch_norm else {}))  # the first one's
            return [bench.outputs(made, device=self._device, progress=progress, world=self._world) for bench in benches]
        except ScoringError as error:
            raise ScoringError.of(error, f"{name}: {error.message}") from None

    def _template_of(self, model: Plan | SavedModel) -> ModelTemplate:
        return self._data.template if isinstance(model, Plan) else model.template or self._data.template

    def _made(self, model: Plan | SavedModel, batch_norm: BatchStatistics | None) -> PreTrainedModel:
        tensors: dict[str, Tensor] = {}
        if isinstance(model, SavedModel) and model.over:
            layout, paths = model.over
            with closing(Materializer(layout, [paths])) as materializer:
                tensors = materializer.materialize(Plan(layout, Mixture({layout.names[0]: 1.0})))
        elif isinstance(model, SavedModel):
            for file in sorted(model.folder.glob("model*.safetensors")):
                tensors |= load_file(file)
        else:
            tensors = self._materializer.materialize(model)
        if batch_norm and not batch_norm.modules:
            self._resident = None  # or there would be two models
            batch_norm.model_of(tensors)
        template = self._template_of(model)
        if self._resident is None or self._resident[0] is not template:
            self._resident = template, ReusableModel(template.config, self._task, getattr(torch, self._layout.dtype))
        return self._resident[1].load(tensors)

    def _note(self, weights: str, bench: EvalDataset, template: ModelTemplate) -> Path:
        """Where it is remembered what some weights answer to some data, named by all that this depends on."""
        data = [bench.fingerprint, *bench.looked_at_as, self._device.partition(":")[0]]
        return self._folder / f"{sha256_of([weights, dict(template.config), data, self._versions])}.npy"


def answer_along(world: ProcessGroup, between: Callable[[], object]) -> None:
    """The part that every process but the first has in a cook: answer what it asks, merge with it, answer again.

    Args:
        world: This process's.
        between: What is to be done when all candidates are answered.
    """
    own: ModelAnswers | None = None
    with ExitStack() as stack:
        for then in (between, stack.close):
            while (asked := world.broadcast(None)) is not None:
                if own is None:  # first of all it says which models and data there are
                    layout, paths, data, device = asked
                    own = ModelAnswers(layout, paths, data, RunContext(device=device, processes=world))
                    stack.callback(own.close)
                    continue
                name, sent, known = asked
                model = sent if isinstance(sent, SavedModel) else Plan(own._layout, *sent)
                benches = [own._data.scored[each] if isinstance(each, int) else each for each in known]
                own._answer(name, model, benches)
            then()


def _noted(note: Path, bench: EvalDataset) -> Outputs | None:
    """What was remembered, if it can still be read; it counts as used now."""
    with suppress(OSError, ValueError):
        found: Outputs = np.load(io.BytesIO(read_note(note)), allow_pickle=False)
        if bench.fits(found):
            os.utime(note)
            return found
    return None


def _keep(note: Path, outputs: Outputs) -> None:
    np.save(content := io.BytesIO(), outputs, allow_pickle=False)
    keep_note(note, content.getbuffer())
