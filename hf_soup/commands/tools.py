"""The demo, what methods there are, and the local Hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hf_soup import explained
from hf_soup.commands import JSON
from hf_soup.errors import RecipeError


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("hf-soup-demo"), show_default=True, help="Folder."
)
def demo(output: Path) -> None:
    """Show the whole story on real data, without network or account.

    Trains a small ancestor and nine fine-tunes of it, publishes them on a local Hub, and then does what you would do:
    check, cook, push, load. Takes two minutes the first time.

    Example: hf-soup demo
    """
    from hf_soup.demo import run_demo

    run_demo(output, say=click.echo, progress=lambda text: click.echo(text, err=True))


@click.command()
@click.argument("name", required=False)
@JSON
def methods(name: str | None, as_json: bool) -> None:
    """List the ways of combining tensors and of selecting ingredients, or explain one.

    Example: hf-soup methods ties
    """
    from hf_soup.methods import METHODS
    from hf_soup.selection import SELECTIONS

    every: dict[str, Mapping[str, Any]] = {"methods": METHODS, "selections": SELECTIONS}
    known = [each for registry in every.values() for each in sorted(registry)]
    if name is not None and name not in known:
        raise RecipeError(f"There is no method or selection '{name}'.", hint=f"Known are: {', '.join(known)}.")
    chosen = {
        title: [registry[each] for each in sorted(registry) if name in (None, each)]
        for title, registry in every.items()
    }
    if as_json:
        click.echo(json.dumps(explained.as_data(chosen), indent=2))
    elif name is None:
        click.echo(explained.listed(chosen))
    else:
        click.echo("\n\n\n".join(explained.whole(each) for registry in chosen.values() for each in registry))


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("local-hub"), show_default=True, help="Folder.")
@click.option("--port", type=click.IntRange(0, 65535), default=8760, show_default=True, help="0 takes a free one.")
def hub(root: Path, port: int) -> None:
    """Serve a small local Hub, for demos, tests and work without a network.

    Point any Hugging Face tool at it with HF_ENDPOINT and HF_TOKEN. Ctrl-C stops it.

    Example: hf-soup hub --root local-hub --port 8760
    """
    from hf_soup.local_hub import LocalHub, serve

    def ready(server: LocalHub) -> None:
        click.echo(f"export HF_ENDPOINT={server.endpoint} HF_TOKEN={server.token} HF_HUB_DISABLE_XET=1")
        sys.stdout.flush()

    serve(root, port=port, on_ready=ready)
