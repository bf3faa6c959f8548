"""Coefficients of task vectors, learned so that the merged model is sure of its answers to examples without labels.

As in `hf_soup.evaluation.gradients` one model and its gradients are held, and the ingredients are read slice by slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set as AbstractSet
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_soup.errors import ScoringError
from hf_soup.evaluation.batch_norm import MEAN, VARIANCE, batch_norms
from hf_soup.evaluation.dataset import CalibrationDataset
from hf_soup.evaluation.evaluation_data import Calibration
from hf_soup.evaluation.gradients import MergedModelGradient, Read, Slice, mean_of
from hf_soup.evaluation.model import one_thread
from hf_soup.evaluation.statistics import Ints
from hf_soup.merging import Materializer, Plan
from hf_soup.recipe import LINEAR, MethodCall

#: Derivatives below this part of the largest are rounding, as those by the biases of keys, on which no answer depends;
#: Adam would take steps of full length along them.
_ROUNDING = 1e-7


class EntropyLoss(MergedModelGradient):
    r"""The mean entropy of a merged model's answers, and the streamed gradient.

    With :math:`\theta_t = \theta_{0,t} + \sum_i w_{ti}\lambda_{ti}\tau_{ti}`, made in float32, and
    :math:`H = -\sum_c p_c\log p_c`,

    .. math:: \frac{\partial H}{\partial\lambda_{ti}} =
        w_{ti} \Bigl\langle\frac{\partial H}{\partial\theta_t}, \theta_{i,t} - \theta_{0,t}\Bigr\rangle

    summed in float64. What the ancestor or some ingredient does not have is the mean, as in a merge, and so is what
    other methods combine as the merge makes it: neither has a part in the gradient.

    Args:
        plan: Of a layout with a base, with statistics for all methods but those that learn.
        paths: For every source, its weight files on this machine.
        call: How those tensors are combined whose coefficients are learned.
        calibration: The examples.
    """

    def __init__(
        self,
        plan: Plan,
        paths: Sequence[Mapping[str, Path]],
        call: MethodCall,
        calibration: Calibration,
    ) -> None:
        self._inputs = inputs = calibration.inputs
        layout, mixture, sources = plan.layout, plan.mixture, sorted(plan.weights)
        # No answer tells their coefficients, and a variance between those of models may not come out below zero.
        running = {
            layer + each for layer in batch_norms(tensor.name for tensor in layout.tensors) for each in (MEAN, VARIANCE)
        }
        averaged = {tensor.name for tensor in layout.tensors if tensor.averaged and tensor.size}
        own_methods = mixture.tensor_methods
        self.learned = {name for name in averaged - running if own_methods.get(name, mixture.method) == call}
        self._still = _combined(plan, paths, call, averaged - self.learned)
        config, task = calibration.template.config, inputs.data.task
        super().__init__(layout, paths, sources, config, task, calibration.device)
        own = {name: dict(zip(plan.weights, shares, strict=True)) for name, shares in mixture.tensor_weights.items()}
        #: (tensors, ingredients): what coefficients are multiplied with.
        self._weights = np.array([
            [own.get(name, plan.weights)[source] for source in sources] for name in self.tensors
        ])  # fmt: skip

    def mean(self, coefficients: NDArray[np.float64], rows: Ints) -> float:
        """The mean entropy of the answers to some rows."""
        with torch.no_grad():
            return math.fsum(float(each) for each in self._passes(coefficients, rows)) / len(rows)

    def gradient(self, coefficients: NDArray[np.float64], rows: Ints) -> tuple[float, NDArray[np.float64]]:
        """That, and its derivatives by ``coefficients``, ``(len(tensors), ingredients)``; zero where none is learned.

        Raises:
            ScoringError: The model fails.
            MergeError: A file is shorter than its header says, or holds NaN.
        """
        self._model.zero_grad()
        found = []
        for each in self._passes(coefficients, rows):
            share = each / len(rows)
            share.backward()  # type: ignore[no-untyped-call]
            found.append(share.item())
        return math.fsum(found), self._weights * self._derivatives(coefficients)

    def _passes(self, coefficients: NDArray[np.float64], rows: Ints) -> Iterator[Tensor]:
        """The sum of the entropies of each batch."""
        self._set(coefficients)
        for places in self._inputs.padded(rows):
            batch = self._inputs.batch(places, self._device)
            try:
                logs = self._model(**batch).logits.float().cpu().log_softmax(-1)
                yield -(logs.exp() * logs).sum()
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                shapes = {name: tuple(value.shape) for name, value in batch.items()}
                raise ScoringError(
                    f"The model cannot learn from the examples '{self._inputs.data.title}' ({shapes}): {error}",
                    hint="Out of memory: a smaller `batch_size` of the examples, or a larger machine.",
                ) from error

    def _mix(self, number: int, shares: NDArray[np.float64], flat: Tensor) -> None:
        still = self._still.get(self._layout.tensors[number].name)
        if still is None:
            super()._mix(number, shares, flat)
        else:
            flat.copy_(still.view(-1))

    def _made(self, row: int, given: NDArray[np.float64], piece: Slice) -> Tensor:
        read_origin = self._origin_of(piece)
        if read_origin is None:
            weights = self._weights[row, piece.having].clip(0).tolist()
            return mean_of(piece.parts, weights, piece.end - piece.begin)
        origin = read_origin().float()
        made = origin.clone()
        for factor, read in zip((self._weights[row] * given).tolist(), piece.parts, strict=True):
            if factor:
                made.add_(read().float().sub_(origin), alpha=factor)
        return made

    def _moves(self, row: int, given: NDArray[np.float64], piece: Slice, slope: Tensor) -> Any:
        read_origin = self._origin_of(piece)
        if read_origin is None or self.tensors[row] in self._still:
            return 0.0
        origin = read_origin().double()
        return np.array([float(slope.dot(read().double().sub_(origin))) for read in piece.parts])

    def _origin_of(self, piece: Slice) -> Read | None:
        """What reads the ancestor's, from which there are task vectors where all have it; else None."""
        return piece.origin if len(piece.having) == len(self.sources) else None


def _combined(
    plan: Plan, paths: Sequence[Mapping[str, Path]], call: MethodCall, others: AbstractSet[str]
) -> dict[str, Tensor]:
    """The tensors that other methods than one combine, as the merge makes them."""
    if not others:
        return {}
    mixture = plan.mixture
    usual, *own = [LINEAR if each == call else each for each in mixture.methods]
    straight = replace(mixture, method=usual, tensor_methods=dict(zip(mixture.tensor_methods, own, strict=True)))
    with closing(Materializer(plan.layout, paths)) as materializer:
        made = materializer.materialize(replace(plan, mixture=straight))
        return {name: each for name, each in made.items() if name in others}


def learn_coefficients(
    loss: EntropyLoss,
    inputs: CalibrationDataset,
    parameters: Mapping[str, Any],
    seed: int,
    progress: Callable[[int], object],
) -> tuple[list[dict[str, Tensor]], tuple[float, float]]:
    """Descend on the entropy of random batches of examples, by Adam.

    On the CPU by one thread, as torch's division of a matrix product among threads shows in its last bits, and
    every step would add to that.

    Args:
        loss: The merged model.
        inputs: The examples.
        parameters: All of the method's.
        seed: Of the examples that are drawn, and their order.
        progress: Called with 1 after each step.

    Returns:
        For every ingredient, tensor → its coefficient, float32; and the mean entropy over all examples that were drawn,
        in nats: before, and after.

    Raises:
        ScoringError: The model fails, or the entropy is not finite.
    """
    rows, size = inputs.drawn(parameters["examples"], seed), parameters["batch_size"]
    shape = (len(loss.tensors), len(loss.sources))
    free = torch.full(
        (shape[0] if parameters["by"] == "layer" else 1, shape[1]), parameters["init"], dtype=torch.float64
    ).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=parameters["lr"])

    def finite(value: float, step: int) -> float:
        if math.isfinite(value):
            return value
        mean = ", ".join(f"{each:.3g}" for each in free.detach().mean(0).tolist())
        raise ScoringError(
            f"The entropy of the answers to the examples '{inputs.data.title}' is {value:g} in step {step}, "
            f"with the mean coefficients {mean}.",
            hint="Lower `init` or `lr`, or look at the ingredients: one may be broken.",
        )

    with one_thread():
        before = finite(loss.mean(free.detach().expand(shape).numpy(), rows), 0)
        for step, batch in zip(range(parameters["steps"]), _batches(rows, size, seed), strict=False):
            spread = free.expand(shape)
            value, slope = loss.gradient(spread.detach().numpy(), batch)
            finite(value, step + 1)
            slope[np.abs(slope) < _ROUNDING * np.abs(slope).max()] = 0.0
            optimizer.zero_grad()
            spread.backward(torch.from_numpy(slope))  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                free.clamp_(0, 1)
            progress(1)
        found = free.detach().expand(shape)
        after = finite(loss.mean(found.numpy(), rows), parameters["steps"])
    learned = [(name, row) for name, row in zip(loss.tensors, found.float(), strict=True) if name in loss.learned]
    return [{name: row[column] for name, row in learned} for column in range(shape[1])], (before, after)


def _batches(rows: Ints, size: int, seed: int) -> Iterator[Ints]:
    """Rows in random order, again and again."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(rows)
        yield from (np.sort(order[begin : begin + size]) for begin in range(0, len(order), size))
