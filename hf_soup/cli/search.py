"""``hf-soup search``: the fine-tunes of a base on the Hub."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import click

from hf_soup.cli import tables
from hf_soup.cli.arguments import refuse_existing
from hf_soup.cli.options import JSON, QUIET, patient, tell


@click.command()
@click.argument("base")
@click.option("--task", metavar="TASK", help="Only those with this task on the Hub, such as image-classification.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The most downloaded ones.")
@click.option(
    "-o", "--out", "output", type=click.Path(path_type=Path), metavar="RECIPE", help="Write the largest group down."
)
@QUIET
@JSON
@click.pass_context
def search(
    ctx: click.Context, base: str, task: str | None, limit: int, output: Path | None, quiet: bool, as_json: bool
) -> None:
    """Find the fine-tunes of a base on the Hub, and who of them can be averaged.

    Lists architecture, labels, licence, downloads and verdict. Exit code 3 when there is no group to write down.

    Example: hf-soup search google/vit-base-patch16-224-in21k --task image-classification -o recipe.yaml
    """
    from hf_soup._util.io import write_new
    from hf_soup.workflows.search import search as find

    patient()
    if output is not None:
        refuse_existing(output)
    found = find(base, task=task, limit=limit, quiet=quiet)
    recipe = found.recipe().to_yaml().encode() if output is not None and found.groups else None
    text = "" if as_json else tables.fine_tunes(found)
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
