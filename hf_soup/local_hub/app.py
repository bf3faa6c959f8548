"""The ASGI application: the table of routes, and the one way that every request takes."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Message, Receive, Scope, Send

from hf_soup.local_hub import metadata, refs, transfer
from hf_soup.local_hub.names import HubError
from hf_soup.local_hub.store import Kind
from hf_soup.local_hub.wire import Call, Hub, error_response, not_found

Endpoint = Callable[[Call], Awaitable[Response]]
Intercept = Callable[[Request], Response | Awaitable[Response | None] | None]
Transform = Callable[[Request, Response], Response]

_API, _FILE = "/api/{kind}/{owner}/{name}", "/{owner}/{name}/resolve/{rev}/{path:path}"
_MAX_DRAINED_BYTES = 64 << 20

_ROUTES: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/api/whoami-v2", metadata.whoami),
    ("POST", "/api/validate-yaml", metadata.validate_yaml),
    ("POST", "/api/repos/create", metadata.create),
    ("DELETE", "/api/repos/delete", metadata.delete),
    ("POST", "/api/repos/move", metadata.move),
    ("GET", "/api/{kind}", metadata.list_repos),
    ("GET", _API, metadata.info),
    ("GET", f"{_API}/revision/{{rev}}", metadata.info),
    ("GET", f"{_API}/tree/{{rev}}", metadata.tree),
    ("GET", f"{_API}/tree/{{rev}}/{{path:path}}", metadata.tree),
    ("POST", f"{_API}/paths-info/{{rev}}", metadata.paths_info),
    ("GET", f"{_API}/safetensors-metadata/{{path:path}}", metadata.safetensors_metadata),
    ("GET", f"{_API}/refs", refs.list_refs),
    ("GET", f"{_API}/commits/{{rev}}", refs.commits),
    ("POST", f"{_API}/branch/{{rev}}", refs.create_branch),
    ("DELETE", f"{_API}/branch/{{rev}}", refs.delete_branch),
    ("POST", f"{_API}/tag/{{rev}}", refs.create_tag),
    ("DELETE", f"{_API}/tag/{{rev}}", refs.delete_tag),
    ("PUT", f"{_API}/settings", metadata.settings),
    ("GET", f"{_API}/auth-check", metadata.auth_check),
    ("GET", f"{_API}/auth-check/write", metadata.auth_check_write),
    ("GET", f"{_API}/discussions", refs.list_discussions),
    ("POST", f"{_API}/discussions", refs.create_discussion),
    ("GET", f"{_API}/discussions/{{num}}", refs.discussion),
    ("POST", f"{_API}/discussions/{{num}}/comment", refs.comment),
    ("POST", f"{_API}/discussions/{{num}}/status", refs.change_status),
    ("POST", f"{_API}/preupload/{{rev}}", transfer.preupload),
    ("POST", f"{_API}/commit/{{rev}}", transfer.commit),
    ("POST", f"{_API}/lfs-files/duplicate", transfer.duplicate),
    ("POST", "/datasets/{owner}/{name}.git/info/lfs/objects/batch", transfer.lfs_batch),
    ("POST", "/{owner}/{name}.git/info/lfs/objects/batch", transfer.lfs_batch),
    ("PUT", "/lfs/{secret}", transfer.lfs_put),
    ("POST", "/lfs/{secret}", transfer.lfs_complete),
    ("PUT", "/lfs/{secret}/{part}", transfer.lfs_put_part),
    ("GET", "/cdn/{signature}/{sha256}", transfer.cdn),
    ("GET", "/api/resolve-cache/{kind}/{owner}/{name}/{rev}/{path:path}", transfer.resolve_cache),
    ("GET", f"/datasets{_FILE}", transfer.resolve),
    ("GET", _FILE, transfer.resolve),
)
_TABLE = [(method, compile_path(pattern)[0], endpoint) for method, pattern, endpoint in _ROUTES]
_KINDS: dict[str, Kind] = {"models": "model", "datasets": "dataset"}


@dataclass(frozen=True)
class Record:
    """One request and the status that it got. ``authorization`` and ``range`` are empty where not sent."""

    method: str
    path: str
    query: str
    authorization: str
    range: str
    status: int


class App:
    """Answers requests from the state of a hub, notes them, and lets a test put itself in between."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.records: list[Record] = []
        self.intercept: Intercept | None = None
        self.transform: Transform | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        more, drained = True, 0

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
                response = error_response(error)
            # An answer before the end of the body can reset the connection, and be lost by that.
            while more and drained < _MAX_DRAINED_BYTES:
                drained += len((await receiving()).get("body", b""))
        except ClientDisconnect:
            return
        if self.transform:
            response = self.transform(request, response)
        header, query = request.headers.get, scope["query_string"].decode("latin-1")
        found = (request.url.path, query, header("authorization", ""), header("range", ""))
        self.records.append(Record(request.method, *found, response.status_code))
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
        path = request.scope["raw_path"].decode("latin-1")
        method = "GET" if request.method == "HEAD" else request.method
        allowed = set()
        for verb, pattern, endpoint in _TABLE:
            if not (match := pattern.match(path)):
                continue
            params = {key: unquote(value) for key, value in match.groupdict().items()}
            if params.get("kind", "models") not in _KINDS:
                continue
            if verb != method:
                allowed.add(verb)
                continue
            call = Call(self.hub, request, params, user, may_write)
            if "owner" in params and (moved := self._find(call, path)):
                return moved
            return await endpoint(call)
        if allowed:
            raise HubError(405, "Method not allowed", headers={"Allow": ", ".join(sorted(allowed))})
        first, *rest = path.removeprefix("/api/").split("/")
        if (path.startswith("/api/") and first in _KINDS and len(rest) < 2) or "/resolve/" in path:
            raise not_found(user)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _identify(self, request: Request) -> tuple[str | None, bool]:
        header = request.headers.get("authorization")
        if header is None or request.scope["path"].startswith("/cdn/"):
            return None, False
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token], token not in self.hub.read_only

    def _find(self, call: Call, path: str) -> Response | None:
        # Before anything else is looked at: what may not be seen is answered as what is not there.
        default = "datasets" if path.startswith("/datasets/") else "models"
        kind = _KINDS[call.params.get("kind", default)]
        repo_id = f"{call.params['owner']}/{call.params['name']}"
        repo = call.store.renamed(kind, repo_id)
        if repo is None or not self.hub.may_see(call.user, repo):
            raise not_found(call.user)
        call.found = repo
        if repo.id == repo_id:
            return None
        query = f"?{call.request.url.query}" if call.request.url.query else ""
        return Response(status_code=307, headers={"Location": path.replace(repo_id, repo.id, 1) + query})
