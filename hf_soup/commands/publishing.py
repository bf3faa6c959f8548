"""What goes to the Hub, and whether what is there is what it says: push, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hf_soup import shown
from hf_soup.commands import JSON, MODELS, QUIET, patient


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, default=None, help="Create the repo as private.")
@click.option("--pr", "create_pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--tag", metavar="NAME", help="Tag the commit, such as v1.0.")
@click.option("--license", metavar="ID", help="The card's licence, such as apache-2.0.")
@click.option("--replace", is_flag=True, help="Delete what the repo holds beside the soup.")
@click.option("--allow-private-ingredients", is_flag=True, help="Name private models in a public repo.")
@click.option("--force", is_flag=True, help="Push weights that were changed since; the card says so.")
@JSON
def push(folder: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Publish a soup as one commit to a model repo on the Hub.

    Example: hf-soup push soup me/my-soup --private
    """
    from hf_soup.cooked import Soup

    patient()
    done = Soup.open(folder).push(repo, **options)
    if as_json:
        click.echo(json.dumps({**done.to_dict(), "tag": options["tag"]}))
    else:
        click.echo(shown.pushed(done))


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
    from hf_soup.verification import DIFFERENT, UNVERIFIABLE
    from hf_soup.verification import verify as examine

    where = dict(each.partition("=")[::2] for each in paths)
    if bad := next((each for each in paths if not each.partition("=")[0] or not each.partition("=")[2]), None):
        raise click.UsageError(f"--map takes NAME=PATH, not '{bad}'")
    patient()
    found = examine(
        model, score=score, map=where, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, quiet=quiet
    )
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else shown.verified(found))
    if found.verdict in (DIFFERENT, UNVERIFIABLE):
        ctx.exit(3)
