"""Bytes from the Hub: ranges, files into the cache, files beside the output.

What the client leaves open is closed here: requests that it does not retry are retried, and downloads are compared
with the sha256 that the Hub states.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from hf_soup._util.version import __version__
from hf_soup.errors import ResolveError
from hf_soup.hub.client import (
    ATTEMPTS,
    EXPLAINED,
    TIMEOUT,
    ShortAnswerError,
    explain,
    is_passing,
    pause_after,
    retrying,
)
from hf_soup.hub.file_digests import known_sha256, sha256_of
from hf_soup.hub.http import httpx
from hf_soup.hub.repo import Repo

#: Bytes that are taken from a connection at a time.
_PIECE = 1 << 20

_HERE = threading.Lock()
#: Address of a file on the Hub → the one that it redirected to, which it signs for an hour.
_signed: dict[str, str] = {}
_received = 0


def traffic() -> int:
    """Bytes of headers, indexes and samples that this process has read from the Hub so far."""
    return _received


def read_range(repo: Repo, path: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, from the cache where it is, else by a range request.

    A file that is read whole, as configs, indexes and cards are, is compared with what the Hub states; of a part
    nobody states anything.

    Raises:
        ResolveError: They cannot be read, every answer is shorter than asked for, or a whole file is wrong twice.
    """
    if start == stop:
        return b""
    whole = (start, stop) == (0, repo.files[path].size)
    stated = _stated(repo, path) if whole else ""
    cached = cached_path(repo, path)
    # A header that was changed in the cache would decide where tensors are looked for, so the file has to be known to
    # be right, unless there is nobody else to ask.
    sha256 = repo.files[path].sha256
    if cached and (repo.from_cache or sha256 in (None, known_sha256(cached))):
        with cached.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if _content_id(data, stated) == stated:
            return data
        if repo.from_cache:
            raise ResolveError(
                f"{_called(repo, path)}: the copy in the cache is not what the Hub stated.",
                hint=f"Run the same command with the Hub in reach, or remove '{cached}'.",
                subjects=_about(repo),
            )
    for _ in range(2):
        data = _asked_for(repo, path, start, stop)
        found = _content_id(data, stated)
        if found == stated:
            return data
    raise _wrong(repo, path, stated, found)


def _asked_for(repo: Repo, path: str, start: int, stop: int) -> bytes:
    what = _called(repo, path)
    try:
        data = retrying(_request_range, repo, path, start, stop)
    except EXPLAINED as error:
        raise explain(error, what, subjects=_about(repo)) from None
    global _received
    with _HERE:
        _received += len(data)
    return data


def _request_range(repo: Repo, path: str, start: int, stop: int) -> bytes:
    with closing(_pieces(repo, path, start, stop, remembering=True)) as pieces:
        return b"".join(pieces)


def _pieces(repo: Repo, path: str, start: int, stop: int, *, remembering: bool = False) -> Generator[bytes]:
    """Bytes ``start`` to ``stop`` of a file as they arrive; raises ShortAnswerError where there are fewer."""
    url = hf_hub_url(repo.id, path, revision=repo.revision)
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers(token=repo.token, library_name="hf-soup", library_version=__version__) | wanted
    # Many samples of one file: where the Hub sent the first request, the others go directly, and without the token.
    signed = _signed.get(url) if remembering else None
    address, sent = (signed, wanted) if signed else (url, headers)
    with get_session().stream("GET", address, headers=sent, timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            response.read()
        if signed and response.status_code >= 400:
            _signed.pop(url, None)
            raise httpx.RemoteProtocolError("the address is no longer good")  # and the next attempt asks the Hub
        hf_raise_for_status(response)
        if remembering and response.history:
            _signed[url] = str(response.url)
        # A server that ignores the range answers 200 with the whole file: skip to the range, and stop after it.
        position = start if response.status_code == 206 else 0
        for chunk in response.iter_raw(_PIECE):
            piece = chunk[max(0, start - position) : stop - position]
            position += len(chunk)
            if piece:
                yield piece
            if position >= stop:
                return
    raise ShortAnswerError(f"{max(0, position - start):,} of {stop - start:,} bytes")


def fetch_one(repo: Repo, path: str, advance: Callable[[int], object] = lambda _: None) -> Path:
    """A file in the ordinary cache, downloaded where it is not there yet, and compared with its sha256.

    Args:
        repo, path: Which.
        advance: Told how many bytes arrived.

    Raises:
        ResolveError: It cannot be had, or its bytes are wrong twice; the wrong copy is taken out of the cache.
    """

    class Share(tqdm):  # type: ignore[type-arg]
        """A download's own bar, unseen, whose bytes go to the one that is seen."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    what = _called(repo, path)
    try:
        local = retrying(_download, repo, path, Share)
        stated, found = _stated(repo, path), _found(repo, path, local)
        # The client does not compare what arrives with what the Hub states.
        if found != stated and not constants.HF_HUB_OFFLINE:
            local = retrying(_download, repo, path, Share, force=True)
            found = _found(repo, path, local)
        if found != stated:
            blob = local.resolve()
            local.unlink()
            blob.unlink(missing_ok=True)
            raise _wrong(repo, path, stated, found)
    except (*EXPLAINED, RuntimeError) as error:  # hf_xet raises plain RuntimeErrors
        raise explain(error, what, subjects=_about(repo)) from None
    return local


def download_beside(
    repo: Repo, path: str, target: Path, *, arrived: Callable[[int], object], stopped: Callable[[], bool]
) -> None:
    """A file at a place of its own, outside the cache, hashed as it arrives; what is there already is kept.

    Args:
        repo, path: Which.
        target: Where. After an error what had arrived stays, and the next call goes on from there.
        arrived: Told after each piece how many bytes are there.
        stopped: Asked after each piece whether to give up.

    Raises:
        ResolveError: It cannot be had, or its bytes are wrong; then the copy is removed.
    """
    what, file, stated = _called(repo, path), repo.files[path], _stated(repo, path)
    small = len(stated) == 40
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if small else hashlib.sha256()
    have = attempt = 0
    try:
        with target.open("a+b") as out:
            out.seek(0)
            while piece := out.read(_PIECE):
                digest.update(piece)
                have += len(piece)
                arrived(have)
            while have < file.size and not stopped():
                before = have
                try:
                    with closing(_pieces(repo, path, have, file.size)) as pieces:
                        for piece in pieces:
                            if stopped():
                                break  # the next run may have the file already
                            out.write(piece)
                            out.flush()
                            digest.update(piece)
                            have += len(piece)
                            arrived(have)
                except (HfHubHTTPError, httpx.TransportError) as error:
                    attempt = 0 if have > before else attempt + 1
                    if attempt == ATTEMPTS or not is_passing(error):
                        raise
                    time.sleep(pause_after(error, attempt))
    except EXPLAINED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the Hub's
        raise explain(error, what, subjects=_about(repo)) from None
    if not stopped() and (have != file.size or digest.hexdigest() != (stated or digest.hexdigest())):
        target.unlink()
        raise _wrong(repo, path, stated or f"{file.size:,} bytes", digest.hexdigest())


def _stated(repo: Repo, path: str) -> str:
    """What the Hub says that a file's content hashes to: sha256 for large files, git's id for small ones."""
    file = repo.files[path]
    return file.sha256 or (file.blob if re.fullmatch("[0-9a-f]{40}", file.blob) else "")


def _found(repo: Repo, path: str, local: Path) -> str:
    """What it does."""
    stated = _stated(repo, path)
    return sha256_of(local) if len(stated) == 64 else _content_id(local.read_bytes() if stated else b"", stated)


def _content_id(data: bytes, stated: str) -> str:
    """The hash of a content, of the kind that is stated of it; nothing where nothing is."""
    if len(stated) == 40:
        return git_hash(data)
    return hashlib.sha256(data).hexdigest() if stated else ""


def _called(repo: Repo, path: str) -> str:
    return f"'{repo.id}@{repo.revision[:7]}', file '{path}'"


def _about(repo: Repo) -> list[str]:
    return [f"{repo.id}@{repo.revision[:7]}"]


def _wrong(repo: Repo, path: str, stated: str, found: str) -> ResolveError:
    what = _called(repo, path)
    return ResolveError(
        f"{what}: the bytes that arrived are not the ones that the Hub states.\n  stated  {stated}\n  arrived {found}",
        hint="Something between here and the Hub changes data. No wrong copy is kept; run the same command again.",
        code="wrong-bytes",
        subjects=_about(repo),
    )


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
        if isinstance(error.__cause__, HfHubHTTPError | httpx.TransportError):
            raise error.__cause__ from None
        raise


def cached_path(repo: Repo, path: str) -> Path | None:
    """Where a file is that needs no download."""
    cached = try_to_load_from_cache(repo.id, path, revision=repo.revision)
    return Path(cached) if isinstance(cached, str) else None


def cache_folder() -> Path:
    """Where downloads go."""
    return Path(constants.HF_HUB_CACHE)
