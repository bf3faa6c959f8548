"""Do models lie in one basin? The score along the straight line between each two of them, on held-out data.

Statistics of weights cannot tell: two ancestors that share no more than their random initialisation look like
siblings, and their fine-tunes do not average. What is measured here is what averaging does to the score.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_soup.basin import Barriers, Pair
from hf_soup.batch_norm import batch_norms
from hf_soup.client import Token
from hf_soup.contents import soup_config, write_assets
from hf_soup.cooked import Say, to_stderr
from hf_soup.errors import RecipeError
from hf_soup.examples import prepare_inputs
from hf_soup.lineage import Lineage
from hf_soup.preparation import plan_of, prepare_benches, validate
from hf_soup.progress import bar, spoken
from hf_soup.recipe import Named, Recipe, as_recipe
from hf_soup.soup import check
from hf_soup.training_run import unroll
from hf_soup.weights import fetch_weights

#: What counts as a barrier, as a share of one. Frankle et al. call a difference of less than 2 % in error no barrier:
#: the margin takes in noise, and what the score loses along curves that are known to stay in one basin.
LEAST = 0.02
#: More pairs than that are not measured: at ten seconds each it would be three hours.
MAX_PAIRS = 1000
#: So many pairs, those with the highest barrier at the midpoint, are measured at a quarter and three quarters too.
LINES = 5


def require_measurable(recipe: Recipe, picture: Path | None = None) -> None:
    """Refuse what cannot be measured or drawn, before anything is looked at.

    Raises:
        RecipeError: The recipe has no held-out data or too many models, or the picture's place is taken.
    """
    if recipe.heads == "body":
        raise RecipeError(
            "The recipe has `heads: body`, and a body has no outputs that could be measured.",
            hint="Where the models have outputs, leave `heads` out or set `heads: MODEL`, and add `score`.",
        )
    if not recipe.score:
        raise RecipeError(
            "Barriers are measured on held-out data, and the recipe has no `score`.",
            hint="Add `score: {task: …, dataset: …, split: validation, metric: accuracy}`.",
        )
    count = len(recipe.ingredients)
    pairs = count * (count - 1) // 2
    if pairs > MAX_PAIRS:
        raise RecipeError(
            f"{count} models are {pairs:,} pairs, each of which would be scored; at most {MAX_PAIRS:,} are.",
            hint="Name some of the models before `--recipe`, or let `select: greedy` choose: it scores each once.",
        )
    if picture is None:
        return
    if picture.suffix != ".png":
        raise RecipeError(f"'{picture}' does not end in .png, and pictures are written as PNG.")
    if os.path.lexists(picture):
        raise RecipeError(f"'{picture}' exists already, and nothing is overwritten.", hint="Name another file.")
    if not os.access(picture.absolute().parent, os.W_OK):
        raise RecipeError(f"The picture cannot be written to the folder '{picture.absolute().parent}'.")


def barriers(
    recipe: Recipe | str | Path,
    lineage: Lineage | None = None,
    *,
    least: float = LEAST,
    token: Token = None,
    device: str = "cpu",
    quiet: bool = True,
    say: Say = to_stderr,
) -> Barriers:
    r"""Measure the barrier between each two ingredients on the held-out data of a recipe, the first of several.

    With :math:`s(\alpha)` the score of :math:`(1-\alpha)\theta_1 + \alpha\theta_2`, in a metric that is better when
    it is higher,

    .. math:: B = \max_\alpha\;(1-\alpha)\,s(0) + \alpha\,s(1) - s(\alpha)

    over the inner :math:`\alpha` that are measured: the midpoint of every pair, and the quarters of the five pairs
    with the highest barrier there. It counts as a barrier where the bootstrap's 95 % interval lies above zero and
    :math:`B` is ``least`` or more. Every ingredient counts the same; shares, method and selection are not used.
    With the recipe's `examples`, statistics of batch normalisation are collected again at every inner point.

    Args:
        recipe: With `score`; or the path of one.
        lineage: What `check` said of this recipe; it is checked here where that is absent.
        least: The height from which on a barrier counts, as a share of one (0.02: two points).
        token: As everywhere in huggingface_hub.
        device: Where models run.
        quiet: No progress bar.
        say: Gets warnings, and how much is to be done.

    Raises:
        RecipeError: The recipe has no `score`, or more than a thousand pairs.
        IncompatibleError: The models cannot be averaged.
        SoupError: A model or the data cannot be used.

    Reference:
        Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671
        (error barriers, against the mean of the ends; the 2 %). Entezari et al., The Role of Permutation Invariance
        in Linear Mode Connectivity of Neural Networks, ICLR 2022, arXiv:2110.06296 (against the line between the ends;
        for the loss, which is turned round here).
    """
    from hf_soup.batch_statistics import BatchStatistics
    from hf_soup.evaluation import Evaluation
    from hf_soup.world import require_alone

    require_alone("The measuring of barriers")
    recipe, _ = unroll(as_recipe(recipe), checks=True)
    validate(recipe)
    require_measurable(recipe)
    lineage = lineage or check(recipe, token=token)
    lineage.raise_if_refused()
    names = lineage.names
    if len(names) < 2:
        raise RecipeError("A barrier lies between two models, and there is one.")
    # What is measured is the straight line, by whatever method the recipe averages.
    straight = recipe.model_copy(update={"method": Named(name="linear")})
    plan = plan_of(straight, lineage, dict.fromkeys(names, 1.0))
    pairs = len(names) * (len(names) - 1) // 2
    total = len(names) + pairs + 2 * min(LINES, pairs)
    with tempfile.TemporaryDirectory(prefix="hf-soup-") as kitchen:
        config = soup_config(lineage, plan.dtype)
        write_assets(Path(kitchen), config, lineage)
        bench = prepare_benches(recipe, plan, Path(kitchen), config, device, token, say, lineage.head_of)[0]
        say(f"note: {len(names)} models, {pairs} pair{'s'[: pairs - 1]}: {total} scorings of {bench.n:,} rows")
        inputs = prepare_inputs(recipe, Path(kitchen), config, device, token, say)
        statistics = None
        if inputs and batch_norms(tensor.name for tensor in plan.tensors):
            statistics = BatchStatistics(plan, inputs, Path(kitchen), recipe.seed, device)
        with (
            Evaluation(
                [bench], held_out=1, names=names, plan=plan,
                paths=fetch_weights(lineage.checkpoints, quiet=quiet), config_folder=Path(kitchen), device=device,
                head_of=lineage.head_of, quiet=True, statistics=statistics,
            ) as evaluation,
            bar("Measuring barriers", total, unit="score", quiet=quiet) as shown,
        ):  # fmt: skip
            ended = [time.monotonic()]

            def point(weights: Mapping[str, float]) -> _Point:
                (logits,) = evaluation.logits(weights)
                found = bench.value(logits), bench.resampled(logits)
                shown.update(1)
                ended.append(time.monotonic())
                if len(ended) == 3:  # the first one started what the others only use
                    seconds = ended[1] - ended[0] + (ended[2] - ended[1]) * (total - 1)
                    say(f"note: they take about {spoken(seconds)}")
                return found

            scores, found = _measure(names, point, least)
    return Barriers(bench.title, bench.n, least, scores, found, lineage.head_of)


#: A score, and the score over resamples of the rows.
_Point = tuple[float, NDArray[np.float64]]


def _measure(
    names: Sequence[str], point: Callable[[Mapping[str, float]], _Point], least: float
) -> tuple[dict[str, float], tuple[Pair, ...]]:
    """The scores of all models, and their pairs: midpoints first, then the quarters of those that are highest."""
    ends = {name: point({name: 1.0}) for name in names}
    places = [(a, b) for number, a in enumerate(names) for b in names[number + 1 :]]
    lines = {(a, b): {0.5: point({a: 0.5, b: 0.5})} for a, b in places}

    def pair(a: str, b: str) -> Pair:
        (first, drawn), (second, redrawn) = ends[a], ends[b]
        heights = {
            at: ((1 - at) * first + at * second - score, (1 - at) * drawn + at * redrawn - draws)
            for at, (score, draws) in lines[a, b].items()
        }
        at = max(heights, key=lambda at: heights[at][0])
        height = heights[at][0]
        low, high = (float(bound) for bound in np.quantile(heights[at][1], [0.025, 0.975]))
        inner = {at: score for at, (score, _) in lines[a, b].items()}
        line = dict(sorted({0.0: first, **inner, 1.0: second}.items()))
        return Pair(a, b, line, at, height, min(low, height), max(high, height), low > 0 and height >= least)

    for a, b in sorted(places, key=lambda ends: -pair(*ends).height)[:LINES]:
        for at in (0.25, 0.75):
            lines[a, b][at] = point({a: 1 - at, b: at})
    return {name: score for name, (score, _) in ends.items()}, tuple(pair(a, b) for a, b in places)
