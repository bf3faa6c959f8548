"""Where a soup is made before anyone sees it: a locked folder beside the output, and one rename at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set as AbstractSet
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from filelock import FileLock, Timeout

from hf_soup._util.io import appearing
from hf_soup.errors import MergeError

_PLAN = "plan.json"
_LOCK = "lock"
_WORLD = "world"  # and a number: held by each process of a world but the first
_JOURNAL = "journal"


class CompletedUnit(NamedTuple):
    """A finished unit.

    Args:
        unit: Its number.
        digests: The sha256s of its blocks in hexadecimal, one after the other.
        differing: Numbers of its tensors that are not averaged and on which the sources disagree.
    """

    unit: int
    digests: str
    differing: tuple[int, ...] = ()


class Workspace:
    """The folder ``.NAME.cooking`` beside an output folder: a lock, a plan, journals, and the soup that grows in it.

    It is locked while a process works in it. It stays when the work is interrupted, so that the next run can
    continue; the soup in it is renamed to the output when it is complete. Nothing that exists is replaced.

    Args:
        output: The folder that the soup will be.
        kept: Whether it stays when the work fails; else somebody takes it away.

    Raises:
        MergeError: The output exists, cannot be written, or another process is cooking it.
    """

    def __init__(self, output: Path, *, kept: bool = True) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 -- resolve() would follow the last link
        self.root = self.output.parent / f".{self.output.name}.cooking"
        self.folder = self.root / "soup"
        self._lock = FileLock(self.root / _LOCK, timeout=0)
        self._guard = threading.Lock()
        self._kept = kept

    def __enter__(self) -> Self:
        refuse_existing(self.output)
        try:
            self._take_lock()
        except Timeout:
            raise MergeError(
                f"Another process is cooking '{self.output.name}' right now.",
                hint="Wait until it is done, or choose another output folder with -o.",
                code="busy",
            ) from None
        except OSError as error:
            raise MergeError(
                f"Cannot write beside '{self.output}': {error.strerror}.",
                hint="Choose another output folder with -o.",
            ) from None
        try:
            refuse_existing(self.output)  # the process that had the lock may have finished it
            self._refuse_strange()
        except MergeError:
            self.__exit__(None, None, None)
            raise
        return self

    def _refuse_strange(self) -> None:
        """Stop where a process of an earlier world is still at work here, or where links lead elsewhere."""
        for path in (self.root, self.folder, self.fetched):
            if path.is_symlink():
                raise MergeError(f"'{path}' is a link, and nothing behind it is touched.", hint="Remove the link.")
        try:
            for path in self.root.glob(f"{_WORLD}.*"):
                with FileLock(path, timeout=0):
                    pass
        except Timeout:
            raise MergeError(
                f"A process of an interrupted run is still at work on '{self.output.name}'.",
                hint="Wait until it has ended, or end it, and run the same command again.",
                code="busy",
            ) from None

    def _take_lock(self) -> None:
        while not self._lock.is_locked:
            try:
                self.root.mkdir(parents=True)
            except FileExistsError as error:  # for `exist_ok` it may be gone again; but a link to nothing stays
                if Path(error.filename).is_symlink() and not Path(error.filename).exists():
                    raise
            try:
                with suppress(FileNotFoundError):  # the process that had the lock took the folder away
                    self._lock.acquire()
            except FileExistsError:  # the same, in the moment in which filelock looks whether it is there
                if self.root.exists() and not self.root.is_dir():
                    raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._lock.is_locked:
            return
        if not (self.root / _PLAN).exists():
            # Nothing was begun, or all is done: there is nothing to continue.
            with suppress(OSError):
                for path in self.root.glob(f"{_WORLD}.*"):
                    path.unlink()
                (self.root / _LOCK).unlink()
                self.root.rmdir()
        self._lock.release()

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn what the file system refuses into a `MergeError` that says what is kept."""
        mend = "make room or mend the cause, and run the same command again."
        try:
            yield
        except OSError as error:
            raise MergeError(
                f"Cannot make '{self.output.name}': {error.strerror} ('{error.filename or self.folder}').",
                hint=f"What is finished is kept; {mend}" if self._kept else mend.capitalize(),
                code="disk-full" if error.errno == errno.ENOSPC else "",
            ) from None

    @property
    def fetched(self) -> Path:
        """Where files lie that are dropped after use."""
        return self.root / "fetched"

    def held_bytes(self) -> int:
        """What an interrupted run left on the disk."""
        return sum(path.lstat().st_blocks * 512 for path in self.root.rglob("*") if path.is_file())

    def open(self, fingerprint: str, outline: Mapping[str, Any]) -> str | None:
        """Start a merge, or continue the one that was interrupted.

        Args:
            fingerprint: Of the plan.
            outline: Of the plan, as plain data.

        Returns:
            None at a fresh start; ``continued`` where the same merge was interrupted; else why it starts anew.
        """
        try:
            earlier = json.loads((self.root / _PLAN).read_text())
            if earlier["fingerprint"] == fingerprint:
                said = "continued"
            else:
                said = f"an interrupted run had {_difference(earlier['plan'], outline)}, so this one starts anew"
        except FileNotFoundError:
            said = None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            said = "what an interrupted run left cannot be read, so this one starts anew"
        with self.disk_errors():
            self._clear({file["name"] for file in outline["files"]} if said == "continued" else set())
            self._write(_PLAN, json.dumps({"fingerprint": fingerprint, "plan": outline}))
            self.folder.mkdir(exist_ok=True)
            self.fetched.mkdir(exist_ok=True)
        return said

    @contextmanager
    def join(self, fingerprint: str, rank: int) -> Iterator[None]:
        """See what the first process of a world wrote with `open`; as long as this lasts nobody else may begin here.

        Raises:
            MergeError: It is not there: the processes see different folders.
        """
        with ExitStack() as stack:
            try:
                self.root.lstat()  # or the lock would make it
                stack.enter_context(FileLock(self.root / f"{_WORLD}.{rank}", timeout=0))
                if json.loads((self.root / _PLAN).read_text())["fingerprint"] != fingerprint:
                    raise ValueError("it is another one's")
            except (OSError, ValueError, LookupError, TypeError):
                raise MergeError(
                    f"This process does not see '{self.root}', which the first one wrote.",
                    hint="All processes need the same file system, and the same output folder.",
                ) from None
            yield

    def allocate(self, files: Iterable[tuple[str, bytes, int]]) -> None:
        """Make the output files, ``(name, first bytes, size)``, as large as they will be; what they hold stays.

        That reserves the space, so that a full disk is known before the work and not in its middle.
        """
        for name, header, size in files:
            with open(os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as file:  # noqa: PTH123
                file.write(header)
                file.truncate(size)
                if not hasattr(os, "posix_fallocate"):
                    continue  # macOS; whether there is room was asked before the first download
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                        raise

    def restart(self, kept: Sequence[CompletedUnit]) -> None:
        """Put one journal of the units that are kept in the place of all journals."""
        self._write(f"{_JOURNAL}.0", "".join(f"{json.dumps(entry)}\n" for entry in kept))
        for journal in self.root.glob(f"{_JOURNAL}.*"):
            if journal.name != f"{_JOURNAL}.0":
                journal.unlink()

    def note(self, rank: int, entries: Sequence[CompletedUnit]) -> None:
        """Append finished units to this process's journal, after their bytes were written."""
        if entries:
            with self._guard, (self.root / f"{_JOURNAL}.{rank}").open("a") as journal:
                journal.write("".join(f"{json.dumps(entry)}\n" for entry in entries))

    def finished(self) -> Iterator[CompletedUnit]:
        """The units that any process noted; a line that was cut off when the process died is passed over."""
        for journal in sorted(self.root.glob(f"{_JOURNAL}.*")):
            for line in journal.read_text(errors="replace").splitlines():
                with suppress(ValueError, TypeError, OverflowError, RecursionError):
                    unit, digests, differing = json.loads(line)
                    yield CompletedUnit(int(unit), str(digests), tuple(int(number) for number in differing))

    def publish(self) -> Path:
        """Make the folder appear as the output, durably, replacing nothing.

        Raises:
            MergeError: Something with that name appeared meanwhile; the soup waits in the staging folder.
        """
        with self.disk_errors():
            for path in [*self.folder.rglob("*"), self.folder]:
                _sync(path)
            refuse_existing(self.output)
            self.folder.rename(self.output)  # onto a file, or a folder that holds anything, it fails
            _sync(self.output.parent)
            self._clear(set())
        return self.output

    def _write(self, name: str, text: str) -> None:
        with appearing(self.root / name) as partial:
            partial.write_text(text)

    def _clear(self, keep: AbstractSet[str]) -> None:
        """Remove what an earlier run left, but of the soup the files to ``keep``, and the plan and journals with them.

        Whatever else lies there was not put there by this package, and stays.
        """
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if not keep:
            for path in [self.root / _PLAN, *self.root.glob(f"{_JOURNAL}.*"), *self.root.glob("*.partial")]:
                path.unlink(missing_ok=True)
            shutil.rmtree(self.fetched, ignore_errors=True)
            with suppress(FileNotFoundError):
                self.folder.rmdir()


#: Part of a plan → what a run is said to have had when it was different.
_PARTS = {
    "sources": "other ingredients",
    "states": "the same ingredients before they changed",
    "weights": "other weights",
    "method": "another method",
    "parameters": "other parameters of the method",
}


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two plans differ, for people."""
    found = [said for part, said in _PARTS.items() if earlier.get(part) != now[part]]
    if "sources" in now and earlier.get("sources") != now["sources"]:
        found = [said for said in found if said != _PARTS["states"]]
        found[0] += f" ({', '.join(map(str, earlier.get('sources', [])))})"
    return " and ".join(found) or "another layout of the output"


def refuse_existing(output: Path) -> None:
    """Stop before an output that exists; nothing is ever overwritten.

    Raises:
        MergeError: It exists, or cannot.
    """
    if "\0" in str(output):
        raise MergeError(f"The output {str(output)!r} has a zero byte in it.", hint="Choose another folder with -o.")
    if os.path.lexists(output):
        whole = output.absolute()
        kind = "is a mount point" if whole.is_mount() and not whole.is_symlink() else "exists already"
        raise MergeError(
            f"The output '{output}' {kind}, and nothing that exists is overwritten.",
            hint="Choose another folder with -o, or move that one away.",
            code="exists",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
