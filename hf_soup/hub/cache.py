"""The folder where this package keeps what it derived from downloads: notes, which are read whole, and large files.

One rule holds for all of it: what is kept carries a sha256 of its place and its content, which is compared whenever it
is used. What is damaged, or stands in another's place, is as good as absent, and is made anew.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from hf_soup._util.io import appearing


def own_cache_folder() -> Path:
    """Where this package keeps what it derived from downloads, beside the Hub's cache."""
    return Path(constants.HF_HOME) / "hf-soup"


def keep_note(note: Path, content: str | bytes | memoryview) -> None:
    """Write a note in that folder, whole or not at all; what it saves is only work."""
    with suppress(OSError):  # a home that cannot be written costs nothing but this
        write_note(note, content)


def write_note(note: Path, content: str | bytes | memoryview) -> None:
    """The same, where a disk that is full matters."""
    data = content.encode() if isinstance(content, str) else content
    with appearing(note) as partial, partial.open("wb") as file:
        file.write(data)
        file.write(_seal(note, data))


def read_note(note: Path) -> bytes:
    """What was written there.

    Raises:
        OSError: There is no such note.
        ValueError: It is damaged, or another's.
    """
    whole = memoryview(note.read_bytes())
    if _seal(note, whole[:-32]) != whole[-32:]:
        raise ValueError("damaged")
    return bytes(whole[:-32])


def _seal(note: Path, content: bytes | memoryview) -> bytes:
    """The sha256 that stands behind a note."""
    place = "/".join(note.parts[-2:])  # of its folder and its name: homes may be moved
    whole = hashlib.sha256(f"{place}\n".encode())
    whole.update(content)
    return whole.digest()
