"""How the fleet is: for load balancers, autoscalers and Prometheus."""

from fastapi import APIRouter
from starlette.responses import Response

from inferfleet.tasks.errors import LedgerUnavailable, Unavailable
from inferfleet.workers.api import openapi
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.responses import json_response
from inferfleet.workers.api.services import Use
from inferfleet.workers.api.telemetry import render
from inferfleet.workers.metrics import fleet_families

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> Response:
    """This process answers. Says nothing about Redis: an outage there is no reason to restart the API."""
    return json_response({"status": "ok"})


@router.get("/ready", openapi_extra=openapi.READY)
async def ready(use: Use) -> Response:
    """200 while jobs can be accepted, 503 while the ledger (Redis) is away. Lists the models that are ready."""
    cards = await use.door.cards()
    if use.hub.draining.is_set():
        raise Unavailable("this API is shutting down", retry_after=1)
    if use.hub.outage_seconds > 0:
        raise LedgerUnavailable("the ledger (Redis) does not deliver events", retry_after=1)
    return json_response({"status": "ready", "models": [name for name, card in cards.items() if _ready(card)]})


@router.get("/v1/stats", openapi_extra=openapi.STATS)
async def stats(tenant: Tenant, use: Use) -> Response:
    """Waiting and running jobs by model. `backlog` is their sum: scale on it, so that the last busy worker stays."""
    counted = await use.ledger.stats()
    cards = await use.door.cards()
    nothing = {"waiting": 0, "running": 0, "oldest_age_s": 0.0}
    models = {name: nothing | counted.get(name, {}) for name in sorted(counted.keys() | cards.keys())}
    for numbers in models.values():
        numbers["backlog"] = numbers["waiting"] + numbers["running"]
    total = {key: sum(numbers[key] for numbers in models.values()) for key in ("waiting", "running", "backlog")}
    workers = await use.ledger.workers()
    return json_response({"object": "stats", "models": models, "total": total, "workers": len(workers)})


@router.get("/metrics", openapi_extra=openapi.METRICS)
async def metrics(tenant: Tenant, use: Use) -> Response:
    """Prometheus exposition of this process, the queues and all present workers, read from the ledger now."""
    try:
        counted, cards = await use.ledger.stats(), await use.door.cards()
        workers = await use.ledger.run(fleet_families())
        failovers = await use.ledger.failovers()
    except LedgerUnavailable:
        counted, cards, workers, failovers = None, {}, [], None
    page = render(use.metrics, counted, cards, workers, failovers)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def _ready(card: dict[str, object]) -> bool:
    return card.get("state") == "ready"
