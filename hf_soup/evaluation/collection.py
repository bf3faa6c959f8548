"""What the ingredients show on a recipe's examples: one pass over each, one model in memory at a time, remembered."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_soup._util.progress import bar
from hf_soup._util.text import some
from hf_soup._util.version import version
from hf_soup.errors import ScoringError
from hf_soup.evaluation.evaluation_data import Calibration
from hf_soup.evaluation.loaded_parameters import LoadedParameters, find_loaded_parameters, held, on_disk
from hf_soup.evaluation.model import ReusableModel, each_alone, workers_for
from hf_soup.evaluation.statistics import Ints
from hf_soup.hub import is_intact, keeping, prune
from hf_soup.merging import (
    MAX_STATISTICS_BYTES,
    Materializer,
    Plan,
    StatisticsStore,
    needs_statistics,
    statistics_folder,
    statistics_kind,
    statistics_path,
)
from hf_soup.methods import BLOCK
from hf_soup.recipe import Mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Of what is in the files; another one leaves older files alone.
_FORM = 4

#: Parameters of the model, or weights of its linear layers, by name, and what was found of them.
_Found = dict[str, Tensor]


def with_statistics(plan: Plan, calibration: Calibration | None) -> Plan:
    """The plan with the identities of the statistics that its methods ask for, whether they are in the cache or not.

    Args:
        plan: Of ingredients, and of the base where a method needs it.
        calibration: The examples; None where no method looks at any.
    """
    calls = [call for call in plan.mixture.methods if needs_statistics(call)]
    if not calls:
        return plan
    assert calibration is not None, "the recipe was checked: who asks for statistics has examples"
    about, names = _about(calibration), list(plan.mixture.weights)
    # What a model shows depends on these, and on none of its shares.
    alone = {name: _alone(plan, name).key for name in names}
    kinds = sorted({statistics_kind(call) for call in calls})
    return replace(
        plan, statistics={kind: {name: sha256_of([kind, alone[name], about]) for name in names} for kind in kinds}
    )


def is_collected(plan: Plan) -> bool:
    """Whether all statistics that a plan names are in the cache."""
    return all(is_intact(statistics_path(each)) for names in plan.statistics.values() for each in names.values())


def collect_statistics(
    plan: Plan, paths: Callable[[], Sequence[Mapping[str, Path]]], calibration: Calibration | None
) -> None:
    """Collect the statistics that a plan names and that are not in the cache: a model and its gradients in memory.

    Args:
        plan: From `with_statistics`.
        paths: For every source, its weight files; not called where all is in the cache.
        calibration: The examples, where the plan names any statistics.

    Raises:
        ScoringError: There is too little memory, a model fails on the examples, or what comes out is no number.
    """
    if calibration is None or is_collected(plan):
        return
    missing = [
        (name, kind)
        for name in plan.mixture.weights
        for kind, names in plan.statistics.items()
        if not is_intact(statistics_path(names[name]))
    ]
    if missing:
        alone = {name: _alone(plan, name) for name in plan.mixture.weights}
        with closing(_Pass(alone[missing[0][0]], paths(), calibration)) as work:
            rows = sum(min(calibration.inputs.n, int(kind.partition("-")[2])) for _, kind in missing)
            with bar("Looking at examples", rows, unit="row", quiet=calibration.quiet) as shown:
                for name, kind in missing:
                    work.collect(alone[name], kind, statistics_path(plan.statistics[kind][name]), shown.update)
    used = {statistics_path(each) for names in plan.statistics.values() for each in names.values()}
    prune(statistics_folder(), max(MAX_STATISTICS_BYTES, sum(path.stat().st_size for path in used)))


def statistics_notes(plan: Plan) -> list[str]:
    """Which tensors are averaged, as some ingredient shows nothing of them, in a sentence."""
    if not plan.statistics:
        return []
    collected = StatisticsStore(plan)
    names = list(collected.lacking(plan))
    asked = " and ".join(dict.fromkeys(call.method for call in plan.mixture.methods if needs_statistics(call)))
    every = sum(tensor.averaged for tensor in plan.layout.tensors)
    said = f"{len(names)} of {every} tensors have nothing that {asked} goes by, and are averaged: {some(names)}."
    return [said] if names else []


def _alone(plan: Plan, name: str) -> Plan:
    """One ingredient as it is."""
    return Plan(plan.layout, Mixture({name: 1.0}))


def _about(calibration: Calibration) -> list[object]:
    """What else decides what is found."""
    inputs, libraries = calibration.inputs, [version(name) for name in ("hf-soup", "torch", "transformers")]
    about = [dict(calibration.template.config), inputs.fingerprint, inputs.data.task, inputs.data.batch_size]
    return [*about, calibration.seed, libraries, _FORM, calibration.device.partition(":")[0]]


class _Pass:
    """Models of the layout of one of them, one after the other, and what each shows."""

    def __init__(self, one: Plan, paths: Sequence[Mapping[str, Path]], calibration: Calibration) -> None:
        self._layout, self._inputs = one.layout, calibration.inputs
        self._seed, self._device = calibration.seed, calibration.device
        self._made_of = calibration.template.config, self._inputs.data.task
        self._materializer = Materializer(one.layout, paths)
        self._resident = ReusableModel(*self._made_of, torch.float32)
        self._loaded: tuple[Plan, PreTrainedModel] | None = None
        self._homes = self._find(one)

    def close(self) -> None:
        """Close the files."""
        self._materializer.close()

    def collect(self, alone: Plan, kind: str, target: Path, progress: Callable[[int], object]) -> None:
        """Write what an ingredient shows into a file."""
        model, label = self._model(alone), self._layout.labels[next(iter(alone.weights))]
        name, _, count = kind.partition("-")
        rows = self._inputs.drawn(int(count), self._seed)
        turned: list[str] = []
        try:
            # On a GPU convolutions would be worked out with ten bits of a number.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                if name == "fisher":
                    pieces = self._named(model, self._fisher(model, rows, progress))
                    tensors = {name: each.reshape(-1) for name, each in pieces.items()}  # to be read in slices
                else:
                    tensors, turned = self._grams(model, rows, progress)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ScoringError(
                f"{label} fails on the examples '{self._inputs.data.title}': {error}",
                hint="With `batch_size: 1` examples need no padding, and the least memory. Do the tokenizer or image "
                "processor and the config belong to these weights?",
            ) from error
        bad = next((tensor for tensor, each in tensors.items() if not each.isfinite().all()), None)
        if bad is not None:
            raise ScoringError(
                f"What {label} shows of '{bad}' on the examples is not finite.",
                hint="Look at that model's weights; leave it out.",
                code="not-finite",
                subjects=[label],
            )
        _keep(target, tensors, turned)

    def _find(self, alone: Plan) -> LoadedParameters:
        """Where each tensor of the disk lies in the model; nothing is known of those that are in pieces there."""
        numbers = [number for number, tensor in enumerate(self._layout.tensors) if tensor.averaged and tensor.size]
        return find_loaded_parameters(self._layout, numbers, self._materializer.materialize(alone), *self._made_of)[1]

    def _model(self, alone: Plan) -> PreTrainedModel:
        if self._loaded is None or self._loaded[0] is not alone:
            self._loaded = None
            tensors = self._materializer.materialize(alone)
            self._materializer.forget()
            for name, each in tensors.items():
                tensors[name] = each.float() if each.is_floating_point() else each
            self._loaded = alone, self._resident.load(tensors)
        model = self._loaded[1]
        model.to(self._device)  # type: ignore[arg-type]  # transformers types its wrapper as taking no string
        return model

    def _named(self, model: PreTrainedModel, found: _Found) -> _Found:
        """Under the names of the plan, in the pieces in which tensors lie on the disk."""
        names, tensors = self._homes.names, self._layout.tensors
        pieces = on_disk(model, found)
        return {tensors[names[name]].name: each for name, each in pieces.items() if name in names}

    def _fisher(self, model: PreTrainedModel, rows: Ints, progress: Callable[[int], object]) -> _Found:
        """The mean over examples, each by itself, of the squared gradients of the log-probability of a drawn label.

        Of a text it is that of a token for each that there is.

        Over their root mean square in the model, as a model that is sure of its answers has tiny ones everywhere.
        """
        every = {name: each for name, each in held(model).items() if each.requires_grad}
        total = {name: torch.zeros(each.shape) for name, each in every.items()}

        def slopes(row: Ints) -> list[Tensor | None]:
            logs = self._inputs.inputs.log_probabilities(model(**self._inputs.inputs.batch(row, self._device)), row)
            labels = _drawn(logs.detach().cpu(), self._inputs.uniform(int(row[0]), self._seed))
            likelihood = logs.gather(-1, labels.to(logs.device)).sum()
            return list(torch.autograd.grad(likelihood, list(every.values()), allow_unused=True))

        # The logits, their logarithms, and the gradients by both.
        beside = 4 * self._inputs.inputs.logit_bytes(rows)
        workers = workers_for(beside + sum(4 * each.numel() for each in every.values()))
        for found in each_alone(slopes, [row.reshape(1) for row in rows], workers, self._device):
            for name, slope in zip(every, found, strict=True):
                if slope is not None:
                    total[name].add_(slope.cpu().square())  # not in place: two gradients may be views of one
            progress(1)
        # In blocks that torch does not divide among threads, whose number would show in the last bit.
        blocks = (block for each in total.values() for block in torch.split(each.view(-1), BLOCK))
        whole = sum(float(block.double().square().sum()) for block in blocks)
        length = math.sqrt(whole / max(1, sum(each.numel() for each in total.values())))
        return {name: each.div_(length or 1.0) for name, each in total.items()}

    def _grams(self, model: PreTrainedModel, rows: Ints, progress: Callable[[int], object]) -> tuple[_Found, list[str]]:
        """The mean of :math:`xx^\\top` over the inputs of each linear layer, and which weights are stored turned."""
        linear = dict(self._linear(model))
        mine = threading.local()
        total: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()

        def look(name: str, values: Tensor) -> None:
            flat = values.detach().reshape(-1, values.shape[-1]).float()
            found = (flat.mT @ flat).cpu()
            known, count = mine.found.get(name, (None, 0))
            mine.found[name] = found if known is None else known.add_(found), count + len(flat)

        def inputs_of(batch: Ints) -> dict[str, tuple[Tensor, int]]:
            mine.found = {}
            with torch.no_grad():
                model(**self._inputs.inputs.batch(batch, self._device))
            result: dict[str, tuple[Tensor, int]] = mine.found
            del mine.found
            return result

        def hook(name: str) -> Callable[[object, tuple[Any, ...]], None]:
            return lambda _, given: look(name, given[0]) if given else None

        hooks = [module.register_forward_pre_hook(hook(name)) for name, (module, _) in linear.items()]
        try:
            batches = self._inputs.alike(rows)
            most = max((len(batch) * self._inputs.inputs.logit_bytes(batch) for batch in batches), default=0)
            workers = workers_for(most + sum(4 * width**2 for _, width in linear.values()))
            for batch, found in zip(batches, each_alone(inputs_of, batches, workers, self._device), strict=True):
                for name, (each, count) in found.items():
                    counts[name] += count
                    total[name] = each if name not in total else total[name].add_(each)
                progress(len(batch))
        finally:
            for each_hook in hooks:
                each_hook.remove()
        turned = [name for name in total if type(linear[name][0]) is not torch.nn.Linear]
        return {name: each.div_(counts[name]) for name, each in total.items()}, turned

    def _linear(self, model: PreTrainedModel) -> Iterator[tuple[str, tuple[torch.nn.Module, int]]]:
        """The linear layers whose weight is a tensor of the disk, and of no other layer: its name, layer, and width."""
        from transformers.pytorch_utils import Conv1D

        numbers = {name: number for number, name in self._homes.direct.items()}
        uses = Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))
        for name, module in model.named_modules():
            if type(module) in (torch.nn.Linear, Conv1D) and uses[id(module.weight)] == 1:
                number, shape = numbers.get(f"{name}.weight"), module.weight.shape
                if number is not None:
                    width = shape[0] if isinstance(module, Conv1D) else shape[1]
                    yield self._layout.tensors[number].name, (module, int(width))


def _drawn(logs: Tensor, draws: Tensor) -> Tensor:
    """``(n, 1)``: the class that each draw falls on, of log-probabilities ``(n, classes)``."""
    # Some lines at a time: vocabularies are large. In float64 the last sum may still be a little below 1, and a draw
    # above it is the last class.
    pairs = zip(torch.split(logs, 64), torch.split(draws[:, None], 64), strict=True)
    reached = [(part.double().exp().cumsum(-1) <= at).sum(-1, keepdim=True) for part, at in pairs]
    return torch.cat(reached).clamp(max=logs.shape[-1] - 1)


def sha256_of(values: object) -> str:
    """Of plain data."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _keep(path: Path, tensors: _Found, turned: Sequence[str]) -> None:
    about = {"turned": json.dumps(turned)}
    try:
        with keeping(path) as partial:
            save_file({name: each.contiguous() for name, each in tensors.items()}, partial, about)
    except OSError as error:
        raise ScoringError(
            f"Cannot keep statistics in '{path.parent}': {error.strerror or error}.",
            hint="Make room, or set HF_HOME elsewhere.",
            code="disk-full" if error.errno == errno.ENOSPC else "",
        ) from error
