"""``hf-soup verify``: is a published soup what it says?"""

from __future__ import annotations

import json

import click

from hf_soup.cli import tables
from hf_soup.cli.options import JSON, MODELS, QUIET, patient, show


@click.command(epilog=MODELS)
@click.argument("model")
@click.option("--score", is_flag=True, help="Measure its scores again too.")
@click.option(
    "--map", "paths", metavar="NAME=PATH", multiple=True, help="Where a folder or file that was local is here."
)
@click.option("--allow-pickle", is_flag=True, help="Read ingredients that are pickles; tensors only.")
@click.option("--trust-remote-code", is_flag=True, help="Run metrics that are code; read them first.")
@QUIET
@JSON
@click.pass_context
def verify(
    ctx: click.Context,
    model: str,
    score: bool,
    paths: tuple[str, ...],
    allow_pickle: bool,
    trust_remote_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Cook a published soup again from its repo alone, and compare every tensor bit by bit.

    Exit code 0 when it is identical, or within the bound that its method states; 3 when it is different, or cannot be
    verified.

    \b
    Example: hf-soup verify owner/soup --score
             hf-soup verify owner/soup@v2 --map run-1=outputs/run-1
    """
    from hf_soup.workflows.verify import DIFFERENT, UNVERIFIABLE, verify as examine

    where = dict(each.partition("=")[::2] for each in paths)
    if bad := next((each for each in paths if not each.partition("=")[0] or not each.partition("=")[2]), None):
        raise click.UsageError(f"--map takes NAME=PATH, not '{bad}'")
    patient()
    found = examine(
        model, score=score, map=where, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, quiet=quiet
    )
    show(json.dumps(found.to_dict(), indent=2) if as_json else tables.verified(found))
    if found.verdict in (DIFFERENT, UNVERIFIABLE):
        ctx.exit(3)
