"""Where a model's files are: in a repo on the Hub, at one commit, or in a folder here.

Who needs a file asks its source, and does not look which of the two it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hf_soup import hub
from hf_soup._util.io import within
from hf_soup._util.parallel import in_parallel
from hf_soup._util.progress import bar
from hf_soup.checkpoint.headers import reader_of
from hf_soup.errors import ResolveError
from hf_soup.hub import ASSETS, Stamp


@dataclass(frozen=True, kw_only=True)
class FileSource(ABC):
    """The files of one model. Two that are equal have the same files, so that each is fetched once.

    Args:
        reference: What names it in a recipe on this machine, without a revision: ``owner/name``, or a folder's path.
        files: Every file's size in bytes, as they were listed when it was opened.
        commit: The full commit on the Hub; None where it is not there, and is pinned by the content of its weights.
        from_cache: The Hub was not reached, so this is what it looked like when it last was.
        stamps: The states of files that may change, from before anything of them was read.
    """

    reference: str
    files: Mapping[str, int] = field(repr=False, compare=False)
    commit: str | None = None
    from_cache: bool = field(default=False, compare=False)
    stamps: Mapping[str, Stamp] = field(default_factory=dict, repr=False, compare=False)

    @abstractmethod
    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of a file, by a range request where it is not here.

        Raises:
            ResolveError: The file is shorter than that, or cannot be read.
        """

    @abstractmethod
    def here(self, file: str) -> Path | None:
        """Where a file lies on this machine; None where it is to be fetched."""

    @abstractmethod
    def fetch(self, file: str, advance: Callable[[int], object] = lambda _: None) -> Path:
        """Where a file lies on this machine, once it was downloaded and compared with what the Hub states.

        Args:
            file: Which.
            advance: Told how many bytes arrived.

        Raises:
            ResolveError: It cannot be had, or its bytes are wrong.
        """

    @abstractmethod
    def content_id(self, file: str) -> str:
        """What equal files in sources of one kind have in common: the sha256, or the Hub's id of a small one."""

    def content_ids(self, wanted: Callable[[str], object]) -> dict[str, str]:
        """`content_id` of the files that are wanted."""
        return {file: self.content_id(file) for file in self.files if wanted(file)}

    def origin(self, file: str) -> tuple[FileSource, str]:
        """Where a file really is, where several sources are seen as one, and what it is called there."""
        return self, file

    def fetch_assets(self) -> Path:
        """A folder here that holds what a model needs beside its weights: config, tokenizer, processor."""
        wanted = [file for file in self.files if ASSETS.fullmatch(file)]
        paths = fetch_files([(self, file) for file in wanted], quiet=True)
        return paths[0].parents[len(PurePosixPath(wanted[0]).parts) - 1]


@dataclass(frozen=True, kw_only=True)
class HubRepo(FileSource):
    """A repo on the Hub at one commit, of which no more is read than is asked for; see `hub.Repo`."""

    repo: hub.Repo = field(repr=False, compare=False)

    @classmethod
    def of(cls, repo: hub.Repo) -> HubRepo:
        """A repo that was resolved."""
        return cls(
            reference=repo.id,
            files={path: file.size for path, file in repo.files.items()},
            commit=repo.revision,
            from_cache=repo.from_cache,
            repo=repo,
        )

    def read(self, file: str, start: int, stop: int) -> bytes:
        """From the cache where it is there and known to be right."""
        return hub.read_range(self.repo, file, start, stop)

    def here(self, file: str) -> Path | None:
        """In the cache."""
        return hub.cached_path(self.repo, file)

    def fetch(self, file: str, advance: Callable[[int], object] = lambda _: None) -> Path:
        """Into the cache."""
        return hub.fetch_one(self.repo, file, advance)

    def content_id(self, file: str) -> str:
        """As the Hub lists it."""
        return self.repo.files[file].sha256 or self.repo.files[file].blob


@dataclass(frozen=True, kw_only=True)
class LocalFolder(FileSource):
    """A folder, as it was when it was opened."""

    path: Path = field(repr=False)

    @classmethod
    def of(cls, folder: Path, paths: Iterable[Path]) -> LocalFolder:
        """A folder with the files among such paths, in the states in which they are now."""
        stamps = {path.relative_to(folder).as_posix(): hub.stamp_of(path) for path in sorted(paths) if path.is_file()}
        sizes = {file: stamp[2] for file, stamp in stamps.items()}
        return cls(reference=str(folder), files=sizes, stamps=stamps, path=folder)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """From the disk."""
        path = self._place(file)
        try:
            data = reader_of(path)(file, start, stop)
        except OSError as error:
            raise ResolveError(f"Cannot read '{path}': {error.strerror}.") from None
        if len(data) != stop - start:
            raise ResolveError(f"'{path}' is shorter than its header says: {start + len(data):,} bytes of {stop:,}.")
        return data

    def here(self, file: str) -> Path:
        """In the folder."""
        return self.path / file

    def fetch(self, file: str, advance: Callable[[int], object] = lambda _: None) -> Path:
        """It is here."""
        self._place(file)
        return self.path / file

    def _place(self, file: str) -> Path:
        """Where a file lies. What goes into a soup as it is, as a tokenizer does, must be of this folder: a stranger's
        link could name any secret of this machine. Weights, which are validated, may be links to anywhere.
        """
        place = within(self.path, file) if ASSETS.fullmatch(file) else self.path / file
        if place is None:
            raise ResolveError(
                f"'{self.path}': {file} is a link to '{(self.path / file).resolve()}', which is not in the folder.",
                hint="Only weights may lie elsewhere. Put a copy of the file in its place, if you trust it.",
            )
        return place

    def content_id(self, file: str) -> str:
        """By reading it, where its sha256 is not known yet."""
        return hub.sha256_of(self.path / file)


@dataclass(frozen=True, kw_only=True)
class SubFolder(FileSource):
    """A folder in a repo, as if it were one."""

    whole: FileSource = field(repr=False)
    folder: str

    @classmethod
    def of(cls, whole: FileSource, folder: str) -> SubFolder:
        """The files below a folder."""
        files = {file.removeprefix(f"{folder}/"): n for file, n in whole.files.items() if file.startswith(f"{folder}/")}
        return cls(
            reference=f"{whole.reference}/{folder}", files=files, commit=whole.commit, from_cache=whole.from_cache,
            whole=whole, folder=folder,
        )  # fmt: skip

    def origin(self, file: str) -> tuple[FileSource, str]:
        """In the whole."""
        return self.whole.origin(f"{self.folder}/{file}")

    def read(self, file: str, start: int, stop: int) -> bytes:
        """As in the whole."""
        return self.whole.read(f"{self.folder}/{file}", start, stop)

    def here(self, file: str) -> Path | None:
        """As in the whole."""
        return self.whole.here(f"{self.folder}/{file}")

    def fetch(self, file: str, advance: Callable[[int], object] = lambda _: None) -> Path:
        """As in the whole."""
        return self.whole.fetch(f"{self.folder}/{file}", advance)

    def content_id(self, file: str) -> str:
        """As in the whole."""
        return self.whole.content_id(f"{self.folder}/{file}")


def fetch_files(wanted: Sequence[tuple[FileSource, str]], *, quiet: bool = False) -> list[Path]:
    """Where files lie on this machine, downloaded where they must be, several at once.

    Raises:
        ResolveError: One cannot be had, or its bytes are wrong.
    """
    total = sum(source.files[file] for source, file in wanted if source.here(file) is None)
    with bar("Fetching", total, quiet=quiet) as shown:
        return in_parallel(lambda item: item[0].fetch(item[1], shown.update), wanted, threads=4)
