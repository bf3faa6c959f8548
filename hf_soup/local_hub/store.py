"""What the local Hub keeps on disk.

::

    root/
      blobs/ab/ab12…                     every content once, named by its sha256
      incoming/                          uploads under way; emptied at start
      repos/models/acme/tiny/repo.json   settings, refs, discussions: the only file of a repo that changes
      repos/models/acme/tiny/commits/    one immutable JSON a commit: {path: (git oid, size, sha256, is LFS)}
      renames.json                       {"models/acme/old": "acme/new"}

A commit is written before the ref that names it, and every file appears by one rename, so a killed server
leaves at worst a content or a commit that nothing refers to.
"""

import fcntl
import hashlib
import json
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from hf_soup.errors import SoupError
from hf_soup.local_hub.names import LFS_SUFFIXES, HubError, git_oid, pointer, valid_id, valid_path, valid_sha256

Kind = Literal["model", "dataset"]
_GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class File(NamedTuple):
    """One file of a commit. ``oid`` is the git sha1 of the content, or of the pointer to it if it is LFS."""

    oid: str
    size: int
    sha256: str
    lfs: bool


class Note(NamedTuple):
    """What a commit or a discussion says about itself."""

    title: str
    message: str
    author: str


@dataclass(frozen=True)
class Commit:
    """One immutable state of a repo, and how it came about."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """The part of a repo that changes. Change it under `Store.lock`, then `Store.save` it."""

    kind: Kind
    id: str
    created: str
    private: bool = False
    gated: str | bool = False
    allowed: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    """sha256 of every LFS content that was uploaded *to this repo*: knowing the hash of somebody's private
    file must not be enough to put that file into a repo of one's own."""

    @property
    def namespace(self) -> str:
        """The part of the id before the slash."""
        return self.id.partition("/")[0]


Change = tuple[str, File | None]
"""A path and its new file; None deletes the path, or all that is below it if it ends in a slash."""


def now() -> str:
    """The time in the Hub's spelling."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Incoming:
    """A content on its way in: hashed while it is written, in place only when whole, else gone."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._path = store.root / "incoming" / secrets.token_hex(16)
        self._file = self._path.open("xb")
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def keep(self, sha256: str | None = None, size: int | None = None) -> str:
        """Move the content in place and return its sha256, unless it is not what was announced."""
        self._file.close()
        got = self._hash.hexdigest()
        if sha256 not in (None, got) or size not in (None, self.size):
            raise HubError(400, f"The content is {self.size} bytes of sha256 {got}, not {size} of {sha256}.")
        target = self._store.blob(got)
        target.parent.mkdir(exist_ok=True)
        self._path.replace(target)
        return got


@lru_cache(maxsize=512)
def _read_commit(path: Path) -> Commit:
    # A commit's name is the hash of what is in it, so an entry of this cache can never be out of date.
    data = json.loads(path.read_text())
    data["files"] = {name: File(*entry) for name, entry in data["files"].items()}
    return Commit(**data)


def _read_repo(path: Path) -> Repo:
    # The folder has the last word on the id: a server killed during a move leaves the old one inside.
    owner, name = path.parts[-3:-1]
    return Repo(**{**json.loads(path.read_text()), "id": f"{owner}/{name}"})


def _write_json(path: Path, data: object) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_text(json.dumps(data))
    draft.replace(path)


class Store:
    """All repos of one local Hub. Methods may be called from any thread.

    Args:
        root: Folder that everything is kept in; made if absent, and held by one server at a time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        for name in ("blobs", "repos/models", "repos/datasets"):
            (root / name).mkdir(parents=True, exist_ok=True)
        self._held = (root / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.close()
            raise SoupError(f"{root} is in use by another local Hub.", hint="Stop it or use another root.") from None
        shutil.rmtree(root / "incoming", ignore_errors=True)
        (root / "incoming").mkdir()
        found = [_read_repo(path) for path in sorted(root.glob("repos/*/*/*/repo.json"))]
        self.repos: dict[tuple[Kind, str], Repo] = {(repo.kind, repo.id): repo for repo in found}
        renames = root / "renames.json"
        self._renames: dict[str, str] = json.loads(renames.read_text()) if renames.exists() else {}

    def close(self) -> None:
        """Let another server have the folder."""
        self._held.close()

    def blob(self, sha256: str) -> Path:
        """Where the content of this sha256 is, or would be."""
        return self.root / "blobs" / valid_sha256(sha256)[:2] / sha256

    def folder(self, repo: Repo) -> Path:
        """The folder of a repo."""
        return self.root / "repos" / f"{repo.kind}s" / valid_id(repo.id)

    def save(self, repo: Repo) -> None:
        """Write the changing part of a repo; this is the moment at which a change has happened."""
        _write_json(self.folder(repo) / "repo.json", asdict(repo))

    # Contents

    def put(self, content: bytes) -> File:
        """Keep a small content as a plain file."""
        with Incoming(self) as incoming:
            incoming.write(content)
            return File(git_oid(content), len(content), incoming.keep(), lfs=False)

    def put_lfs(self, repo: Repo, source: Path | bytes) -> File:
        """Keep a content as an LFS file of `repo`."""
        with Incoming(self) as incoming:
            if isinstance(source, bytes):
                incoming.write(source)
            else:
                with source.open("rb") as file:
                    while block := file.read(1 << 20):
                        incoming.write(block)
            sha256 = incoming.keep()
        self.own(repo, [sha256])
        return self.lfs_file(repo, sha256)

    def own(self, repo: Repo, objects: Iterable[str]) -> None:
        """Note that these LFS contents were uploaded to `repo`."""
        with self.lock:
            self._check_alive(repo)
            repo.objects = sorted({*repo.objects, *objects})
            self.save(repo)

    def _check_alive(self, repo: Repo) -> None:
        # A request that takes long may come to its end after somebody else deleted the repo.
        if self.repos.get((repo.kind, repo.id)) is not repo:
            raise HubError(404, "The repository was deleted meanwhile.", "RepoNotFound")

    def lfs_file(self, repo: Repo, sha256: str) -> File:
        """The file that an LFS content of this repo makes."""
        if sha256 not in repo.objects:
            raise HubError(400, f"The LFS object {sha256:.64} was never uploaded to {repo.id}.")
        size = self.blob(sha256).stat().st_size
        return File(git_oid(pointer(sha256, size)), size, sha256, lfs=True)

    # Repos

    def create(self, kind: Kind, repo_id: str, *, private: bool, author: str) -> Repo:
        """Make a repo with the first commit that the Hub makes."""
        with self.lock:
            repo = Repo(kind, valid_id(repo_id), now(), private)
            if (kind, repo.id) in self.repos:
                raise HubError(409, f"You already created this {kind} repo")
            # What is in the way has no repo.json: the rest of a repo that was half made or half removed.
            shutil.rmtree(self.folder(repo), ignore_errors=True)
            (self.folder(repo) / "commits").mkdir(parents=True)
            attributes = (".gitattributes", self.put(_GIT_ATTRIBUTES))
            first = self._write_commit(repo, None, [attributes], Note("initial commit", "", author))
            repo.refs["refs/heads/main"] = first.sha
            self.save(repo)
            self._rename(f"{kind}s/{repo.id}", None)
            self.repos[kind, repo.id] = repo
            return repo

    def delete(self, repo: Repo) -> None:
        """Remove a repo; contents stay, because other repos may name them."""
        with self.lock:
            del self.repos[repo.kind, repo.id]
            # repo.json first: a half-removed folder without it is not taken for a repo at the next start.
            (self.folder(repo) / "repo.json").unlink()
            shutil.rmtree(self.folder(repo))

    def move(self, repo: Repo, new_id: str) -> None:
        """Give a repo a new id; the old one leads to it from now on."""
        with self.lock:
            new_id = valid_id(new_id)
            if (repo.kind, new_id) in self.repos:
                raise HubError(409, f"{new_id} exists already.")
            old_id, target = repo.id, self.root / "repos" / f"{repo.kind}s" / new_id
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            self.folder(repo).rename(target)
            repo.id = new_id
            self.save(repo)
            self.repos[repo.kind, new_id] = self.repos.pop((repo.kind, old_id))
            self._rename(f"{repo.kind}s/{new_id}", None)
            self._rename(f"{repo.kind}s/{old_id}", new_id)

    def _rename(self, old: str, new: str | None) -> None:
        if new:
            self._renames[old] = new
        elif self._renames.pop(old, None) is None:
            return
        _write_json(self.root / "renames.json", self._renames)

    def renamed(self, kind: Kind, repo_id: str) -> Repo | None:
        """The repo that once had this id."""
        seen = set[str]()
        while (kind, repo_id) not in self.repos:
            if repo_id in seen or (following := self._renames.get(f"{kind}s/{repo_id}")) is None:
                return None
            seen.add(repo_id)
            repo_id = following
        return self.repos[kind, repo_id]

    # Commits

    def revision(self, repo: Repo, revision: str) -> Commit:
        """The commit that a branch, a tag, a full ref, or a sha of at least seven digits names."""
        commits = self.folder(repo) / "commits"
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in repo.refs:
                return _read_commit(commits / f"{repo.refs[ref]}.json")
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = list(commits.glob(f"{revision}*.json"))
            if len(found) == 1:
                return _read_commit(found[0])
        raise HubError(404, f"Invalid rev id: {revision:.120}", "RevisionNotFound")

    def history(self, repo: Repo, commit: Commit) -> Iterable[Commit]:
        """A commit and its ancestors, youngest first."""
        yield commit
        while commit.parent:
            commit = self.revision(repo, commit.parent)
            yield commit

    def commit(self, repo: Repo, ref: str, changes: list[Change], note: Note, parent: str | None) -> Commit:
        """Put one commit on a branch or pull request, if `parent`, where given, is still its head."""
        with self.lock:
            self._check_alive(repo)
            full = ref if ref in repo.refs else f"refs/heads/{ref}"
            if full not in repo.refs or full.startswith("refs/tags/"):
                raise HubError(404, f"There is no branch {ref:.120}.", "RevisionNotFound")
            if parent not in (None, repo.refs[full]):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            made = self._write_commit(repo, self.revision(repo, full), changes, note)
            repo.refs[full] = made.sha
            for discussion in repo.discussions:
                if full == f"refs/pr/{discussion['num']}":
                    discussion["events"].append(_commit_event(made))
            self.save(repo)
            return made

    def discuss(self, repo: Repo, note: Note, base: Commit | None = None, changes: Sequence[Change] = ()) -> int:
        """Open a discussion, or a pull request on `base`; one without changes is a draft, as on the Hub."""
        with self.lock:
            self._check_alive(repo)
            num, status = 1 + len(repo.discussions), "open" if changes or base is None else "draft"
            events: list[dict[str, Any]] = []
            if base:
                made = self._write_commit(repo, base, changes, note) if changes else base
                repo.refs[f"refs/pr/{num}"] = made.sha
                events = [_commit_event(made)] if changes else []
            opened = {"num": num, "title": note.title, "author": {"name": note.author}, "createdAt": now()}
            opened |= {"status": status, "isPullRequest": base is not None, "events": events}
            repo.discussions.append(opened)
            self.comment(repo, num, note.message, note.author)
            return num

    def comment(self, repo: Repo, num: int, text: str, author: str) -> dict[str, Any]:
        """Add a comment to a discussion."""
        latest = {"edited": False, "hidden": False, "latest": {"raw": text}}
        return self.add_event(repo, num, "comment", latest, author)

    def add_event(self, repo: Repo, num: int, kind: str, data: Any, author: str) -> dict[str, Any]:
        """Add an event to a discussion."""
        event = {"id": secrets.token_hex(12), "type": kind, "createdAt": now(), "data": data}
        event["author"] = {"name": author}
        with self.lock:
            repo.discussions[num - 1]["events"].append(event)
            self.save(repo)
        return event

    def _write_commit(self, repo: Repo, base: Commit | None, changes: Sequence[Change], note: Note) -> Commit:
        files = dict(base.files) if base else {}
        for path, file in changes:
            if file:
                files[valid_path(path)] = file
                continue
            gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise HubError(404, f"There is no {path:.120} to delete.", "EntryNotFound")
            for name in gone:
                del files[name]
        folders = {name[:at] for name in files for at, letter in enumerate(name) if letter == "/"}
        if clash := sorted(folders & set(files)):
            raise HubError(400, f"{clash[0]} would be both a file and a folder.")
        content = (base.sha if base else None, *note, now(), dict(sorted(files.items())))
        sha = hashlib.sha1(json.dumps(content).encode(), usedforsecurity=False).hexdigest()
        made = Commit(sha, *content)
        _write_json(self.folder(repo) / "commits" / f"{sha}.json", asdict(made))
        return made


def _commit_event(commit: Commit) -> dict[str, Any]:
    event = {"id": commit.sha[:24], "type": "commit", "createdAt": commit.date}
    return {**event, "author": {"name": commit.author}, "data": {"subject": commit.title, "oid": commit.sha}}
