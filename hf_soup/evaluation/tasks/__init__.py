"""Tasks by name: one class a file, imported when it is asked for; those of other packages too."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from hf_soup._util.registry import load_offered, offered_by_packages
from hf_soup.errors import RecipeError

if TYPE_CHECKING:
    from hf_soup.evaluation.tasks.task import Task

_BUILT_IN = {
    "causal-lm": "causal_lm:CausalLM",
    "image-classification": "image_classification:ImageClassification",
    "multiple-choice-lm": "multiple_choice_lm:MultipleChoiceLM",
    "text-classification": "text_classification:TextClassification",
}


@cache
def task_named(name: str) -> type[Task]:
    """The class of a task: of one that is built in (a file here, named above and in `TASKS` of
    `hf_soup.recipe.schema`), or that an installed package offers.

    Raises:
        KeyError: There is no such task; recipes refuse its name before.
        RecipeError: It is that of another package, which cannot be imported or offers something else.
    """
    from hf_soup.evaluation.tasks.task import Task

    if name in _BUILT_IN:
        module, _, kind = _BUILT_IN[name].partition(":")
        found = getattr(import_module(f"{__name__}.{module}"), kind)
    else:
        offered = offered_by_packages("task")[name]
        found = load_offered("task", offered)
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise RecipeError(
                f"'{offered.value}', which is offered as the task '{name}', is no subclass of hf_soup.evaluation.Task.",
                hint="The value of the entry point is `module:Class`.",
            )
    result: type[Task] = found
    return result
