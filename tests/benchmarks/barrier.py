"""How high are barriers? Between siblings, towards a hot run, between fine-tunes of twins, and towards strangers.

    python tests/benchmarks/barrier.py [--seed 0] [--plot FILE.png]

Takes the demo's zoo (one ancestor, eight fine-tunes, and one with a learning rate ten times too high), and trains three
more ancestors, each with two fine-tunes whose settings are those of the zoo's first two:

redrawn    the same random initialisation and the same letters, drawn anew
mirrored   the same random initialisation, the letters mirrored
stranger   another random initialisation (a check refuses its fine-tunes; they are measured all the same)

Printed are, for every kind of pair: the cosine that the check sees, and the barrier in points of accuracy on the 450
validation digits, minimum, median and maximum over the pairs; and how many count as a barrier.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import tempfile
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is loaded: threads of OpenMP that spin while they wait make small models slow on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers.utils import logging

import hf_soup
from hf_soup import ConnectivityReport, Recipe
from hf_soup._util.text import short
from hf_soup.demo import DigitsZoo, digits as training
from hf_soup.demo.digits_data import DIGITS, LETTERS, draw_letters, splits_of

#: Name → seed of the initial weights (beside the zoo's), seed of the letters, whether they are mirrored.
ANCESTORS = {"redrawn": (0, 1, False), "mirrored": (0, 1, True), "stranger": (1, 1, False)}


def ancestor(zoo: DigitsZoo, start: int, drawn: int, mirrored: bool) -> Any:
    """One that was trained as the zoo's was, but for what is asked."""
    generator = torch.Generator().manual_seed(zoo.seed + drawn)
    images, labels = draw_letters(zoo.letters, generator)
    images = images.flip(-1) if mirrored else images
    model = training._new_model(LETTERS, zoo.seed + start)
    steps = zoo.letter_epochs * math.ceil(zoo.letters / 128)
    batches = islice(training.batches(images, labels, 128, generator), steps)
    training.train(model, training._losses(model, batches), 2e-3, 0.05, training.cosine(steps))
    return model


def fine_tunes(zoo: DigitsZoo, name: str, folder: Path) -> list[Path]:
    """Two fine-tunes of an ancestor of its own, saved."""
    train = splits_of(zoo.seed)["train"]
    start = training._new_model(DIGITS, zoo.seed)
    start.vit.load_state_dict(ancestor(zoo, *ANCESTORS[name]).vit.state_dict())
    training._probe(start, *train)
    made = []
    for number in range(2):
        model = copy.deepcopy(start)
        training._fine_tune(model, *train, training._hyperparameters(zoo, number))
        made.append(folder / f"{name}-{number + 1}")
        training._save(model, made[-1], {}, "# A model for a benchmark\n")
    return made


def kind(first: str, second: str) -> str:
    """What two models are to each other."""
    a, b = (
        name.removeprefix("local:").rpartition("-")[0] if DigitsZoo.poor not in name else "hot"
        for name in (first, second)
    )
    if a == b:
        return "siblings"
    return "hot run" if {a, b} == {"vit-digits", "hot"} else f"{b} and the zoo's" if a == "vit-digits" else "other"


def draw(path: Path, found: ConnectivityReport) -> None:
    """The matrix of heights, and the lines that were measured, as PNG."""
    summary, names = found.to_dict(), short(list(found.scores))
    called = dict(zip(found.scores, names, strict=True))
    side = max(3.2, 1.8 + 0.36 * len(names))
    figure = Figure(figsize=(side + 5.5, side), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(side, 4.6))
    heights = 100 * np.array(summary["heights"])
    np.fill_diagonal(heights, np.nan)
    most = max(100 * summary["least"], float(np.nanmax(np.abs(heights))))
    shown = left.imshow(heights, cmap="RdBu_r", vmin=-most, vmax=most)
    for row, column in np.argwhere(~np.isnan(heights)):
        color = "w" if abs(heights[row, column]) > 0.6 * most else "k"
        left.text(column, row, f"{heights[row, column]:.1f}", ha="center", va="center", fontsize=6, color=color)
    left.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set_title("barriers in points (red); blue: the way between is better", fontsize=8)
    figure.colorbar(shown, ax=left, shrink=0.8)
    for number, pair in enumerate(summary["lines"]):
        at, scores = np.array(pair["line"]).T  # (points,) each
        label = f"{called[pair['first']]} – {called[pair['second']]}"
        right.plot(at, 100 * scores, "o-", color=f"C{number}", label=label)
        right.plot(at[[0, -1]], 100 * scores[[0, -1]], ":", color=f"C{number}", linewidth=0.8)
    right.set_title(f"{found.title} on the way", fontsize=8)
    right.set_xlabel("from the first (0) to the second (1)", fontsize=8)
    right.set_ylabel("percent", fontsize=8)
    right.grid(linewidth=0.3)
    right.legend(fontsize=6)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the zoo")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the barriers without the stranger's")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    zoo = DigitsZoo(seed=options.seed)
    found: dict[str, list[tuple[float, float, bool]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "zoo"
        training.make_all(folder, print, zoo)
        theirs = {ancestor: fine_tunes(zoo, ancestor, Path(name)) for ancestor in ANCESTORS}
        siblings = [folder / each for each in zoo.fine_tunes]
        for group in ([*siblings, *theirs["redrawn"], *theirs["mirrored"]], [*siblings[:2], *theirs["stranger"]]):
            seen = measure(folder, group, found)
            if options.plot and group[-1] not in theirs["stranger"]:
                draw(options.plot, seen)
    print(f"\n{'kind of pair':28} pairs  cosine   barrier in points: minimum  median  maximum   count")
    for title, rows in sorted(found.items()):
        cosines, heights, counted = zip(*rows, strict=True)
        low, middle, high = (100 * f(heights) for f in (min, statistics.median, max))
        print(
            f"{title:28} {len(rows):5}  {statistics.median(cosines):6.2f} {low:27.1f} {middle:7.1f} {high:8.1f}"
            f" {sum(counted):7}"
        )


def measure(folder: Path, models: list[Path], found: dict[str, list[tuple[float, float, bool]]]) -> ConnectivityReport:
    """All pairs of some models, sorted by kind into ``found``: cosine, height, whether it counts."""
    data = folder / DigitsZoo.dataset / "data" / "validation-00000-of-00001.parquet"
    recipe = Recipe(
        ingredients=[str(model) for model in models],
        validation={"task": "image-classification", "dataset": str(data), "name": "digits"},
    )
    lineage = hf_soup.check(recipe)
    (bodies,) = [each for each in lineage.evidence if each.part == "body"]
    ends = [(first, second) for first in range(len(bodies.names)) for second in range(first)]
    cosines = {frozenset((bodies.names[a], bodies.names[b])): float(bodies.cosines[a, b]) for a, b in ends}
    if lineage.verdict == "refused":
        refused = [reason.code for reason in lineage.reasons if reason.refuses]
        print(f"The check refuses {', '.join(model.name for model in models)}: {', '.join(refused)}")
        lineage = replace(lineage, verdict="likely")
    seen = hf_soup.connectivity(recipe, lineage)
    print(seen)
    for pair in seen.pairs:
        title = kind(pair.first, pair.second)
        if title != "other":
            found[title].append((cosines[frozenset((pair.first, pair.second))], pair.height, pair.barrier))
    return seen


if __name__ == "__main__":
    main()
