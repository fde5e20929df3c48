"""Bounds on HTTP before there is a request to refuse: how long its head may take, and how large it
may grow.

    connection ──head──> Gate, endpoint ──body──> bounded by whoever reads it
               └ 408 after HEAD_TIMEOUT_S, 431 beyond MAX_HEAD_BYTES

uvicorn waits for a head for ever and keeps all of it: a few thousand connections that send a byte now
and then would hold every file descriptor there is.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 30.0
"""From the connection, or the first byte of a later request on it, to the end of the headers."""
MAX_HEAD_BYTES = 64 * 2**10
"""Of the request line and all headers."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with these bounds."""

    _timer: asyncio.TimerHandle | None = None
    """Runs while a head is being read."""
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:  # a further request of this connection
            self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        self._head_bytes = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)

    def _end_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int) -> None:
        self._end_head()
        if not self.transport.is_closing():
            line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            self.transport.write(line.encode() + b"content-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
