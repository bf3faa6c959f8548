"""From tensors with disk names to a model that answers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_soup.errors import ScoringError
from hf_soup.scoring.tasks import TASKS, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def build_model(
    config_folder: Path, tensors: Mapping[str, torch.Tensor], task: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Make a model from the tensors of a checkpoint, under the names that they have on disk.

    transformers 5 renames, and for some families stacks, what it reads from files; giving the tensors to
    ``from_pretrained`` goes through the same mapping as loading the folder. The model's parameters may
    *alias* the tensors: do not write to them while the model lives.

    Args:
        config_folder: A folder with ``config.json``. No code from it is run.
        tensors: Disk name → tensor.
        task: ``image-classification`` or ``text-classification``.
        dtype: Of the model's parameters.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        ScoringError: The config is no such model, or tensors are missing, left over or of another shape.
            Tied tensors may be missing.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(config_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a stranger's config, and no common class
        raise ScoringError(
            f"Cannot read the model's config: {first_line(error)}",
            hint="Only models that transformers itself knows can be scored; code from a repo is never run.",
        ) from error
    classes = getattr(transformers, TASKS[task].models).get(type(config), None)
    if classes is None:
        raise ScoringError(
            f"A model of type '{config.model_type}' has no {TASKS[task].head}.",
            hint=f"The recipe says `task: {task}`; is that what the ingredients do?",
        )
    # Some families have several, such as DeiT's with and without its teacher.
    several = classes if isinstance(classes, tuple) else (classes,)
    model_class = next((found for found in several if found.__name__ in (config.architectures or ())), several[0])
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                None,
                config=config,
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
