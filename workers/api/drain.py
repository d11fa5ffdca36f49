"""The API's shutdown: what may end early does so at once, so that only real answers are waited for."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Drain:
    """Long polls and event streams can be taken up again elsewhere: they end when the shutdown begins."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """The server was told to stop."""
        self.begun.set()
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())

    @contextmanager
    def shortens(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Inside, the shutdown ends the timeout's time."""
        if self.begun.is_set():
            limit.reschedule(asyncio.get_running_loop().time())
        self._limits.add(limit)
        try:
            yield
        finally:
            self._limits.discard(limit)
