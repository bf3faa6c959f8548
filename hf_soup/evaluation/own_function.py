"""A function of the user's own that measures a model in memory, or in a folder."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from hf_soup._util.text import first_line
from hf_soup._util.users_code import users_code
from hf_soup.checkpoint import Kind, excess, panics_as_errors
from hf_soup.errors import ScoringError
from hf_soup.evaluation.dataset import MeanOfRows, Outputs
from hf_soup.evaluation.metrics import LARGEST, own_function
from hf_soup.evaluation.model import hand_out
from hf_soup.evaluation.statistics import Floats, Ints
from hf_soup.evaluation.template import ModelTemplate
from hf_soup.hub import ASSETS
from hf_soup.merging import ProcessGroup
from hf_soup.recipe import Comparison, FunctionScoring, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class FunctionDataset(MeanOfRows):
    """What a function of one's own gives, as `hf_soup.recipe.FunctionScoring` says; `function_dataset` makes it.

    Args:
        template: Of the models: the processor comes from its folder.
    """

    #: Nobody knows what a function looks at.
    remembered: ClassVar[bool] = False

    share: ClassVar[bool] = False

    scoring: FunctionScoring
    template: ModelTemplate = field(repr=False)

    @property
    def rows(self) -> None:
        """Nobody knows how many before it was called."""

    def outputs(
        self,
        model: PreTrainedModel,
        *,
        device: str = "cpu",
        progress: Callable[[int], object] = lambda _: None,
        world: ProcessGroup | None = None,
    ) -> Outputs:
        """What the function gives: ``(rows,)`` float64, or ``()`` of one number. The first process alone calls it.

        torch's random numbers begin anew, so that what is sampled is the same for equal models. Nothing is recorded for
        gradients.

        Raises:
            ScoringError: It fails, or gives something else, or NaN.
        """
        world = world or ProcessGroup()
        given: Outputs = world.broadcast(self._called(model, device) if world.rank == 0 else None)
        progress(1)
        return given

    def _called(self, model: PreTrainedModel, device: str) -> Outputs:
        import torch

        function = own_function(self.scoring.function, "function")
        named = f"The function '{self.scoring.function}'"
        hint = "It is called as `score(model, processor)`, or as `score(folder)` where an argument has that name."
        with (
            tempfile.TemporaryDirectory(prefix="hf-soup-") as folder,
            torch.random.fork_rng(),
            torch.no_grad(),
            users_code(f"{named} fails", hint=hint),
        ):
            torch.manual_seed(0)
            names = [name for name, each in inspect.signature(function).parameters.items() if _asks(each)]
            if "folder" in names:
                hand_out(model, device)
                model.save_pretrained(folder)
                shutil.copytree(self.template.folder, folder, dirs_exist_ok=True)
                return _numbers(function(folder=Path(folder)), named)
            hand_out(model, device, self.template.generation)
            return _numbers(function(model, self._processor) if len(names) > 1 else function(model), named)

    @cached_property
    def _processor(self) -> Any:
        """The processor, or tokenizer, or image processor, of the models; None where they have none.

        Raises:
            ScoringError: It cannot be read, or its files ask for too much.
        """
        from transformers import AutoProcessor

        folder, options = self.template.folder, {"local_files_only": True, "trust_remote_code": False}
        if not [file for file in folder.iterdir() if ASSETS.fullmatch(file.name) and file.name != "config.json"]:
            return None
        hint = "Put the files of another beside the weights; a function that takes the model alone needs none."
        for kind in get_args(Kind):
            if beyond := excess(folder, kind):
                raise ScoringError(f"The models' {kind} {beyond}, so it is not used.", hint=hint)
        try:
            with panics_as_errors():
                return AutoProcessor.from_pretrained(folder, **options)  # type: ignore[no-untyped-call]
        except Exception as error:  # a stranger's files, and no common class; tokenizers raises Exception itself
            raise ScoringError(f"Cannot read the models' processor: {first_line(error)}", hint=hint) from error

    def fits(self, outputs: Outputs) -> bool:
        """Nothing is kept on the disk."""
        return False

    def row_values(self, answers: Outputs) -> Any:
        """The numbers that it gave; None where it gave one for all rows."""
        return answers if answers.ndim else None

    def judge(self, answers: Outputs, rows: Ints | None = None) -> float:
        """The number, or the mean of the rows."""
        return super().judge(answers, rows) if answers.ndim else float(answers)

    def score(self, outputs: Outputs) -> Score:
        """That, with the bootstrap's 95 % interval where there are rows."""
        if outputs.ndim:
            return super().score(outputs)
        return Score(self.scoring.measure, float(outputs), None, None, None, share=False)

    def compare(self, first: Outputs, second: Outputs) -> Comparison:
        """The paired bootstrap, and a permutation test; of single numbers nothing is claimed."""
        if first.ndim:
            return super().compare(first, second)
        sentence = f"{float(first):.4g} against {float(second):.4g}; a number without rows tells nothing of luck"
        return Comparison(
            metric=self.scoring.measure, difference=float(first) - float(second), low=None, high=None, p=None, n=None,
            sentence=sentence, significant=False,
        )  # fmt: skip

    def resampled(self, outputs: Outputs) -> Floats:
        """As `EvalDataset.resampled`."""
        if not outputs.ndim:
            raise ScoringError(
                f"The function '{self.scoring.function}' gives one number, and an interval needs one for each row.",
                hint="Return a list of numbers, one for each row.",
            )
        return super().resampled(outputs)


def function_dataset(scoring: FunctionScoring, template: ModelTemplate) -> FunctionDataset:
    """A function of one's own, ready to be called.

    Raises:
        ScoringError: It cannot be imported.
    """
    own_function(scoring.function, "function")  # now, and not after the download
    note = "its rows are the function's own; nobody compared them with other data"
    fingerprint = hashlib.sha256(f"function {scoring.function}".encode()).hexdigest()
    return FunctionDataset(scoring.title, scoring, (note,), fingerprint, scoring.title, template)


def _asks(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) or (
        parameter.kind is parameter.KEYWORD_ONLY and parameter.name == "folder"
    )


def _numbers(given: object, named: str) -> Outputs:
    """What the function gives: finite numbers, one or one for each row."""
    try:
        values = np.asarray(given.tolist() if hasattr(given, "tolist") else given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.empty((0, 0))
    lacking = given is None or (isinstance(given, list | tuple) and any(each is None for each in given))
    if values.ndim > 1 or not values.size or isinstance(given, str | bytes | complex) or lacking:
        shape = f" of shape {tuple(given.shape)}" if hasattr(given, "shape") else ""
        raise ScoringError(
            f"{named} gives {type(given).__name__}{shape} {str(given)[:80]!r}, and not a number or a number for each "
            "row.",
            hint="Return one number, where more is better, or a list of them, one for each row.",
        )
    for row in np.flatnonzero(~(np.abs(values) <= LARGEST)):
        raise ScoringError(
            f"{named} gives {values.flat[row]}{f' for row {row}' if values.ndim else ''}.",
            hint="Look at the function, and at the dtype of the weights (float16 overflows at 65,504).",
        )
    return values
