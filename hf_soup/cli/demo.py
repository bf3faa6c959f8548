"""``hf-soup demo``: the whole way, without a network."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "-o",
    "--out",
    "output",
    type=click.Path(path_type=Path),
    default=Path("hf-soup-demo"),
    show_default=True,
    help="Folder.",
)
@click.option("--lm", is_flag=True, help="With language models, in place of models that read digits.")
def demo(output: Path, lm: bool) -> None:
    """Show the whole story on real data, without network or account.

    Trains a small ancestor and several fine-tunes of it, publishes them on a local Hub, and then does what you would
    do: check, cook, push, load. Takes two minutes the first time.

    Example: hf-soup demo
    """
    from hf_soup.demo import DigitsZoo, LanguageZoo, run_demo

    zoo = LanguageZoo() if lm else DigitsZoo()
    run_demo(output, zoo, progress=lambda text: click.echo(text, err=True))
