"""/v1/responses: OpenAI's responses, answered at once, streamed, or in the background, where they outlive everything.

A response is a job, and its id says which: a stream that broke off is taken up again behind its last number, by any
API process, for as long as the job is kept.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from inferfleet.tasks import calls, names
from inferfleet.tasks.calls import MAX_PAGE
from inferfleet.tasks.contracts import JobRequest, ResponseRequest, parse_response
from inferfleet.tasks.errors import AlreadyTerminal, FleetError, InvalidRequest, JobNotFound, ResponseNotFound
from inferfleet.tasks.event_log import MAX_PLACE
from inferfleet.tasks.records import Event, JobRecord
from inferfleet.tasks.response_object import STATUSES, input_items, response_object
from inferfleet.workers.api import openapi
from inferfleet.workers.api.accept import accept, replay_headers
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.body import read_contract
from inferfleet.workers.api.parameters import path_id
from inferfleet.workers.api.response_events import ResponseEvents
from inferfleet.workers.api.responses import json_response, page_response
from inferfleet.workers.api.services import Services, Use
from inferfleet.workers.api.showing import answer_of
from inferfleet.workers.api.sse import KEEP_ALIVE, EventStream, frame
from inferfleet.workers.api.waiting import ClientGone, leave, unless_gone

#: A running response that was cancelled is waited for so long, so that its answer can say that it is.
CANCEL_SECONDS = 5.0


def job_of(response_id: Annotated[str, path_id(names.RESPONSE_ID.pattern)]) -> str:
    """An id that no response can have is not found, like any other that is not there."""
    job_id = names.job_of_response(response_id)
    if job_id is None:
        raise ResponseNotFound(param="response_id")
    return job_id


JobId = Annotated[str, Depends(job_of)]
router = APIRouter(prefix="/v1/responses", tags=["OpenAI"])


@router.post("", openapi_extra=openapi.CREATE_RESPONSE)
async def create_response(request: Request, tenant: Tenant, use: Use) -> Response:
    """Answer an input: at once, as a stream (`stream`), or by and by (`background`), with or without a stream.

    A client that leaves cancels its response, unless it is in the background or named an Idempotency-Key.
    """
    asked = await read_contract(request, use.settings.max_body_bytes, parse_response)
    await use.door.check(asked)
    submitted = await accept(use, request.headers, JobRequest.from_body(asked), tenant)
    job_id, headers = submitted.job_id, replay_headers(submitted)
    if asked.stream:
        return await _stream(request, use, tenant, job_id, asked, headers=headers)
    if asked.background:
        return _shown(await use.ledger.get(job_id, tenant), asked, headers)
    try:
        record = await unless_gone(request, use.hub.until_ended(job_id, tenant))
    except ClientGone:
        return await leave(request, use, job_id, tenant)
    answer = Response(answer_of(record), headers=headers, media_type="application/json")
    await _forget(use, tenant, job_id, asked)
    return answer


@router.get("/{response_id}", openapi_extra=openapi.GET_RESPONSE)
async def get_response(
    request: Request,
    job_id: JobId,
    tenant: Tenant,
    use: Use,
    stream: Annotated[bool, Query(description="its events from the first, or behind `starting_after`")] = False,
    starting_after: Annotated[int, Query(ge=-1, le=MAX_PLACE, description="the last sequence_number seen")] = -1,
) -> Response:
    """A response as it is now, or its events until it ends."""
    record, asked = await _find(use, job_id, tenant)
    if stream:
        return await _stream(request, use, tenant, job_id, asked, after=starting_after, returning=True)
    return _shown(record, asked)


@router.post("/{response_id}/cancel", openapi_extra=openapi.CANCEL_RESPONSE)
async def cancel_response(job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Stop a response in the background. One that has ended is answered as it is."""
    _, asked = await _find(use, job_id, tenant)
    if not asked.background:
        raise InvalidRequest("only a response in the background can be cancelled", param="response_id")
    try:
        await use.ledger.cancel(job_id, tenant)
    except AlreadyTerminal:
        pass
    return _shown(await use.hub.until_ended(job_id, tenant, CANCEL_SECONDS), asked)


@router.delete("/{response_id}", openapi_extra=openapi.DELETE_RESPONSE)
async def delete_response(job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Forget a response that has ended."""
    await _find(use, job_id, tenant)
    await use.ledger.delete(job_id, tenant)
    return json_response({"id": names.response_id(job_id), "object": "response", "deleted": True})


@router.get("/{response_id}/input_items", openapi_extra=openapi.INPUT_ITEMS)
async def list_input_items(
    job_id: JobId,
    tenant: Tenant,
    use: Use,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(max_length=256, description="the last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
) -> Response:
    """The messages that a response was asked with, the last first unless `order` is asc."""
    _, asked = await _find(use, job_id, tenant)
    items = input_items(asked, job_id)
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"there is no item {after!r}", param="after")
        items = items[places[0] + 1 :]
    return page_response(items[:limit], len(items) > limit)


async def _find(use: Services, job_id: str, tenant: str) -> tuple[JobRecord, ResponseRequest]:
    """The job and what it was asked. A job of another route is no response: ResponseNotFound."""
    try:
        record = await use.ledger.get(job_id, tenant)
        envelope = await use.ledger.run(calls.envelope(job_id, tenant))
    except JobNotFound:
        raise ResponseNotFound(param="response_id") from None
    job = JobRequest.model_validate_json(envelope)
    if not isinstance(job.body, ResponseRequest):
        raise ResponseNotFound(param="response_id")
    return record, job.body


def _object(record: JobRecord, asked: ResponseRequest) -> dict[str, Any]:
    """The response as its job is: what the worker left, or what can be said without."""
    if record.response is not None:
        stored: dict[str, Any] = json.loads(record.response)
        return stored
    status, created = STATUSES[record.state], record.created_ms // 1000
    return response_object(asked, record.id, created, status, usage=record.usage, error=record.error)


def _shown(record: JobRecord, asked: ResponseRequest, headers: dict[str, str] | None = None) -> Response:
    return json_response(_object(record, asked), headers=headers)


async def _stream(
    request: Request,
    use: Services,
    tenant: str,
    job_id: str,
    asked: ResponseRequest,
    *,
    after: int = -1,
    returning: bool = False,
    headers: dict[str, str] | None = None,
) -> Response:
    """Events above `after`. returning: its reader may come again, so his leaving means nothing."""

    async def on_gone() -> None:
        await leave(request, use, job_id, tenant)

    follow = use.hub.follow(job_id, tenant)
    frames = _frames(use, tenant, job_id, asked, after, follow)
    if asked.background or returning:
        return EventStream(frames, stop=use.hub.draining, headers=headers)
    return EventStream(frames, on_gone=on_gone, headers=headers)


async def _frames(
    use: Services,
    tenant: str,
    job_id: str,
    asked: ResponseRequest,
    after: int,
    follow: AsyncGenerator[list[Event], None],
) -> AsyncIterator[bytes]:
    record = await use.ledger.get(job_id, tenant)
    events = ResponseEvents(asked, job_id, record.created_ms // 1000)
    async with aclosing(follow):
        try:
            async for batch in follow:
                made = [event for said in batch for event in events.of(said)]
                if data := _framed(made, after) if batch else KEEP_ALIVE:
                    yield data
            record = await use.ledger.get(job_id, tenant)
            yield _framed(list(events.closing(_object(record, asked))), after)
            await _forget(use, tenant, job_id, asked)
        except FleetError as error:
            yield _framed([events.error(error.to_dict())], -1)


def _framed(events: list[dict[str, Any]], after: int) -> bytes:
    return b"".join(frame(event, event=event["type"]) for event in events if event["sequence_number"] > after)


async def _forget(use: Services, tenant: str, job_id: str, asked: ResponseRequest) -> None:
    """What was not to be stored goes once it has been answered."""
    if asked.store is False:
        await use.ledger.delete(job_id, tenant)
