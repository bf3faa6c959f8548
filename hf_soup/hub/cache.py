"""The folder where this package keeps what it derived from downloads, and its size."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from hf_soup._util.io import appearing


def own_cache_folder() -> Path:
    """Where this package keeps what it derived from downloads, beside the Hub's cache."""
    return Path(constants.HF_HOME) / "hf-soup"


def keep_note(note: Path, text: str) -> None:
    """Write a small file in that folder, whole or not at all; what it saves is only work."""
    with suppress(OSError), appearing(note) as partial:  # a home that cannot be written costs nothing but this
        partial.write_text(text)


def prune(folder: Path, most: int) -> None:
    """Delete files that were not used for longest, beyond so many bytes in all; the newest is kept, however large."""
    with suppress(OSError):
        states = [(path.stat(), path) for path in folder.iterdir() if path.is_file()]
        found = sorted((state.st_mtime, state.st_size, path) for state, path in states)
        held = sum(size for _, size, _ in found)
        for _, size, path in found[:-1]:
            if held <= most:
                break
            path.unlink(missing_ok=True)
            held -= size
