"""What goes to the Hub: push."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hf_soup.commands import JSON, patient


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, default=None, help="Create the repo as private.")
@click.option("--license", "license_id", metavar="ID", help="The card's licence, such as apache-2.0.")
@click.option("--replace", is_flag=True, help="Delete what the repo holds beside the soup.")
@JSON
def push(folder: Path, repo: str, private: bool | None, license_id: str | None, replace: bool, as_json: bool) -> None:
    """Publish a soup as one commit to a model repo on the Hub.

    Example: hf-soup push soup me/my-soup --private
    """
    from hf_soup.cooked import Soup

    patient()
    done = Soup.open(folder).push(repo, private=private, license=license_id, replace=replace)
    if as_json:
        click.echo(json.dumps({"repo": done.repo, "commit": done.commit, "url": done.url, "pull_request": None}))
    elif done.changed:
        click.echo(f"Pushed {done.repo} as commit {done.commit[:7]}: {done.url}")
    else:
        click.echo(f"{done.repo} holds this soup already, in commit {done.commit[:7]}: {done.url}")
