"""Tasks by name: one class a file, imported when it is asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

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
    """The class of a task; a new one is a file here, and its name above and in `hf_soup.recipe.Scoring`."""
    module, _, kind = _BUILT_IN[name].partition(":")
    found: type[Task] = getattr(import_module(f"{__name__}.{module}"), kind)
    return found
