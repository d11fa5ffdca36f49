"""What every request gets, whatever its route: an id, a count, a log line, and JSON even for our own mistakes."""

import re
import time
from uuid import uuid4

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inferfleet.tasks.errors import FleetError
from inferfleet.workers import logs
from inferfleet.workers.api.responses import error_response
from inferfleet.workers.api.telemetry import HttpMetrics

log = logs.get("api")

#: A caller's own id is kept if it is short and printable: it goes into a header and a log line.
CALLER_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


class RequestScope:
    """Pure ASGI, so that streams and disconnects pass through untouched."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        started = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                # Says where it broke, never what the request held: frame locals carry prompts.
                log.exception("request_crashed", method=scope["method"], route=_route(scope))
                if status:
                    raise
                await error_response(FleetError("the server made a mistake; see its log"))(scope, receive, send_with_id)
            seconds = time.perf_counter() - started
            self._metrics.count(scope["method"], _route(scope), status, seconds)
            log.debug("request_answered", method=scope["method"], route=_route(scope), status=status, seconds=seconds)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and CALLER_ID.fullmatch(text := value.decode("latin-1")):
            return text
    return f"req_{uuid4().hex}"


def _route(scope: Scope) -> str:
    """The route's pattern: a path with ids in it would make a new time series for every job."""
    return getattr(scope.get("route"), "path", "unknown")
