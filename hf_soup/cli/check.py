"""``hf-soup check``: may these models be averaged?"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_soup.cli import tables
from hf_soup.cli.arguments import recipe_of, refuse_existing
from hf_soup.cli.options import ALLOW, DEVICE, JSON, MODELS, QUIET, patient, tell

if TYPE_CHECKING:
    from hf_soup.lineage import LineageReport
    from hf_soup.recipe import Recipe


@click.command(epilog=MODELS)
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--base", metavar="MODEL", help="The pretrained ancestor, where cards do not name it.")
@ALLOW
@click.option(
    "-o", "--out", "output", type=click.Path(path_type=Path), metavar="RECIPE", help="Write a recipe of them."
)
@click.option("--recipe", "source", metavar="RECIPE", help="Whose data to use, and its models where none are named.")
@click.option("--barrier", is_flag=True, help="Measure on its validation data whether they lie in one basin.")
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
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say whether models may be averaged, before anything is downloaded.

    Reads configs, cards, tensor headers and samples of weights. Exit code 3 when they may not. With --barrier the
    models are downloaded and scored, and half-way between each two of them.

    \b
    Example: hf-soup check owner/run-1 owner/run-2 -o recipe.yaml
             hf-soup check --recipe recipe.yaml --barrier
    """
    from hf_soup._util.io import write_new
    from hf_soup.workflows.check import check as examine

    if not models and source is None:
        raise click.UsageError("Missing argument 'MODEL...': name models, or a recipe of them with --recipe.")
    if barrier and source is None:
        raise click.UsageError(
            "--barrier measures on validation data: name a recipe that has `validation` with --recipe."
        )
    patient()
    recipe = recipe_of(models, source, base_model=base, allow=allow)
    if output is not None:
        refuse_existing(output)
    if barrier:
        from hf_soup.workflows.connectivity import connectivity, require_measurable

        require_measurable(recipe)
    lineage = examine(recipe)
    report, text = lineage.to_dict(), lineage.text()
    refused = lineage.verdict == "refused"
    if barrier and refused:
        click.echo("note: models that cannot be averaged have no barrier measured between them", err=True)
        report["barrier"] = None
    elif barrier:
        found = connectivity(recipe, lineage, device=device, quiet=quiet)
        report["reasons"] += [reason.to_dict() for reason in found.reasons]
        report["barrier"] = found.to_dict()
        # What the check advises is to measure, which is done.
        text = f"{lineage.text(advice=False)}\n\n{tables.barriers(found)}"
    written, how = _to_write(recipe, lineage) if output is not None else (None, "")
    files = [partial(write_new, output, written.to_yaml().encode())] if output and written else []
    tell(report, text, as_json, *files)
    if output is not None and written is not None:
        click.echo(f"Wrote {output}{how}. Next: hf-soup cook {shlex.quote(str(output))} -o soup", err=True)
    elif output is not None:
        click.echo(f"'{output}' was not written: leaving models out does not make a soup of these.", err=True)
    if refused:
        ctx.exit(3)


def _to_write(recipe: Recipe, lineage: LineageReport) -> tuple[Recipe | None, str]:
    """The recipe that a check writes down, and how it differs from what was checked: where that is refused, by what the
    report proposes.
    """
    from hf_soup.ingredients import expand_runs
    from hf_soup.workflows.check import propose

    recipe, _ = expand_runs(recipe, checks=True)  # what was checked
    if lineage.verdict == "refused":
        proposed = propose(recipe, lineage)
        return (proposed[0], f", a recipe {proposed[1]}") if proposed else (None, "")
    # One that cannot be read would stop the cook, for which it is only a hint here.
    if lineage.ancestor and lineage.ancestor.checkpoint and lineage.ancestor.declared and recipe.base_model is None:
        recipe = recipe.model_copy(update={"base_model": lineage.ancestor.checkpoint.source.reference})
    return recipe, ""
