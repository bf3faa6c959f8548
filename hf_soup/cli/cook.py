"""``hf-soup cook``: average them."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hf_soup._util.text import printable
from hf_soup.cli import tables
from hf_soup.cli.arguments import codes_of, data_of, recipe_of
from hf_soup.cli.options import ALLOW, DEVICE, JSON, METRIC, MODELS, QUIET, TASK, VALIDATION, patient, show
from hf_soup.errors import PublishError


@click.command(epilog=f"RECIPE is a YAML file. {MODELS}")
@click.argument("models", nargs=-1, required=True, metavar="RECIPE | MODEL...")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="The soup.")
@click.option("--base", metavar="MODEL", help="The pretrained ancestor, where cards do not name it.")
@click.option("--method", metavar="NAME", help="How tensors are combined; see `hf-soup methods`.")
@click.option("--select", metavar="NAME", help="What goes in, with which shares; see `hf-soup methods`.")
@ALLOW
@click.option("--set", "parameters", multiple=True, metavar="KEY=VALUE", help="A parameter of the selection or method.")
@click.option("--weights", metavar="W,W,…", help="A weight for each model, in their order.")
@click.option("--data", multiple=True, metavar="DATA[:SPLIT]", help="Validation data, which selection may look at.")
@click.option("--test", multiple=True, metavar="DATA[:SPLIT]", help="Test data, which are looked at once, at the end.")
@VALIDATION
@TASK
@METRIC
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32", "float64"]), help="Of the soup.")
@click.option("--output", type=click.Choice(["model", "adapter"]), help="A whole model, or a LoRA adapter of the base.")
@click.option("--rank", type=click.IntRange(min=1), help="Of the adapter; by default the one at which nothing is lost.")
@click.option("--heads", metavar="body|MODEL", help="Average bodies alone, and keep no head or that of one model.")
@click.option("--vocabulary", type=click.Choice(["base", "union"]), help="Keep the tokens that all have, or all.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of methods and selections that draw at random.")
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
    out: Path,
    base: str | None,
    method: str | None,
    select: str | None,
    allow: tuple[str, ...],
    data: tuple[str, ...],
    validation: tuple[str, ...],
    test: tuple[str, ...],
    task: str | None,
    metric: str | None,
    parameters: tuple[str, ...],
    weights: str | None,
    add: tuple[str, ...],
    dry_run: bool,
    stream: bool,
    push: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
    **keys: Any,
) -> None:
    """Average models into a new one, score it, and write it to a folder.

    \b
    Example: hf-soup cook recipes/beans.yaml -o soup
             hf-soup cook owner/run-1 owner/run-2 -o soup --weights 0.7,0.3
             hf-soup cook owner/run-1 owner/run-2 -o soup --select greedy \\
                 --data owner/dataset:validation --task image-classification
             hf-soup cook owner/run-1 owner/run-2 -o soup --select greedy --validation my_eval:score
             hf-soup cook runs/exp1 -o soup --select run_average --set last=5
             hf-soup cook owner/soup --add owner/run-3 -o better
             hf-soup cook owner/lora-1 owner/lora-2 -o lora --output adapter --rank 16
             hf-soup cook owner/base owner/fine-tune -o lora --output adapter --rank 16
    """
    from hf_soup.hub import inspect_target, require_public, within_repo, without_bars
    from hf_soup.recipe import Recipe, as_recipe, is_local_path, split_revision
    from hf_soup.workflows.cook import cook as cook_soup, preview
    from hf_soup.workflows.update import Update

    patient()
    looked_at = data_of(data, test, task, metric, validation)
    update = None
    if add:
        if len(models) != 1 or models[0].endswith((".yaml", ".yml")):
            raise click.UsageError("--add adds to one published soup: name its repo or folder, and nothing beside it.")
        asked = {"--base": base, "--method": method, "--select": select, "--set": parameters, "--weights": weights}
        asked |= {"--test": test} | {f"--{key}": value for key, value in keys.items()}
        if unfit := [option for option, value in asked.items() if value not in (None, ())]:
            raise click.UsageError(f"--add cooks by the soup's recipe: leave out {', '.join(unfit)}.")
        update = Update.of(models[0], add, validation=Recipe(ingredients=models, **looked_at).validation)
        recipe = as_recipe(update.recipe, allow=[*update.recipe.allow, *codes_of(allow)] if allow else None)
        update = replace(update, recipe=recipe)
    else:
        recipe = recipe_of(
            models, method=method, select=select, parameters=parameters, weights=weights, allow=allow,
            base_model=base, **looked_at, **keys,
        )  # fmt: skip
    if dry_run:
        planned = preview(recipe, out, stream=stream)
        show(json.dumps(planned, indent=2) if as_json else printable(tables.plan(planned)))
        return
    if push:
        # What would stop the push stops it now, and not after hours of work.
        if quiet:
            without_bars()
        target = inspect_target(push)
        named = [*(ingredient.model for ingredient in recipe.ingredients), split_revision(recipe.base_model or "")[0]]
        named += [update.soup] if update else []
        places = [within_repo(model) for model in named if not is_local_path(model)]
        require_public([place[0] for place in places if place], target)
    soup = cook_soup(update or recipe, out, device=device, stream=stream, quiet=quiet)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    try:
        pushed = soup.push(push) if push else None
    except PublishError as error:
        message = f"The soup is in '{soup.folder}', but its push failed. {error.message}"
        raise PublishError.of(error, message) from None
    if as_json:
        told = soup.report.to_dict()
        report = {
            "folder": str(soup.folder),
            "weights": soup.weights,
            "scores": soup.scores,
            "comparisons": {title: each.sentence for title, each in soup.report.comparisons.items()},
            **{
                key: told[key]
                for key in ("best", "selected", "trace", "parameters", "curve", "stability", "update", "adapter")
            },
            "digest": soup.digest,
            "seconds": soup.seconds,
            "resumed": soup.resumed,
            "pushed": pushed and pushed.to_dict(),
        }
        show(json.dumps(report, indent=2))
        return
    show(printable(tables.soup(soup)))
    repo = [update.soup, "--pr"] if update and update.revision else ["OWNER/NAME"]
    following = shlex.join(["hf-soup", "push", str(soup.folder), *repo])
    if pushed or not soup.report.copy_of:
        show(tables.pushed(pushed) if pushed else f"Next: {following}")
