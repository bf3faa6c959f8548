"""The way of every request through the local Hub: who asks, for what, what they may do, and how errors are said."""

import hmac
import inspect
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from hf_soup.local_hub.store import Commit, HubError, Kind, Repo, Store

#: What stands for a part of a path in a route; any other name is one segment. An id may lack its namespace.
_PARTS = {"kind": "models|datasets", "data": "(?:datasets/)?", "id": "[^/]+(?:/[^/]+)?", "path": ".*"}
_MAX_BODY_BYTES = 32_000_000


class Record(NamedTuple):
    """One request and the status that it got. ``authorization`` and ``range`` are empty where not sent."""

    method: str
    path: str
    query: str
    authorization: str
    range: str
    status: int


class Hub:
    """The ASGI application and the state that it answers from; `LocalHub` says what is what."""

    def __init__(self, store: Store, users: Mapping[str, str], read_only: Collection[str], everywhere: bool) -> None:
        self.store, self._users, self._read_only, self._everywhere = store, users, read_only, everywhere
        self._routes: list[tuple[str, re.Pattern[str], Endpoint]] = []
        self._secret = secrets.token_bytes(32)
        self.endpoint = self.cdn = ""
        self.page_size, self.part_bytes = 1000, 64 << 20
        self.uploads: dict[str, tuple[str, int]] = {}
        self.requests: list[Record] = []
        self.intercept: Callable[[Request], Response | Awaitable[Response | None] | None] | None = None
        self.transform: Callable[[Request, Response], Response] | None = None

    def route(self, routes: Mapping[str, "Endpoint"]) -> None:
        """Have requests answered by function, as ``GET /api/{kind}/{id}`` by `info`; the first that fits does it."""
        for route, endpoint in routes.items():
            method, pattern = route.split()
            parts = re.sub(r"\{(\w+)\}", lambda name: f"(?P<{name[1]}>{_PARTS.get(name[1], '[^/]+')})", pattern)
            self._routes.append((method, re.compile(parts), endpoint))

    def sign(self, sha256: str) -> str:
        """What makes a download URL impossible to guess from a hash; it changes with every start."""
        return hmac.new(self._secret, sha256.encode(), "sha256").hexdigest()

    def owns(self, user: str | None, namespace: str) -> bool:
        """Whether a user may see and change what is private in a namespace."""
        return user is not None and (self._everywhere or user == namespace)

    def has(self, namespace: str) -> bool:
        """Whether there is somebody of this name: a user, or whoever has a repo already."""
        owners = {*self._users.values(), *(repo.namespace for repo in self.store.repos.values())}
        return self._everywhere or namespace in owners

    def may_see(self, user: str | None, repo: Repo) -> bool:
        """Whether a repo exists as far as this user is told."""
        return not repo.private or self.owns(user, repo.namespace)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, note it, and let a test put itself in between."""
        more = True

        async def receiving() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        request = Request(scope, receiving)
        try:
            try:
                response = await self._answer(request)
            except HubError as error:
                response = _refusal(error)
            # An answer before the end of the body can reset the connection, and be lost by that.
            while more:
                await receiving()
        except ClientDisconnect:
            return
        if self.transform:
            response = self.transform(request, response)
        query, header = scope["query_string"].decode("latin-1"), request.headers.get
        sent = (request.method, request.url.path, query, header("authorization", ""), header("range", ""))
        self.requests.append(Record(*sent, response.status_code))
        await response(scope, receiving, send)

    async def _answer(self, request: Request) -> Response:
        if self.intercept:
            early = self.intercept(request)
            if inspect.isawaitable(early):
                early = await early
            if early is not None:
                return early
        user, may_write = self._identify(request)
        # The path as it was sent: `refs%2Fpr%2F1` is one segment, and is three once it is unquoted.
        path, absent = request.scope["raw_path"].decode("latin-1"), False
        for method, pattern, endpoint in self._routes:
            match = pattern.fullmatch(path)
            if match is None or method != request.method.replace("HEAD", "GET"):
                continue
            params = {name: unquote(value) for name, value in match.groupdict().items()}
            call = Call(self, request, params, user, may_write)
            if "id" in params:
                # Before anything else is looked at: what may not be seen is answered as what is not there.
                repo = self.store.find(kind_of(params.get("kind") or params["data"]), params["id"])
                if repo is None or not self.may_see(user, repo):
                    # Perhaps the next route: `beans/refs` is an id as well as the refs of `beans`.
                    absent = True
                    continue
                if repo.id != params["id"]:
                    query = f"?{request.url.query}" if request.url.query else ""
                    location = path[: match.start("id")] + repo.id + path[match.end("id") :] + query
                    return Response(status_code=307, headers={"Location": location})
                call.repo = repo
            return await endpoint(call)
        raise not_found(user) if absent else HubError(404, "Sorry, we can't find the page you are looking for.")

    def _identify(self, request: Request) -> tuple[str | None, bool]:
        header = request.headers.get("authorization")
        if header is None or request.scope["path"].startswith("/cdn/"):
            return None, False
        token = header.removeprefix("Bearer ")
        if token not in self._users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self._users[token], token not in self._read_only


@dataclass
class Call:
    """One request, with what is known about it before it is answered."""

    hub: Hub
    request: Request
    params: Mapping[str, str]
    user: str | None
    may_write: bool
    repo: Repo = field(init=False)
    """The repo that the path names, if it names one."""

    @property
    def store(self) -> Store:
        """Where everything is kept."""
        return self.hub.store

    @property
    def query(self) -> QueryParams:
        """The query parameters."""
        return self.request.query_params

    def flag(self, name: str) -> bool:
        """Whether a query parameter is set to something true."""
        return self.query.get(name, "").lower() in ("1", "true")

    def commit(self) -> Commit:
        """The commit that the path names; main's head where it names none."""
        return self.store.revision(self.repo, self.params.get("rev", "main"))

    def address(self, kind: Kind, repo_id: str, *parts: str) -> str:
        """An address below the page of a repo."""
        return "/".join((self.hub.endpoint, *(["datasets"] if kind == "dataset" else []), repo_id, *parts))

    def writer(self, namespace: str | None = None) -> str:
        """The user, if they may write in this namespace; with None, if they may write anything at all."""
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if not self.may_write:
            raise HubError(403, "This token is read-only: use one with the write role")
        if namespace is not None and not self.hub.owns(self.user, namespace):
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r:.100}")
        return self.user

    def check_content(self) -> None:
        """An error if the repo is gated and the user does not own it."""
        if self.repo.gated and not self.hub.owns(self.user, self.repo.namespace):
            message = f"Access to {self.repo.kind} {self.repo.id} is restricted and you are not in the authorized list."
            raise HubError(403 if self.user else 401, message, "GatedRepo")

    async def body(self) -> bytes:
        """The body, up to a bound."""
        body = bytearray()
        async for chunk in self.request.stream():
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                raise HubError(413, f"The body is larger than {_MAX_BODY_BYTES} bytes.")
        return bytes(body)

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object; empty if there is no body."""
        body: dict[str, Any] = json.loads(await self.body() or b"{}")
        return body

    def page(self, items: list[Any], path: str | None = None) -> JSONResponse:
        """One page of a list, with the address of the next one.

        A list that belongs to a commit names its ``path``, or a push between two pages would mix two states.
        """
        size = min(number_in(self.query.get("limit", "")) or self.hub.page_size, self.hub.page_size)
        start = number_in(self.query.get("cursor", ""))
        answer = JSONResponse(items[start : start + size])
        if start + size < len(items):
            kept = [(k, v) for k, v in self.query.multi_items() if k != "cursor"]
            query = urlencode([*kept, ("cursor", start + size)])
            where = f"{self.hub.endpoint}{path or self.request.url.path}?{query}"
            answer.headers["link"] = f'<{where}>; rel="next"'
        return answer


Endpoint = Callable[[Call], Awaitable[Response]]


def number_in(value: str) -> int:
    """A count in a path or a query; 0 if it is none, or too long for one."""
    return int(value) if value.isdecimal() and len(value) < 10 else 0


def kind_of(name: str | None) -> Kind:
    """``model`` or ``dataset``, from either, its plural, or the beginning of a path."""
    match (name or "model").rstrip("s/"):
        case "model" | "dataset" as kind:
            return kind
    raise HubError(400, f"The local Hub has models and datasets, and no {name!r:.40}.")


def not_found(user: str | None) -> HubError:
    """One answer for an absent and for a private repo, so that neither gives the other away."""
    if user is None:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def _refusal(error: HubError) -> JSONResponse:
    headers = {"X-Error-Message": quote(error.message.splitlines()[0], safe=" !\"#$&'()*,-./:;=?@[]_`")}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message, **error.body}, error.status, {**headers, **error.headers})
