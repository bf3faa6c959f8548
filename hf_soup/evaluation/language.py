"""Texts, and how likely language models find them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_soup.errors import ScoringError
from hf_soup.evaluation.dataset import EvalDataset, answered_together
from hf_soup.evaluation.encoded_rows import EncodedRows
from hf_soup.evaluation.statistics import Floats, Ints, Metric, bootstrap, comparison_of, paired_bootstrap, resampled
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import Comparison, Score, Scoring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

#: Bytes that the logits of a batch may take, in float32; a window alone may take more.
_LOGIT_BYTES = 1 << 29


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
class LikelihoodDataset(EvalDataset):
    """Rows of tokens, parts of which a causal language model predicts.

    Args:
        encoded: Token numbers of all rows, in the first line of each.
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

        The model is given all of them but the last; the predicted ones are the last.
        """

    def likelihoods(
        self, model: PreTrainedModel, device: str, progress: Callable[[int], object], world: ProcessGroup | None
    ) -> Floats:
        """``(windows,)`` float64: the log-likelihood of what each window predicts, in nats.

        Raises:
            ScoringError: The model fails, or gives NaN.
        """
        import torch

        windows = self.windows
        # Long ones first: a batch too big for the memory fails at once. Stable: ties stay in order.
        order = np.argsort(windows[:, 1] - windows[:, 2], kind="stable")
        batches, begin = [], 0
        while begin < len(order):
            length = int(windows[order[begin], 2] - windows[order[begin], 1])
            most = max(1, min(self.scoring.batch_size, _LOGIT_BYTES // (4 * length * self.vocabulary)))
            batches.append(order[begin : begin + most])
            begin += most

        def tokens_of(numbers: Ints) -> Iterator[tuple[NDArray[np.int32], int]]:
            rows = self.encoded.rows(self.kept[windows[numbers, 0]])
            for row, (_, first, last, predicted) in zip(rows, windows[numbers].tolist(), strict=True):
                yield row[0, first : last + 1], predicted

        def batch_of(numbers: Ints) -> dict[str, Tensor]:
            inputs = [tokens[:-1] for tokens, _ in tokens_of(numbers)]
            padded = np.zeros((len(inputs), max(map(len, inputs))), dtype=np.int64)
            for line, tokens in zip(padded, inputs, strict=True):
                line[: len(tokens)] = tokens  # what stands to the right of a token changes nothing there
            return {"input_ids": torch.from_numpy(padded)}

        def likelihoods(given: Any, numbers: Ints) -> Floats:
            values = np.empty(len(numbers))
            for line, (logits, (tokens, predicted)) in enumerate(zip(given.logits, tokens_of(numbers), strict=True)):
                end, targets = len(tokens) - 1, torch.from_numpy(tokens[-predicted:].astype(np.int64))
                logs = logits[end - predicted : end].float().log_softmax(-1)
                values[line] = float(logs.gather(1, targets.to(logs.device)[:, None]).double().sum())
            return values

        found = np.empty(len(windows))
        every = answered_together(self.name, model, batch_of, batches, device, progress, world, likelihoods)
        for numbers, values in zip(batches, every, strict=True):
            found[numbers] = values
        for window in np.flatnonzero(~np.isfinite(found)):
            raise ScoringError(
                f"The model's log-likelihood of row {windows[window, 0]} of '{self.name}' is {found[window]}.",
                hint="Look at the ingredients' weights, and at the dtype (float16 overflows at 65,504).",
            )
        return found


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
        encoded: Token numbers of all texts, ``(1, 1 + T)`` with the first one before them.
        kept, longest, vocabulary: As in `LikelihoodDataset`.
        sizes: ``(n, 2)``: bytes in UTF-8 and tokens of those that count.
    """

    share: ClassVar[bool] = False

    sizes: Ints = field(repr=False)

    @cached_property
    def windows(self) -> Ints:
        """As `LikelihoodDataset.windows`."""
        counts = enumerate(self.sizes[:, 1].tolist())
        found = [(place, *window) for place, tokens in counts for window in _cut(tokens, self.longest)]
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

    @property
    def _metric(self) -> Metric:
        return LANGUAGE_METRICS[self.scoring.metric]

    def _value(self, outputs: Floats, rows: Ints | None = None) -> float:
        chosen = np.arange(len(outputs)) if rows is None else rows
        return float(self._metric(self.sizes[chosen], outputs[chosen], np.ones((1, len(chosen)), np.int64))[0])

    def judge(self, answers: Floats, rows: Ints | None = None) -> float:
        """The negative of the metric, as less is better."""
        return -self._value(answers, rows)

    def score(self, outputs: Floats) -> Score:
        """The metric, with the bootstrap's 95 % interval over texts."""
        value = self._value(outputs)
        low, high = bootstrap(self.sizes, outputs, self._metric)
        return Score(
            self.scoring.measure, value, min(low, value), max(high, value), len(outputs), share=False,
            less_is_better=True,
        )  # fmt: skip

    def compare(self, first: Floats, second: Floats) -> Comparison:
        """The paired bootstrap, and a permutation test, over texts."""
        low, high, p = paired_bootstrap(self.sizes, first, second, self._gain)
        difference = self.judge(first) - self.judge(second)
        return comparison_of(self.scoring.measure, difference, low, high, p, len(first), share=False)

    def resampled(self, outputs: Floats) -> Floats:
        """As `EvalDataset.resampled`, of the negative metric."""
        return resampled(self.sizes, outputs, self._gain)

    def _gain(self, sizes: Ints, outputs: Floats, rows: Ints) -> Floats:
        return -self._metric(sizes, outputs, rows)


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
