"""HTTP on the wire: uvicorn's parser, with limits on what may come before a request is one. Knows no route.

uvicorn bounds neither the size of headers and trailers nor the time that they take, so that one client who sends a
header without an end could fill the memory, and many silent ones every connection.
"""

import asyncio
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from inferfleet.tasks.errors import FleetError, HeadersTooLarge, InvalidHTTP, RequestTimeout
from inferfleet.workers.api.sse import compact

#: Of the first line and all headers, trailers included.
MAX_HEAD_BYTES = 64 * 1024


def bounded(head_seconds: float) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn; `head_seconds` is how long a request's headers may take."""
    return type("BoundedProtocol", (BoundedProtocol,), {"head_seconds": head_seconds})


class BoundedProtocol(HttpToolsProtocol):
    """Refuses in the one shape of all errors, and closes."""

    head_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        #: Bytes that came since the parser last told of something: part of a line that has not ended.
        self._untold_bytes = 0
        self._in_head = True
        self._timer: asyncio.TimerHandle | None = None
        self._refusal: FleetError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._untold_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._untold_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())
        elif self._in_head and self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_timer()

    def on_message_begin(self) -> None:
        self._untold_bytes = self._head_bytes = 0
        self._in_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        if self._in_head:  # a trailer comes when the headers have been acted upon
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._untold_bytes = 0
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._untold_bytes = 0
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for whatever its parser, or a callback of it, cannot take."""
        self._refuse(self._refusal or InvalidHTTP())

    def _count(self, *parts: bytes) -> None:
        self._untold_bytes = 0
        self._head_bytes += sum(map(len, parts)) + 4  # what stands between them
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = _too_large()
            raise self._refusal  # through the parser, which stops and has send_400_response called

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self._head_bytes and not self._untold_bytes:
            self.transport.close()  # nobody asked for anything
        else:
            limit = f"{self.head_seconds:g} s (read_timeout_seconds)"
            self._refuse(RequestTimeout(f"the headers did not end within {limit}"))

    def _refuse(self, error: FleetError) -> None:
        body = compact({"error": error.to_dict()}).encode()
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: req_{uuid4().hex}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"the first line and the headers are larger than the limit of {MAX_HEAD_BYTES} bytes")
