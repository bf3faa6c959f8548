"""``hf-soup score``: scores of models that exist."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hf_soup._util.text import printable
from hf_soup.cli import tables
from hf_soup.cli.options import DEVICE, JSON, MODELS, QUIET, patient


@click.command(epilog=MODELS)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--recipe", type=click.Path(path_type=Path), required=True, help="Whose data to use.")
@DEVICE
@QUIET
@JSON
def score(models: tuple[str, ...], recipe: Path, device: str, quiet: bool, as_json: bool) -> None:
    """Score any models on a recipe's validation and test data.

    Example: hf-soup score owner/run-1 soup --recipe recipes/beans.yaml
    """
    from hf_soup.recipe import Recipe
    from hf_soup.workflows.score import score as measure

    patient()
    scores = measure(models, Recipe.load(recipe), device=device, quiet=quiet)
    if as_json:
        click.echo(json.dumps({"scores": scores}, indent=2))
    else:
        click.echo(printable("Percent, with 95 % intervals.\n\n" + tables.table(scores)))
