"""/v1/webhook_endpoints and /v1/webhook_deliveries: where a tenant's events go, and what became of each of them."""

import asyncio
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from inferfleet.tasks import batches, names, webhooks
from inferfleet.tasks.calls import MAX_PAGE
from inferfleet.tasks.contracts import EndpointCreate, EndpointTest, EndpointUpdate, SecretRotation
from inferfleet.tasks.contracts.contract import ENDPOINT_ID, C
from inferfleet.tasks.errors import DeliveryNotFound, EndpointNotFound, NoWebhookWorker, ReceiverFailed
from inferfleet.tasks.webhooks import Delivery, Endpoint
from inferfleet.workers.api import openapi_webhooks as docs
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.batches import known_batch
from inferfleet.workers.api.body import parser, read_contract
from inferfleet.workers.api.jobs import JOB_ID, known_id
from inferfleet.workers.api.parameters import check_after, only_known_parameters, path_id, query_id
from inferfleet.workers.api.responses import json_response, page_response
from inferfleet.workers.api.services import Services, Use
from inferfleet.workers.webhooks.guard import Policy

#: Stands in the place of an endpoint's id for the secret that signs for URLs which jobs bring along.
DEFAULT = "default"
DELIVERY_ID = re.compile(r"whd_[0-9a-f]{32}")
MAX_BODY_BYTES = 64 * 1024
#: A test waits for a worker this much longer than an attempt may take.
TEST_WAIT_SECONDS = 5.0
TEST_LOOK_SECONDS = 0.05


def known_endpoint(endpoint_id: Annotated[str, path_id(ENDPOINT_ID.pattern)]) -> str:
    """An id that no endpoint can have is not found, like any other that is not there."""
    if not ENDPOINT_ID.fullmatch(endpoint_id):
        raise EndpointNotFound(param="webhook_endpoint_id")
    return endpoint_id


def known_delivery(delivery_id: Annotated[str, path_id(DELIVERY_ID.pattern)]) -> str:
    """The same for deliveries."""
    if not DELIVERY_ID.fullmatch(delivery_id):
        raise DeliveryNotFound(param="webhook_delivery_id")
    return delivery_id


EndpointId = Annotated[str, Depends(known_endpoint)]
DeliveryId = Annotated[str, Depends(known_delivery)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
router = APIRouter(prefix="/v1", tags=["webhooks"], dependencies=[Depends(only_known_parameters)])


@router.post("/webhook_endpoints", openapi_extra=docs.CREATE)
async def create_endpoint(request: Request, tenant: Tenant, use: Use) -> Response:
    """Make an endpoint. Its signing secret is in this answer and in no later one."""
    wanted = await _read(request, EndpointCreate)
    Policy.of(use.settings).url(wanted.url, "url")
    endpoint_id, secret = webhooks.new_endpoint_id(), webhooks.new_secret()
    await use.ledger.put_endpoint(endpoint_id, tenant, wanted.name, wanted.url, wanted.event_types, secret)
    return json_response(_shown(await use.ledger.endpoint(endpoint_id, tenant)) | {"signing_secret": secret})


@router.get("/webhook_endpoints", openapi_extra=docs.LIST)
async def list_endpoints(
    tenant: Tenant,
    use: Use,
    after: Annotated[str | None, query_id(ENDPOINT_ID.pattern)] = None,
    limit: Limit = 20,
) -> Response:
    """The caller's endpoints, newest first."""
    found = await use.ledger.endpoints(tenant)
    if after is not None:
        ids = [endpoint.id for endpoint in found]
        if after not in ids:
            raise EndpointNotFound("after names no webhook endpoint of this tenant", param="after")
        found = found[ids.index(after) + 1 :]
    return page_response([_shown(endpoint) for endpoint in found[:limit]], len(found) > limit)


@router.get("/webhook_endpoints/{endpoint_id}", openapi_extra=docs.GET)
async def get_endpoint(endpoint_id: EndpointId, tenant: Tenant, use: Use) -> Response:
    """One endpoint, without its secret."""
    return json_response(_shown(await use.ledger.endpoint(endpoint_id, tenant)))


@router.post("/webhook_endpoints/{endpoint_id}", openapi_extra=docs.UPDATE)
async def update_endpoint(request: Request, endpoint_id: EndpointId, tenant: Tenant, use: Use) -> Response:
    """Change an endpoint. `"status": "enabled"`, or another URL, lets what waited for it go."""
    change = await _read(request, EndpointUpdate)
    if change.url is not None:
        Policy.of(use.settings).url(change.url, "url")
    await use.ledger.update_endpoint(
        endpoint_id, tenant, name=change.name, url=change.url, events=change.event_types, enable=bool(change.status)
    )
    return json_response(_shown(await use.ledger.endpoint(endpoint_id, tenant)))


@router.delete("/webhook_endpoints/{endpoint_id}", openapi_extra=docs.DELETE)
async def delete_endpoint(endpoint_id: EndpointId, tenant: Tenant, use: Use) -> Response:
    """Forget an endpoint; deliveries that wait for it fail."""
    await use.ledger.delete_endpoint(endpoint_id, tenant)
    return json_response({"id": endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret", openapi_extra=docs.ROTATE)
async def rotate_secret(
    request: Request,
    endpoint_id: Annotated[str, path_id(f"({ENDPOINT_ID.pattern}|{DEFAULT})")],
    tenant: Tenant,
    use: Use,
) -> Response:
    """A new signing secret, shown in this answer alone; for 24 hours the old one signs beside it, unless told not to.

    `default` in the place of an id means the secret that signs for URLs which jobs bring along.
    """
    keep = (await _read(request, SecretRotation)).keep_old_secret_active_for_24_hours
    target = None if endpoint_id == DEFAULT else known_endpoint(endpoint_id)
    secret = webhooks.new_secret()
    await use.ledger.rotate_secret(target, tenant, secret, webhooks.ROTATION_MS if keep else 0)
    if target is None:
        return json_response({"id": DEFAULT, "object": "webhook_endpoint", "signing_secret": secret})
    return json_response(_shown(await use.ledger.endpoint(target, tenant)) | {"signing_secret": secret})


@router.post("/webhook_endpoints/{endpoint_id}/test", openapi_extra=docs.TEST)
async def test_endpoint(request: Request, endpoint_id: EndpointId, tenant: Tenant, use: Use) -> Response:
    """Send a made-up event now, once, and say what the receiver answered."""
    wanted = await _read(request, EndpointTest)
    delivery_id = await use.ledger.test_endpoint(endpoint_id, tenant, wanted.event_type)
    ended = await _until_ended(use, delivery_id, tenant)
    if ended.last_status is None:
        raise ReceiverFailed(f"the receiver gave no answer: {ended.last_error}", param="webhook_endpoint_id")
    return json_response(
        {"object": "webhook_endpoint.test", "webhook_endpoint_id": endpoint_id, "event_type": wanted.event_type,
         "status_code": ended.last_status, "success": True}
    )  # fmt: skip


@router.get("/webhook_event_types", openapi_extra=docs.EVENT_TYPES)
async def list_event_types(tenant: Tenant) -> Response:
    """What an endpoint may ask for."""
    return json_response({"object": "list", "data": list(names.WEBHOOK_EVENTS)})


@router.get("/webhook_deliveries", openapi_extra=docs.LIST_DELIVERIES)
async def list_deliveries(
    tenant: Tenant,
    use: Use,
    webhook_endpoint_id: Annotated[str | None, query_id(ENDPOINT_ID.pattern, "only those of this endpoint")] = None,
    job_id: Annotated[str | None, query_id(JOB_ID.pattern, "only those of this job")] = None,
    batch_id: Annotated[str | None, query_id(batches.BATCH_ID.pattern, "only those of this batch")] = None,
    status: Annotated[Literal["pending", "delivered", "failed"] | None, Query(description="only in this state")] = None,
    after: Annotated[str | None, query_id(DELIVERY_ID.pattern)] = None,
    limit: Limit = 20,
) -> Response:
    """The caller's deliveries, newest first. Those of progress are not kept."""
    check_after(after, DELIVERY_ID, DeliveryNotFound)
    for given, check in ((webhook_endpoint_id, known_endpoint), (job_id, known_id), (batch_id, known_batch)):
        if given is not None:
            check(given)
    if job_id is not None and batch_id is not None:
        return page_response([], has_more=False)  # no event tells of both
    subject = job_id or batch_id
    found, more = await use.ledger.list_deliveries(tenant, webhook_endpoint_id, subject, status, after, limit)
    return page_response([_delivery(delivery) for delivery in found], more)


@router.get("/webhook_deliveries/{delivery_id}", openapi_extra=docs.GET_DELIVERY)
async def get_delivery(delivery_id: DeliveryId, tenant: Tenant, use: Use) -> Response:
    """One delivery."""
    return json_response(_delivery(await use.ledger.get_delivery(delivery_id, tenant)))


@router.post("/webhook_deliveries/{delivery_id}/replay", status_code=202, openapi_extra=docs.REPLAY)
async def replay_delivery(delivery_id: DeliveryId, tenant: Tenant, use: Use) -> Response:
    """Send it once more, now, under the same event id and with the whole schedule before it."""
    await use.ledger.replay_delivery(delivery_id, tenant)
    return json_response(_delivery(await use.ledger.get_delivery(delivery_id, tenant)), 202)


async def _read(request: Request, contract: type[C]) -> C:
    return await read_contract(request, MAX_BODY_BYTES, parser(contract))


async def _until_ended(use: Services, delivery_id: str, tenant: str) -> Delivery:
    """The test's delivery when it was tried. Raises NoWebhookWorker."""
    try:
        async with asyncio.timeout(use.settings.webhook_timeout_seconds + TEST_WAIT_SECONDS):
            while (delivery := await use.ledger.get_delivery(delivery_id, tenant)).state == "pending":
                await asyncio.sleep(TEST_LOOK_SECONDS)
            return delivery
    except TimeoutError:
        raise NoWebhookWorker(retry_after=TEST_WAIT_SECONDS) from None


def _shown(endpoint: Endpoint) -> dict[str, Any]:
    """OpenAI's webhook_endpoint, then what we know of its health."""
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.events),
        "created_at": endpoint.created_ms // 1000,
        "updated_at": endpoint.updated_ms // 1000,
        "signing_secret_hint": endpoint.secret_hint,
        "status": "disabled" if endpoint.disabled else "enabled",
        "disabled_reason": endpoint.disabled,
        "failures": endpoint.failures,
        "failing_since": _seconds(endpoint.failing_since_ms),
    }


def _delivery(delivery: Delivery) -> dict[str, Any]:
    of_batch = delivery.type.startswith("batch.")
    return {
        "id": delivery.id,
        "object": "webhook_delivery",
        "event_id": delivery.event,
        "event_type": delivery.type,
        "job_id": None if of_batch else delivery.subject,
        "batch_id": delivery.subject if of_batch else None,
        "webhook_endpoint_id": delivery.endpoint,
        "url": delivery.url,
        "status": delivery.state,
        "attempts": delivery.attempts,
        "created_at": delivery.created_ms // 1000,
        "ended_at": _seconds(delivery.ended_ms),
        "next_attempt_at": _seconds(delivery.due_ms),
        "last_attempt_at": _seconds(delivery.last_ms),
        "last_status_code": delivery.last_status,
        "last_error": delivery.last_error,
        "last_answer": delivery.last_answer,
    }


def _seconds(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000
