"""``hf-soup score``: scores of models that exist."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hf_soup._util.text import printable
from hf_soup.cli import tables
from hf_soup.cli.arguments import data_of
from hf_soup.cli.options import DEVICE, JSON, METRIC, MODELS, QUIET, TASK, VALIDATION, patient, show


@click.command(epilog=MODELS)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--recipe", type=click.Path(path_type=Path), help="Whose data to use.")
@click.option("--data", multiple=True, metavar="DATA[:SPLIT]", help="The data, without a recipe.")
@VALIDATION
@TASK
@METRIC
@DEVICE
@QUIET
@JSON
def score(
    models: tuple[str, ...],
    recipe: Path | None,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    task: str | None,
    metric: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score any models, on data or on a recipe's validation and test data.

    \b
    Example: hf-soup score owner/run-1 soup --data owner/dataset:test --task image-classification
             hf-soup score owner/run-1 soup --recipe recipes/beans.yaml
             hf-soup score owner/run-1 soup --validation my_eval:score
    """
    from hf_soup.recipe import Recipe
    from hf_soup.workflows.score import score as measure

    if (recipe is None) == (not data and not validation):
        raise click.UsageError("Name the data: --data and --task, --validation, or --recipe.")
    patient()
    looked_at = data_of((), data, task, metric, validation)
    asked = Recipe.load(recipe) if recipe else Recipe(ingredients=models, **looked_at)
    scores = measure(models, asked, device=device, quiet=quiet)
    if as_json:
        show(json.dumps({"scores": scores}, indent=2))
    else:
        show(printable(f"{tables.unit(scores)}.\n\n{tables.table(scores)}"))
