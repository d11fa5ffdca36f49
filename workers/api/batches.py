"""/v1/batches: OpenAI's batches, and beside them results while they run and a retry of the lines that failed."""

import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response, StreamingResponse

from inferfleet.tasks import batches, files, names
from inferfleet.tasks.batches import BatchRecord, Idempotency, Results
from inferfleet.tasks.calls import idempotency_digest
from inferfleet.tasks.contracts.batches import MAX_LINES, BatchRequest, RetryRequest, window_seconds
from inferfleet.tasks.errors import BatchNotFound, OutputNotFound, UrlNotAllowed
from inferfleet.tasks.s3_url import lies_in
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.shelf import unmarked
from inferfleet.workers.api import openapi_files as docs
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.body import parser, read_contract
from inferfleet.workers.api.files import chained
from inferfleet.workers.api.parameters import check_after, only_known_parameters, path_id, query_id
from inferfleet.workers.api.prefer import read_idempotency_key, read_retry_count
from inferfleet.workers.api.responses import json_response, page_response
from inferfleet.workers.api.services import Services, Use

router = APIRouter(prefix="/v1/batches", tags=["OpenAI"], dependencies=[Depends(only_known_parameters)])

POLL_AFTER_MS = "2000"
#: Where the batch object says since when it has a status.
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def known_batch(batch_id: Annotated[str, path_id(batches.BATCH_ID.pattern)]) -> str:
    """An id that no batch can have is not found, like any other that is not there."""
    if not batches.BATCH_ID.fullmatch(batch_id):
        raise BatchNotFound(param="batch_id")
    return batch_id


BatchId = Annotated[str, Depends(known_batch)]


@router.post("", openapi_extra=docs.CREATE_BATCH)
async def create_batch(request: Request, tenant: Tenant, use: Use) -> Response:
    """Run the lines of an uploaded file. Sent again by the OpenAI SDK after a lost answer, or under the same
    Idempotency-Key, it is still one batch."""
    asked = await read_contract(request, use.settings.max_body_bytes, parser(BatchRequest))
    check_places(use.settings, tenant, asked)
    use.door.check_webhook(asked.webhook)
    keep = asked.output_expires_after.seconds if asked.output_expires_after else files.DEFAULT_SECONDS
    digest = body_digest("batch", asked.model_dump_json())
    batch_id, replayed = await use.ledger.run(
        batches.create(
            batches.new_batch_id(),
            tenant,
            body_hash=digest,
            window=asked.completion_window,
            window_seconds=asked.window_seconds,
            endpoint=asked.endpoint,
            keep_seconds=keep,
            input_file_id=None if asked.input_url else asked.input_file_id,
            input_url=asked.input_url,
            output_url_prefix=asked.output_url_prefix,
            metadata=asked.metadata,
            priority=asked.effective_priority,
            webhook=asked.webhook,
            webhook_words=asked.webhook_events_filter or names.BATCH_ENDS,
            idempotency=idempotency_of(request, tenant, digest),
        )
    )
    return await _created(use, batch_id, tenant, replayed)


@router.get("", openapi_extra=docs.LIST_BATCHES)
async def list_batches(
    tenant: Tenant,
    use: Use,
    after: Annotated[str | None, query_id(batches.BATCH_ID.pattern)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """The caller's batches, newest first."""
    check_after(after, batches.BATCH_ID, BatchNotFound)
    found, has_more = await use.ledger.run(batches.list_batches(tenant, after, limit))
    return page_response([batch_object(record) for record in found], has_more)


@router.get("/{batch_id}", openapi_extra=docs.GET_BATCH)
async def get_batch(batch_id: BatchId, tenant: Tenant, use: Use) -> Response:
    """One batch."""
    return batch_response(await use.ledger.run(batches.get(batch_id, tenant)))


@router.post("/{batch_id}/cancel", openapi_extra=docs.CANCEL_BATCH)
async def cancel_batch(batch_id: BatchId, tenant: Tenant, use: Use) -> Response:
    """Stop a batch. What has ended stays in its files; every other line ends in the error file."""
    await use.ledger.run(batches.cancel(batch_id, tenant))
    return batch_response(await use.ledger.run(batches.get(batch_id, tenant)))


@router.post("/{batch_id}/retry", openapi_extra=docs.RETRY_BATCH)
async def retry_batch(request: Request, batch_id: BatchId, tenant: Tenant, use: Use) -> Response:
    """Run the lines of an ended batch's error file again, or those that `custom_ids` names among them, as a new batch.

    The first one and its files stay as they are.
    """
    asked = await read_contract(request, use.settings.max_body_bytes, parser(RetryRequest))
    parent = await use.ledger.run(batches.get(batch_id, tenant))
    digest = body_digest(f"retry {batch_id}", asked.model_dump_json())
    retry_id, replayed = await use.ledger.run(
        batches.create(
            batches.new_batch_id(),
            tenant,
            body_hash=digest,
            window=parent.completion_window,
            window_seconds=window_seconds(parent.completion_window),
            endpoint=parent.endpoint,
            keep_seconds=parent.keep_seconds,
            retry_of=batch_id,
            output_url_prefix=parent.output_url_prefix,
            custom_ids=asked.custom_ids,
            metadata=parent.metadata,
            priority=parent.priority,
            webhook=parent.webhook,
            webhook_words=parent.webhook_words,
            idempotency=idempotency_of(request, tenant, digest),
        )
    )
    return await _created(use, retry_id, tenant, replayed)


@router.get("/{batch_id}/results", openapi_extra=docs.RESULTS)
async def batch_results(
    batch_id: BatchId,
    tenant: Tenant,
    use: Use,
    offset: Annotated[int, Query(ge=0, le=MAX_LINES, description="lines that the caller has already")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_LINES, description="lines at most")] = MAX_LINES,
) -> Response:
    """The lines that have ended so far, of both files, in the order of their ends, one JSON object a line.

    `X-Last-Line` is the next `offset`; `X-Incomplete` says whether more will come.
    """
    found = await use.ledger.run(batches.results(batch_id, tenant))
    last = max(offset, min(found.batch.lines, offset + limit))
    if offset < last and not found.parts and not found.tail:
        raise OutputNotFound("the batch's files have expired or were deleted", param="batch_id")
    body = _result_lines(use, found, offset, last)
    first = await anext(body, b"")  # a store that is away is an error with a status, as long as nothing was sent
    incomplete = not found.batch.terminal or last < found.batch.lines
    headers = {"x-incomplete": str(incomplete).lower(), "x-last-line": str(last)}
    return StreamingResponse(chained(first, body), headers=headers, media_type="application/x-ndjson")


async def _created(use: Services, batch_id: str, tenant: str, replayed: bool) -> Response:
    record = await use.ledger.run(batches.get(batch_id, tenant))
    return batch_response(record, {"idempotency-replayed": "true"} if replayed else {})


def batch_response(record: BatchRecord, headers: dict[str, str] | None = None) -> Response:
    """The batch object, with the polling hint while it has not ended."""
    polling = {} if record.terminal else {"openai-poll-after-ms": POLL_AFTER_MS}
    return json_response(batch_object(record), headers=polling | (headers or {}))


def batch_object(record: BatchRecord) -> dict[str, Any]:
    """OpenAI's batch object; what is ours is in x_fleet."""
    times = {f"{name}_at": record.times[name] // 1000 if name in record.times else None for name in TIMES}
    errors = None if record.errors is None else {"object": "list", "data": record.errors}
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model,
        "errors": errors,
        "input_file_id": record.input_file_id,
        "completion_window": record.completion_window,
        "status": record.status,
        "output_file_id": record.output_file_id,
        "error_file_id": record.error_file_id,
        "created_at": record.created_ms // 1000,
        "expires_at": record.expires_ms // 1000,
        **times,
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "usage": {
            "input_tokens": record.input_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_tokens},
            "output_tokens": record.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.input_tokens + record.output_tokens,
        },
        "metadata": record.metadata,
        "x_fleet": {
            "priority": record.priority,
            "retry_of": record.retry_of,
            "input_url": record.input_url,
            "output_url_prefix": record.output_url_prefix,
            "output_url": record.output_url,
            "error_url": record.error_url,
            "output_problem": record.output_problem,
        },
    }


def check_places(settings: Settings, tenant: str, asked: BatchRequest) -> None:
    """Raises UrlNotAllowed for a place in a bucket that the settings do not give this tenant."""
    allowed = settings.batch_buckets.get(tenant, [])
    places = {"input_file_id": asked.input_url, "output_url_prefix": asked.output_url_prefix}
    for param, text in places.items():
        if text is not None and not lies_in(text, allowed):
            raise UrlNotAllowed(f"{param}: batch_buckets does not give this place to the tenant", param=param)


def idempotency_of(request: Request, tenant: str, digest: str) -> Idempotency | None:
    """How a repeat of this POST is known: by the caller's key, or by what the OpenAI SDK counts."""
    key, tries = read_idempotency_key(request.headers), read_retry_count(request.headers)
    if key is not None:
        return Idempotency(idempotency_digest(tenant, f"batches:{key}"), look=True, ttl_ms=None)
    if tries is not None:
        digest = idempotency_digest(tenant, f"batches:sdk:{digest}")
        return Idempotency(digest, look=tries > 0, ttl_ms=files.SDK_MEMORY_MS)
    return None


def body_digest(verb: str, body: str) -> str:
    """What a repeat must agree in."""
    return hashlib.sha256(f"{verb}\n{body}".encode()).hexdigest()


async def _result_lines(use: Services, found: Results, offset: int, last: int) -> AsyncIterator[bytes]:
    """Lines `offset` to `last` of the shelf."""
    at = 0
    for part in found.parts:
        if at >= last:
            return
        if offset < at + part.lines:
            yield unmarked(await use.store.get(part.key, part.sha256), offset - at, last - at)
        at += part.lines
    if at < last:
        yield unmarked(found.tail, offset - at, last - at)
