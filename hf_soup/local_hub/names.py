"""What may be named how, which files are LFS, and the error that says no."""

import hashlib
import re
from collections.abc import Mapping
from typing import cast

MAX_REGULAR_BYTES = 10_000_000
"""Above this a file is LFS, whatever its name."""

LFS_SUFFIXES = (
    *(".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gguf", ".gif", ".gz", ".h5", ".jpeg", ".jpg"),
    *(".joblib", ".model", ".mp3", ".mp4", ".msgpack", ".npy", ".npz", ".onnx", ".ot", ".parquet", ".pb"),
    *(".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth", ".rar", ".safetensors", ".tar", ".tflite", ".tgz"),
    *(".tiff", ".wav", ".webp", ".xz", ".zip", ".zst"),
)
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubError(Exception):
    """An answer other than a good one: raised where it is known, and sent the way the Hub sends it.

    Args:
        status: The HTTP status.
        message: Body and ``X-Error-Message``.
        code: ``X-Error-Code``, from which the client picks its exception.
        headers: Further headers.
        body: Further keys of the JSON body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        **body: object,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.body = dict(headers or {}), body


def valid_id(repo_id: object) -> str:
    """``owner/name`` if the Hub would take it as an id.

    >>> valid_id("acme/../etc")
    Traceback (most recent call last):
        ...
    hf_soup.local_hub.names.HubError: Invalid repository id 'acme/../etc'.
    """
    parts = repo_id.split("/") if isinstance(repo_id, str) and len(repo_id) <= 96 else []
    text = "/".join(parts)
    if len(parts) != 2 or not all(map(_NAME.fullmatch, parts)) or ".." in text or "--" in text or text.endswith(".git"):
        raise HubError(400, f"Invalid repository id {repo_id!r:.120}.")
    return text


def valid_sha256(sha256: str) -> str:
    """A sha256 in hex, or an error."""
    if not _SHA256.fullmatch(sha256):
        raise HubError(400, f"Invalid sha256 {sha256!r:.80}.")
    return sha256


def valid_path(path: object) -> str:
    """A path inside a repo, or an error: nothing that git would refuse and nothing that leaves the folder."""
    parts = path.split("/") if isinstance(path, str) and len(path) <= 1024 else [""]
    printable = all(part.isprintable() and "\\" not in part for part in parts)
    if not printable or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts):
        raise HubError(400, f"Invalid path {path!r:.120}.")
    return "/".join(parts)


def valid_ref(name: object) -> str:
    """A branch or tag name, or an error; the ``refs/`` names belong to the server."""
    bad = not isinstance(name, str) or len(name) > 128 or not _REF.fullmatch(name) or name.startswith("refs/")
    if bad or re.search(r"\.\.|//|/$|\.lock$|\.$", cast(str, name)):
        raise HubError(400, f"Invalid reference name {name!r:.120}.")
    return cast(str, name)


def wants_lfs(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub would keep this file out of git: by name, by size, or because it is not text."""
    return size > MAX_REGULAR_BYTES or path.lower().endswith(LFS_SUFFIXES) or b"\0" in sample


def pointer(sha256: str, size: int) -> bytes:
    """The text that git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    """The name that git gives to this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
