"""The validation loss of soups in memory, and its gradient with respect to the shares of the ingredients.

One backward pass gives the gradient of the loss by the weights of the one model that is held; the ingredients are
read from their files slice by slice and multiplied with it, so nothing grows with their number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_soup.checkpoint import TORCH
from hf_soup.errors import ScoringError
from hf_soup.evaluation.classification import ClassificationDataset
from hf_soup.evaluation.ensembles import Logits
from hf_soup.evaluation.loaded_parameters import find_loaded_parameters, held, on_disk
from hf_soup.evaluation.model import build_model
from hf_soup.evaluation.statistics import Ints
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

    The loss is the cross-entropy of :math:`\operatorname{softmax}(\beta f(x; \theta))` with
    :math:`\theta_t = \sum_i\alpha_{ti}\theta_{i,t}`, made in float32 and not rounded to the type that is written, and

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
        benches: The validation data, whose rows share its weight equally. The loss of the same rows is the same,
            whatever is measured on them: they are looked at once, with the weights of all.
        answers: What each ingredient answers to each of the validation data, all rows.
        rows: Of each of the validation data those that are looked at, by default all; they are numbered through.
        device: Where the model runs.
    """

    def __init__(
        self,
        layout: Layout,
        paths: Sequence[Mapping[str, Path]],
        ingredients: Mapping[str, Mapping[str, float]],
        config: Mapping[str, Any],
        benches: Sequence[ClassificationDataset],
        answers: Sequence[Sequence[Logits]] = (),
        rows: Sequence[Ints] | None = None,
        device: str = "cpu",
    ) -> None:
        self.names: Sequence[str] = tuple(ingredients)
        sources = [name for name in layout.names if any(name in shares for shares in ingredients.values())]
        self._groups = np.array([[shares.get(source, 0.0) for source in sources] for shares in ingredients.values()])
        kinds = [bench.fingerprint for bench in benches]
        places = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        self._benches = [benches[place] for place in places]
        self._answers = [[logits[place] for place in places] for logits in answers]
        weights = [math.fsum(b.scoring.weight for b in benches if b.fingerprint == kinds[place]) for place in places]
        each = zip(weights, self._benches, strict=True)
        self._weights = np.concatenate([np.full(bench.n, weight / bench.n) for weight, bench in each])
        self._starts = np.cumsum([0, *(bench.n for bench in self._benches)])
        seen = [np.arange(benches[place].n) if rows is None else rows[place] for place in places]
        self._seen = np.concatenate([start + mine for start, mine in zip(self._starts, seen, strict=False)])
        labels = [b.references + n * len(b.class_names) for n, b in enumerate(self._benches)]
        self.labels = np.concatenate(labels)[self._seen]
        task = benches[0].scoring.task
        super().__init__(layout, paths, [layout.numbers[source] for source in sources], config, task, device)

    def loss(self, shares: NDArray[np.float64], rows: NDArray[np.int64]) -> tuple[float, float]:
        """The mean cross-entropy over some rows, each with its weight, at the logit scale where it is least.

        Args:
            shares: ``(len(tensors), len(names))``, or ``(1, len(names))`` for all tensors alike.
            rows: Numbers of validation rows.

        Returns:
            The loss and that scale, between exp(-5) and exp(5).

        Raises:
            ScoringError: The model fails.
            MergeError: A file is shorter than its header says, or holds NaN.
        """
        answers: list[_Answers] = []
        with torch.no_grad():
            self._run(shares, rows, lambda *each: answers.append(each))
        return _least(answers)

    def alone(self, rows: NDArray[np.int64]) -> list[float]:
        """That of every ingredient, from what it answered, without another forward pass."""
        return [self._loss_of(logits, self._seen[rows]) for logits in self._answers]

    def _loss_of(self, logits: Sequence[Logits], rows: NDArray[np.int64]) -> float:
        share = self._weights[rows] / self._weights[rows].sum()
        answers = []
        for number, (bench, mine) in enumerate(zip(self._benches, logits, strict=True)):
            chosen = (rows >= self._starts[number]) & (rows < self._starts[number + 1])
            places = rows[chosen] - self._starts[number]
            if len(places):
                each = mine[places], bench.references[places], share[chosen]
                answers.append((torch.from_numpy(each[0]), torch.from_numpy(each[1]), torch.from_numpy(each[2])))
        return _least(answers)[0]

    def gradient(
        self, shares: NDArray[np.float64], scale: float, rows: NDArray[np.int64]
    ) -> tuple[float, NDArray[np.float64], float]:
        """The loss, its derivatives with respect to ``shares``, of their shape, and that with respect to ``scale``."""
        self._model.zero_grad()
        beta = torch.tensor(scale, requires_grad=True)
        losses = []

        def descend(logits: Tensor, target: Tensor, weights: Tensor) -> None:
            loss = _loss(beta * logits, target, weights)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())

        self._run(shares, rows, descend)
        assert beta.grad is not None
        return sum(losses), self._derivatives(shares @ self._groups) @ self._groups.T, float(beta.grad)

    def _run(
        self, shares: NDArray[np.float64], rows: NDArray[np.int64], use: Callable[[Tensor, Tensor, Tensor], None]
    ) -> None:
        """Have the soup of these shares answer batch by batch: logits, labels, and weights that sum to 1 in all."""
        self._set(shares @ self._groups)
        rows = self._seen[rows]
        share = self._weights[rows] / self._weights[rows].sum()
        for number, bench in enumerate(self._benches):
            chosen = np.flatnonzero((rows >= self._starts[number]) & (rows < self._starts[number + 1]))
            for places in bench.inputs.batches(chosen, bench.scoring.batch_size):
                mine = rows[places] - self._starts[number]
                batch = bench.inputs.batch(mine, self._device)
                try:
                    logits = self._model(**batch).logits.float().cpu()
                    use(logits, torch.from_numpy(bench.references[mine]), torch.from_numpy(share[places]))
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    shapes = {name: tuple(value.shape) for name, value in batch.items()}
                    raise ScoringError(
                        f"The model cannot learn from '{bench.title}' ({shapes}): {error}",
                        hint="Out of memory: a smaller `batch_size` of the data.",
                    ) from error

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


#: Logits, labels, and weights of rows.
_Answers = tuple[Tensor, Tensor, Tensor]


def _least(answers: Sequence[_Answers]) -> tuple[float, float]:
    """The cross-entropy at the logit scale where it is least, and that scale."""
    from scipy.optimize import minimize_scalar

    def at(log_scale: float) -> float:
        return sum(_loss(math.exp(log_scale) * logits.double(), *rest).item() for logits, *rest in answers)

    found = minimize_scalar(at, bounds=(-5, 5), method="bounded")
    return float(found.fun), math.exp(found.x)


def _loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target, reduction="none") @ weights.to(logits.dtype)
