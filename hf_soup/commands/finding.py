"""Who may be averaged: forage, check."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_soup import shown
from hf_soup.arguments import recipe_of, refuse_existing, write_new
from hf_soup.commands import ALLOW, DEVICE, JSON, MODELS, QUIET, patient, tell

if TYPE_CHECKING:
    from hf_soup.lineage import Lineage
    from hf_soup.recipe import Recipe


@click.command()
@click.argument("base")
@click.option("--task", metavar="TASK", help="Only those with this task on the Hub, such as image-classification.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The most downloaded ones.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Write the largest group down.")
@QUIET
@JSON
@click.pass_context
def forage(
    ctx: click.Context, base: str, task: str | None, limit: int, output: Path | None, quiet: bool, as_json: bool
) -> None:
    """Find the fine-tunes of a base on the Hub, and who of them can be averaged.

    Lists architecture, labels, licence, downloads and verdict. Exit code 3 when there is no group to write down.

    Example: hf-soup forage google/vit-base-patch16-224-in21k --task image-classification -o recipe.yaml
    """
    from hf_soup.foraging import forage as find

    patient()
    if output is not None:
        refuse_existing(output)
    found = find(base, task=task, limit=limit, quiet=quiet)
    recipe = found.recipe().to_yaml() if output is not None and found.groups else None
    text = "" if as_json else shown.foraged(found)
    tell(found.to_dict(), text, as_json, *([partial(write_new, output, recipe)] if output and recipe else []))
    if found.unread:
        many = f"{len(found.unread)} of {len(found.siblings)}"
        click.echo(f"note: incomplete: {many} could not be read just now: {', '.join(found.unread)}", err=True)
    if output is None:
        return
    if recipe is None:
        click.echo(f"'{output}' was not written: no two of them can be averaged.", err=True)
        ctx.exit(3)
    click.echo(f"Wrote group 1 to {output}. Next: hf-soup cook {shlex.quote(str(output))} -o soup", err=True)
    for number, group in enumerate(found.groups[1:], 2):
        members = shlex.join([*group.members, *(["--base", found.base] if group.from_base else [])])
        click.echo(f"Group {number} instead: hf-soup check {members} -o RECIPE", err=True)


@click.command(epilog=MODELS)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--base", metavar="MODEL", help="The pretrained ancestor, where cards do not name it.")
@ALLOW
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="RECIPE", help="Write a recipe of them.")
@click.option("--recipe", "source", metavar="RECIPE", help="Whose data to use, and its models where none are named.")
@click.option("--barrier", is_flag=True, help="Measure on its held-out data whether they lie in one basin.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the barriers.")
@DEVICE
@QUIET
@JSON
@click.pass_context
def check(
    ctx: click.Context,
    models: tuple[str, ...],
    base: str | None,
    allow: tuple[str, ...],
    output: Path | None,
    source: str | None,
    barrier: bool,
    plot: Path | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say whether models may be averaged, before anything is downloaded.

    Reads configs, cards, tensor headers and samples of weights. Exit code 3 when they may not. With --barrier the
    models are downloaded and scored, and half-way between each two of them.

    \b
    Example: hf-soup check owner/run-1 owner/run-2 -o recipe.yaml
             hf-soup check --recipe recipe.yaml --barrier --plot barriers.png
    """
    from hf_soup.soup import check as examine

    if not models and source is None:
        raise click.UsageError("Missing argument 'MODEL...': name models, or a recipe of them with --recipe.")
    if barrier and source is None:
        raise click.UsageError("--barrier measures on held-out data: name a recipe that has `score` with --recipe.")
    if plot and not barrier:
        raise click.UsageError("--plot draws barriers, so it goes with --barrier.")
    if plot and output and plot.absolute() == output.absolute():
        raise click.UsageError(f"-o and --plot both name '{plot}', and one would take the other's place.")
    patient()
    recipe = recipe_of(models, source, base=base, allow=allow)
    if output is not None:
        refuse_existing(output)
    if barrier:
        from hf_soup.barrier import barriers, require_measurable

        require_measurable(recipe, plot)
    lineage = examine(recipe)
    report, text = lineage.to_dict(), str(lineage)
    refused = lineage.verdict == "refused"
    files: list[Callable[[], None]] = []
    if barrier and refused:
        click.echo("note: models that cannot be averaged have no barrier measured between them", err=True)
        report["barrier"] = None
    elif barrier:
        found = barriers(recipe, lineage, device=device, quiet=quiet)
        report["reasons"] += [reason.to_dict() for reason in found.reasons]
        report["barrier"] = found.to_dict()
        # What the check advises is to measure, which is done.
        said = [part for part in text.split("\n\n") if not part.startswith("What to do: ")]
        text = "\n\n".join([*said, shown.barriers(found)])
        files += [partial(found.draw, plot)] if plot else []
    written, how = _to_write(recipe, lineage) if output is not None else (None, "")
    if output is not None and written is not None:
        files.insert(0, partial(write_new, output, written.to_yaml()))
    tell(report, text, as_json, *files)
    if output is not None and written is not None:
        click.echo(f"Wrote {output}{how}. Next: hf-soup cook {shlex.quote(str(output))} -o soup", err=True)
    elif output is not None:
        click.echo(f"'{output}' was not written: leaving models out does not make a soup of these.", err=True)
    if refused:
        ctx.exit(3)


def _to_write(recipe: Recipe, lineage: Lineage) -> tuple[Recipe | None, str]:
    """The recipe that a check writes down, and how it differs from what was checked: where that is refused, by what the
    report proposes.
    """
    from hf_soup.soup import propose
    from hf_soup.training_run import unroll

    recipe, _ = unroll(recipe, checks=True)  # what was checked
    if lineage.verdict == "refused":
        proposed = propose(recipe, lineage)
        return (proposed[0], f", a recipe {proposed[1]}") if proposed else (None, "")
    # One that cannot be read would stop the cook, for which it is only a hint here.
    if lineage.ancestor and lineage.ancestor.checkpoint and lineage.ancestor.declared and recipe.base is None:
        found = lineage.ancestor.checkpoint
        recipe = recipe.model_copy(update={"base": str(found.folder) if found.folder else found.model})
    return recipe, ""
