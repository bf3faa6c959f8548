"""Which output a label means: by name, by number with a note, by the recipe's `labels`."""

from typing import Any

import pytest

from hf_soup.errors import ScoringError
from hf_soup.evaluation import label_map as labels

GENERIC = ("LABEL_0", "LABEL_1", "LABEL_2")
MOODS = ("sadness", "joy", "anger")


def match(model: Any, column: Any, declared: Any = None, said: Any = None) -> labels.LabelMap:
    return labels.match("data", model, column, declared, said)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"1": "cat", "0": "dog"}}, ("dog", "cat")),
        ({"id2label": {str(i): str(i) for i in range(11)}}, tuple(str(i) for i in range(11))),
        ({"num_labels": 3}, GENERIC),
        ({"id2labl": {"0": "x"}}, GENERIC[:2]),
        ({"model_type": "bert"}, GENERIC[:2]),
        ({"model_type": "bart"}, GENERIC),
    ],
)
def test_model_classes(config: dict[str, Any], names: tuple[str, ...]) -> None:
    assert labels.model_classes(config) == names


def test_id2label_with_a_gap_is_refused() -> None:
    with pytest.raises(ScoringError, match="0, 2, not 0 to 1"):
        labels.model_classes({"id2label": {"0": "a", "2": "b"}})


@pytest.mark.parametrize(
    ("model", "column", "declared", "said", "outputs", "noted"),
    [
        (MOODS, [0, 1], ("Joy", " anger", "SADNESS"), None, (1, 2, 0), False),
        (MOODS, ["Joy ", "sadness"], None, None, (1, 0), False),
        (MOODS, [0, 2], None, None, (0, 1, 2), True),
        (MOODS, [0, 2], GENERIC, None, (0, 1, 2), True),
        (MOODS, [0, 2], ("0", "1", "2"), None, (0, 1, 2), True),
        (GENERIC, [0, 2], MOODS, None, (0, 1, 2), True),
        (GENERIC, [0, 1], None, None, (0, 1), True),
        (("0", "1"), [0, 1], ("1", "0"), None, (1, 0), False),
        (GENERIC, [0, 2], ("0", "1", "2"), None, (0, 1, 2), True),
        (MOODS, [0, 2], None, ("anger", "sadness", "joy"), (2, 0, 1), False),
        (MOODS, [0, 1], ("colère", "joie"), ("anger", "joy"), (2, 1), False),
        (GENERIC, [0, 2], None, ("2", "0", "1"), (2, 0, 1), False),
        (GENERIC, [0, 2], ("0", "1", "2"), ("LABEL_2", "LABEL_0", "LABEL_1"), (2, 0, 1), False),
        (GENERIC, [0, 2], MOODS, ("anger", "sadness", "joy"), (1, 2, 0), False),
        (GENERIC, ["joy", "sadness"], None, MOODS, (1, 0), False),
    ],
)
def test_match(model: Any, column: Any, declared: Any, said: Any, outputs: tuple[int, ...], noted: bool) -> None:
    found = match(model, column, declared, said)
    assert found.outputs == outputs
    assert bool(found.note) == noted


def test_names_of_the_data_are_shown_where_the_model_has_none() -> None:
    assert match(GENERIC, [0, 2], MOODS).class_names == MOODS
    assert match(GENERIC, ["joy"], None, MOODS).class_names == MOODS
    assert match(MOODS, [0, 2]).class_names == MOODS


@pytest.mark.parametrize(
    ("model", "column", "declared", "said", "message"),
    [
        (MOODS, [0], ("sadness", "joy", "fear"), None, "data:  sadness, joy, fear\n  model: sadness, joy, anger"),
        (MOODS, [0], ("sadness", "joy"), None, "data:  sadness, joy\n  model: sadness, joy, anger"),
        (MOODS, ["fear", "joy"], None, None, "data:  fear, joy\n  model: sadness, joy, anger"),
        (MOODS, [0], None, ("sadness", "fear"), "labels:  sadness, fear\n  model: sadness, joy, anger"),
        (GENERIC, ["b", "a"], None, None, "rows say a, b, and the model's config says LABEL_0"),
        (GENERIC, [0, 3], None, None, "4 classes and the model has 3 outputs"),
        (GENERIC, [0, 10**12], None, None, "1,000,000,000,001 classes and the model has 3 outputs"),
        (GENERIC, [0, 1], ("a", "b", "c", "d"), None, "4 classes and the model has 3 outputs"),
        (GENERIC, ["a", "b"], None, ("a", "b", "c", "d"), "4 classes and the model has 3 outputs"),
        (MOODS, [0, 1], None, ("joy", "Joy ", "anger"), "one name: joy, Joy , anger"),
        (("a", "A"), [0, 1], ("a", "b"), None, "one name: a, A"),
    ],
)
def test_mismatches_show_both_sides(model: Any, column: Any, declared: Any, said: Any, message: str) -> None:
    with pytest.raises(ScoringError) as raised:
        match(model, column, declared, said)
    assert message in raised.value.message
    assert raised.value.hint or "one name" in message


@pytest.mark.parametrize(
    ("column", "cleaned"),
    [
        ([0.0, 2.0], [0, 2]),
        (["0", "10"], [0, 10]),
        ([True, False], [1, 0]),
        ([" a", "b "], ["a", "b"]),
        (["1", "a"], ["1", "a"]),
    ],
)
def test_clean(column: list[Any], cleaned: list[Any]) -> None:
    assert labels.clean("data", column, "label") == cleaned


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0, None], "Row 1 of data has no usable label: 'label' is None"),
        ([0.0, float("nan")], "Row 1 of data has no usable label: 'label' is nan"),
        ([0.5, 1.0], "Row 0 of data has no usable label: 'label' is 0.5"),
        ([[0, 1]], "Row 0 of data has no usable label"),
        ([0, -1], "Row 1 of data has the label -1: the labels of this split are hidden"),
        (["a", 1], "mixes names and numbers"),
    ],
)
def test_unusable_labels(column: list[Any], message: str) -> None:
    with pytest.raises(ScoringError, match="data") as raised:
        labels.clean("data", column, "label")
    assert message in raised.value.message


def test_a_label_that_no_class_has() -> None:
    found = match(MOODS, [0, 1], None, ("sadness", "joy"))
    with pytest.raises(ScoringError, match="Row 1 of data has the label 2, which is none of sadness, joy"):
        labels.to_outputs(found, [0, 2], "data")


@pytest.mark.parametrize(
    ("model", "column", "declared", "said"),
    [
        (MOODS, [0, 1, 2], MOODS, None),
        (MOODS, [0, 1, 2], ("joy", "anger", "sadness"), None),
        (MOODS, [0, 1, 2], None, None),
        (GENERIC, [0, 1, 2], MOODS, None),
        (GENERIC, [0, 1, 2], None, None),
        (GENERIC, [0, 1, 2], ("0", "1", "2"), None),
        (GENERIC, [0, 1, 2], MOODS, ("anger", "sadness", "joy")),
        (GENERIC, ["sadness", "joy", "anger"], None, MOODS),
        (GENERIC, ["sadness", "joy", "anger"], None, ("anger", "sadness", "joy")),
    ],
)
def test_the_suggested_labels_do_what_they_promise(model: Any, column: Any, declared: Any, said: Any) -> None:
    """Following the hint moves every row's label by the permutation, also by one that is not its own inverse."""
    permutation = [1, 2, 0]
    before = match(model, column, declared, said)
    hint = labels.suggestion(before, permutation)
    assert hint is not None
    after = match(model, column, declared, hint)
    moved = [permutation[output] for output in labels.to_outputs(before, column, "data")]
    assert labels.to_outputs(after, column, "data").tolist() == moved


def test_nothing_is_suggested_where_names_met_names() -> None:
    assert labels.suggestion(match(MOODS, ["joy", "anger", "sadness"]), [1, 2, 0]) is None
