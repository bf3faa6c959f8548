"""The names of a model's outputs, as its config says them, and the tensors that have a row for each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_soup.checkpoint.config import shortened_value
from hf_soup.errors import IncompatibleError

#: The type of models of timm that transformers saved. Their labels are ``label_names``, and `with_labels` gives them
#: an ``id2label``; the config itself says how pictures are prepared.
TIMM = "timm_wrapper"


def labels_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What two classifiers say differently about their outputs; empty where one says nothing, or both say the same.

    Case and outer spaces make no other label.

    >>> a = {"id2label": {"0": "cat", "1": "dog"}}
    >>> labels_differ(a, {"id2label": {"0": "Dog", "1": "cat"}})
    'the same 2 labels stand in another order: 0 cat is 1, 1 dog is 0'
    >>> labels_differ(a, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    ''
    """
    ours, theirs = label_names(a, "the first model"), label_names(b, "the second model")
    counts = num_labels(a), num_labels(b)
    if None not in counts and counts[0] != counts[1]:
        return f"{counts[0]} labels against {counts[1]}"
    if ours is None or theirs is None:
        return ""
    left, right = ([label.strip().casefold() for label in labels] for labels in (ours, theirs))
    moved = [number for number, (one, other) in enumerate(zip(left, right, strict=True)) if one != other]
    if not moved:
        return ""
    if Counter(left) == Counter(right):
        what = f"the same {len(left)} labels stand in another order"
        pairs = [f"{number} {shortened_value(ours[number])} is {right.index(left[number])}" for number in moved[:8]]
    else:
        what = "other labels"
        pairs = [
            f"{number} is {shortened_value(ours[number])} against {shortened_value(theirs[number])}"
            for number in moved[:8]
        ]
    more = f", and {len(moved) - 8} more" if len(moved) > 8 else ""
    return f"{what}: {', '.join(pairs)}{more}"


def label_order(wanted: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Where each wanted label stands; None where the labels are others, or two have one name.

    >>> label_order(["cat", "dog"], ["Dog ", "cat"])
    [1, 0]
    """
    ours, theirs = ([label.strip().casefold() for label in each] for each in (wanted, labels))
    if sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        return None
    places = {label: place for place, label in enumerate(theirs)}
    return [places[label] for label in ours]


def label_names(config: Mapping[str, Any], name: str = "the model") -> tuple[str, ...] | None:
    """The names of a classifier's outputs in their order; None where they are absent or the generic ones.

    Raises:
        IncompatibleError: ``id2label`` is no map from 0, 1, 2, … to names.

    >>> label_names({"id2label": {"1": "joy", "0": "sadness"}})
    ('sadness', 'joy')
    >>> label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    """

    def damaged(what: str) -> IncompatibleError:
        return IncompatibleError(f"'id2label' of {name} {what}.", hint="Correct its config.json, or drop the model.")

    labels = config.get("id2label")
    if labels is None or labels == {}:
        return None
    if not isinstance(labels, Mapping):
        raise damaged("is no map from numbers to names")
    numbered: dict[int, str] = {}
    for key, value in labels.items():
        if not re.fullmatch(r"[0-9]{1,7}", str(key)):
            raise damaged(f"has the key {shortened_value(key)}, no number")
        if not isinstance(value, str | int | float):
            raise damaged(f"names {key} {shortened_value(value)}, no text")
        if int(key) in numbered:
            raise damaged(f"has {int(key)} twice")
        numbered[int(key)] = str(value)
    for number in range(len(numbered)):
        if number not in numbered:
            raise damaged(f"has {len(numbered)} names up to {max(numbered)}, but none for {number}")
    ordered = tuple(numbered[number] for number in range(len(numbered)))
    return None if all(re.fullmatch(r"label_\d+", label.strip().casefold()) for label in ordered) else ordered


def with_labels(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A config with these names of outputs, also where timm's class of transformers has them.

    >>> with_labels({"model_type": "bert"}, ["cat", "dog"])["id2label"]
    {'0': 'cat', '1': 'dog'}
    >>> with_labels({"model_type": "timm_wrapper"}, ["cat", "dog"])["label_names"]
    ['cat', 'dog']
    """
    numbered = {str(number): name for number, name in enumerate(names)}
    timms = {"label_names": list(names), "num_classes": len(names)} if config.get("model_type") == TIMM else {}
    return {**config, "id2label": numbered, "label2id": {name: int(n) for n, name in numbered.items()}, **timms}


def num_labels(config: Mapping[str, Any]) -> int | None:
    """How many outputs a config declares; None where it does not say (the library then assumes two)."""
    for key in ("id2label", "num_labels", "label2id", *(["num_classes"] if config.get("model_type") == TIMM else [])):
        value = config.get(key)
        if isinstance(value, Mapping) and value:
            return len(value)
        if isinstance(value, int) and value > 0:
            return value
    return None
