"""A small Hub on loopback, on disk: for the demo, for tests, and for work without a network.

The real ``huggingface_hub``, ``datasets`` and ``transformers`` work against it unchanged, through
``HF_ENDPOINT``. It is no mirror and no server for others: it listens on this machine only, counts
downloads without their dates and does not scale.

::

    with LocalHub(Path("hub")) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("local/tiny")
"""

import asyncio
import ipaddress
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hf_soup.errors import SoupError
from hf_soup.local_hub import discussions, files, repos
from hf_soup.local_hub.store import Change, HubError, Kind, Repo, Store
from hf_soup.local_hub.wire import Hub

__all__ = ["Hangup", "LocalHub", "Record", "serve"]


class Hangup(Response):
    """An answer that is lost on its way: what a client sees when the connection breaks.

    Return it from `LocalHub.intercept` to lose a request before anything is done, and from
    `LocalHub.transform` to lose the answer to one that has been done.

    Args:
        response: The answer to send a part of; without it, nothing is sent.
        keep: Bytes of its body that still arrive.
        reset: Break the connection with a TCP reset instead of closing it.
    """

    def __init__(self, response: Response | None = None, keep: int = 0, *, reset: bool = False) -> None:
        super().__init__(status_code=response.status_code if response else 500)
        self._response, self._keep, self._reset = response, keep, reset

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what is to be sent, then break the connection."""
        left = self._keep

        async def sending(message: Any) -> None:
            nonlocal left
            if message["type"] == "http.response.body":
                message = {**message, "body": message.get("body", b"")[:left], "more_body": True}
                left -= len(message["body"])
            await send(message)

        if self._response is not None:
            await self._response(scope, receive, sending)
        # ASGI has no word for this; uvicorn's `send` is a method of the object that holds the connection.
        transport = send.__self__.transport  # type: ignore[attr-defined]
        if self._reset:
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        transport.close()
        # Until it is closed, or uvicorn would report that the answer is not complete.
        while (await receive())["type"] != "http.disconnect":
            continue


class _Server(uvicorn.Server):
    """Stops when it is asked to; uvicorn's looks every 100 ms whether it shall, and then waits for as long again."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._asked = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)

    async def main_loop(self) -> None:
        ticking = asyncio.create_task(super().main_loop())  # it keeps the date that answers bear
        await self._asked.wait()
        ticking.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0)  # connections that are idle are gone by then
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)

    def stop(self) -> None:
        """Finish what is being answered; may be called from any thread once the server has started."""
        self._loop.call_soon_threadsafe(self._asked.set)


class LocalHub(Hub):
    """A Hub on loopback, between ``__enter__`` and ``__exit__``.

    Args:
        root: Folder that everything is kept in; made if absent. A later hub on it goes on from there.
        port: TCP port; 0 for a free one.
        users: User names by token; each may write in the namespace of that name. With None there is one
            user, ``local``, who may write in every namespace and whose token is kept in ``root/token``.
        read_only: Those of the tokens that may not write.
        host: An IPv4 address of the loopback interface, or ``localhost``.

    Attributes:
        endpoint: What to set ``HF_ENDPOINT`` to, or to give to ``HfApi(endpoint=…)``.
        token: The token of the first user.
        store: What is on disk.
        requests: A `Record` of every request so far, in the order in which they were answered.
        page_size: Entries a page of every list; lower it to see a client turn pages.
        part_bytes: LFS files above this size are uploaded in parts of it.
        intercept: Called with every request before anything is done; its answer, if not None, is the answer.
            It runs in the server's event loop: to delay a request, use a coroutine function that sleeps.
        transform: Called with every request and its finished answer; what it returns is sent instead.

    Raises:
        SoupError: The host is not on loopback, the port is taken, or another hub has the folder.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        users: dict[str, str] | None = None,
        read_only: Collection[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self._host, self._port, self.root = _loopback(host), port, Path(root)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = {_own_token(self.root): "local"} if users is None else users
        super().__init__(Store(self.root), known, read_only, everywhere=users is None)
        self.route(repos.ROUTES | discussions.ROUTES | files.ROUTES)
        self.token = next(iter(known), "")

    def __enter__(self) -> Self:
        # asyncio turns Nagle's delay off only where the protocol is named: 40 ms for every POST otherwise.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self._host, self._port))
        except OSError as error:
            listening.close()
            self.store.close()
            raise SoupError(
                f"Cannot listen on {self._host}:{self._port}: {error.strerror}.", hint="Use another port."
            ) from error
        port = listening.getsockname()[1]
        self.endpoint = f"http://{self._host}:{port}"
        # Another host name for the same socket is another origin for every client, as the real CDN is.
        self.cdn = f"http://localhost:{port}"
        # Without a check of the Host header a web page could point its name to loopback and read private repos.
        guarded = TrustedHostMiddleware(self, [self._host, "localhost"], www_redirect=False)
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
        config = uvicorn.Config(guarded, http="h11", loop="asyncio", timeout_graceful_shutdown=2, **quiet)
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        """Finish what is being answered, and let go of the port and the folder."""
        self._server.stop()
        self._thread.join()
        self.store.close()

    def rename(self, kind: Kind, old_id: str, new_id: str) -> None:
        """Let the old id answer 307, to the new one.

        The repo of the old id moves there, whoever owns it. If there is none, the old id becomes a second name
        of the repo that has the new one; it may lack a namespace, as ``bert-base-uncased`` does on the Hub.
        """
        try:
            self.store.rename(kind, old_id, new_id)
        except HubError as error:
            raise SoupError(error.message) from error

    def gate(self, kind: Kind, repo_id: str) -> None:
        """Let only the owner read files; info and tree stay readable for all."""
        repo = self._repo(kind, repo_id)
        with self.store.lock:
            repo.gated = "auto"
            self.store.save(repo)

    def count_downloads(self, kind: Kind, repo_id: str, times: int) -> None:
        """Have a repo downloaded so many times; from then on every request for its config is one more."""
        self.store.count_downloads(self._repo(kind, repo_id), times)

    def bot_pull_request(
        self,
        kind: Kind,
        repo_id: str,
        files: dict[str, bytes | Path],
        author: str = "SFconvertbot",
        title: str = "Adding `safetensors` variant of this model",
    ) -> int:
        """Open a pull request on main's head as somebody else would, and return its number."""
        repo, changes = self._repo(kind, repo_id), list[Change]()
        for path, source in files.items():
            changes.append(self.store.put(path, source.read_bytes() if isinstance(source, Path) else source))
        return self.store.open_pull_request(repo, self.store.revision(repo, "main"), changes, (title, "", author))

    def _repo(self, kind: Kind, repo_id: str) -> Repo:
        repo = self.store.find(kind, repo_id)
        if repo is None:
            raise SoupError(f"The local Hub has no {kind} {repo_id!r}.")
        return repo


def serve(
    root: Path, host: str = "127.0.0.1", port: int = 8760, on_ready: Callable[[LocalHub], None] | None = None
) -> None:
    """Run a local Hub until it is interrupted, with ``on_ready`` called once it accepts requests."""
    with LocalHub(root, port=port, host=host) as hub:
        try:
            if on_ready:
                on_ready(hub)
            threading.Event().wait()
        except KeyboardInterrupt:
            return


def _loopback(host: str) -> str:
    try:
        address = ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not address.is_loopback:
        raise SoupError(f"The local Hub cannot listen on {host!r}: it is for this machine only.", hint="Use 127.0.0.1.")
    return str(address)


def _own_token(root: Path) -> str:
    # Kept, so that a login with it survives a restart; readable by its owner only, from the first byte on.
    path = root / "token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(f"hf_local_{secrets.token_hex(16)}\n")
    return path.read_text().strip()
