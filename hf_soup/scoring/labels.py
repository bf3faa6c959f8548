"""Which of a model's outputs a data set's label means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_soup.errors import ScoringError
from hf_soup.scoring.statistics import Ints

_SAYS_NOTHING = re.compile(r"(?:label[ _-]?)?0*(\d+)")


@dataclass(frozen=True)
class LabelMap:
    """How a data set's labels become the numbers of a model's outputs.

    Args:
        outputs: For each class of the data (its number, or its place in ``values``), the model's output.
        values: The data's class names, in the order of ``outputs``.
        class_names: The names of the model's outputs, from its config or else from the data.
        model: What the config says, be it only ``LABEL_0``.
        text: Whether the data holds names and not numbers.
        note: What had to be assumed, or "".
    """

    outputs: tuple[int, ...]
    values: tuple[str, ...]
    class_names: tuple[str, ...]
    model: tuple[str, ...]
    text: bool
    note: str = ""


def model_classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The model's class names in the order of its outputs.

    ``id2label`` has string keys in JSON, and is left out where the names are the generic ones.

    Raises:
        ScoringError: ``id2label`` does not number the classes from zero.

    >>> model_classes({"id2label": {"1": "cat", "0": "dog"}}), model_classes({})
    (('dog', 'cat'), ('LABEL_0', 'LABEL_1'))
    """
    names = config.get("id2label")
    if not names:
        number = config.get("num_labels")
        if not isinstance(number, int) or number < 1:
            number = _default_classes(config.get("model_type"))
        return tuple(f"LABEL_{i}" for i in range(number))
    keys = [str(key) for key in names]
    if sorted(keys) != sorted(str(i) for i in range(len(keys))):
        raise ScoringError(
            f"'id2label' of the model's config numbers its {len(keys)} classes {_listed(keys)}, "
            f"not 0 to {len(keys) - 1}.",
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

    Raises:
        ScoringError: The names differ, or there are more labels than outputs.
    """
    text = isinstance(column[0], str)
    values = tuple({_key(str(v)): str(v) for v in sorted(column)}.values()) if text else declared
    for names in (values or (), labels or (), model):
        if len(_keys(names)) < len(names):
            raise ScoringError(f"Two classes of {title} or of the model have one name: {_listed(names)}.")
    nameless = _nameless(model)
    if labels is not None:
        if nameless and values and not _nameless(values) and _keys(values) <= _keys(labels):
            _refuse_more(title, len(labels), model)
            order = (*labels, *model[len(labels) :])
            return LabelMap(_by_name(values, order), tuple(values), order, tuple(model), text)
        if not text:
            values = labels
    if values is None:
        values = tuple(str(number) for number in range(int(max(column)) + 1))
    elif _keys(values) == _keys(model) or (_keys(values) <= _keys(model) and (text or labels)):
        # `LABEL_1` and `1` are one, but nobody has said that they mean the same.
        spelled = {name.strip().casefold() for name in values} <= {name.strip().casefold() for name in model}
        note = "" if labels or spelled or not nameless else _by_number(title, nameless)
        return LabelMap(_by_name(values, model), tuple(values), tuple(model), tuple(model), text, note)
    elif not nameless and not _nameless(values):
        raise ScoringError(
            f"The classes of {title} are not the model's.\n"
            f"  {'labels' if values is labels else 'data'}:  {_listed(values)}\n  model: {_listed(model)}",
            hint="Say which of the model's names each of the data's numbers is: `labels: [...]`.",
        )
    elif text:
        raise ScoringError(
            f"Cannot match the labels of {title}: its rows say {_listed(values)}, "
            f"and the model's config says {_listed(model)}.",
            hint=f"Say the order of the model's classes, for instance `labels: [{', '.join(values)}]`.",
        )
    _refuse_more(title, len(values), model)
    names = (*values, *model[len(values) :]) if nameless and not _nameless(values) else tuple(model)
    outputs, note = tuple(range(len(values))), _by_number(title, nameless)
    return LabelMap(outputs, tuple(values), names, tuple(model), text, note)


def clean(title: str, column: Sequence[Any], name: str) -> list[Any]:
    """The labels of a column, all names or all whole numbers; numbers written as text are numbers.

    Raises:
        ScoringError: A label is missing, NaN, negative or neither name nor whole number.
    """
    cleaned: list[Any] = []
    for row, value in enumerate(column):
        # A float that is a whole number is how pandas writes integers beside a gap.
        whole = isinstance(value, float) and value.is_integer()
        if value is None or (not whole and not isinstance(value, str | int)):
            raise ScoringError(
                f"Row {row} of {title} has no usable label: '{name}' is {value!r}.",
                hint="Remove such rows, or name another `label_column`.",
            )
        cleaned.append(int(value) if not isinstance(value, str) else value.strip())
    if len({isinstance(value, str) for value in cleaned}) > 1:
        raise ScoringError(f"Column '{name}' of {title} mixes names and numbers.")
    if cleaned and isinstance(cleaned[0], str) and all(value.isdecimal() for value in cleaned):
        cleaned = [int(value) for value in cleaned]
    if cleaned and not isinstance(cleaned[0], str) and min(cleaned) < 0:
        row = next(row for row, value in enumerate(cleaned) if value < 0)
        raise ScoringError(
            f"Row {row} of {title} has the label {cleaned[row]}: the labels of this split are hidden.",
            hint="Use another split, such as validation.",
        )
    return cleaned


def to_outputs(labels: LabelMap, column: Sequence[Any], title: str) -> Ints:
    """The model's output number for each row, ``(n,)`` int64.

    Raises:
        ScoringError: A label is none of the classes.
    """
    places: dict[Any, int] = {_key(value): place for place, value in enumerate(labels.values)}
    rows = np.empty(len(column), dtype=np.int64)
    for row, value in enumerate(column):
        place = places.get(_key(value)) if isinstance(value, str) else value
        if place is None or place >= len(labels.outputs):
            raise ScoringError(
                f"Row {row} of {title} has the label {value!r}, which is none of {_listed(labels.values)}."
            )
        rows[row] = labels.outputs[place]
    return rows


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


def _default_classes(model_type: Any) -> int:
    """How many outputs transformers builds when a config does not say: two, but three for BART."""
    from transformers import CONFIG_MAPPING

    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return int(CONFIG_MAPPING[model_type]().num_labels or 2) if known else 2


def _key(name: str) -> str:
    """What two spellings of one class have in common; ``LABEL_2`` and ``2`` are both number 2."""
    key = " ".join(name.casefold().split())
    number = _SAYS_NOTHING.fullmatch(key)
    return number[1] if number else key


def _keys(names: Sequence[str]) -> set[str]:
    return {_key(name) for name in names}


def _nameless(names: Sequence[str]) -> bool:
    """Whether names are only numbers: ``LABEL_0``, ``0``."""
    return all(_SAYS_NOTHING.fullmatch(_key(name)) for name in names)


def _by_name(values: Sequence[str], model: Sequence[str]) -> tuple[int, ...]:
    places = {_key(name): place for place, name in enumerate(model)}
    return tuple(places[_key(value)] for value in values)


def _by_number(title: str, nameless: bool) -> str:
    side = "the model's config" if nameless else "the data"
    return f"{title}: labels matched by number, because {side} names no classes"


def _refuse_more(title: str, number: int, model: Sequence[str]) -> None:
    if number > len(model):
        raise ScoringError(
            f"{title} has {number} classes and the model has {len(model)} outputs ({_listed(model)}).",
            hint="Use data that the model was trained for, or name another `label_column`.",
        )


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown
