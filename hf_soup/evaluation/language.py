"""Texts, and how likely language models find them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation.dataset import LearnableDataset, answered_together
from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.inputs import right_padded, rows_with_room
from hf_soup.evaluation.statistics import Floats, Ints, Metric
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import Scoring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

#: What the second line of a row says of tokens: that they are predicted, that something to read begins with them.
PREDICTED, BEGINS = 1, 2


def _by(column: int, of: Callable[[Floats], Floats]) -> Metric:
    def value(sizes: Ints, likelihoods: Floats, rows: Ints) -> Floats:
        return of(-(rows @ likelihoods) / np.maximum(rows @ sizes[:, column], 1))  # a draw may have empty texts alone

    return value


#: Name → metric, of ``(n, 2)`` bytes and tokens of texts and their ``(n,)`` log-likelihoods in nats; less is better.
LANGUAGE_METRICS: Mapping[str, Metric] = {
    "bits_per_byte": _by(0, lambda nats: nats / math.log(2)),
    "nll": _by(1, lambda nats: nats),
    "perplexity": _by(1, np.exp),
}


@dataclass(frozen=True, eq=False)
class LikelihoodDataset(LearnableDataset):
    """Rows of tokens, parts of which a causal language model predicts.

    Args:
        encoded: Token numbers of all rows, in the first line of each, and, where not all are predicted, what they are
            (`PREDICTED`, `BEGINS`) in the second.
        kept: The numbers of those that count.
        longest: How many tokens the model reads.
        vocabulary: How many it knows.
    """

    scoring: Scoring
    encoded: EncodedRows = field(repr=False)
    kept: Ints = field(repr=False)
    longest: int
    vocabulary: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.kept)

    @property
    def steps(self) -> int:
        """How many windows there are."""
        return len(self.windows)

    @property
    def looked_at_as(self) -> tuple[object, ...]:
        """The size of batches, which shows in the last bits, and the task."""
        return self.scoring.batch_size, self.scoring.task

    @property
    @abstractmethod
    def windows(self) -> Ints:
        """``(windows, 4)``: which row, its first and its last token that belong to it, and how many are predicted.

        The model is given all of them but the last; the predicted ones are the last, or those of them that the second
        line names.
        """

    def _sequences(self) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
        """Of rows with a second line, each sequence that is read by itself: which row, where it begins, that line."""
        numbers = (self.kept[begin : begin + 1000] for begin in range(0, len(self.kept), 1000))
        for place, row in enumerate(chain.from_iterable(map(self.encoded.rows, numbers))):
            begins = np.flatnonzero(row[1] & BEGINS)
            for first, end in zip(begins.tolist(), [*begins.tolist()[1:], row.shape[1]], strict=True):
                yield place, first, row[1, first:end]

    def likelihoods(
        self, model: PreTrainedModel, device: str, progress: Callable[[int], object], world: ProcessGroup | None
    ) -> Floats:
        """``(windows,)`` float64: the log-likelihood of what each window predicts, in nats.

        Raises:
            ScoringError: The model fails, or gives NaN.
        """
        windows, found = self.windows, np.empty(len(self.windows))
        batches = self._in_batches(np.arange(len(windows)))
        every = answered_together(self, model, batches, device, progress, world)
        for numbers, values in zip(batches, every, strict=True):
            found[numbers] = values
        for window in np.flatnonzero(~np.isfinite(found)):
            raise ScoringError(
                f"The model's log-likelihood of row {windows[window, 0]} of '{self.name}' is {found[window]}.",
                hint="Look at the ingredients' weights, and at the dtype (float16 overflows at 65,504).",
            )
        return found

    def _of_rows(self, rows: Ints) -> Ints:
        """The numbers of the windows of some rows."""
        return np.flatnonzero(np.isin(self.windows[:, 0], rows))

    def _in_batches(self, numbers: Ints) -> list[Ints]:
        """Windows in batches whose logits have room."""
        lengths = self.windows[numbers, 2] - self.windows[numbers, 1]
        # Long ones first: a batch too big for the memory fails at once. Stable: ties stay in order.
        order = np.argsort(-lengths, kind="stable")
        batches, begin = [], 0
        while begin < len(order):
            most = rows_with_room(int(lengths[order[begin]]), self.vocabulary, self.scoring.batch_size)
            batches.append(numbers[order[begin : begin + most]])
            begin += most
        return batches

    def _lines_of(self, numbers: Ints) -> Iterator[tuple[NDArray[np.int32], int]]:
        """The lines of some windows, and how many of the last tokens are predicted."""
        rows = self.encoded.rows(self.kept[self.windows[numbers, 0]])
        for row, (_, first, last, predicted) in zip(rows, self.windows[numbers].tolist(), strict=True):
            yield row[:, first : last + 1], predicted

    def batch(self, numbers: Ints) -> dict[str, Tensor]:
        """The model's keyword arguments for some windows."""
        return {"input_ids": right_padded([lines[0, :-1] for lines, _ in self._lines_of(numbers)])}

    def read(self, given: Any, numbers: Ints) -> Tensor:
        """``(windows,)`` float64: the log-likelihood of what some windows predict, in nats."""
        import torch

        values = []
        for logits, (lines, predicted) in zip(given.logits, self._lines_of(numbers), strict=True):
            end, last = lines.shape[1] - 1, lines[:, -predicted:]
            counted = np.flatnonzero(last[1] & PREDICTED) if len(last) > 1 else np.arange(predicted)
            targets = torch.from_numpy(last[0, counted].astype(np.int64)).to(logits.device)
            logs = logits[end - predicted + torch.from_numpy(counted).to(logits.device)].float().log_softmax(-1)
            values.append(logs.gather(1, targets[:, None]).cpu().double().sum())  # not all devices have doubles
        return torch.stack(values)


@dataclass(frozen=True, eq=False)
class LanguageDataset(LikelihoodDataset):
    r"""Texts, each of which a causal language model predicts token by token.

    The log-likelihood of a text of tokens :math:`x_1, \dots, x_T` is :math:`\sum_t \log p(x_t \mid x_{<t})`, with the
    token that begins texts (or, where there is none, the one that ends them) as :math:`x_0`. Texts that are longer than
    the model reads are cut into windows that predict each token once. The first begins with :math:`x_0`, each later one
    with the last token before it; the last one is filled up from the left. This is what lm-evaluation-harness calls
    ``loglikelihood_rolling``.

    ``bits_per_byte`` is :math:`-\frac{1}{\ln 2}\frac{\sum \log p}{\sum \text{bytes}}` over all texts, ``nll``
    :math:`-\frac{\sum \log p}{\sum T}` in nats by token, ``perplexity`` its exponential. Only the first compares models
    with different tokenizers.

    Args:
        encoded: Token numbers of all texts, ``(1, 1 + T)`` with the first one before them; or, of conversations whose
            answers alone count, ``(2, tokens)``: what is read up to answers, each with the one before it.
        kept, longest, vocabulary: As in `LikelihoodDataset`.
        sizes: ``(n, 2)``: bytes in UTF-8 and tokens of those that count, where they are predicted.
    """

    share: ClassVar[bool] = False
    less_is_better: ClassVar[bool] = True
    scaled: ClassVar[bool] = False

    sizes: Ints = field(repr=False)

    @property
    def learned_as(self) -> tuple[object, ...]:
        """The texts: bits, nats and the perplexity are least together."""
        return (self.fingerprint,)

    @property
    def strata(self) -> Ints:
        """Texts are of one kind."""
        return np.zeros(len(self.sizes), dtype=np.int64)

    @property
    def row_weights(self) -> Floats:
        """The tokens of each text, as a share of all."""
        return np.asarray(self.sizes[:, 1] / self.sizes[:, 1].sum())

    def batches(self, rows: Ints) -> list[Ints]:
        """The windows of some texts."""
        return self._in_batches(self._of_rows(rows))

    def by_row(self, answers: Tensor, numbers: Ints) -> tuple[Tensor, Ints]:
        """Windows, and the text of each."""
        return answers, self.windows[numbers, 0]

    def row_losses(self, outputs: Tensor, rows: Ints) -> Tensor:
        """Nats, divided by the tokens of the whole text."""
        import torch

        return -outputs / torch.from_numpy(np.maximum(self.sizes[rows, 1], 1)).to(outputs.device)

    @cached_property
    def windows(self) -> Ints:
        """As `LikelihoodDataset.windows`."""
        if len(self.encoded.names) == 1:
            counts = enumerate(self.sizes[:, 1].tolist())
            found = [(place, *window) for place, tokens in counts for window in _cut(tokens, self.longest)]
            return np.array(found, dtype=np.int64)
        found = [
            (place, start + first, start + last, predicted)
            for place, start, said in self._sequences()
            for first, last, predicted in _cut(len(said) - 1, self.longest)
            if (said[last + 1 - predicted : last + 1] & PREDICTED).any()
        ]
        return np.array(found, dtype=np.int64)

    def outputs(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Floats:
        """``(n,)`` float64: the log-likelihood of each text, in nats.

        Raises:
            ScoringError: The model fails, or finds a text impossible.
        """
        found = np.zeros(len(self.kept))
        np.add.at(found, self.windows[:, 0], self.likelihoods(model, device, progress, world))
        return found

    def fits(self, outputs: Floats) -> bool:
        """Whether remembered log-likelihoods can be those of a model."""
        return bool(outputs.dtype == np.float64 and outputs.shape == (len(self.kept),) and np.isfinite(outputs).all())

    def columns(self, answers: Floats) -> tuple[Ints, Floats]:
        """Bytes and tokens, and log-likelihoods."""
        return self.sizes, answers

    @property
    def metric(self) -> Metric:
        """As the scoring names it."""
        return LANGUAGE_METRICS[self.scoring.metric]

    def row_values(self, answers: Floats) -> Floats | None:
        """The part of each text in the negative metric; of the perplexity there is none."""
        metric = self.scoring.metric
        if metric == "perplexity":
            return None
        unit, column = (np.log(2), 0) if metric == "bits_per_byte" else (1.0, 1)
        return np.asarray(answers * len(answers) / (unit * self.sizes[:, column].sum()))


def _cut(tokens: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a text of so many tokens: the first and the last that belong to each, and how many it predicts.

    Tokens are numbered from 1 on, with the one before them as 0. A model is given all of a window but the last.

    >>> list(_cut(10, 4)), list(_cut(3, 4)), list(_cut(0, 4))
    ([(0, 4, 4), (4, 8, 4), (6, 10, 2)], [(0, 3, 3)], [])
    """
    done = min(tokens, longest)
    if done:
        yield 0, done, done
    while done < tokens:
        predicted = min(tokens - done, longest)
        done += predicted
        yield done - longest, done, predicted
