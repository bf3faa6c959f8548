"""Pictures of what was measured."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_soup._util.io import write_new
from hf_soup._util.text import short
from hf_soup.recipe import OTHER_MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_soup.recipe import Score, SoupReport


#: That are told apart by those who see no red or no green, on white and on black.
_COLORS = {"soup": "#d55e00", "last version": "#cc79a7", "ingredient": "#2f8fd8", "ensemble": "#009e73"}
_MARKERS = {"soup": "*", "last version": "s", "ingredient": "o", "ensemble": "D"}
#: Panels beside each other; a wider picture is too small to read on a page.
_COLUMNS = 4
#: The background of a page in dark.
_DARK = (11, 15, 25)


def draw_scores(folder: Path, report: SoupReport) -> None:
    """Write the scores with their intervals as PNG, for pages in light and in dark: a panel for each data set.

    Where there are several data sets, a last panel is the picture of the paper (Wortsman et al., arXiv:2203.05482):
    the data on which the ingredients do best against those on which they do worst, which mostly are shifted.

    Args:
        folder: Where ``scores.png`` and ``scores-dark.png`` are written.
        report: With scores.
    """
    light = _drawn(_scores(report))
    # Black for white, and colours keep their hue: HSL with its lightness turned.
    red, green, blue = np.moveaxis(light, 2, 0)
    turned = 255 - np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    dark = np.maximum(light + turned[:, :, None], _DARK)
    for name, pixels in (("scores.png", light), ("scores-dark.png", dark)):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)


def _scores(report: SoupReport) -> Figure:
    scores = report.scores
    names, titles = list(scores), list(scores["soup"])
    pair = _in_and_out_of_distribution(report)
    count = len(titles) + bool(pair)
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    height = max(1.2 + 0.3 * len(names), 3.2 * bool(pair))
    figure, panels = _panels(1.5 + 3.6 * columns, rows * height, (1,) * columns, rows)
    for panel in panels[count:]:
        panel.set_axis_off()
    for panel, title in zip(panels, titles, strict=False):
        for row, name in enumerate(names):
            if (score := scores[name].get(title)) is None:
                continue
            color = _COLORS[_kind(name)]
            panel.plot([_low(score), _high(score)], [row, row], color=color, linewidth=1.5)
            panel.plot([_value(score)], [row], "o", color=color, markersize=5)
        soup = scores["soup"][title]
        panel.axvline(_value(soup), color=_COLORS["soup"], linewidth=0.6, linestyle=":")
        panel.set_title(_plain(textwrap.fill(title, 34)), fontsize=9)
        panel.grid(axis="x", linewidth=0.3)
        panel.set_yticks(range(len(names)), [], fontsize=8)
        unit = "percent" if soup.share else f"{soup.metric}{' (less is better)' if soup.less_is_better else ''}"
        panel.set_xlabel(_plain(unit if soup.low is None else f"{unit}, with 95 % intervals"), fontsize=8)
        panel.invert_yaxis()
    for panel in panels[: len(titles) : columns]:
        panel.set_yticklabels([_plain(name) for name in short(names)])
    if pair:
        _against(panels[count - 1], report, *pair)
    return figure


def _in_and_out_of_distribution(report: SoupReport) -> tuple[str, str] | None:
    """The data on which the ingredients do best, and those on which they do worst; test data, if there are several."""
    titles = list(report.scores["soup"])
    tests = [title for title in titles if title not in report.validation]
    titles = [
        title for title in (tests if len(tests) > 1 else titles) if report.scores["soup"][title].share
    ]  # what has another unit is neither more nor less

    def total(title: str) -> float:
        return sum(report.scores[name][title].value for name in report.ingredients)

    ranked = sorted(titles, key=total)
    return (ranked[-1], ranked[0]) if len(ranked) > 1 else None


def _against(panel: Any, report: SoupReport, inside: str, outside: str) -> None:
    """Every model as a point with its intervals: one data set across, the other up."""
    told = set()
    for name, by_title in list(report.scores.items())[::-1]:
        kind, across, up = _kind(name), by_title[inside], by_title[outside]
        panel.errorbar(
            _value(across), _value(up), fmt=_MARKERS[kind],
            xerr=[[_value(across) - _low(across)], [_high(across) - _value(across)]],
            yerr=[[_value(up) - _low(up)], [_high(up) - _value(up)]],
            color=_COLORS[kind], elinewidth=0.6, markersize=11 if kind == "soup" else 5,
            label=None if kind in told else kind, zorder=3 if kind == "soup" else 2,
        )  # fmt: skip
        told.add(kind)
    panel.set_xlabel(_plain(textwrap.fill(inside, 40)), fontsize=8)
    panel.set_ylabel(_plain(textwrap.fill(outside, 40)), fontsize=8)
    panel.set_title("one against the other", fontsize=9)
    panel.grid(linewidth=0.3)
    panel.legend(fontsize=7)


def _value(score: Score) -> float:
    return 100 * score.value if score.share else score.value


def _low(score: Score) -> float:
    return _value(score) if score.low is None else _value(replace(score, value=score.low))


def _high(score: Score) -> float:
    return _value(score) if score.high is None else _value(replace(score, value=score.high))


def _kind(name: str) -> str:
    if name not in OTHER_MODELS:
        return "ingredient"
    return "ensemble" if name.endswith("ensemble") else name


def draw_curve(path: Path, report: SoupReport) -> None:
    """Write what parameters do as PNG: scores by value, and test scores against the validation score.

    The second is the picture of WiSE-FT (Wortsman et al., arXiv:2109.01903): what a step costs or gains on the data
    that were fine-tuned for, against what it does on others.

    Args:
        path: A new file.
        report: With a ``curve`` and scores.

    Raises:
        RecipeError: The file exists, or cannot be written.
    """
    points = report.curve
    figure, (left, right) = _panels(9.5, 3.8, (1, 1))
    varied = [key for key in points[0].parameters if len({repr(point.parameters[key]) for point in points}) > 1]
    said = [", ".join(f"{point.parameters[key]:g}" for key in varied) for point in points]
    places = [point.parameters[varied[0]] for point in points] if len(varied) == 1 else list(range(len(points)))
    chosen = max(range(len(points)), key=lambda place: points[place].score)
    scale = 100 if report.in_percent else 1
    for title in points[0].scores:
        values = [scale * point.scores[title].value for point in points]
        style = "o--" if title in report.validation else "o-"
        (line,) = left.plot(places, values, style, markersize=4, label=_plain(title))
        if title not in report.validation:
            right.plot([scale * point.score for point in points], values, "o-", color=line.get_color(), markersize=4)
            for place in dict.fromkeys((0, chosen, len(points) - 1)):
                at = (scale * points[place].score, values[place])
                right.annotate(said[place], at, fontsize=7, xytext=(4, 4), textcoords="offset points")
    left.axvline(places[chosen], color="k", linewidth=0.6, linestyle=":")
    if len(varied) > 1:
        left.set_xticks(places, said, rotation=90, fontsize=6)
    left.set_xlabel(f"{', '.join(varied)} (dotted: chosen on validation data)", fontsize=8)
    left.set_ylabel("percent" if report.in_percent else "score", fontsize=8)
    left.legend(fontsize=7)
    right.set_xlabel("validation data", fontsize=8)
    right.set_ylabel("test", fontsize=8)
    for panel in (left, right):
        panel.grid(linewidth=0.3)
    _save(figure, path)


def draw_learned(path: Path, report: SoupReport, layers: Mapping[str, Sequence[float]]) -> None:
    """Write how shares were learned as PNG: the losses by epoch, and the shares, by tensor where they have their own.

    Args:
        path: A new file.
        report: With a ``history``.
        layers: Tensor → its own shares, in the order of the weights.

    Raises:
        RecipeError: The file exists, or cannot be written.
    """
    history, weights = report.history, report.weights
    figure, (left, right) = _panels(10.5, max(3.8, 0.25 * len(weights) + 1.5), (1, 1.4))
    epochs = [entry.epoch for entry in history]
    train = [np.nan if entry.train_loss is None else entry.train_loss for entry in history]
    left.plot(epochs, train, label="rows learned from")
    left.plot(epochs, [entry.inner_loss for entry in history], label="rows kept apart")
    best = min(history, key=lambda entry: entry.inner_loss).epoch
    left.axvline(best, color="k", linewidth=0.6, linestyle=":")
    left.set_xlabel("epoch (dotted: taken)", fontsize=8)
    left.set_ylabel("loss", fontsize=8)
    left.legend(fontsize=7)
    left.grid(linewidth=0.3)
    names = [_plain(name) for name in short(list(weights))]
    if layers:
        shares = np.array(list(layers.values())).T  # (ingredients, tensors)
        most = np.abs(shares).max()
        shown = right.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        figure.colorbar(shown, ax=right, shrink=0.8)
        right.set_xlabel(f"{len(layers)} tensors, in the order of the file", fontsize=8)
    else:
        right.barh(range(len(names)), list(weights.values()))
        right.invert_yaxis()
        right.set_xlabel("share", fontsize=8)
    right.set_yticks(range(len(names)), names, fontsize=7)
    _save(figure, path)


def _plain(name: str) -> str:
    # A dollar sign would start a formula, and names are strangers' text.
    return name.replace("$", r"\$")


def _panels(width: float, height: float, ratios: Sequence[float], rows: int = 1) -> tuple[Figure, Any]:
    """A figure in memory with panels beside each other, in rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, len(ratios), width_ratios=ratios, squeeze=False).flatten()


def _drawn(figure: Figure) -> NDArray[np.int16]:
    """Its pixels, ``(height, width, 3)``. `Figure.savefig` would draw it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].astype(np.int16)


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    Image.fromarray(_drawn(figure).astype(np.uint8)).save(picture, format="png")
    write_new(path, picture.getvalue())
