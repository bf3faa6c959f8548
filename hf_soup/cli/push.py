"""``hf-soup push``: publish a soup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hf_soup.cli import tables
from hf_soup.cli.options import JSON, patient, show


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, default=None, help="Create the repo as private.")
@click.option("--pr", "create_pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--tag", metavar="NAME", help="Tag the commit, such as v1.0.")
@click.option("--license", metavar="ID", help="The card's licence, such as apache-2.0.")
@click.option("--replace", is_flag=True, help="Delete what the repo holds beside the soup.")
@click.option("--allow-private-ingredients", is_flag=True, help="Name private models in a public repo.")
@JSON
def push(folder: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Publish a soup as one commit to a model repo on the Hub.

    Example: hf-soup push soup me/my-soup --private
    """
    from hf_soup.publishing import Soup

    patient()
    done = Soup.open(folder).push(repo, **options)
    if as_json:
        show(json.dumps({**done.to_dict(), "tag": options["tag"]}))
    else:
        show(tables.pushed(done))
