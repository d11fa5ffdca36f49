"""Server-sent events on the wire: frames, keep-alive comments and a response that notices when its reader leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

CANCEL_AGAIN_SECONDS = 0.1
#: A silent connection is cut by many proxies after 30 to 60 s; a comment line keeps it and is ignored by every client.
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def compact(value: Any) -> str:
    """JSON as OpenAI sends it: no spaces, text as is. Never holds a raw newline, so it fits one `data:` line."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def frame(data: Any, *, event: str | None = None, event_id: int | None = None) -> bytes:
    """One server-sent event with `data` as JSON."""
    lines = [] if event_id is None else [f"id: {event_id}\n"]
    if event is not None:
        lines.append(f"event: {event}\n")
    lines.append(f"data: {compact(data)}\n\n")
    return "".join(lines).encode()


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its side; the body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `frames` as they come and calls `on_gone` when the client leaves before the last of them; `stop` ends a
    stream that its reader can take up again.

    Starlette's StreamingResponse only cancels the iterator; here leaving has a meaning of its own (the job is
    cancelled), which must not be taken for the server's shutting down.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        on_gone: Callable[[], Awaitable[None]] | None = None,
        stop: asyncio.Event | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._frames = frames
        self._on_gone = on_gone
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sender = asyncio.ensure_future(self._send_frames(send))
        watcher = asyncio.ensure_future(gone(receive))
        stopper = asyncio.ensure_future((self._stop or asyncio.Event()).wait())
        try:
            await asyncio.wait({sender, watcher, stopper}, return_when=asyncio.FIRST_COMPLETED)
            ended, left = sender.done(), watcher.done()
            if ended:
                await sender
        finally:
            await cancel_and_wait(sender, watcher, stopper)
        if not ended and left and self._on_gone is not None:
            await self._on_gone()
        elif not ended and not left:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_frames(self, send: Send) -> None:
        async for part in self._frames:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def cancel_and_wait(*tasks: "asyncio.Future[Any]") -> None:
    """Ends tasks and waits until they have run their own clean-up.

    Asks again: redis-py sends through asyncio.wait_for, which can swallow a cancellation (seen on Python 3.11).
    """
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
