"""From tensors with disk names to a model that answers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_soup._util.parallel import in_order, usable_cores
from hf_soup._util.text import first_line
from hf_soup.checkpoint import parts_of, read_config
from hf_soup.errors import IncompatibleError, ScoringError
from hf_soup.evaluation.batch_limit import BatchLimit
from hf_soup.evaluation.statistics import Ints
from hf_soup.evaluation.tasks import task_named

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


_T = TypeVar("_T")
#: Bytes that the threads of a pass hold together beside the model, where one of them does not hold more by itself.
_HELD_BYTES = 2 << 30


def build_model(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], task: str | None, dtype: torch.dtype
) -> PreTrainedModel:
    """Make a model from the tensors of a checkpoint, under the names that they have on disk.

    transformers 5 renames, and for some families stacks, what it reads from files; giving the tensors to
    ``from_pretrained`` goes through the same mapping as loading the folder. The model's parameters may
    *alias* the tensors: do not write to them while the model lives. `ReusableModel` uses that.

    Args:
        config: Its ``config.json``. No code that it names is run.
        tensors: Disk name → tensor.
        task: That it is scored by, as a recipe names it; None for a model of the class that its config names.
        dtype: Of the model's parameters.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        ScoringError: The config is no such model, or tensors are missing, left over or of another shape.
            Tied tensors may be missing.
    """
    known, model_class = _class_of(config, task)
    try:
        with _quiet(), parts_of(len(tensors), "The config is that of another model"):
            model, info = model_class.from_pretrained(
                None,
                config=known,
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
                # Only so that mismatches come back with the rest of the report; they are refused below.
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # what a stranger's config makes of a model's constructor
        raise ScoringError(f"Cannot make {model_class.__name__} from the tensors: {first_line(error)}") from error
    faults = [
        *(f"  missing     {name}" for name in sorted(info["missing_keys"])),
        *(f"  left over   {name}" for name in sorted(info["unexpected_keys"])),
        *(
            f"  other shape {name}: {tuple(given)}, the config says {tuple(wanted)}"
            for name, given, wanted in sorted(info["mismatched_keys"])
        ),
        *(f"  {message}" for message in info["error_msgs"]),
    ]
    if faults:
        more = [f"  … {len(faults) - 20} more"] if len(faults) > 20 else []
        raise ScoringError(
            "\n".join([f"The tensors do not make a {model_class.__name__}:", *faults[:20], *more]),
            hint="Score a model that was fine-tuned for this task, with the config that belongs to it.",
        )
    result: PreTrainedModel = model.eval()
    return result


def hand_out(model: PreTrainedModel, device: str, generation: Mapping[str, Any] | None = None) -> None:
    """Make a model what ``from_pretrained`` gives, for code that asks it: in eval mode, on its device, and with the
    settings of ``generation_config.json``, or of its config where there are none.

    Args:
        model: One of `build_model`, which has no folder to read settings from. Code that had it may have changed them.
        device: Where it goes.
        generation: The settings; None for code that lets it write nothing.
    """
    model.eval()  # type: ignore[no-untyped-call]
    model.to(device)  # type: ignore[arg-type]  # transformers types its wrapper as taking no string
    if generation is not None and model.can_generate():
        kind = model.generation_config_class
        model.generation_config = kind.from_dict({**generation}) if generation else kind.from_model_config(model.config)


def require_head(config: Mapping[str, Any], task: str) -> None:
    """Refuse models that have another head than a task is for, before anything is fetched.

    Raises:
        ScoringError: It is so, or their config cannot be read.
    """
    import transformers

    known, model_class = _class_of(config, task)
    named = next(iter(known.architectures or ()), model_class.__name__)
    if named != model_class.__name__ and hasattr(transformers, named):
        raise ScoringError(
            f"The models are {named}, and `task: {task}` is for {model_class.__name__}.",
            hint="Name the task that they were trained for, or measure them by a function of your own.",
        )


def _class_of(config: Mapping[str, Any], task: str | None) -> tuple[Any, Any]:
    """The config as transformers reads it, and its class of models for a task."""
    import transformers

    try:
        known = read_config(config, "the model")
    except IncompatibleError as error:
        raise ScoringError(
            f"Cannot read the model's config: {first_line(error)}",
            hint="Only models that transformers itself knows can be scored; code from a repo is never run.",
        ) from error
    if task is None:
        named = next(iter(known.architectures or ()), "")
        model_class: Any = getattr(transformers, named, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise ScoringError(
                f"transformers has no model '{named}', which the config names as its class.",
                hint="Upgrade transformers, or name the class as `architectures` in the models' config.json.",
            )
        return known, model_class
    asked = task_named(task)
    classes = getattr(transformers, asked.models).get(type(known), None)
    if classes is None:
        raise ScoringError(
            f"A model of type '{known.model_type}' has no {asked.head}.",
            hint=f"The recipe says `task: {task}`; is that what the ingredients do?",
        )
    # Some families have several, such as DeiT's with and without its teacher.
    several = classes if isinstance(classes, tuple) else (classes,)
    return known, next((found for found in several if found.__name__ in (known.architectures or ())), several[0])


class ReusableModel:
    """One model in memory, whose weights are changed in place where that gives what a fresh build would.

    `build_model` makes it once. Where every parameter and saved buffer is then one of the tensors given, as it is
    but for families that stack what they read, the next tensors are copied to where those went; else it is built anew.

    Args:
        config, task, dtype: As in `build_model`.
    """

    def __init__(self, config: Mapping[str, Any], task: str | None, dtype: torch.dtype) -> None:
        self._made_of = config, task, dtype
        self._model: PreTrainedModel | None = None
        self._places: dict[str, str] = {}  # of a parameter or buffer → the tensor that it takes
        self._still: dict[str, torch.Tensor] = {}  # buffers that are not saved, as they were made
        self._plain: list[object] = []  # what else the modules were made with

    def load(self, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
        """The model of these tensors, under the names of the first ones; it may keep them as its own.

        Raises:
            ScoringError: As in `build_model`.
        """
        import torch

        held = _held(self._model) if self._model is not None and self._places else {}
        # Scoring may change a buffer, such as the angles of rotary embeddings that grow, or a module for good: BigBird
        # has full attention after a short text, also for long ones.
        same = all(torch.equal(held[name].cpu(), value) for name, value in self._still.items() if held)
        if held and self._model is not None and same and _plain(self._model) == self._plain:
            with torch.no_grad():
                for name, source in self._places.items():
                    held[name].copy_(tensors[source])
            return self._model
        self._model = None  # before the next one is built
        config, task, dtype = self._made_of
        self._model = build_model(config, tensors, task, dtype)
        self._places, self._still = _places(self._model, tensors)
        self._plain = _plain(self._model)
        return self._model


def _held(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _plain(model: PreTrainedModel) -> list[object]:
    """The plain attributes of all modules."""
    every = ((name, *each) for name, module in model.named_modules() for each in vars(module).items())
    return [each for each in every if each[-1] is None or isinstance(each[-1], str | int | float)]


def _places(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Which tensor every parameter and saved buffer is, and copies of other buffers; nothing where one is none."""
    sources = {value.data_ptr(): name for name, value in tensors.items() if value.numel()}
    saved, places, still = model.state_dict().keys(), {}, {}
    for name, value in _held(model).items():
        source = sources.pop(value.data_ptr(), None)
        if source is not None and tensors[source].shape == value.shape and tensors[source].dtype == value.dtype:
            places[name] = source
        elif source is None and name not in saved:
            still[name] = value.detach().clone()
        else:
            return {}, {}
    # Numbers that went nowhere may be a tied tensor's second copy, which counts as soon as it differs.
    if any(tensors[name].is_floating_point() for name in sources.values()):
        return {}, {}
    return places, still


def answers(
    model: PreTrainedModel,
    batch_of: Callable[[Ints], dict[str, torch.Tensor]],
    every: Sequence[Ints],
    device: str,
    progress: Callable[[int], object],
    read: Callable[[Any, Ints], NDArray[Any]],
    limit: BatchLimit | None = None,
) -> list[NDArray[Any]]:
    """What a model answers to batches of rows. One that does not fit the memory goes through it in halves.

    Args:
        model: Moved to the device, and left there in eval mode.
        batch_of: Its keyword arguments for some rows.
        every: The rows of each batch.
        device: Where it runs.
        progress: Called with the number of rows done since the last call.
        read: What is kept of the model's output for some rows.
        limit: What is known of the size of batches that fit.

    Raises:
        ScoringError: The model fails; the message begins with the shapes of the batch.
    """
    import torch

    hand_out(model, device)
    bounds = limit or BatchLimit("a batch")

    def answer(rows: Ints) -> NDArray[Any]:
        if bounds.exceeded(len(rows)):
            return np.concatenate([answer(half) for half in np.array_split(rows, 2)])
        placed = {
            name: value.to(device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in batch_of(rows).items()
        }
        try:
            with torch.inference_mode():
                answered = read(model(**placed), rows)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if not bounds.lower(error, len(rows)):
                shapes = {name: tuple(value.shape) for name, value in placed.items()}
                raise ScoringError(
                    f"({shapes}): {first_line(error)}",
                    hint="Do the donor's tokenizer or image processor and its config belong to these weights?",
                ) from error
        else:
            progress(len(rows))
            return answered
        return answer(rows)  # outside of the handler, whose error holds what was allocated

    # Several processes that answer together have the cores that their launcher gives each.
    return list(each_alone(answer, every, torch.get_num_threads(), device))


def workers_for(size: int) -> int:
    """How many threads work at a time, each of which holds so many bytes beside the model."""
    return max(1, min(usable_cores(), _HELD_BYTES // max(1, size)))


def each_alone(work: Callable[[Ints], _T], every: Sequence[Ints], workers: int, device: str) -> Iterator[_T]:
    """What comes of each, in their order, so that sums of it are the same at any number of threads.

    On the CPU several are worked on at a time, each by one thread, as torch's own division of a matrix product among
    threads shows in its last bits.

    Args:
        work: Of some rows; called by several threads.
        every: The rows of each.
        workers: How many threads.
        device: Where models run; on another than the CPU it is one thread.
    """
    import torch

    workers = workers if torch.device(device).type == "cpu" else 1
    with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from in_order(pool, work, every, workers)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch works by one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading bar, and no loading report: its content is in the error."""
    from transformers.utils import logging as library

    bars, level = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()  # type: ignore[no-untyped-call]
    library.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()  # type: ignore[no-untyped-call]


def require_device(device: str) -> None:
    """Refuse a device that torch does not have, before anything is fetched for it.

    Raises:
        ScoringError: It has not.
    """
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ScoringError(
            f"torch cannot use the device '{device}': {reason}", hint="Use `cpu`, `cuda`, or `auto`."
        ) from None
