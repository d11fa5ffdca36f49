"""The HTTP application: routes put together, errors in one shape, start and stop. Holds no rule about jobs."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis.asyncio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from redis.asyncio.retry import Retry
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from inferfleet.tasks.contracts.complaints import worded
from inferfleet.tasks.errors import FleetError, InvalidRequest, MethodNotAllowed, NotFound, SetupError
from inferfleet.tasks.ledger import BACKOFF, CONNECT_TIMEOUT, AsyncLedger, Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import open_async_store
from inferfleet.workers.api import (
    batches,
    chat,
    dead_letters,
    files,
    health,
    images,
    jobs,
    models,
    outputs,
    queues,
    response_routes,
    webhooks,
)
from inferfleet.workers.api.auth import NoApiKey
from inferfleet.workers.api.docs import docs_page
from inferfleet.workers.api.door import Door
from inferfleet.workers.api.hub import BLOCK_MS, Hub
from inferfleet.workers.api.middleware import RequestScope
from inferfleet.workers.api.openapi_whole import describe
from inferfleet.workers.api.protocol import bounded
from inferfleet.workers.api.responses import error_response, json_response
from inferfleet.workers.api.ringer import Ring, Ringer
from inferfleet.workers.api.services import Services
from inferfleet.workers.api.sse import cancel_and_wait
from inferfleet.workers.api.telemetry import HttpMetrics
from inferfleet.workers.api.waiting import CLIENT_LEFT
from inferfleet.workers.checks import accept_redis, check_store
from inferfleet.workers.keys import is_loopback

#: Short calls share these; waiters hold none of them (see hub.py).
MAX_CONNECTIONS = 64
#: A Redis that is silent this long is away: three tries and the caller has its 503.
CALL_SECONDS = 3.0
RETRIES = 3
#: OpenAI's first: the document lists them in this order.
ROUTERS = [
    module.router
    for module in (
        chat,
        response_routes,
        images,
        files,
        batches,
        models,
        jobs,
        queues,
        dead_letters,
        outputs,
        webhooks,
        health,
    )
]


def create_app(settings: Settings, ring: Ring) -> FastAPI:
    """The application. `ring` puts turns on a model's queue; it may block and may fail."""
    metrics, keys_required = HttpMetrics(), not is_loopback(settings.api_host)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        ledger = AsyncLedger(_client(settings, MAX_CONNECTIONS, CALL_SECONDS, RETRIES), settings.namespace)
        reader = _client(settings, 1, BLOCK_MS / 1000 + CALL_SECONDS, 0)
        hub, ringer = Hub(ledger, reader), Ringer(ring)
        door = Door(settings, ledger, ringer)
        store = open_async_store(settings, ledger)
        app.state.services = Services(settings, ledger, store, hub, door, metrics, keys_required)
        limits = {name: values.model_dump(exclude_none=True) for name, values in settings.tenants.items()}
        await ledger.put_tenants(limits)
        reading = asyncio.create_task(hub.run())
        try:
            yield
        finally:
            await cancel_and_wait(reading)
            await asyncio.to_thread(ringer.close)
            await reader.aclose()
            await ledger.close()

    app = FastAPI(
        title="inferfleet",
        version="1",
        description="Chat and picture jobs behind a queue: OpenAI's surface, and the jobs themselves under /v1/jobs.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its script from a CDN; ours is rendered here
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    for router in ROUTERS:
        app.include_router(router)
    app.add_api_route("/docs", _docs, include_in_schema=False, response_class=HTMLResponse)
    app.add_middleware(RequestScope, metrics=metrics)
    app.add_exception_handler(FleetError, _on_fleet_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_query_error)
    app.add_exception_handler(ClientDisconnect, _on_client_left)
    describe(app, keys_required=keys_required)
    return app


def serve(settings: Settings, ring: Ring) -> None:
    """Listens until SIGTERM or SIGINT, then lets running answers finish within drain_grace_seconds.

    Raises NoApiKey, RedisMisconfigured, LedgerUnavailable, StoreUnavailable, or SetupError when the address cannot be
    had.
    """
    _check_setup(settings)
    with listen(settings.api_host, settings.api_port) as listener:
        DrainingServer(create_app(settings, ring), settings).run(sockets=[listener])


class DrainingServer(uvicorn.Server):
    """uvicorn, telling the application at once that the end has begun: its own lifespan event comes last."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=bounded(settings.read_timeout_seconds),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=round(settings.drain_grace_seconds),
        )
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        services: Services = self._app.state.services
        services.hub.drain()
        await super().shutdown(sockets)


def _client(settings: Settings, connections: int, seconds: float, retries: int) -> "redis.asyncio.Redis":
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=connections,
        timeout=seconds,
        socket_timeout=seconds,
        socket_connect_timeout=CONNECT_TIMEOUT,
        retry=Retry(BACKOFF, retries),
    )
    return redis.asyncio.Redis.from_pool(pool)


def _check_setup(settings: Settings) -> None:
    ledger = Ledger.from_url(settings.redis_url, settings.namespace)
    try:
        accept_redis(ledger, settings)
        check_store(settings, ledger)
        if not is_loopback(settings.api_host) and not ledger.list_keys():
            raise NoApiKey(
                f"api_host {settings.api_host} can be reached from other machines and there is no API key yet; "
                "make one with `inferfleet keys create`, or listen on 127.0.0.1",
                param="api_host",
            )
    finally:
        ledger.close()


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening TCP socket; port 0 = any free one. Raises SetupError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SetupError(f"cannot listen on {host}:{port}: {error.strerror or error}", param="api_port") from None
    listener.listen(2048)
    return listener


async def _on_fleet_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FleetError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in our shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFound(f"there is no route {request.url.path[:200]!r}"))
    if error.status_code == 405:
        allowed = ", ".join(sorted(_methods(request)))
        return error_response(
            MethodNotAllowed(f"{request.method} is not allowed here, only {allowed}"), {"allow": allowed}
        )
    body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": "http_error"}
    return json_response({"error": body}, error.status_code, error.headers)


def _methods(request: Request) -> set[str]:
    """Of all routes with this path: Starlette names those of the first one alone."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
    found = [route for route in routes if route.path == request.url.path]  # no id, though it may look like one
    found = found or [route for route in routes if route.path_regex.match(request.url.path)]
    # A model's name may hold slashes, so /v1/queues/{model} takes /v1/queues/a/pause too; nobody means that one.
    named = [route for route in found if not route.path.endswith(":path}")] or found
    return set().union(*(route.methods or set() for route in named))


async def _on_client_left(request: Request, error: Exception) -> Response:
    """In the middle of its own request."""
    return Response(status_code=CLIENT_LEFT)


async def _on_query_error(request: Request, error: Exception) -> Response:
    """A query parameter that FastAPI refused."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return error_response(InvalidRequest(worded(first, name), param=name))


async def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(docs_page(request.app.openapi()))
