"""What is said of a newcomer, by what was measured."""

from __future__ import annotations

import pytest

from hf_soup.evaluation.statistics import comparison_of
from hf_soup.recipe import Comparison
from hf_soup.workflows.update import _judged


def compared(points: int) -> Comparison:
    """Of versions that differ by some points, with an interval of four."""
    share = points / 100
    return comparison_of("accuracy", share, share - 0.04, share + 0.04, 0.001 if points else 1.0, 500)


@pytest.mark.parametrize(
    ("points", "validation", "helps", "said"),
    [
        (
            {"seen": 9, "test": 0},
            ["seen"],
            True,
            "Adding acme/c helps: the soup is better on seen than the last version.",
        ),
        (
            {"seen": 9, "test": -9, "far": 9},
            ["seen"],
            True,
            "Adding acme/c helps: the soup is better on seen than the last version. "
            "It is better on far and worse on test.",
        ),
        (
            {"seen": -9, "other": 9},
            ["seen", "other"],
            False,
            "Adding acme/c does not help: the soup is worse on seen than the last version, and better on other.",
        ),
        (
            {"seen": 0, "test": 9},
            ["seen"],
            None,
            "That adding acme/c helps cannot be shown: no difference from the last version can be seen on seen. "
            "It is better on test.",
        ),
        ({"test": 9}, [], True, "Adding acme/c helps: the soup is better on test than the last version."),
        ({"test": 9}, ["gone"], True, "Adding acme/c helps: the soup is better on test than the last version."),
    ],
)
def test_validation_data_says_whether_a_newcomer_helps(
    points: dict[str, int], validation: list[str], helps: bool | None, said: str
) -> None:
    """And reports only where there is none."""
    assert _judged(["acme/c"], {title: compared(each) for title, each in points.items()}, validation) == (helps, said)
