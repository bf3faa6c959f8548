"""Pictures of what was measured."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_soup.errors import RecipeError

#: Letters of a name in a table or picture, and models up to which a matrix has its figures in it.
_LETTERS, _FIGURES = 24, 22


def short(names: Sequence[str]) -> list[str]:
    """Names without owners, where that leaves them apart, and of bounded length; different names stay different.

    >>> short(["acme/vit-1", "local:vit-2"])
    ['vit-1', 'vit-2']
    >>> short([f"acme/a-base-model-fine-tuned-with-seed-{seed}-on-digits-and-more" for seed in (1, 2)])
    ['…1-on-digits-and-more', '…2-on-digits-and-more']
    """
    last = [name.rpartition("/")[2].removeprefix("local:") for name in names]
    found = last if len({*last}) == len(last) else list(names)
    begin = len(os.path.commonprefix(found))  # noqa: RUF071 -- letter by letter is what is meant
    ways = (
        [_middle_out(name) for name in found],
        # What they have in common at the start goes first, as what tells them apart may have been in the middle.
        [_middle_out(f"…{name[begin:]}") for name in found],
        [f"{name[: _LETTERS - 5]}…{number}" for number, name in enumerate(found, 1)],
    )
    return next(way for way in ways if len({*way}) == len(way) or way is ways[-1])


def _middle_out(name: str) -> str:
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[:half]}…{name[1 - half :]}"


def barriers(path: Path, summary: Mapping[str, Any]) -> None:
    """Write barriers between models as PNG: the matrix of their heights, and the lines that were measured.

    Args:
        path: A new file.
        summary: `Barriers.to_dict()`.

    Raises:
        RecipeError: The file exists, or cannot be written.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = summary["names"]
    # A dollar sign would start a formula, and names are strangers' text.
    called = dict(zip(names, (name.replace("$", r"\$") for name in short(names)), strict=True))
    side = max(3.2, 1.8 + 0.36 * len(names))
    figure = Figure(figsize=(side + 5.5, side), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(side, 4.6))
    heights = 100 * np.array(summary["heights"])
    np.fill_diagonal(heights, np.nan)
    most = max(100 * summary["least"], float(np.nanmax(np.abs(heights))))
    shown = left.imshow(heights, cmap="RdBu_r", vmin=-most, vmax=most)
    if len(names) <= _FIGURES:
        for row, column in np.argwhere(~np.isnan(heights)):
            color = "w" if abs(heights[row, column]) > 0.6 * most else "k"
            text = f"{heights[row, column]:.1f}"
            left.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
    left.set_xticks(range(len(names)), called.values(), rotation=90, fontsize=7)
    left.set_yticks(range(len(names)), called.values(), fontsize=7)
    left.set_title("barriers in points (red); blue: the way between is better", fontsize=8)
    figure.colorbar(shown, ax=left, shrink=0.8)
    for number, pair in enumerate(summary["lines"]):
        at, scores = np.array(pair["line"]).T  # (points,) each
        color, label = f"C{number}", f"{called[pair['first']]} – {called[pair['second']]}"
        right.plot(at, 100 * scores, "o-", color=color, label=label)
        right.plot(at[[0, -1]], 100 * scores[[0, -1]], ":", color=color, linewidth=0.8)
    right.set_title(f"{summary['data']} on the way".replace("$", r"\$"), fontsize=8)
    right.set_xlabel("from the first (0) to the second (1)", fontsize=8)
    right.set_ylabel("percent", fontsize=8)
    right.grid(linewidth=0.3)
    if summary["lines"]:
        right.legend(fontsize=6)
    picture = io.BytesIO()
    # Without the date and version that matplotlib adds, the same barriers have the same picture.
    figure.savefig(picture, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    try:
        with path.open("xb") as file:
            file.write(picture.getvalue())
    except OSError as error:
        raise RecipeError(f"Cannot write '{path}': {error.strerror}.") from None
