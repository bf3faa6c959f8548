"""``hf-soup demo``: the whole way, without a network."""

from __future__ import annotations

from pathlib import Path

import click


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
    from hf_soup.demo import DigitsZoo, run_demo

    run_demo(output, DigitsZoo(), progress=lambda text: click.echo(text, err=True))
