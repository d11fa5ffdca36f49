"""/v1/queues: what waits and runs by model; pause, resume, purge.

A queue is shared by all tenants, so pausing it is for operators (setting `operators`); so is purging what others have
waiting. Anybody may purge their own jobs.
"""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from inferfleet.tasks.errors import Forbidden, ModelNotFound
from inferfleet.tasks.queues import Queue
from inferfleet.workers.api import openapi_queues
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.body import parser, read_contract
from inferfleet.workers.api.openapi_queues import Purge
from inferfleet.workers.api.parameters import only_known_parameters
from inferfleet.workers.api.responses import json_response
from inferfleet.workers.api.services import Services, Use

router = APIRouter(prefix="/v1/queues", tags=["queues"], dependencies=[Depends(only_known_parameters)])

#: Rings after a resume; the janitors of the workers ring for the rest.
MAX_RINGS = 500


@router.get("", openapi_extra=openapi_queues.LIST)
async def list_queues(tenant: Tenant, use: Use) -> Response:
    """Every model's queue. `tenants` counts the caller's jobs, for an operator everybody's."""
    found = await use.ledger.queues(None, _seen_by(use, tenant))
    cards = await use.door.cards()
    idle = (_idle(model) for model in cards.keys() - {queue.model for queue in found})
    data = sorted((*found, *idle), key=lambda queue: queue.model)
    return json_response({"object": "list", "data": [queue.to_dict() for queue in data]})


@router.get("/{model:path}", openapi_extra=openapi_queues.GET)
async def get_queue(model: str, tenant: Tenant, use: Use) -> Response:
    """One model's queue. Names may hold slashes, as hub ids do."""
    return await _shown(use, model, tenant)


@router.post("/{model:path}/pause", openapi_extra=openapi_queues.PAUSE)
async def pause_queue(model: str, tenant: Tenant, use: Use) -> Response:
    """Give no job of the model to a worker: what runs goes on, what comes is accepted and waits. For operators."""
    _check_operator(use, tenant)
    await _check_known(use, model)
    await use.ledger.pause(model)
    return await _shown(use, model, tenant)


@router.post("/{model:path}/resume", openapi_extra=openapi_queues.PAUSE)
async def resume_queue(model: str, tenant: Tenant, use: Use) -> Response:
    """Give the model's jobs to workers again. For operators."""
    _check_operator(use, tenant)
    await _check_known(use, model)
    for _ in range(min(MAX_RINGS, await use.ledger.resume(model))):
        use.door.ring(model)
    return await _shown(use, model, tenant)


@router.post("/{model:path}/purge", openapi_extra=openapi_queues.PURGE)
async def purge_queue(model: str, request: Request, tenant: Tenant, use: Use) -> Response:
    """Cancel the caller's jobs that wait for the model now; for an operator everybody's, or those of `tenant`. What
    runs goes on. `more` says that the call had to stop before the last one: repeat it."""
    asked = await read_contract(request, use.settings.max_body_bytes, parser(Purge))
    await _check_known(use, model)
    if asked.tenant not in (None, tenant):
        _check_operator(use, tenant)
    whose = asked.tenant or _seen_by(use, tenant)
    purged = await use.ledger.purge(model, confirm=asked.confirm, tenant=whose)
    body = {"object": "queue.purged", "model": model, "cancelled": purged.cancelled, "more": purged.more}
    return json_response(body)


def _seen_by(use: Services, tenant: str) -> str | None:
    """Whose jobs a caller sees: None = everybody's."""
    return None if tenant in use.settings.operators else tenant


def _check_operator(use: Services, tenant: str) -> None:
    if tenant not in use.settings.operators:
        raise Forbidden("this is for operators: the setting `operators` names their tenants", param="Authorization")


async def _check_known(use: Services, model: str) -> None:
    """A queue is there for every model that is served or configured, and while jobs of another are left."""
    if model in await use.door.cards():
        return
    found = await use.ledger.queues(model) if model else []
    if not any(queue.waiting or queue.running or queue.paused_at is not None for queue in found):
        raise ModelNotFound(f"no worker serves the model {model[:100]!r} and it has no jobs", param="model")


async def _shown(use: Services, model: str, tenant: str) -> Response:
    await _check_known(use, model)
    (queue,) = await use.ledger.queues(model, _seen_by(use, tenant))
    return json_response(queue.to_dict())


def _idle(model: str) -> Queue:
    return Queue(model, 0, 0, 0.0, None, None, {})
