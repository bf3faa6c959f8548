"""The Hub, read: pin, ranges, fetch. This, `client` and `publish` are the only importers of huggingface_hub.

What the client leaves open is closed here: requests that it does not retry are retried, downloads are compared
with the sha256 that the Hub states, and every failure becomes one `SoupError` that says what to do.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import (
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.community import Discussion
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status
from tqdm import tqdm

from hf_soup import __version__
from hf_soup.client import EXPLAINED, TIMEOUT, Token, api, explain, retrying, status_of
from hf_soup.errors import ResolveError

_T = TypeVar("_T")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BOT = "SFconvertbot"
_BOT_TITLE = "Adding `safetensors` variant of this model"


@dataclass(frozen=True)
class RepoFile:
    """A file of a repo: its size in bytes, its git id, and the sha256 of its content where it is a large file."""

    size: int
    blob: str
    sha256: str | None = None


@dataclass(frozen=True)
class Repo:
    """A repo pinned to one commit.

    Args:
        id: As the Hub answers, which is the new name where a repo was renamed.
        revision: The full commit.
        requested: The reference that was asked for; None is the default branch.
        files: Every file by its path.
        card: The front matter of the model card.
        tags: As the Hub derives them.
        private: Whether others cannot see it.
        from_cache: The Hub was not reached, so this is what it looked like when it last was.
    """

    id: str
    revision: str
    requested: str | None
    files: Mapping[str, RepoFile] = field(repr=False)
    card: Mapping[str, Any] = field(repr=False)
    tags: tuple[str, ...] = field(repr=False)
    private: bool = False
    from_cache: bool = False
    token: Token = field(default=None, repr=False, compare=False)


# ---- pin ----------------------------------------------------------------------------------------------------


def resolve(repo_id: str, revision: str | None = None, *, token: Token = None, from_cache: bool = True) -> Repo:
    """Pin a model repo to a full commit and list its files, with one request.

    Args:
        repo_id: ``owner/name``, or the name of one of the oldest repos.
        revision: A branch, tag, pull request reference or commit; the default branch when None.
        token: As everywhere in huggingface_hub.
        from_cache: Where the Hub cannot be reached, answer from the cache if it can.

    Raises:
        ResolveError: It does not exist, is private or gated, or the Hub cannot be reached and the cache has no
            copy.
    """
    what = f"'{repo_id}@{revision}'" if revision else f"'{repo_id}'"
    try:
        info = retrying(api(token).model_info, repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        cached = _resolve_in_cache(repo_id, revision, token) if from_cache else None
        if cached is None:
            raise explain(error, what) from None
        return cached
    except EXPLAINED as error:
        raise explain(error, what) from None
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ResolveError(f"{what}: the Hub's answer names no commit, but '{info.sha}'.")
    if any(file.size is None for file in info.siblings or ()):
        raise ResolveError(f"{what}: the Hub's answer has no file sizes.", hint="Check what HF_ENDPOINT points to.")
    files = {
        file.rfilename: RepoFile(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or ()
    }
    card: dict[str, Any] = dict(info.card_data.__dict__) if info.card_data else {}
    remember("model", repo_id, revision, found=info.id, commit=str(info.sha))
    return Repo(
        id=info.id,
        revision=str(info.sha),
        requested=revision,
        files=files,
        card=card,
        tags=tuple(info.tags or ()),
        private=bool(info.private),
        token=token,
    )


def _resolve_in_cache(repo_id: str, revision: str | None, token: Token) -> Repo | None:
    """What the cache knows of a repo, from its references and from one snapshot's links."""
    requested = revision
    repo_id, revision = _remembered("model", repo_id, revision) or (repo_id, revision)
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")
    commit = revision or constants.DEFAULT_REVISION
    reference = root / "refs" / commit
    if not _COMMIT.fullmatch(commit):
        if not reference.is_file() or root not in reference.resolve().parents:
            return None
        commit = reference.read_text().strip()
    snapshot = root / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = {}
    for path in sorted(snapshot.rglob("*")):
        if path.is_file():
            # The cache names a blob after the Hub's ETag: sha256 of a large file, git id of a small one.
            blob = path.resolve().name
            sha256 = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None
            files[path.relative_to(snapshot).as_posix()] = RepoFile(path.stat().st_size, blob, sha256)
    return Repo(repo_id, commit, requested, files, card={}, tags=(), from_cache=True, token=token)


def conversion_of(repo: Repo) -> Repo | None:
    """The open pull request in which the Hub's conversion bot offers safetensors for the head of main, pinned.

    As transformers does, it is believed only when the bot wrote it and its parent is the head.
    """
    if repo.from_cache:
        return None
    try:
        for discussion in retrying(_pull_requests_of_the_bot, repo):
            if discussion.author != _BOT or discussion.title != _BOT_TITLE or discussion.status != "open":
                continue
            offered = resolve(repo.id, f"refs/pr/{discussion.num}", token=repo.token)
            commits = retrying(api(repo.token).list_repo_commits, repo.id, revision=offered.revision)
            if repo.revision in [commit.commit_id for commit in commits[1:2]]:
                return offered
    except EXPLAINED as error:
        if status_of(error) not in (403, 404):  # the owner has switched discussions off
            raise explain(error, f"'{repo.id}': its pull requests") from None
    return None


def _pull_requests_of_the_bot(repo: Repo) -> list[Discussion]:
    return list(api(repo.token).get_repo_discussions(repo.id, author=_BOT, discussion_type="pull_request"))


def base_models(repo: Repo) -> tuple[str, ...]:
    """The ancestors that the Hub itself derived, from tags and from ``baseModels``."""
    found = [tag.split(":")[-1] for tag in repo.tags if tag.startswith("base_model:")]
    if not found and not repo.from_cache:
        try:
            stated = retrying(api(repo.token).model_info, repo.id, expand=["baseModels"], timeout=TIMEOUT).base_models
        except EXPLAINED:
            return ()  # Only a hint: the card, the config and the weights speak as well.
        entries: object = stated.get("models") if isinstance(stated, dict) else stated
        for entry in entries if isinstance(entries, list) else []:
            name = entry.get("id") if isinstance(entry, dict) else entry
            found += [name] if isinstance(name, str) else []
    return tuple(dict.fromkeys(found))


def resolve_dataset(dataset: str, revision: str | None, *, token: Token = None) -> tuple[str, str]:
    """The id that the Hub answers with, and the full commit, of a dataset repo.

    Raises:
        ResolveError: As `resolve`.
    """
    what = f"the data set '{dataset}@{revision}'" if revision else f"the data set '{dataset}'"
    try:
        info = retrying(api(token).dataset_info, dataset, revision=revision, timeout=TIMEOUT)
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        if (known := _remembered("dataset", dataset, revision)) is not None:
            return known
        root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=dataset, repo_type="dataset")
        reference = root / "refs" / (revision or constants.DEFAULT_REVISION)
        if _COMMIT.fullmatch(revision or "") and (root / "snapshots" / str(revision)).is_dir():
            return dataset, str(revision)
        if not reference.is_file():
            raise explain(error, what) from None
        return dataset, reference.read_text().strip()
    except EXPLAINED as error:
        raise explain(error, what) from None
    remember("dataset", dataset, revision, found=info.id, commit=str(info.sha))
    return info.id, str(info.sha)


_HERE = threading.Lock()
_received = 0


def traffic() -> int:
    """Bytes of headers, indexes and samples that this process has read from the Hub so far."""
    return _received


def is_repo_id(name: str) -> bool:
    """Whether a name can be a repo's, rather than a folder on somebody's machine.

    >>> is_repo_id("google/vit-base-patch16-224"), is_repo_id("./results/checkpoint-500")
    (True, False)
    """
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None and len(name) <= 96


# ---- read ---------------------------------------------------------------------------------------------------


def read_range(repo: Repo, path: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, from the cache where it is, else by a range request.

    Raises:
        ResolveError: They cannot be read, or the answer is shorter than asked for.
    """
    what = f"'{repo.id}@{repo.revision[:7]}', file '{path}'"
    cached = try_to_load_from_cache(repo.id, path, revision=repo.revision)
    if isinstance(cached, str):
        with Path(cached).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
    try:
        data = retrying(_request_range, repo, path, start, stop)
    except EXPLAINED as error:
        raise explain(error, what) from None
    global _received
    with _HERE:
        _received += len(data)
    if len(data) != stop - start:
        raise ResolveError(
            f"{what}: asked for bytes {start} to {stop}, got {len(data)} bytes.",
            hint="The file is shorter than the repo says; its owner may have to upload it again.",
        )
    return data


def _request_range(repo: Repo, path: str, start: int, stop: int) -> bytes:
    url = hf_hub_url(repo.id, path, revision=repo.revision)
    headers = build_hf_headers(token=repo.token, library_name="hf-soup", library_version=__version__)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        # A server that ignores the range answers 200 with the whole file: skip to the range, and stop after it.
        skip = 0 if response.status_code == 206 else start
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk[skip:] if skip < len(chunk) else b""
            skip = max(0, skip - len(chunk))
            if len(data) >= stop - start:
                break
    return bytes(data[: stop - start])


def fetch(
    wanted: Sequence[tuple[Repo, str]], *, quiet: bool = False, verify: bool = True, threads: int = 4
) -> list[Path]:
    """Files in the ordinary cache, downloaded where they are not there yet, each compared with its sha256.

    Args:
        wanted: Repos and paths in them.
        quiet: No progress bar.
        verify: Compare large files with the sha256 that the Hub states; the client does not.
        threads: Files at a time.

    Raises:
        ResolveError: A file cannot be had, or its bytes are wrong twice; the wrong copy is taken out of the cache.
    """
    total = sum(repo.files[path].size for repo, path in wanted if not is_cached(repo, path))
    hidden = True if quiet or total == 0 else None
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Fetching", disable=hidden, leave=False)
    lock = threading.Lock()

    class Share(tqdm):  # type: ignore[type-arg]
        """A download's own bar, unseen, whose bytes go to the one that is seen."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                return bar.update(n)

    def get(item: tuple[Repo, str]) -> Path:
        repo, path = item
        what = f"'{repo.id}@{repo.revision[:7]}', file '{path}'"
        try:
            local = retrying(_download, repo, path, Share)
            expected = repo.files[path].sha256
            if verify and expected and sha256_of(local) != expected:
                local = retrying(_download, repo, path, Share, force=True)
                found = sha256_of(local)
                if found != expected:
                    blob = local.resolve()
                    local.unlink()
                    blob.unlink(missing_ok=True)
                    raise ResolveError(
                        f"{what}: the bytes that arrived are not the ones that the Hub states, twice.\n"
                        f"  stated  {expected}\n  arrived {found}",
                        hint="Something between here and the Hub changes data. The wrong copy was removed.",
                    )
        except (*EXPLAINED, RuntimeError) as error:  # hf_xet raises plain RuntimeErrors
            raise explain(error, what) from None
        return local

    with bar:
        return in_parallel(get, wanted, threads)


def _download(repo: Repo, path: str, bar: type[tqdm[Any]], *, force: bool = False) -> Path:
    """One file through the client; by its commit, so that a file in the cache costs no request."""
    try:
        return Path(
            hf_hub_download(
                repo.id,
                path,
                revision=repo.revision,
                token=repo.token,
                force_download=force,
                tqdm_class=bar,
                library_name="hf-soup",
                library_version=__version__,
            )
        )
    except (LocalEntryNotFoundError, ValueError) as error:
        # The client says that the cache has no copy; why it had to look there is what matters.
        if isinstance(error.__cause__, HfHubHTTPError | httpx2.TransportError):
            raise error.__cause__ from None
        raise


def remember(kind: str, asked: str, revision: str | None, *, found: str, commit: str) -> None:
    """Note what a name and a reference stood for, so that offline runs know it: repos are renamed, branches move.

    Args:
        kind: ``model`` or ``dataset``.
        asked, revision: As somebody spelled them.
        found, commit: The id that the Hub answered with, and the full commit.
    """
    note = _note(kind, asked, revision)
    with suppress(OSError):  # a home that cannot be written costs nothing but this
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f"{note.name}.{os.getpid()}.{threading.get_ident()}")
        partial.write_text(f"{found}\n{commit}\n")
        partial.replace(note)


def _remembered(kind: str, asked: str, revision: str | None) -> tuple[str, str] | None:
    """The id and commit that `remember` noted."""
    try:
        found, commit = _note(kind, asked, revision).read_text().split()
    except (OSError, ValueError):
        return None
    return (found, commit) if _COMMIT.fullmatch(commit) and is_repo_id(found) else None


def _note(kind: str, asked: str, revision: str | None) -> Path:
    name = hashlib.sha256(f"{asked}\n{revision or ''}".encode()).hexdigest()
    return own_cache_folder() / "resolved" / kind / name


def is_cached(repo: Repo, path: str) -> bool:
    """Whether a file needs no download."""
    return isinstance(try_to_load_from_cache(repo.id, path, revision=repo.revision), str)


def cache_folder() -> Path:
    """Where downloads go."""
    return Path(constants.HF_HUB_CACHE)


def own_cache_folder() -> Path:
    """Where this package keeps what it derived from downloads, beside the Hub's cache."""
    return Path(constants.HF_HOME) / "hf-soup"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_parallel(call: Callable[[Any], _T], items: Sequence[Any], threads: int = 8) -> list[_T]:
    """``[call(item) for item in items]`` on several threads, in order; the first error in order is raised."""
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
