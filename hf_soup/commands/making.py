"""Cook, and score."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from hf_soup import shown
from hf_soup.arguments import recipe_of, scoring_of
from hf_soup.commands import DEVICE, JSON, MODELS, QUIET, patient


@click.command(epilog=f"RECIPE is a YAML file. {MODELS}")
@click.argument("models", nargs=-1, required=True, metavar="RECIPE | MODEL...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="The soup.")
@click.option("--base", metavar="MODEL", help="The pretrained ancestor, where cards do not name it.")
@click.option("--method", metavar="NAME", help="How tensors are combined; see `hf-soup methods`.")
@click.option("--select", metavar="NAME", help="What goes in, with which shares; see `hf-soup methods`.")
@click.option("--data", metavar="ID_OR_PATH[:SPLIT]", help="Held-out data that selection may look at.")
@click.option("--task", metavar="TASK", help="image-classification or text-classification.")
@click.option("--metric", metavar="METRIC", help="accuracy, f1, …; accuracy by default.")
@click.option("--set", "parameters", multiple=True, metavar="KEY=VALUE", help="A parameter of the method.")
@click.option(
    "--add", multiple=True, metavar="MODEL", help="A model more for the soup that MODEL is, cooked from its leaves."
)
@click.option("--dry-run", is_flag=True, help="Check, and say what would be fetched and written.")
@click.option("--stream", is_flag=True, help="Keep no ingredient: drop each file after its last use.")
@click.option("--push", metavar="REPO", help="Publish the soup when it is done.")
@DEVICE
@QUIET
@JSON
def cook(
    models: tuple[str, ...],
    output: Path,
    base: str | None,
    method: str | None,
    select: str | None,
    data: str | None,
    task: str | None,
    metric: str | None,
    parameters: tuple[str, ...],
    add: tuple[str, ...],
    dry_run: bool,
    stream: bool,
    push: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Average models into a new one, score it, and write it to a folder.

    \b
    Example: hf-soup cook recipes/beans.yaml -o soup
             hf-soup cook owner/run-1 owner/run-2 -o soup --select greedy \\
                 --data owner/dataset:validation --task image-classification
             hf-soup cook owner/soup --add owner/run-3 -o better
    """
    from hf_soup import soup as kitchen
    from hf_soup.publish import require_token
    from hf_soup.recipe import Recipe, Scoring
    from hf_soup.updating import Update

    patient()
    changes: dict[str, Any] = {"base": base}
    if data or task or metric:
        changes["score"] = scoring_of(data, task, metric)
    asked: Recipe | Update
    if add:
        if len(models) != 1 or models[0].endswith((".yaml", ".yml")):
            raise click.UsageError("--add adds to one published soup: name its repo or folder, and nothing beside it.")
        if base or method or select or parameters:
            raise click.UsageError(
                "--add cooks by the soup's recipe, so leave out --base, --method, --select and --set."
            )
        score = changes.get("score")
        asked = Update.of(models[0], add, score=score and [Scoring(**score)])
    else:
        asked = recipe_of(models, method=method, select=select, parameters=parameters, **changes)
    if dry_run:
        planned = kitchen.preview(asked.recipe if isinstance(asked, Update) else asked, output, stream=stream)
        click.echo(json.dumps(planned, indent=2) if as_json else shown.plan(planned))
        return
    if push:
        require_token()
    soup = kitchen.cook(asked, output, device=device, stream=stream, quiet=quiet)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    pushed = soup.push(push) if push else None
    if as_json:
        report = {
            "folder": str(soup.folder),
            "weights": soup.weights,
            "scores": soup.scores,
            "comparisons": {title: each["sentence"] for title, each in soup.summary["comparisons"].items()},
            "best": soup.summary["best"],
            "selected": soup.summary["selected"],
            "trace": soup.summary["trace"],
            "parameters": soup.summary["parameters"],
            "curve": soup.summary["curve"],
            "stability": soup.summary["stability"],
            "update": soup.summary["update"],
            "digest": soup.digest,
            "seconds": soup.seconds,
            "resumed": soup.resumed,
            "pushed": pushed and {"repo": pushed.repo, "commit": pushed.commit, "url": pushed.url},
        }
        click.echo(json.dumps(report, indent=2))
        return
    click.echo(shown.soup(soup))
    click.echo(f"Pushed to {pushed.url}" if pushed else f"Next: hf-soup push {soup.folder} OWNER/NAME")


@click.command(epilog=MODELS)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--recipe", type=click.Path(path_type=Path), required=True, help="Whose data to use.")
@DEVICE
@QUIET
@JSON
def score(models: tuple[str, ...], recipe: Path, device: str, quiet: bool, as_json: bool) -> None:
    """Score any models on a recipe's held-out and report data.

    Example: hf-soup score owner/run-1 soup --recipe recipes/beans.yaml
    """
    from hf_soup.recipe import Recipe
    from hf_soup.soup import score as measure

    patient()
    scores = measure(models, Recipe.load(recipe), device=device, quiet=quiet)
    if as_json:
        click.echo(json.dumps({"scores": scores}, indent=2))
    else:
        click.echo("Percent, with 95 % intervals.\n\n" + shown.table(scores))
