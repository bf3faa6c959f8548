"""The running statistics of batch normalisation, collected again for mixed weights: one pass over examples."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hf_soup._util.io import open_file, write_all
from hf_soup._util.progress import bar
from hf_soup._util.text import first_line
from hf_soup.checkpoint import COUNT, TORCH, LocalFolder, TensorInfo, bytes_of
from hf_soup.errors import ScoringError, ValuesError
from hf_soup.evaluation.batch_norm import MEAN, VARIANCE, batch_norms
from hf_soup.evaluation.evaluation_data import Calibration, require_variance
from hf_soup.evaluation.loaded_parameters import find_loaded_parameters
from hf_soup.evaluation.model import each_alone, workers_for
from hf_soup.evaluation.statistics import Ints
from hf_soup.merging import Layout, MergeResult, digest_of, root_of
from hf_soup.methods import round_into
from hf_soup.recipe import BatchNormUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BatchNormStatistics(NamedTuple):
    """Of a layer: the means over batches of their mean and unbiased variance, ``(channels,)`` float64, and how many."""

    mean: Tensor
    variance: Tensor
    batches: int


class BatchStatistics:
    r"""Collects the running statistics of models of one kind on the same examples.

    With :math:`\mu_b, \sigma^2_b` the mean and the unbiased variance of a layer's inputs over batch :math:`b`, of which
    there are :math:`B`,

    .. math:: \mu = \frac1B \sum_b \mu_b, \qquad \sigma^2 = \frac1B \sum_b \sigma^2_b

    which is what torch's ``momentum=None`` comes to, in float64. Layers of batch normalisation normalise by the batch,
    as in training; all others, dropout among them, are as in inference. The batches are all rows once, in a random
    order by the seed: a split may be sorted by label, and batches of one label have another variance. They do not
    depend on each other, so on the CPU several are worked on at a time, each by one thread, and summed in their order.

    Args:
        layout: Names and shapes of the soup's tensors.
        calibration: The examples.

    Raises:
        ScoringError: There are fewer than two examples.

    Reference:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018, arXiv:1803.05407.
    """

    def __init__(self, layout: Layout, calibration: Calibration) -> None:
        self.inputs = inputs = calibration.inputs
        self.layers = batch_norms(tensor.name for tensor in layout.tensors)
        require_variance(layout, calibration)
        self._layout, self._config, self._device = layout, calibration.template.config, calibration.device
        self.batches = inputs.alike(inputs.shuffled(calibration.seed))
        about = [inputs.fingerprint, inputs.data.task, inputs.data.batch_size, calibration.seed]
        #: What decides, beside the weights and the device, what is collected.
        self.key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        #: A layer, as the files call it → as the model does; known after `model_of`.
        self.modules: dict[str, str] = {}

    def model_of(self, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
        """The model of a soup's tensors in float32, in which marks are in the place of running means.

        So it is found which of its layers is which, whatever transformers calls it.

        Raises:
            ScoringError: The tensors make no model, or a layer is none of torch's.
        """
        numbers = {tensor.name: number for number, tensor in enumerate(self._layout.tensors)}
        means = [numbers[layer + MEAN] for layer in self.layers]
        task = self.inputs.data.task
        model, homes = find_loaded_parameters(self._layout, means, tensors, self._config, task)
        for layer, number in zip(self.layers, means, strict=True):
            home = homes.direct.get(number, "")
            name = home.removesuffix(MEAN).rstrip(".")
            if not home.endswith(MEAN) or not isinstance(model.get_submodule(name), _BatchNorm):
                raise ScoringError(
                    f"'{layer.rstrip('.')}' has running statistics, and is no layer of torch's batch normalisation in "
                    f"a {type(model).__name__}: they cannot be collected again.",
                    hint="Leave `calibration` out, and use a method such as linear, which averages them.",
                )
            self.modules[layer] = name
        return model

    def collect(
        self, model: PreTrainedModel, progress: Callable[[int], object] = lambda count: None
    ) -> dict[str, BatchNormStatistics]:
        """The statistics of the layers through which examples go, by their names in the model, which is not changed.

        Args:
            model: Of the kind of `model_of`, which was called before.
            progress: Told how many rows went through.

        Raises:
            ScoringError: The model fails, or what comes out is no number.
        """
        model.eval()  # type: ignore[no-untyped-call]
        model.to(self._device)  # type: ignore[arg-type]  # transformers types its wrapper as taking no string
        names = list(self.modules.values())
        mine = threading.local()
        # A thread has statistics of its own; weights are there once.
        layers: list[Any] = [model.get_submodule(name) for name in names]
        own = {id(buffer) for layer in layers for buffer in layer.buffers()}
        shared = {id(each): each for each in (*model.parameters(), *model.buffers()) if id(each) not in own}

        def lent() -> tuple[PreTrainedModel, list[Any]]:
            if not hasattr(mine, "lent"):
                another = copy.deepcopy(model, dict(shared))
                norms: list[Any] = [another.get_submodule(name) for name in names]
                for norm in norms:
                    norm.momentum = None
                    norm.train()
                mine.lent = another, norms
            found: tuple[PreTrainedModel, list[Any]] = mine.lent
            return found

        def statistics(rows: Ints) -> list[BatchNormStatistics]:
            another, norms = lent()
            for norm in norms:
                norm.reset_running_stats()
            with torch.no_grad():
                another(**self.inputs.inputs.batch(rows, self._device))
            return [_now(norm) for norm in norms]

        sums: dict[str, list[Tensor]] = {}
        counts: Counter[str] = Counter()
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        workers = workers_for(sum(16 * layer.num_features for layer in layers))
        try:
            with _in_float32(model), flags:
                of_batches = each_alone(statistics, self.batches, workers, self._device)
                for rows, found in zip(self.batches, of_batches, strict=True):
                    for name, each in zip(names, found, strict=True):
                        if each.batches:  # more than one where a layer is used several times
                            counts[name] += each.batches
                            known = sums.get(name, [torch.zeros(()), torch.zeros(())])
                            sums[name] = [a + b * each.batches for a, b in zip(known, each[:2], strict=True)]
                    progress(len(rows))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise self._failed(error) from error
        for name, values in sums.items():
            for what, value in zip(("mean", "variance"), values, strict=True):
                if not value.isfinite().all():
                    raise ScoringError(
                        f"The {what} of what goes into '{name}' is not finite on the examples "
                        f"'{self.inputs.data.title}'.",
                        hint="The mixed weights do not hold together: another `method`, or fewer ingredients.",
                    )
        return {
            name: BatchNormStatistics(mean / counts[name], variance / counts[name], counts[name])
            for name, (mean, variance) in sums.items()
        }

    def _failed(self, error: Exception) -> ScoringError:
        title, size = self.inputs.data.title, self.inputs.data.batch_size
        if "more than 1 value per channel" in str(error):  # torch has no code for it
            lone = sum(len(rows) == 1 for rows in self.batches)
            return ScoringError(
                f"{lone:,} of {len(self.batches):,} batches of the examples '{title}' are one row "
                f"({self.inputs.n:,} rows, `batch_size` {size:,}), and a layer of batch normalisation sees one number "
                "of each of its channels.",
                hint="Set a `batch_size` of the examples that leaves no row alone.",
            )
        return ScoringError(
            f"The soup fails on the examples '{title}': {first_line(error)}",
            hint="Are these its inputs? Out of memory: a smaller `batch_size` of the examples.",
        )


def put(model: PreTrainedModel, found: Mapping[str, BatchNormStatistics]) -> None:
    """Put statistics into a model, rounded once to its type."""
    for name, each in found.items():
        layer: Any = model.get_submodule(name)
        round_into(each.mean, layer.running_mean)
        round_into(each.variance, layer.running_var)
        layer.num_batches_tracked.fill_(each.batches)


def recalibrate_batch_norm(
    merged: MergeResult, layout: Layout, folder: Path, calibration: Calibration | None
) -> MergeResult:
    """A merged soup with statistics of batch normalisation of its own, in the place of the mean in its files.

    A soup of one model is that model, and keeps its own; so does one without such layers, or without examples. What is
    written is not in the journal, so that a run that is interrupted after it merges these places again.

    Args:
        merged: From the engine.
        layout: Of what was merged.
        folder: The staged files.
        calibration: The examples as the soup itself reads them.

    Returns:
        What a merge leaves behind, with the new roots and digest, and what was collected.

    Raises:
        ScoringError: As `BatchStatistics`.
        ValuesError: The output's type cannot hold what was collected.
    """
    if calibration is None or len(layout.labels) == 1 or not batch_norms(tensor.name for tensor in layout.tensors):
        return merged
    statistics = BatchStatistics(layout, calibration)
    tensors: dict[str, Tensor] = {}
    for file in layout.files:
        tensors |= load_file(folder / file.name)
    model = statistics.model_of(tensors)
    del tensors
    with bar("Collecting statistics", statistics.inputs.n, unit="row", quiet=calibration.quiet) as shown:
        found = statistics.collect(model, shown.update)
    values: dict[str, Tensor] = {}
    for layer, name in statistics.modules.items():
        if name in found:
            mean, variance, count = found[name]
            values |= {layer + MEAN: mean, layer + VARIANCE: variance, layer + COUNT: torch.tensor(count)}
    source = LocalFolder.of(folder, [folder / file.name for file in layout.files])
    roots = dict(merged.roots)
    with ExitStack() as stack:
        outputs = [open_file(stack, folder / file.name, os.O_RDWR) for file in layout.files]
        for tensor in (tensor for tensor in layout.tensors if tensor.name in values):
            rounded = torch.empty(tensor.shape, dtype=TORCH[tensor.dtype])
            round_into(values[tensor.name].reshape(tensor.shape), rounded)
            if not rounded.isfinite().all():
                raise ValuesError(
                    f"'{tensor.name}' would be {values[tensor.name].max().item():g}, which "
                    f"{str(rounded.dtype).removeprefix('torch.')} cannot hold.",
                    hint="Set `dtype: bfloat16` or `dtype: float32` in the recipe.",
                    code="overflow",
                )
            data = bytes_of(rounded.reshape(-1).view(torch.uint8))
            write_all(outputs[tensor.file], data, tensor.offset)
            written = TensorInfo(
                tensor.name, tensor.dtype, tensor.shape, layout.files[tensor.file].name, tensor.offset, tensor.size
            )
            roots[tensor.name] = root_of(source.read, written)
    inputs, reached = statistics.inputs, [layer for layer, name in statistics.modules.items() if name in found]
    again = BatchNormUpdate(
        data=inputs.data.title,
        layers=len(reached),
        rows=inputs.n,
        batches=len(statistics.batches),
        batch_size=inputs.data.batch_size,
        unreached=tuple(layer.rstrip(".") for layer in statistics.modules if layer not in reached),
    )
    return replace(
        merged,
        roots=roots,
        digest=digest_of((tensor.name, tensor.dtype, tensor.shape, roots[tensor.name]) for tensor in layout.tensors),
        differing=tuple(name for name in merged.differing if name not in values),
        batch_norm=again,
    )


def _now(norm: Any) -> BatchNormStatistics:
    """What a layer collected since it was reset."""
    # Copies also where they are in float64 on the CPU: the next batch writes over them.
    mean, variance = (each.to("cpu", torch.float64, copy=True) for each in (norm.running_mean, norm.running_var))
    return BatchNormStatistics(mean, variance, int(norm.num_batches_tracked))


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """A model of 16 bits in float32, as the written soup is loaded, and back: nothing is rounded."""
    narrow = [
        (each, each.dtype)
        for each in (*model.parameters(), *model.buffers())
        if each.is_floating_point() and each.element_size() == 2
    ]
    for each, _ in narrow:
        each.data = each.data.float()
    try:
        yield
    finally:
        for each, dtype in narrow:
            each.data = each.data.to(dtype)
