"""What the local Hub keeps on disk.

::

    root/
      blobs/ab/ab12…                     every content once, named by its sha256
      incoming/                          uploads under way; emptied at start
      repos/models/acme/tiny/repo.json   settings, refs, discussions: the only file of a repo that changes
      repos/models/acme/tiny/commits/    one immutable JSON a commit: {path: (git oid, size, sha256, is LFS)}
      renames.json                       {"models/acme/old": "acme/new", "models/old": "acme/new"}

A commit is written before the ref that names it, and every file appears by one rename, so a killed server
leaves at worst a content or a commit that nothing refers to.
"""

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
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from hf_soup._util.io import appearing
from hf_soup.errors import SoupError

Kind = Literal["model", "dataset"]
MAX_REGULAR_BYTES = 10_000_000
"""Above this a file is LFS, whatever its name."""

_LFS_SUFFIXES = (
    *(".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gguf", ".gif", ".gz", ".h5", ".jpeg", ".jpg", ".joblib"),
    *(".model", ".mp3", ".mp4", ".msgpack", ".npy", ".npz", ".onnx", ".ot", ".parquet", ".pb", ".pdf", ".pickle"),
    *(".pkl", ".png", ".pt", ".pth", ".rar", ".safetensors", ".tar", ".tflite", ".tgz", ".tiff", ".wav", ".webp"),
    *(".xz", ".zip", ".zst"),
)
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REF = re.compile(r"(?!refs/)[A-Za-z0-9_][A-Za-z0-9._/-]{,127}")
_GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES).encode()


class HubError(Exception):
    """An answer other than a good one: raised where it is known, and sent the way the Hub sends it.

    ``code`` is the ``X-Error-Code`` from which the client picks its exception; ``body`` is added to the JSON.
    """

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, **body: object
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.body = dict(headers or {}), body


def valid_id(repo_id: str, *, bare: bool = False) -> str:
    """``owner/name`` if the Hub would take it as an id; with ``bare``, a name alone will do."""
    parts = repo_id.split("/")
    fitting = len(parts) in ((1, 2) if bare else (2,)) and len(repo_id) <= 96 and all(map(_NAME.fullmatch, parts))
    if not fitting or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise HubError(400, f"Invalid repository id {repo_id!r:.120}.")
    return repo_id


def valid_path(path: str) -> str:
    """A path inside a repo, or an error: nothing that git would refuse and nothing that leaves the folder."""
    parts = path.split("/")
    wrong = any(part in ("", ".", "..") or part.lower() == ".git" or "\\" in part for part in parts)
    if wrong or not path.isprintable() or len(path) > 1024:
        raise HubError(400, f"Invalid path {path!r:.120}.")
    return path


def valid_ref(name: str) -> str:
    """A branch or tag name, or an error; the ``refs/`` names belong to the server."""
    if not _REF.fullmatch(name) or re.search(r"\.\.|//|/$|\.lock$|\.$", name):
        raise HubError(400, f"Invalid reference name {name!r:.120}.")
    return name


def wants_lfs(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub would keep this file out of git: by name, by size, or because it is not text."""
    return size > MAX_REGULAR_BYTES or path.lower().endswith(_LFS_SUFFIXES) or b"\0" in sample


class File(NamedTuple):
    """One file of a commit. ``oid`` is the git sha1 of the content, or of the pointer to it if it is LFS."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    def details(self) -> dict[str, Any]:
        """What trees and infos say of an LFS file; they do not agree on the name of its hash."""
        size = len(_pointer(self.sha256, self.size))
        return {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": size}}


Change = tuple[str, File | None]
"""A path and its new file; None deletes the path, or all that is below it if it ends in a slash."""
Note = tuple[str, str, str]
"""Title, message and author of a commit or a pull request."""


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
    downloads: int = 0
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        """The part of the id before the slash."""
        return self.id.partition("/")[0]


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
        self._held = FileLock(root / "lock", timeout=0)
        try:
            self._held.acquire()
        except Timeout:
            raise SoupError(f"{root} is in use by another local Hub.", hint="Stop it or use another root.") from None
        shutil.rmtree(root / "incoming", ignore_errors=True)
        (root / "incoming").mkdir()
        self.repos: dict[tuple[Kind, str], Repo] = {}
        for path in root.glob("repos/*/*/*/repo.json"):
            # The folder has the last word on the id: a server killed during a move leaves the old one inside.
            said = json.loads(path.read_text())
            repo = Repo(**{**said, "id": "/".join(path.parts[-3:-1])})
            self.repos[repo.kind, repo.id] = repo
        renames = root / "renames.json"
        self._renames: dict[str, str] = json.loads(renames.read_text()) if renames.exists() else {}

    def close(self) -> None:
        """Let another server have the folder."""
        self._held.release()

    def blob(self, sha256: str) -> Path:
        """Where the content of this sha256 is, or would be."""
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise HubError(400, f"Invalid sha256 {sha256!r:.80}.")
        return self.root / "blobs" / sha256[:2] / sha256

    def save(self, repo: Repo) -> None:
        """Write the changing part of a repo; this is the moment at which a change has happened."""
        _write_json(self._folder(repo.kind, repo.id) / "repo.json", asdict(repo))

    def _folder(self, kind: Kind, repo_id: str) -> Path:
        return self.root / "repos" / f"{kind}s" / valid_id(repo_id)

    def put(self, path: str, content: bytes) -> Change:
        """Keep a content, the way the Hub would keep it under this path."""
        draft = self.root / "incoming" / secrets.token_hex(16)
        draft.write_bytes(content)
        sha256 = self.keep(draft)
        lfs = wants_lfs(path, len(content))
        return path, self.lfs_file(sha256) if lfs else File(_git_oid(content), len(content), sha256, lfs=False)

    def keep(self, draft: Path, announced: str | None = None) -> str:
        """Move a file in place and return its sha256, or remove the file if that is not the announced one."""
        with draft.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if announced not in (None, sha256):
            draft.unlink()
            raise HubError(400, f"The content has the sha256 {sha256}, not {announced}.")
        self.blob(sha256).parent.mkdir(exist_ok=True)
        draft.replace(self.blob(sha256))
        return sha256

    def lfs_file(self, sha256: str) -> File:
        """The file that an LFS content makes."""
        if not self.blob(sha256).exists():
            raise HubError(400, f"The LFS object {sha256} was never uploaded.")
        size = self.blob(sha256).stat().st_size
        return File(_git_oid(_pointer(sha256, size)), size, sha256, lfs=True)

    def find(self, kind: Kind, repo_id: str) -> Repo | None:
        """The repo that has, or once had, this id."""
        return self.repos.get((kind, repo_id)) or self.repos.get((kind, self._renames.get(f"{kind}s/{repo_id}", "")))

    def current_id(self, name: str) -> str:
        """The id of the model that has, or once had, this name; the name where there is none."""
        repo = self.find("model", name)
        return repo.id if repo else name

    def count_downloads(self, repo: Repo, times: int) -> None:
        """Have a repo downloaded so many times more."""
        with self.lock:
            repo.downloads += times
            self.save(repo)

    def create(self, kind: Kind, repo_id: str, *, private: bool, author: str) -> Repo:
        """Make a repo with the first commit that the Hub makes."""
        with self.lock:
            repo = Repo(kind, valid_id(repo_id), _now(), private)
            (self._folder(kind, repo_id) / "commits").mkdir(parents=True, exist_ok=True)
            attributes = self.put(".gitattributes", _GIT_ATTRIBUTES)
            repo.refs["refs/heads/main"] = self._write(repo, None, [attributes], ("initial commit", "", author)).sha
            self.save(repo)
            self.repos[kind, repo_id] = repo
            return repo

    def delete(self, repo: Repo) -> None:
        """Take a repo away, with its history; contents stay, as other repos may have them."""
        with self.lock:
            shutil.rmtree(self._folder(repo.kind, repo.id))
            del self.repos[repo.kind, repo.id]

    def rename(self, kind: Kind, old_id: str, new_id: str) -> None:
        """Let an old id lead to a new one: the repo of that name moves there; without one, it must be there."""
        with self.lock:
            valid_id(old_id, bare=True)
            target, taken = self._folder(kind, new_id), (kind, new_id) in self.repos
            repo = self.repos.get((kind, old_id))
            if repo and taken:
                raise HubError(409, f"{new_id} exists already.")
            if not repo and not taken:
                raise HubError(404, f"There is no {kind} {old_id} and no {kind} {new_id}.", "RepoNotFound")
            if repo:
                target.parent.mkdir(exist_ok=True)
                self._folder(kind, old_id).rename(target)
                repo.id = new_id
                self.save(repo)
                self.repos[kind, new_id] = self.repos.pop((kind, old_id))
            # What led to the old id leads to the new one at once, so there are no chains.
            for key, led_to in self._renames.items():
                if led_to == old_id and key.startswith(f"{kind}s/"):
                    self._renames[key] = new_id
            self._renames[f"{kind}s/{old_id}"] = new_id
            _write_json(self.root / "renames.json", self._renames)

    def revision(self, repo: Repo, revision: str) -> Commit:
        """The commit that a branch, a tag, a full ref, or a sha of at least seven digits names."""
        commits = self._folder(repo.kind, repo.id) / "commits"
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

    def commit(self, repo: Repo, ref: str, changes: Sequence[Change], note: Note, parent: str | None) -> Commit:
        """Put one commit on a branch or pull request, if ``parent``, where given, is still its head."""
        with self.lock:
            full = ref if ref in repo.refs else f"refs/heads/{ref}"
            if full not in repo.refs or full.startswith("refs/tags/"):
                raise HubError(404, f"There is no branch {ref:.120}.", "RevisionNotFound")
            if parent not in (None, repo.refs[full]):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            made = self._write(repo, self.revision(repo, full), changes, note)
            repo.refs[full] = made.sha
            self.save(repo)
            return made

    def open_pull_request(self, repo: Repo, note: Note, base: Commit, changes: Sequence[Change]) -> int:
        """Put changes beside main as one commit, offer them in a pull request, and return its number."""
        with self.lock:
            num, first = 1 + len(repo.discussions), event("comment", note[2], raw=note[1])
            about = {"num": num, "title": note[0], "author": first["author"], "createdAt": first["createdAt"]}
            repo.discussions.append({**about, "status": "open", "events": [first], "base": base.sha})
            repo.refs[f"refs/pr/{num}"] = self._write(repo, base, changes, note).sha
            self.save(repo)
            return num

    def _write(self, repo: Repo, base: Commit | None, changes: Sequence[Change], note: Note) -> Commit:
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
        content = (base.sha if base else None, *note, _now(), dict(sorted(files.items())))
        sha = hashlib.sha1(json.dumps(content).encode(), usedforsecurity=False).hexdigest()
        made = Commit(sha, *content)
        _write_json(self._folder(repo.kind, repo.id) / "commits" / f"{sha}.json", asdict(made))
        return made


@lru_cache(maxsize=512)
def _read_commit(path: Path) -> Commit:
    # A commit's name is the hash of what is in it, so an entry of this cache can never be out of date.
    data = json.loads(path.read_text())
    return Commit(**{**data, "files": {name: File(*entry) for name, entry in data["files"].items()}})


def _write_json(path: Path, data: object) -> None:
    with appearing(path) as partial:
        partial.write_text(json.dumps(data))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def event(kind: str, author: str, **data: str) -> dict[str, Any]:
    """What somebody did in a discussion, as the Hub tells it: a ``comment`` (``raw``), or a ``status-change``."""
    made = {"id": secrets.token_hex(12), "type": kind, "createdAt": _now(), "author": {"name": author}}
    if kind != "comment":
        return {**made, "data": data}
    latest = {**data, "html": "", "updatedAt": made["createdAt"], "author": made["author"]}
    return {**made, "data": {"edited": False, "hidden": False, "numEdits": 0, "latest": latest, "history": []}}


def _pointer(sha256: str, size: int) -> bytes:
    # The text that git keeps in place of an LFS file.
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
