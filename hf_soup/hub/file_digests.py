"""The sha256 of files, computed once for each state of a file and remembered, and large files that are kept by it.

A state is what the file system says of a file: device, inode, size, times of change. As in git's index, a file that
was touched so lately that a later change might not show is hashed again the next time. What neither can see is a
change through a memory map to a page that was not written to the disk since it was last changed.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_soup._util.io import appearing
from hf_soup.errors import MergeError
from hf_soup.hub.cache import keep_note, own_cache_folder, read_note, write_note

#: Device, inode, size in bytes, time of change of the content and of the inode, in nanoseconds.
Stamp = tuple[int, int, int, int, int]

#: Nanoseconds after a change in which another might not show: by the kernel's clock, and by the coarsest of a common
#: file system (FAT), which counts for what is kept on disk.
_TICK, _COARSE = 50_000_000, 2_000_000_000
_CHUNK = 1 << 20
_known: dict[tuple[str, Stamp], str] = {}


def stamp_of(path: Path | int) -> Stamp:
    """The state of a file, given by its path or a descriptor."""
    state = os.stat(path)  # noqa: PTH116 -- which takes both
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def known_sha256(path: Path) -> str | None:
    """The sha256 of a file in its present state, in hexadecimal, if it was computed before."""
    try:
        stamp = stamp_of(path)
        found = _known.get((str(path), stamp))
        if found is None:
            *noted, digest = read_note(_note(path)).decode().split()
            if noted == [str(number) for number in stamp]:
                found = _known[str(path), stamp] = digest
    except (OSError, ValueError):
        return None
    return found


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; read only where it is not known."""
    found = known_sha256(path)
    if found is None:
        stamp, since = stamp_of(path), time.time_ns()
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        remember_sha256(path, stamp, found, since=since)
    return found


def remember_sha256(path: Path, stamp: Stamp, digest: str, *, since: int) -> None:
    """Note the sha256 of a file that was in this state before it was read, at ``since`` (ns), and still is."""
    quiet = since - max(stamp[3:])
    if quiet < _TICK or stamp_of(path) != stamp:
        return
    _known[str(path), stamp] = digest
    if quiet < _COARSE:
        return
    keep_note(_note(path), " ".join(str(number) for number in stamp) + f" {digest}")


def _note(path: Path) -> Path:
    return own_cache_folder() / "sha256" / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()


@contextmanager
def keeping(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Where to write a large file of this package's cache; as `appearing`, and with a note of its sha256 beside it."""
    with appearing(path, replaces=replaces) as partial:
        yield partial
        write_note(_beside(path), sha256_of(partial))  # first, so that none is without


def is_intact(path: Path) -> bool:
    """Whether a large file in this package's cache is there as it was written; it counts as used now."""
    with suppress(OSError, ValueError):
        with suppress(PermissionError):  # another's home, which may be read
            os.utime(_beside(path))
        return read_note(_beside(path)).decode() == sha256_of(path)
    return False


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def prune(folder: Path, most: int) -> None:
    """Delete what was not used for longest, beyond so many bytes in all; the newest is kept, however large."""
    with suppress(OSError):
        found = sorted(
            ((note if (note := _beside(path)).exists() else path).stat().st_mtime, path.stat().st_size, path)
            for path in folder.iterdir()
            if path.is_file() and path.suffix != ".sha256"
        )
        held = sum(size for _, size, _ in found)
        for _, size, path in found[:-1]:
            if held <= most:
                break
            path.unlink(missing_ok=True)
            _beside(path).unlink(missing_ok=True)
            held -= size


def changed_while_read(label: str, file: str) -> MergeError:
    """The error for a file that is in another state than when it was looked at first."""
    return MergeError(
        f"{label}: '{file}' changed while it was read.",
        hint="Leave the ingredients alone while they are averaged, and run this again.",
        code="changed",
    )


class FileHasher:
    """Hashes a file from its beginning to its end in the wake of those who read it, so that it leaves the disk once.

    Args:
        path: The file.
        descriptor: Of it, open until it is finished.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._stamp, self._since = stamp_of(descriptor), time.time_ns()
        self._hash = hashlib.sha256()
        self._position = 0
        self._lock = threading.Lock()

    def follow(self, stop: int) -> None:
        """Hash on up to ``stop``, unless another thread is at it."""
        if self._position < stop and self._lock.acquire(blocking=False):
            try:
                self._advance(stop)
            finally:
                self._lock.release()

    def finish(self) -> str:
        """Hash the rest; the sha256 of the whole file, which is remembered."""
        with self._lock:
            self._advance(self._stamp[2])
            digest = self._hash.hexdigest()
        remember_sha256(self._path, self._stamp, digest, since=self._since)
        return digest

    def _advance(self, stop: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, max(0, stop - self._position))))
        while self._position < stop:
            count = os.preadv(self._descriptor, [buffer[: stop - self._position]], self._position)
            if count == 0:
                return  # it shrank; whoever needs those bytes says so, and the stamp differs
            self._hash.update(buffer[:count])
            self._position += count
