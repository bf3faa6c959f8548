"""Pictures of scores: which panels there are, and that both themes show the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hf_soup.publishing import plots
from hf_soup.recipe import SoupReport

NAMES = ["soup", "acme/$a_1", "acme/b", "ensemble"]


def report(**values: float) -> SoupReport:
    """Of models that all score the same on each of some data sets, which are called by their names."""
    score: Any = lambda value: {"metric": "accuracy", "value": value, "low": value - 0.1, "high": value, "n": 9}  # noqa: E731
    scores = {name: {title: score(value) for title, value in values.items()} for name in NAMES}
    return SoupReport.model_validate({
        "digest": "0", "weights": {}, "method": "linear", "select": "uniform", "scores": scores,
        "license_agreed": True, "validation": ["validation"] if "validation" in values else [],
    })  # fmt: skip


@pytest.mark.parametrize(
    ("values", "pair"),
    [
        ({"validation": 0.9}, None),
        ({"validation": 0.9, "test": 0.8}, ("validation", "test")),
        ({"shifted": 0.6, "test": 0.8}, ("test", "shifted")),
        ({"validation": 0.95, "shifted": 0.6, "test": 0.8}, ("test", "shifted")),
    ],
)
def test_the_last_panel_has_the_data_of_the_paper(values: dict[str, float], pair: tuple[str, str] | None) -> None:
    """In-distribution across, shifted up: where the ingredients score best and worst, of the test data if it can be."""
    panels = plots._scores(report(**values)).axes
    assert len(panels) == len(values) + (pair is not None)
    if pair:
        assert (panels[-1].get_xlabel(), panels[-1].get_ylabel()) == pair
        assert len(panels[-1].containers) == len(NAMES)
        for bars in panels[-1].containers:  # each 10 points long, below the value alone
            across, up = (lines.get_segments()[0] for lines in bars.lines[2])
            ends = [100 * values[title] for title in pair]
            assert across[:, 0] == pytest.approx([ends[0] - 10, ends[0]])
            assert up[:, 1] == pytest.approx([ends[1] - 10, ends[1]])
        assert [text.get_text() for text in panels[-1].get_legend().get_texts()] == ["ensemble", "ingredient", "soup"]


def test_many_data_sets_stand_in_rows() -> None:
    """A page shows a picture at its own width, and of ten panels beside each other nothing could be read."""
    figure = plots._scores(report(**{f"data {number}": number / 10 for number in range(1, 10)}))
    places = [panel.get_subplotspec().get_geometry()[:2] for panel in figure.axes]
    assert set(places) == {(3, 4)}
    assert figure.get_size_inches()[0] < 17
    named = [number for number, panel in enumerate(figure.axes) if any(t.get_text() for t in panel.get_yticklabels())]
    assert [number for number in named if number < 9] == [0, 4, 8], "the models are named at the left of each row"
    assert [panel.axison for panel in figure.axes] == [True] * 10 + [False] * 2
    assert len(figure.axes[9].containers) == len(NAMES), "the data sets against each other are the last one"


def test_there_is_one_for_light_and_one_for_dark_pages(tmp_path: Path) -> None:
    plots.draw_scores(tmp_path, report(test=0.8, shifted=0.5))
    light, dark = (matplotlib.image.imread(tmp_path / name) for name in ("scores.png", "scores-dark.png"))
    assert light.shape == dark.shape
    assert np.median(light) > 0.9
    assert np.median(dark[..., :3]) < 0.1
