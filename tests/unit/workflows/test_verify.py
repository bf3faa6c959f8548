"""What counts as the same score."""

from __future__ import annotations

import pytest

from hf_soup.workflows.verify import ScoreCheck


@pytest.mark.parametrize(
    ("published", "card", "agrees"),
    [
        (0.90, None, True),
        (0.91, None, True),  # a row of a hundred
        (0.92, None, False),
        (0.90, 0.88, False),
        (None, 0.8900004, True),  # the card rounds at the sixth digit
        (None, None, True),
    ],
)
def test_a_score_may_be_one_row_off(published: float | None, card: float | None, agrees: bool) -> None:
    assert ScoreCheck("rows accuracy", 0.90, published, card, n=100).agrees is agrees
