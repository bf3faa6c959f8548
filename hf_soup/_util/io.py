"""Positioned reads and writes between files and tensors.

Not memory maps: these show how much memory is used, and a file that shrinks meanwhile is an error, not a SIGBUS.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hf_soup.errors import MergeError, RecipeError

_MOST_FILES = 10_240


def open_file(stack: ExitStack, path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor that is closed with the stack."""
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        # Many ingredients in many shards pass the usual limit of 1,024, which every process may raise for itself.
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS says that there is no limit, and grants so many.
        raised = max(now, _MOST_FILES) if most == resource.RLIM_INFINITY else most
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, most))
        descriptor = os.open(path, flags)
    stack.callback(os.close, descriptor)
    return descriptor


class ShortReadError(Exception):
    """A file ended before it should."""


def read_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill memory from a file, from ``offset`` on.

    Raises:
        ShortReadError: The file ends before that.
    """
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise ShortReadError
        view = view[count:]
        offset += count


def shrunk(label: str, file: str, tensor: str) -> MergeError:
    """The error for a `ShortReadError` of a source's file."""
    return MergeError(
        f"{label}: {file} ended in the middle of '{tensor}'; it changed while it was read.",
        hint="Leave the ingredients alone while they are averaged, and run this again.",
        code="changed",
    )


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` into a file, from ``offset`` on."""
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count


def begin_writing(descriptor: int, offset: int, size: int) -> None:
    """Have a range go to the disk now, in the background, so that there is less to wait for at the end."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        # Linux begins to write dirty pages back when told that they will not be needed.
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def in_memory(path: Path, probes: int = 8) -> bool:
    """Whether most of a file need not come from the disk, by a few places in it."""
    found = 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for number in range(probes):
            try:
                os.preadv(file.fileno(), [bytearray(1)], size * number // probes, os.RWF_NOWAIT)
                found += 1
            except (OSError, AttributeError):  # it is not, or the file system cannot tell
                continue
    return found > probes // 2


def within(folder: Path, file: str) -> Path | None:
    """Where a file of a folder lies when links are followed; None where they lead out of it.

    Those of a snapshot in the Hub's cache may lead to the blobs of its repo.
    """
    root, real = folder.resolve(), (folder / file).resolve()
    caches = [path.with_name("blobs") for path in (root, *root.parents) if path.name == "snapshots"]
    return real if any(real.is_relative_to(place) for place in (root, *caches)) else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON that is indented, and ends with a line."""
    # Half a letter, as a stranger's "\ud800" is read, has no bytes; the escape that is put in its place is JSON's.
    path.write_bytes(f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace"))


@contextmanager
def appearing(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Where to write a file that appears whole or not at all: by one rename at the end, and never where that fails.

    Args:
        path: Where it appears; its folder is made.
        replaces: What another process wrote meanwhile; else that stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        yield partial
        if replaces or not path.exists():
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that a user asked for, and that must not exist."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise RecipeError(f"Cannot write '{path}': {error.strerror}.") from None
