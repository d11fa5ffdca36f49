"""The line between rank 0 and another rank of a split model: JSON while they load, then frames of steps.

A rank that hangs in a collective does not read its line. So a thread of its own waits for the line's end alone.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

Message = dict[str, Any]


class Closed(Exception):
    """The other side is gone, or takes nothing any more."""


class Wire:
    """One end of a socket pair. One thread talks and listens; `close` may come from any."""

    def __init__(self, end: socket.socket, seconds: float) -> None:
        """seconds: how long the other side may take to make room for a message."""
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), 0))
        self._socket = end
        self.connection = Connection(os.dup(end.fileno()))

    def send(self, data: bytes) -> None:
        try:
            self.connection.send_bytes(data)
        except OSError as error:
            raise Closed from error

    def receive(self) -> bytes:
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise Closed from error

    def tell(self, operation: str, **fields: Any) -> None:
        self.send(json.dumps({"op": operation, **fields}).encode())

    def hear(self) -> Message:
        return json.loads(self.receive())

    def close(self) -> None:
        """Both sides, and whoever watches, see the end at once."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was first
        self._socket.close()
        self.connection.close()


def watch(wires: Sequence[Wire], on_end: Callable[[int], None]) -> None:
    """on_end(number of the wire), once, in a thread, when the first of them ends; whatever is unread in it."""
    ends = {wire.connection.fileno(): number for number, wire in enumerate(wires)}
    poll = select.poll()
    for descriptor in ends:
        poll.register(descriptor, 0)  # hang-ups are always told

    def wait() -> None:
        ended = poll.poll()
        on_end(ends[ended[0][0]])

    threading.Thread(target=wait, name="rank-watch", daemon=True).start()
