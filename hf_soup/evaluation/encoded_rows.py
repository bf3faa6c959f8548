"""Preprocessed rows, on disk from one run to the next and read where they lie: nothing makes them twice.

An entry is one file: the numbers of all rows one after the other, the rows' digests (16 bytes each), where each row
ends (int64, in numbers), and what these are as JSON in 4,096 bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from hf_soup import hub
from hf_soup._util.parallel import in_order
from hf_soup._util.progress import bar
from hf_soup._util.version import __version__, version
from hf_soup.errors import ScoringError
from hf_soup.evaluation.statistics import Ints
from hf_soup.hub import ASSETS, prune

#: What is kept in all; beyond it, what was not used for longest goes.
MAX_BYTES = 20_000_000_000
_TAIL = 4096
_LIBRARIES = ("transformers", "tokenizers", "datasets", "pillow", "numpy")


class Chunk(NamedTuple):
    """Rows made together."""

    digests: Sequence[bytes]  #: 16 bytes a row.
    names: Sequence[str]  #: The model's arguments: one, or one for each line of a row.
    rows: Sequence[NDArray[Any]]  #: ``(channels, height, width)`` float32, or ``(names, tokens)`` int32.


class EncodedRows:
    """Rows mapped from an entry's file, which may be deleted meanwhile; or its bytes.

    Another process maps the same file, or is given the bytes where it is gone.

    Raises:
        OSError, ValueError: There is no such entry, or it is damaged.
    """

    def __init__(self, entry: Path | bytes) -> None:
        self._entry = entry
        self._mapping: mmap.mmap | bytes
        if isinstance(entry, bytes):
            self._mapping = entry
        else:
            if not hub.is_intact(entry):
                raise ValueError("absent or damaged")
            with entry.open("rb") as stream:
                self._mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        said = json.loads(self._mapping[-_TAIL:])
        count, total = said["rows"], said["numbers"]
        self.names: list[str] = said["names"]
        self._shape: list[int] = said["shape"]
        self._numbers = np.frombuffer(self._mapping, said["dtype"], total)
        self.digests = [self._mapping[at : at + 16] for at in range(4 * total, 4 * total + 16 * count, 16)]
        self._ends = np.append(0, np.frombuffer(self._mapping, np.int64, count, 4 * total + 16 * count))
        #: ``(rows,)`` numbers in each row.
        self.sizes: Ints = np.diff(self._ends)

    def rows(self, numbers: Ints) -> list[NDArray[Any]]:
        """Copies of some rows, each in its shape."""
        found = [self._numbers[self._ends[row] : self._ends[row + 1]].reshape(self._shape).copy() for row in numbers]
        self._let_go()
        return found

    def _let_go(self) -> None:
        """What was read stays in the system's cache of files, not in this process's memory."""
        if isinstance(self._mapping, mmap.mmap):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def __reduce__(self) -> tuple[type[EncodedRows], tuple[Path | bytes]]:
        here = isinstance(self._entry, Path) and self._entry.exists()
        return EncodedRows, (self._entry if here else bytes(self._mapping),)


def key_of(about: object, folder: Path, code: Sequence[Path]) -> str:
    """The sha256 of all that preprocessed rows depend on.

    Args:
        about: Which rows, and how the model wants them, as plain data.
        folder: The donor's: its tokenizer or image processor.
        code: The files that make them.
    """
    names = sorted({file.name for file in folder.iterdir() if ASSETS.fullmatch(file.name)} - {"config.json"})
    files = [*(folder / name for name in names), Path(__file__), *code]
    contents = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    versions = [__version__, *(version(library) for library in _LIBRARIES)]
    return hashlib.sha256(json.dumps([about, contents, versions], sort_keys=True).encode()).hexdigest()


def stored(
    key: str, title: str, chunks: Sequence[range], make: Callable[[range], Chunk], *, scratch: Path, threads: int,
    quiet: bool,
) -> EncodedRows:  # fmt: skip
    """The rows of an entry; where there is none, or a damaged one, it is made and kept for the next run.

    Held in memory at a time: two chunks for each thread. The bytes are the same at any number of threads. Of several
    processes one makes the entry, and the others wait for it.

    Args:
        key: Of the entry, from `key_of`.
        title: What errors and the progress bar call the data.
        chunks: All rows in their order, in pieces.
        make: Makes the rows of one chunk; called in several threads.
        scratch: Where the file goes when the user's cache cannot be written. It may be deleted afterwards.
        threads: How many.
        quiet: No progress bar.

    Raises:
        ScoringError: From ``make``; rows differ in shape; or the disk is full.
    """
    folder = hub.own_cache_folder() / "data"
    with suppress(OSError, ValueError):
        return EncodedRows(folder / key)
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder.parent / "locks" / key))
        except OSError:  # a home that cannot be written
            folder = scratch
        with suppress(OSError, ValueError):  # made by another process meanwhile
            return EncodedRows(folder / key)
        try:
            for left in folder.glob(f"{key}.*.partial"):  # by a killed process, as this one has the lock
                left.unlink()
            shown = stack.enter_context(bar(f"Preprocessing {title}", chunks[-1].stop, unit="row", quiet=quiet))
            with (
                hub.keeping(folder / key) as partial,
                partial.open("wb") as stream,
                ThreadPoolExecutor(threads) as pool,
            ):
                _write(stream, title, in_order(pool, make, chunks, 2 * threads), shown.update)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ScoringError(
                f"Cannot keep the preprocessed rows of {title} in '{folder}': {error.strerror or error}.",
                hint="Make room, or set HF_HOME elsewhere.",
                code="disk-full" if error.errno == errno.ENOSPC else "",
            ) from error
        found = EncodedRows(folder / key)
        prune(folder, MAX_BYTES)
        return found


def _write(stream: BinaryIO, title: str, chunks: Iterator[Chunk], progress: Callable[[int], object]) -> None:
    digests: list[bytes] = []
    ends, shape, names, dtype = [0], None, None, ""
    for chunk in chunks:
        for row in chunk.rows:
            found = row.shape if row.ndim == 3 else (len(row), -1)
            if found != (shape := shape or found):
                raise ScoringError(
                    f"The donor's image processor makes images of {shape} and of {found} of {title}.",
                    hint="Check `do_resize` and `size` in its preprocessor_config.json.",
                )
            stream.write(np.ascontiguousarray(row).data)
            ends.append(ends[-1] + row.size)
            dtype = row.dtype.str
        digests += chunk.digests
        names = chunk.names
        progress(len(chunk.rows))
    stream.write(b"".join(digests) + np.array(ends[1:], dtype=np.int64).tobytes())
    said = {"rows": len(digests), "numbers": ends[-1], "dtype": dtype, "shape": shape, "names": names}
    stream.write(json.dumps(said).encode().ljust(_TAIL))
