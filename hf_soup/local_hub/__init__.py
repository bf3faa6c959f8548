"""A small Hub on loopback, on disk: for the demo, for tests, and for work without a network.

The real ``huggingface_hub``, ``datasets`` and ``transformers`` work against it unchanged, through
``HF_ENDPOINT``. It is no mirror and no server for others: it listens on this machine only, counts
downloads without their dates and does not scale.

::

    with LocalHub(Path("hub")) as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("local/tiny")
"""

import secrets
import socket
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware

from hf_soup.errors import SoupError
from hf_soup.local_hub import discussions, files, repos
from hf_soup.local_hub.store import Store
from hf_soup.local_hub.wire import Hub

__all__ = ["LocalHub"]


#: For this machine only.
_HOST = "127.0.0.1"


class LocalHub(Hub):
    """A Hub on loopback, between ``__enter__`` and ``__exit__``.

    Args:
        root: Folder that everything is kept in; made if absent. A later hub on it goes on from there.
        port: TCP port; 0 for a free one.
        users: User names by token; each may write in the namespace of that name. With None there is one
            user, ``local``, who may write in every namespace and whose token is kept in ``root/token``.
        read_only: Those of the tokens that may not write.

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
        SoupError: The port is taken, or another hub has the folder.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        users: dict[str, str] | None = None,
        read_only: Collection[str] = (),
    ) -> None:
        self._port, self.root = port, Path(root)
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
            listening.bind((_HOST, self._port))
        except OSError as error:
            listening.close()
            self.store.close()
            raise SoupError(
                f"Cannot listen on {_HOST}:{self._port}: {error.strerror}.", hint="Use another port."
            ) from error
        port = listening.getsockname()[1]
        self.endpoint = f"http://{_HOST}:{port}"
        # Another host name for the same socket is another origin for every client, as the real CDN is.
        self.cdn = f"http://localhost:{port}"
        # Without a check of the Host header a web page could point its name to loopback and read private repos.
        guarded = TrustedHostMiddleware(self, [_HOST, "localhost"], www_redirect=False)
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
        config = uvicorn.Config(guarded, http="h11", loop="asyncio", timeout_graceful_shutdown=2, **quiet)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        """Finish what is being answered, and let go of the port and the folder."""
        self._server.should_exit = True
        self._thread.join()
        self.store.close()


def _own_token(root: Path) -> str:
    # Kept, so that a login with it survives a restart; readable by its owner only, from the first byte on.
    path = root / "token"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(f"hf_local_{secrets.token_hex(16)}\n")
    return path.read_text().strip()
