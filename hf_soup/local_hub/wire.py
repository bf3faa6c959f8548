"""What every answer of the local Hub shares: who asks, what they may do, bounded bodies, pages, errors."""

import hmac
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse

from hf_soup.local_hub.names import HubError
from hf_soup.local_hub.store import Commit, Kind, Repo, Store

MAX_BODY_BYTES = 32_000_000


@dataclass
class Upload:
    """One LFS upload that was announced; its URL is the only permission needed, as for a signed one."""

    repo: Repo
    sha256: str
    size: int
    parts: dict[int, Path] = field(default_factory=dict)


class Hub:
    """The state that the answers are made from.

    Args:
        store: Where everything is kept.
        users: User names by token.
        read_only: Tokens that may not write.
        everywhere: Whether users may write in every namespace and not only in their own.
    """

    def __init__(
        self, store: Store, users: Mapping[str, str], read_only: Collection[str] = (), *, everywhere: bool
    ) -> None:
        self.store, self.users, self.everywhere = store, dict(users), everywhere
        self.read_only = frozenset(read_only)
        self.endpoint = self.cdn = ""
        self.page_size = 1000
        self.part_bytes = 64 << 20
        self.uploads: dict[str, Upload] = {}
        self._secret = secrets.token_bytes(32)

    def sign(self, sha256: str) -> str:
        """What makes a download URL impossible to guess from a hash; it changes with every start."""
        return hmac.new(self._secret, sha256.encode(), "sha256").hexdigest()

    def owns(self, user: str | None, namespace: str) -> bool:
        """Whether a user may see and change what is private in a namespace."""
        return user is not None and (self.everywhere or user == namespace)

    def may_see(self, user: str | None, repo: Repo) -> bool:
        """Whether a repo exists as far as this user is told."""
        return not repo.private or self.owns(user, repo.namespace)


@dataclass
class Call:
    """One request, with what is known about it before it is answered."""

    hub: Hub
    request: Request
    params: Mapping[str, str]
    user: str | None
    may_write: bool
    found: Repo | None = None

    @property
    def repo(self) -> Repo:
        """The repo that the path names."""
        if self.found is None:
            raise not_found(self.user)
        return self.found

    @property
    def store(self) -> Store:
        """Where everything is kept."""
        return self.hub.store

    @property
    def query(self) -> Mapping[str, str]:
        """The last value of every query parameter."""
        return self.request.query_params

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something true."""
        return self.query.get(name, "").lower() in ("1", "true")

    def commit(self) -> Commit:
        """The commit that the path names; main's head where it names none."""
        return self.store.revision(self.repo, self.params.get("rev", "main"))

    def url(self, *parts: str) -> str:
        """An address below the page of the repo."""
        prefix = "datasets/" if self.repo.kind == "dataset" else ""
        return "/".join((f"{self.hub.endpoint}/{prefix}{self.repo.id}", *parts))

    def writer(self, namespace: str | None = None) -> str:
        """The user, if they may write in this namespace; with None, if they may write anything at all.

        A pull request may come from every user with a token that writes.
        """
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self.may_write:
            raise HubError(403, "This token is read-only: use one with the write role")
        if namespace is not None and not self.hub.owns(self.user, namespace):
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r:.100}")
        return self.user

    def check_content(self) -> None:
        """An error if the repo is gated and the user was not let in."""
        owner = self.hub.owns(self.user, self.repo.namespace)
        if not self.repo.gated or owner or self.user in self.repo.allowed:
            return
        what = f"Access to {self.repo.kind} {self.repo.id} is restricted"
        if self.user is None:
            raise HubError(401, f"{what}. You must be authenticated to access it.", "GatedRepo")
        raise HubError(403, f"{what} and you are not in the authorized list.", "GatedRepo")

    async def body(self) -> bytes:
        """The body, up to a bound."""
        chunks, size = [], 0
        async for chunk in self.request.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise HubError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
        return b"".join(chunks)

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object; empty if there is no body."""
        return json_object(await self.body() or b"{}")

    def page(self, items: list[Any], size: int, path: str | None = None) -> JSONResponse:
        """One page of a list, with the absolute address of the next one.

        Args:
            items: The whole list.
            size: Entries a page.
            path: Where the next page is, if not at the path of the request: a list that belongs to a
                commit has to name it, or a push between two pages would mix two states.
        """
        start = number_in(self.query.get("cursor", ""))
        answer = JSONResponse(items[start : start + size])
        if start + size < len(items):
            kept = [(k, v) for k, v in self.request.query_params.multi_items() if k != "cursor"]
            query = urlencode([*kept, ("cursor", start + size)])
            where = f"{self.hub.endpoint}{path or self.request.url.path}?{query}"
            answer.headers["link"] = f'<{where}>; rel="next"'
        return answer


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object, or an error that says that it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HubError(400, f"Invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise HubError(400, "Expected a JSON object")
    return value


def text(data: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """A string of a JSON object, or an error that names it."""
    value = data.get(key, default)
    if not isinstance(value, str):
        raise HubError(400, f"{key!r} must be a string")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise HubError(400, f"{key!r} is not valid Unicode")
    return value


def number_in(value: str) -> int:
    """A count in a path or a query; 0 if it is none, or too long for one."""
    return int(value) if value.isdecimal() and len(value) < 10 else 0


def objects(data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects in a JSON object, or an error that names it."""
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise HubError(400, f"{key!r} must be a list of objects")
    return value


def kind_of(value: object) -> Kind:
    """``model`` or ``dataset``."""
    if value not in ("model", "dataset"):
        raise HubError(400, f"The local Hub has models and datasets, and no {value!r:.40}")
    return value


def not_found(user: str | None) -> HubError:
    """One answer for an absent and for a private repo, so that neither gives the other away."""
    if user is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def error_response(error: HubError) -> JSONResponse:
    """An error as the client reads it."""
    headers = {"X-Error-Message": quote(error.message.splitlines()[0], safe=" !\"#$&'()*,-./:;=?@[]_`")}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message, **error.body}, error.status, {**headers, **error.headers})
