"""Where a soup is made before anyone sees it: a locked folder beside the output, and one rename at the end."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from hf_soup.errors import MergeError

_PLAN = "plan.json"
_LOCK = "lock"
_JOURNAL = "journal"
_OWN = (_PLAN, _LOCK)

#: A finished block: (tensor number, block number, sha256 in hexadecimal).
Block = tuple[int, int, str]


class Staging:
    """The folder ``.NAME.cooking`` beside an output folder.

    It is locked while a process works in it. It stays when the work is interrupted, so that the next run can
    continue; it is renamed to the output when the soup is complete. Nothing that exists is replaced.

    Args:
        output: The folder that the soup will be.

    Raises:
        MergeError: The output exists, cannot be written, or another process is cooking it.
    """

    def __init__(self, output: Path) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 -- resolve() would follow the last link
        self.folder = self.output.parent / f".{self.output.name}.cooking"
        self._lock: IO[bytes] | None = None
        self._guard = threading.Lock()

    def __enter__(self) -> Self:
        refuse_existing(self.output)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / _LOCK).open("ab")
        except OSError as error:
            raise MergeError(
                f"Cannot write beside '{self.output}': {error.strerror}.",
                hint="Choose another output folder with -o.",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise MergeError(
                f"Another process is cooking '{self.output.name}' right now.",
                hint="Wait until it is done, or choose another output folder with -o.",
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        if self.folder.is_dir() and not (self.folder / _PLAN).exists():
            shutil.rmtree(self.folder)  # nothing was begun, so there is nothing to continue
        self._lock.close()

    def begin(self, fingerprint: str, plan: Mapping[str, Any], paths: Sequence[Mapping[str, Path]]) -> str | None:
        """Start a merge, or continue the one that was interrupted.

        Returns:
            None at a fresh start; ``continued`` where the same merge was interrupted; else why it starts anew.
        """
        said = None
        try:
            earlier = json.loads((self.folder / _PLAN).read_text())["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            earlier = None
        if earlier == fingerprint:
            said = "continued"
        else:
            if earlier is not None:
                said = "an interrupted run had another recipe or other ingredients, so this one starts anew"
            self._clear()
        text = json.dumps(
            {
                "fingerprint": fingerprint,
                "plan": plan,
                "paths": [{file: str(path) for file, path in source.items()} for source in paths],
            }
        )
        partial = self.folder / f"{_PLAN}.partial"
        partial.write_text(text)
        partial.replace(self.folder / _PLAN)
        return said

    def read_plan(self) -> tuple[dict[str, Any], list[dict[str, Path]]]:
        """What the first process of a world wrote with `begin`.

        Raises:
            MergeError: It is not there: the processes see different folders.
        """
        try:
            values = json.loads((self.folder / _PLAN).read_text())
        except (OSError, ValueError):
            raise MergeError(
                f"This process does not see '{self.folder}', which the first one wrote.",
                hint="All processes need the same file system, and the same output folder.",
            ) from None
        return values["plan"], [{file: Path(path) for file, path in source.items()} for source in values["paths"]]

    def note(self, rank: int, blocks: Sequence[Block]) -> None:
        """Append finished blocks to this process's journal, after their bytes were written."""
        with self._guard, (self.folder / f"{_JOURNAL}.{rank}").open("a") as journal:
            journal.write(json.dumps(blocks) + "\n")

    def finished(self) -> Iterator[Block]:
        """The blocks that any process noted; a line that was cut off when the process died is passed over."""
        for journal in sorted(self.folder.glob(f"{_JOURNAL}.*")):
            for line in journal.read_text().splitlines():
                with suppress(ValueError):
                    yield from ((int(tensor), int(block), str(digest)) for tensor, block, digest in json.loads(line))

    def publish(self) -> Path:
        """Make the folder appear as the output, durably, replacing nothing.

        Raises:
            MergeError: Something with that name appeared meanwhile.
        """
        for journal in self.folder.glob(f"{_JOURNAL}.*"):
            journal.unlink()
        for name in _OWN:
            (self.folder / name).unlink(missing_ok=True)
        for path in [*self.folder.rglob("*"), self.folder]:
            _sync(path)
        try:
            _rename(self.folder, self.output)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                refuse_existing(self.output)
            raise MergeError(
                f"The soup is complete in '{self.folder}', but cannot be renamed to '{self.output.name}': "
                f"{error.strerror}.",
                hint="Rename the folder by hand.",
            ) from None
        _sync(self.output.parent)
        return self.output

    def discard(self) -> None:
        """Remove the staging folder; only ever this one."""
        shutil.rmtree(self.folder)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def refuse_existing(output: Path) -> None:
    """Stop before an output that exists; nothing is ever overwritten.

    Raises:
        MergeError: It exists.
    """
    if output.is_symlink() or output.exists():
        kind = "is a mount point" if output.is_mount() else "exists already"
        raise MergeError(
            f"The output '{output}' {kind}, and nothing that exists is overwritten.",
            hint="Choose another folder with -o, or move that one away.",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    """Rename without replacing anything: plain ``rename`` replaces an empty folder and says nothing."""
    at_here, no_replace = -100, 1
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        if call(at_here, os.fsencode(source), at_here, os.fsencode(target), no_replace) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    # A file system that cannot promise it: look, then rename, which still refuses everything but an empty folder.
    if target.exists():
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    source.rename(target)
