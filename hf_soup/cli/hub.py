"""``hf-soup hub``: a Hub on this machine."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import click


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=Path("local-hub"), show_default=True, help="Folder.")
@click.option("--port", type=click.IntRange(0, 65535), default=8760, show_default=True, help="0 takes a free one.")
def hub(root: Path, port: int) -> None:
    """Serve a small local Hub, for demos, tests and work without a network.

    Point any Hugging Face tool at it with HF_ENDPOINT and HF_TOKEN. Ctrl-C stops it.

    Example: hf-soup hub --root local-hub --port 8760
    """
    from hf_soup.local_hub import LocalHub

    with LocalHub(root, port=port) as server, suppress(KeyboardInterrupt):
        click.echo(f"export HF_ENDPOINT={server.endpoint} HF_TOKEN={server.token} HF_HUB_DISABLE_XET=1")
        threading.Event().wait()
