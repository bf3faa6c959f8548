"""Which of a model's outputs a data set's label means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.evaluation.statistics import Ints

_SAYS_NOTHING = re.compile(r"(?:label[ _-]?)?0*(\d+)")


class LabelMap(NamedTuple):
    """How a data set's labels become the numbers of a model's outputs."""

    outputs: tuple[int, ...]  #: For each class of the data (its number, or its place in ``values``).
    values: tuple[str, ...]  #: The data's class names, in the order of ``outputs``.
    class_names: tuple[str, ...]  #: The names of the model's outputs, from its config or else from the data.
    model: tuple[str, ...]  #: What the config says, be it only ``LABEL_0``.
    text: bool  #: Whether the data holds names and not numbers.
    note: str = ""  #: What had to be assumed.


def model_classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The model's class names in the order of its outputs; a config leaves out those that are the generic ones.

    >>> model_classes({"id2label": {"1": "cat", "0": "dog"}}), model_classes({})
    (('dog', 'cat'), ('LABEL_0', 'LABEL_1'))
    """
    names = config.get("id2label")
    if not names:
        from transformers import CONFIG_MAPPING, PreTrainedConfig

        # Most families make two outputs where the config says nothing; BART makes three. CONFIG_MAPPING has no `get`.
        kind, said = str(config.get("model_type")), config.get("num_labels")
        family = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401
        return tuple(f"LABEL_{i}" for i in range(said if isinstance(said, int) else family().num_labels or 2))
    if {str(key) for key in names} != {str(i) for i in range(len(names))}:
        raise ScoringError(
            f"'id2label' of the model's config numbers its {len(names)} classes {_listed([*map(str, names)])}, "
            f"not 0 to {len(names) - 1}.",
            hint="Correct the config of the first ingredient.",
        )
    return tuple(str(name) for _, name in sorted((int(key), name) for key, name in names.items()))


def match(
    title: str,
    model: Sequence[str],
    column: Sequence[int] | Sequence[str],
    declared: Sequence[str] | None,
    labels: Sequence[str] | None,
) -> LabelMap:
    """Match the data's classes to the model's: by name where both sides have names, else by number.

    ``labels`` are the names of the data's numbers 0, 1, …, matched to the model's names (``LABEL_2`` or
    ``2`` will do). Where the model has no names and the data has, they are the order of the model's outputs.
    Case and space make no other name; ``LABEL_0`` and ``0`` are no names.

    Args:
        title: What errors call the data.
        model: The model's class names in the order of its outputs.
        column: The labels of the rows, as `clean` gives them.
        declared: The class names that the data set declares for its numbers, if it does.
        labels: What the recipe says.
    """
    text = isinstance(column[0], str)
    values = tuple({key(str(v)): str(v) for v in sorted(column)}.values()) if text else declared
    for names in (values or (), labels or (), model):
        if len(_keys(names)) < len(names):
            raise ScoringError(f"Two classes of {title} or of the model have one name: {_listed(names)}.")
    nameless, names, note = _nameless(model), tuple(model), ""
    ordered = labels if nameless and values and not _nameless(values) and _keys(values) <= _keys(labels or ()) else None
    if ordered:
        names = (*ordered, *model[len(ordered) :])
    elif labels and not text:
        values = labels
    if values is None:
        number = int(max(column)) + 1
        # No more of them than the model's outputs: a label of 10**12 is refused below, and never counted up to.
        values, by_name = tuple(str(each) for each in range(min(number, len(model)))), False
    else:
        by_name = _keys(values) <= _keys(names) and bool(text or labels or len(values) == len(names))
        if not by_name and not _nameless(values) and not nameless:
            raise ScoringError(
                f"The classes of {title} are not the model's.\n"
                f"  {'labels' if values is labels else 'data'}:  {_listed(values)}\n  model: {_listed(model)}",
                hint="Say which of the model's names each of the data's numbers is: `labels: [...]`.",
            )
        if not by_name and text:
            raise ScoringError(
                f"Cannot match the labels of {title}: its rows say {_listed(values)}, "
                f"and the model's config says {_listed(model)}.",
                hint=f"Say the order of the model's classes, for instance `labels: [{', '.join(values)}]`.",
            )
        number = len(ordered or values)
    if number > len(model):
        raise ScoringError(
            f"{title} has {number:,} classes and the model has {len(model)} outputs ({_listed(model)}).",
            hint="Use data that the model was trained for, or name another `label_column`.",
        )
    places = {key(name): place for place, name in enumerate(names)}
    outputs = tuple(places[key(value)] if by_name else place for place, value in enumerate(values))
    # `LABEL_1` and `1` are one, but nobody has said that they mean the same.
    spelled = {name.strip().casefold() for name in values} <= {name.strip().casefold() for name in model}
    if not by_name or (nameless and not labels and not spelled):
        side = "the model's config" if nameless else "the data"
        note = f"labels matched by number, because {side} names no classes"
    if not by_name and nameless and not _nameless(values):
        names = (*values, *model[len(values) :])
    return LabelMap(outputs, tuple(values), names, tuple(model), text, note)


def clean(title: str, column: Sequence[Any], name: str, rows: Sequence[int] | None = None) -> list[Any]:
    """The labels of a column, all names or all whole numbers from 0; numbers written as text are numbers.

    Args:
        title, name: What errors call the data and the column.
        column: The labels.
        rows: The row of each, where a row has several; by default there is one a row.
    """
    cleaned: list[Any] = []
    rows = range(len(column)) if rows is None else rows
    for row, value in zip(rows, column, strict=True):
        # A float that is a whole number is how pandas writes integers beside a gap.
        if not isinstance(value, str | int) and not (isinstance(value, float) and value.is_integer()):
            raise ScoringError(
                f"Row {row} of {title} has no usable label: '{name}' is {value!r}.",
                hint="Remove such rows, or name another `label_column`.",
            )
        cleaned.append(value.strip() if isinstance(value, str) else int(value))
    texts = [value for value in cleaned if isinstance(value, str)]
    if 0 < len(texts) < len(cleaned):
        raise ScoringError(f"Column '{name}' of {title} mixes names and numbers.")
    if not all(value.isdecimal() for value in texts):
        return cleaned
    numbers = [int(value) for value in cleaned]
    for row, number in zip(rows, numbers, strict=True):
        if number < 0:
            raise ScoringError(
                f"Row {row} of {title} has the label {number}: the labels of this split are hidden.",
                hint="Use another split, such as validation.",
            )
    return numbers


def to_outputs(labels: LabelMap, column: Sequence[Any], title: str, rows: Sequence[int] | None = None) -> Ints:
    """The model's output number for each label, ``(n,)`` int64; ``rows`` as in `clean`."""
    places = {key(value): place for place, value in enumerate(labels.values)}
    numbers = [places[key(value)] for value in column] if labels.text else column
    for row, number in zip(range(len(column)) if rows is None else rows, numbers, strict=True):
        if number >= len(labels.outputs):
            raise ScoringError(
                f"Row {row} of {title} has the label {number}, which is none of {_listed(labels.values)}.",
                hint="Correct the row, or `labels`.",
            )
    return np.array([labels.outputs[number] for number in numbers], dtype=np.int64)


def suggestion(labels: LabelMap, permutation: Sequence[int]) -> tuple[str, ...] | None:
    """The ``labels:`` with which a class that now means output i would mean ``permutation[i]``.

    None where text labels were matched to a model's names: no order can then be at fault.
    """
    if not labels.text:
        return tuple(labels.model[permutation[output]] for output in labels.outputs)
    order = {permutation[output]: value for output, value in zip(labels.outputs, labels.values, strict=True)}
    if not _nameless(labels.model) or len(order) < len(labels.model):
        return None
    return tuple(order[output] for output in range(len(order)))


def key(name: str) -> str:
    """What two spellings of one class have in common; ``LABEL_2`` and ``2`` are both number 2."""
    plain = " ".join(name.casefold().split())
    number = _SAYS_NOTHING.fullmatch(plain)
    return number[1] if number else plain


def _keys(names: Sequence[str]) -> set[str]:
    return {key(name) for name in names}


def _nameless(names: Sequence[str]) -> bool:
    """Whether names are only numbers: ``LABEL_0``, ``0``."""
    return all(_SAYS_NOTHING.fullmatch(key(name)) for name in names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
