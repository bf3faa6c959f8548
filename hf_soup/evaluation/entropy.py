"""How sure a soup is of its answers to calibration data, and the gradient of that by coefficients of task vectors.

As in `hf_soup.evaluation.gradients` one model and its gradients are held, and the ingredients are read slice by slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_soup.errors import ScoringError
from hf_soup.evaluation.batch_norm import MEAN, VARIANCE, batch_norms
from hf_soup.evaluation.evaluation_data import Calibration
from hf_soup.evaluation.gradients import MergedModelGradient, Read, Slice, mean_of
from hf_soup.evaluation.statistics import Ints
from hf_soup.merging import Layout


class EntropyLoss(MergedModelGradient):
    r"""The mean entropy of a soup's answers, and the streamed gradient, a `hf_soup.selection.EntropyObjective`.

    With :math:`\theta_t = \theta_{0,t} + \sum_i w_i\lambda_{ti}\tau_{ti}`, made in float32, and
    :math:`H = -\sum_c p_c\log p_c`,

    .. math:: \frac{\partial H}{\partial\lambda_{ti}} =
        w_i \Bigl\langle\frac{\partial H}{\partial\theta_t}, \theta_{i,t} - \theta_{0,t}\Bigr\rangle

    summed in float64. What the base or some ingredient does not have is the mean, as in a merge, and so are running
    statistics of batch normalisation: neither has a part in the gradient.

    Args:
        layout: With a base.
        paths: For every source, its weight files on this machine.
        weights: Of the ingredients, in the order of columns of coefficients.
        calibration: The examples.
        progress: Called with the number of steps that were done.
    """

    def __init__(
        self,
        layout: Layout,
        paths: Sequence[Mapping[str, Path]],
        weights: Mapping[str, float],
        calibration: Calibration,
        progress: Callable[[int], object],
    ) -> None:
        self._inputs, self.progress = calibration.inputs, progress
        self.title = f"the examples '{calibration.inputs.data.title}'"
        self._weights = np.array(list(weights.values()))
        sources = [layout.numbers[name] for name in weights]
        config, task = calibration.template.config, self._inputs.data.task
        super().__init__(layout, paths, sources, config, task, calibration.device)
        # No answer tells their coefficients, and a variance between those of models may not come out below zero.
        running = {
            layer + each for layer in batch_norms(tensor.name for tensor in layout.tensors) for each in (MEAN, VARIANCE)
        }
        self._all = self.tensors
        self.tensors = tuple(name for name in self._all if name not in running)
        self.others = tuple(name for name in self._all if name in running)
        places = {name: place for place, name in enumerate(self._all)}
        self._places = [places[name] for name in self.tensors]
        self._learned = frozenset(self._places)

    def drawn(self, count: int, seed: int) -> Ints:
        """Numbers of so many rows, drawn at random; of all, where there are fewer."""
        return self._inputs.drawn(count, seed)

    def mean(self, coefficients: NDArray[np.float64], rows: Ints) -> float:
        """The mean entropy of the answers to some rows."""
        with torch.no_grad():
            return math.fsum(float(each) for each in self._passes(coefficients, rows)) / self._inputs.answers(rows)

    def gradient(self, coefficients: NDArray[np.float64], rows: Ints) -> tuple[float, NDArray[np.float64]]:
        """That, and its derivatives by ``coefficients``, ``(len(tensors), ingredients)``.

        Raises:
            ScoringError: The model fails.
            MergeError: A file is shorter than its header says, or holds NaN.
        """
        self._model.zero_grad()
        entropies, answers = [], self._inputs.answers(rows)
        for each in self._passes(coefficients, rows):
            share = each / answers
            share.backward()  # type: ignore[no-untyped-call]
            entropies.append(share.item())
        derivatives = self._derivatives(self._spread(coefficients))[self._places]
        return math.fsum(entropies), self._weights * derivatives

    def _spread(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """With rows of tensors that are the mean."""
        spread = np.zeros((len(self._all), len(self._weights)))
        spread[self._places] = coefficients
        return spread

    def _passes(self, coefficients: NDArray[np.float64], rows: Ints) -> Iterator[Tensor]:
        """The sum of the entropies of each batch."""
        self._set(self._spread(coefficients))
        for places in self._inputs.padded(rows):
            batch = self._inputs.inputs.batch(places, self._device)
            try:
                logs = self._inputs.inputs.log_probabilities(self._model(**batch), places)
                yield -(logs.exp() * logs).sum().cpu()
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                shapes = {name: tuple(value.shape) for name, value in batch.items()}
                raise ScoringError(
                    f"The model cannot learn from {self.title} ({shapes}): {error}",
                    hint="Out of memory: a smaller `batch_size` of the examples, or a larger machine.",
                ) from error

    def _made(self, row: int, given: NDArray[np.float64], piece: Slice) -> Tensor:
        read_origin = self._origin_of(row, piece)
        if read_origin is None:
            return mean_of(piece.parts, self._weights[piece.having].tolist(), piece.end - piece.begin)
        origin = read_origin().float()
        made = origin.clone()
        for factor, read in zip((self._weights * given).tolist(), piece.parts, strict=True):
            if factor:
                made.add_(read().float().sub_(origin), alpha=factor)
        return made

    def _moves(self, row: int, given: NDArray[np.float64], piece: Slice, slope: Tensor) -> Any:
        read_origin = self._origin_of(row, piece)
        if read_origin is None:
            return 0.0
        origin = read_origin().double()
        return np.array([float(slope.dot(read().double().sub_(origin))) for read in piece.parts])

    def _origin_of(self, row: int, piece: Slice) -> Read | None:
        """What reads the base's, from which there are task vectors where all have it; None where it is the mean."""
        learned = row in self._learned and len(piece.having) == len(self.sources)
        return piece.origin if learned else None
