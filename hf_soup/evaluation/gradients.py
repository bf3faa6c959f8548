"""The validation loss of soups in memory, and its gradient with respect to the shares of the ingredients.

One backward pass gives the gradient of the loss by the weights of the one model that is held; the ingredients are
read from their files slice by slice and multiplied with it, so nothing grows with their number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_soup.checkpoint import TORCH
from hf_soup.errors import ScoringError
from hf_soup.evaluation.batch_limit import BatchLimit
from hf_soup.evaluation.dataset import LearnableDataset, Outputs
from hf_soup.evaluation.loaded_parameters import find_loaded_parameters, held, on_disk
from hf_soup.evaluation.model import build_model
from hf_soup.evaluation.statistics import Floats, Ints
from hf_soup.merging import Layout, Reading

#: Elements of an ingredient that are held at once.
SLICE_ELEMENTS = 1 << 18


def needed_bytes(layout: Layout) -> int:
    """What learning holds beside activations: the model, its gradients, and a copy of one of them, all float32.

    The copy is there while the model is built, and, where transformers stacks tensors, in every step.
    """
    return 12 * sum(run.elements for run in layout.runs)


#: What reads a piece of a source, flat, as stored.
Read = Callable[[], Tensor]


class Slice(NamedTuple):
    """A piece of a tensor: where it is, the columns of those in play that have it, and what reads it.

    Of each of those, or of all others where they are none; and of the ancestor, where it is a source and has it.
    """

    begin: int
    end: int
    having: list[int]
    parts: Sequence[Read]
    origin: Read | None


def mean_of(parts: Sequence[Read], factors: Sequence[float], elements: int) -> Tensor:
    """The weighted mean of pieces, float32; the plain one, where the factors have no sum."""
    piece, total = torch.zeros(elements), 0.0
    for factor, read in zip(factors if sum(factors) > 0 else repeat(1.0), parts, strict=False):
        if factor:
            piece.add_(read(), alpha=factor)
        total += factor
    return piece.div_(total)


class MergedModelGradient(ABC):
    r"""One model in memory that is the soup of changing shares, and the gradient by these, streamed.

    Args:
        layout: Names, shapes and places.
        paths: For every source, its weight files on this machine.
        sources: The numbers in the layout of those in play, in the order of columns of ``shares``.
        config: The model's ``config.json``.
        task: What the model does.
        device: Where the model runs.
    """

    def __init__(
        self,
        layout: Layout,
        paths: Sequence[Mapping[str, Path]],
        sources: Sequence[int],
        config: Mapping[str, Any],
        task: str,
        device: str = "cpu",
    ) -> None:
        averaged = [number for number, tensor in enumerate(layout.tensors) if tensor.averaged and tensor.size]
        self.tensors: Sequence[str] = tuple(layout.tensors[number].name for number in averaged)
        self._rows = {number: row for row, number in enumerate(averaged)}  # of shares
        self._layout, self.sources, self._device = layout, list(sources), device
        self._made_of = config, task
        self._reading = Reading(layout, paths)
        self._shares: NDArray[np.float64] | None = None
        self._others = {
            tensor.name: self._first(number) for number, tensor in enumerate(layout.tensors) if number not in self._rows
        }
        self._find()

    def close(self) -> None:
        """Close the files."""
        self._reading.close()

    @abstractmethod
    def _made(self, row: int, given: NDArray[np.float64], piece: Slice) -> Tensor:
        """A piece of a tensor, float32: that of a row of shares."""

    @abstractmethod
    def _moves(self, row: int, given: NDArray[np.float64], piece: Slice, slope: Tensor) -> Any:
        """The derivatives by the shares of those who have a piece, from the float64 gradient by its elements."""

    def _derivatives(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Those of what was propagated back, by ``shares``, of their shape."""
        found = np.zeros_like(shares)
        for number, slope in self._slopes().items():
            row, place = self._rows[number], self._rows[number] if len(shares) > 1 else 0
            flat = slope.reshape(-1)
            for piece in self._slices(number):
                if piece.having:  # else the same whatever the shares
                    wide = flat[piece.begin : piece.end].to("cpu", torch.float64)
                    found[place, piece.having] += self._moves(row, shares[place], piece, wide)
        return found

    def _find(self) -> None:
        """Build the model of numbers that occur once, and see where each tensor of the disk lies in it.

        By content, so that it rests on no name: what a family renames, stacks or splits is taken apart by
        transformers itself, and its pieces are the tensors of the disk, or the model is refused.
        """
        model, found = find_loaded_parameters(self._layout, self._rows, self._others, *self._made_of)
        self._model = model.to(self._device)  # type: ignore[arg-type]  # transformers types its wrapper otherwise
        inside = held(self._model)
        if found.lost:
            raise ScoringError(
                f"'{found.lost[0]}' is not put back together as it lies on the disk, so nothing can be learned of it.",
                hint="Use another `select` or `method`, or another version of transformers.",
            )
        self._names: Mapping[str, int] = found.names
        self._homes: dict[int, Tensor] = {number: inside[name] for number, name in found.direct.items()}
        self._plain = len(self._homes) == len(self._names)
        if not self._plain:
            self._homes = {}  # they would keep this model beside the next

    def _build(self, tensors: dict[str, Tensor]) -> None:
        config, task = self._made_of
        model = build_model(config, tensors, task, torch.float32)
        tensors.clear()
        self._model = model.to(self._device)  # type: ignore[arg-type]

    def _slopes(self) -> dict[int, Tensor]:
        """The gradient by each tensor of the disk that has any."""
        if self._plain:
            return {number: home.grad for number, home in self._homes.items() if home.grad is not None}
        none = torch.zeros((), device=self._device)
        slopes = {
            n: none.expand(each.shape) if each.grad is None else each.grad for n, each in held(self._model).items()
        }
        return {self._names[name]: each for name, each in on_disk(self._model, slopes).items() if name in self._names}

    def _set(self, shares: NDArray[np.float64]) -> None:
        """Make the model the soup of these shares."""
        if self._shares is not None and np.array_equal(shares, self._shares):
            return
        self._shares = None
        if self._plain:
            for number, home in self._homes.items():
                self._mix(number, shares, home.detach().view(-1))
        else:
            del self._model  # not two of them
            tensors = dict(self._others)
            for number in self._rows:
                tensor = self._layout.tensors[number]
                tensors[tensor.name] = torch.empty(tensor.shape)
                self._mix(number, shares, tensors[tensor.name].view(-1))
            self._build(tensors)
        self._shares = shares.copy()

    def _mix(self, number: int, shares: NDArray[np.float64], flat: Tensor) -> None:
        row = self._rows[number]
        given = shares[row if len(shares) > 1 else 0]
        for piece in self._slices(number):
            flat[piece.begin : piece.end].copy_(self._made(row, given, piece))

    def _slices(self, number: int) -> Iterator[Slice]:
        """Pieces of a tensor. What none in play has is the mean of the others, as in a merge."""
        run, base = self._layout.run_of(number), self._layout.base
        for start in range(0, run.elements, SLICE_ELEMENTS):
            for piece in run.pieces(start, min(start + SLICE_ELEMENTS, run.elements)):
                read = {
                    source: partial(self._reading.read, run, piece, source)
                    for source, at in enumerate(piece.extents)
                    if at
                }
                origin = None if base is None else read.pop(base, None)
                having = [column for column, source in enumerate(self.sources) if source in read]
                asked = [self.sources[column] for column in having] or list(read)
                yield Slice(piece.begin, piece.end, having, [read[source] for source in asked], origin)

    def _first(self, number: int) -> Tensor:
        """A tensor that is not averaged: the first source's that has it."""
        tensor = self._layout.tensors[number]
        result = torch.empty(tensor.elements, dtype=TORCH[tensor.dtype])
        for piece in self._slices(number) if tensor.size else ():
            result[piece.begin : piece.end] = piece.parts[0]()
        return result.reshape(tensor.shape)


class ValidationLoss(MergedModelGradient):
    r"""The loss of a soup, and the streamed gradient, a `hf_soup.selection.Objective`.

    Ingredients may be means of sources themselves: with :math:`G` the shares of sources in ingredients, the shares
    :math:`\alpha` of ingredients are :math:`\alpha G` of sources, of which all else here is said.

    The loss is that of each data set: of classes and of choices the cross-entropy of
    :math:`\operatorname{softmax}(\beta f(x; \theta))`, of texts the negative log-likelihood by token, without
    :math:`\beta`. :math:`\theta_t = \sum_i\alpha_{ti}\theta_{i,t}` is made in float32 and not rounded to the type
    that is written, and

    .. math:: \frac{\partial L}{\partial\alpha_{ti}} =
        \Bigl\langle\frac{\partial L}{\partial\theta_t}, \theta_{i,t}\Bigr\rangle

    summed in float64. Rows that not all have are the mean :math:`\sum_i\alpha_i\theta_i/\sum_i\alpha_i` over those who
    have them, as in a merge; integers are the first source's. The model is in eval mode, without dropout; running
    statistics of batch norms follow the mix, and have no part in the gradient.

    Args:
        layout: Names, shapes and places.
        paths: For every source, its weight files on this machine.
        ingredients: Those in play, in the order of columns of ``shares``, and the share of every source in each.
        config: The model's ``config.json``.
        benches: The validation data, whose rows share its weight. Of those whose loss is the same, as they differ in
            the metric alone, one is looked at, with the weights of all.
        outputs: What each ingredient gives on each of the validation data, all rows.
        rows: Of each of the validation data those that are looked at, by default all; they are numbered through.
        device: Where the model runs.
        progress: Called after each batch with the number of rows in it.
    """

    def __init__(
        self,
        layout: Layout,
        paths: Sequence[Mapping[str, Path]],
        ingredients: Mapping[str, Mapping[str, float]],
        config: Mapping[str, Any],
        benches: Sequence[LearnableDataset],
        outputs: Sequence[Sequence[Outputs]] = (),
        rows: Sequence[Ints] | None = None,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.names: Sequence[str] = tuple(ingredients)
        sources = [name for name in layout.names if any(name in shares for shares in ingredients.values())]
        self._groups = np.array([[shares.get(source, 0.0) for source in sources] for shares in ingredients.values()])
        kinds = [bench.learned_as for bench in benches]
        places = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        self._benches = [benches[place] for place in places]
        self._outputs = [[every[place] for place in places] for every in outputs]
        weights = [math.fsum(b.scoring.weight for b in benches if b.learned_as == kinds[place]) for place in places]
        each = zip(weights, self._benches, strict=True)
        self._weights = np.concatenate([weight * bench.row_weights for weight, bench in each])
        self._starts = np.cumsum([0, *(len(bench.row_weights) for bench in self._benches)])
        seen = [np.arange(benches[place].rows or 0) if rows is None else rows[place] for place in places]
        every = np.concatenate([start + mine for start, mine in zip(self._starts, seen, strict=False)])
        self._seen = every[self._weights[every] > 0]  # an empty text has no loss
        strata = [bench.strata for bench in self._benches]
        firsts = np.cumsum([0, *(kind.max() + 1 for kind in strata)])
        self.strata = np.concatenate([first + kind for first, kind in zip(firsts, strata, strict=False)])[self._seen]
        self._progress, self._limits = progress, [BatchLimit(bench.title) for bench in self._benches]
        task = benches[0].scoring.task
        super().__init__(layout, paths, [layout.numbers[source] for source in sources], config, task, device)

    def loss(self, shares: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, float]:
        """The mean loss over some rows, each with its weight, at the scale where it is least.

        Args:
            shares: ``(len(tensors), len(names))``, or ``(1, len(names))`` for all tensors alike.
            rows: Numbers of validation rows.

        Returns:
            The loss and that scale, between exp(-5) and exp(5); 1 where no data have one.

        Raises:
            ScoringError: The model fails.
            MergeError: A file is shorter than its header says, or holds NaN.
        """
        while True:
            parts: list[_Part] = []
            with suppress(_TooLargeError), torch.no_grad():
                self._run(shares, rows, parts.append)
                return _least(parts)

    def alone(self, rows: NDArray[np.int64]) -> list[float]:
        """That of every ingredient, from what it answered, without another forward pass."""
        return [self._loss_of(outputs, self._seen[rows]) for outputs in self._outputs]

    def _loss_of(self, outputs: Sequence[Outputs], rows: NDArray[np.int64]) -> float:
        parts = []
        for bench, own, (mine, share) in zip(self._benches, outputs, self._by_bench(rows), strict=True):
            parts.append(_Part(bench, torch.from_numpy(own[mine]), mine, torch.from_numpy(share)))
        return _least(parts)[0]

    def _by_bench(self, rows: NDArray[np.int64]) -> Iterator[tuple[Ints, Floats]]:
        """Of each data set those of some rows that are its, and their shares, which sum to 1 in all."""
        share = self._weights[rows] / self._weights[rows].sum()
        for start, end in pairwise(self._starts):
            chosen = (rows >= start) & (rows < end)
            yield rows[chosen] - start, share[chosen]

    def gradient(
        self, shares: NDArray[np.float64], scale: float, rows: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], float]:
        """The loss, its derivatives with respect to ``shares``, of their shape, and that with respect to ``scale``."""
        while True:
            with suppress(_TooLargeError):
                return self._gradient(shares, scale, rows)

    def _gradient(
        self, shares: NDArray[np.float64], scale: float, rows: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], float]:
        self._model.zero_grad()
        beta = torch.tensor(scale, requires_grad=True)
        losses = []

        def descend(part: _Part) -> None:
            loss = part.loss(beta)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())

        self._run(shares, rows, descend)
        slope = 0.0 if beta.grad is None else float(beta.grad)
        return sum(losses), self._derivatives(shares @ self._groups) @ self._groups.T, slope

    def _run(self, shares: NDArray[np.float64], rows: NDArray[np.int64], use: Callable[[_Part], object]) -> None:
        """Have the soup of these shares answer batch by batch."""
        self._set(shares @ self._groups)
        for place, (mine, share) in enumerate(self._by_bench(self._seen[rows])):
            bench = self._benches[place]
            share_of = np.zeros(len(bench.row_weights))
            share_of[mine] = share
            for numbers in bench.batches(mine):
                batch = {name: value.to(self._device) for name, value in bench.batch(numbers).items()}
                try:
                    answers, places = bench.by_row(bench.read(self._model(**batch), numbers), numbers)
                    use(_Part(bench, answers, places, torch.from_numpy(share_of[places])))
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    size = bench.scoring.batch_size
                    if self._limits[place].lower(error, min(size, len(numbers))):
                        # What is half done is done anew: a gradient may have come half-way.
                        scoring = bench.scoring.model_copy(update={"batch_size": self._limits[place].most})
                        self._benches[place] = replace(bench, scoring=scoring)
                        raise _TooLargeError from None
                    shapes = {name: tuple(value.shape) for name, value in batch.items()}
                    raise ScoringError(f"The model cannot learn from '{bench.title}' ({shapes}): {error}") from error
                self._progress(len(numbers))

    def _made(self, row: int, given: NDArray[np.float64], piece: Slice) -> Tensor:
        # What only some have is their mean.
        if len(piece.having) < len(self.sources):
            return mean_of(piece.parts, given[piece.having].tolist(), piece.end - piece.begin)
        made = torch.zeros(piece.end - piece.begin)
        for factor, read in zip(given.tolist(), piece.parts, strict=True):
            if factor:
                made.add_(read(), alpha=factor)
        return made

    def _moves(self, row: int, given: NDArray[np.float64], piece: Slice, slope: Tensor) -> Any:
        dots = np.array([float(slope.dot(read().double())) for read in piece.parts])
        if len(piece.having) == len(self.sources):
            return dots
        given = given[piece.having]
        if given.sum() <= 0:
            return 0.0  # their plain mean, as in a merge
        return (dots - given @ dots / given.sum()) / given.sum()


class _TooLargeError(Exception):
    """A batch did not fit the memory, and the next ones are smaller."""


class _Part(NamedTuple):
    """What a model answers to some rows of data, and the share of each in the loss."""

    bench: LearnableDataset
    answers: Tensor
    rows: Ints
    shares: Tensor

    def loss(self, scale: Tensor | float) -> Tensor:
        """Its share of the loss, with answers multiplied where they are those of a softmax."""
        losses = self.bench.row_losses(scale * self.answers if self.bench.scaled else self.answers, self.rows)
        return losses @ self.shares.to(losses)


def _least(parts: Sequence[_Part]) -> tuple[float, float]:
    """The loss at the scale where it is least, and that scale."""
    from scipy.optimize import minimize_scalar

    wide = [part._replace(answers=part.answers.double()) for part in parts]
    fixed = sum(part.loss(1.0).item() for part in wide if not part.bench.scaled)
    scaled = [part for part in wide if part.bench.scaled]
    if not scaled:
        return fixed, 1.0
    found = minimize_scalar(
        lambda log_scale: sum(part.loss(math.exp(log_scale)).item() for part in scaled),
        bounds=(-5, 5),
        method="bounded",
    )
    return fixed + float(found.fun), math.exp(found.x)
