"""Faults of a connection to the local Hub, for tests of what the client side makes of them."""

from __future__ import annotations

import socket
import struct
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class Hangup(Response):
    """An answer that is lost on its way: what a client sees when the connection breaks.

    `LocalHub.intercept` returns it to lose a request before anything is done, and `LocalHub.transform` to lose the
    answer to one that has been done.

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
