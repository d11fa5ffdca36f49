"""/v1/jobs: a job's whole life over HTTP."""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from starlette.responses import Response

from inferfleet.tasks import names
from inferfleet.tasks.calls import MAX_PAGE
from inferfleet.tasks.contracts import JobRequest, parse_job
from inferfleet.tasks.errors import FleetError, InvalidRequest, JobNotFound, NotTerminal
from inferfleet.tasks.event_log import MAX_PLACE
from inferfleet.tasks.records import Event
from inferfleet.workers.api import openapi
from inferfleet.workers.api.accept import accept, replay_headers
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.body import parser, read_contract
from inferfleet.workers.api.door import sealed
from inferfleet.workers.api.parameters import check_after, path_id, query_id, refuse_unknown
from inferfleet.workers.api.prefer import MAX_WAIT_SECONDS, read_prefer
from inferfleet.workers.api.responses import json_response, page_response
from inferfleet.workers.api.services import Services, Use
from inferfleet.workers.api.showing import accepted_response, answer_response, job_response, shown
from inferfleet.workers.api.sse import KEEP_ALIVE, EventStream, frame
from inferfleet.workers.api.waiting import CLIENT_LEFT, ClientGone, unless_gone

JOB_ID = re.compile(r"job_[0-9a-f]{32}")
#: A path that looks like a job's and is none.
LOOKUP = "/v1/jobs/lookup"
METADATA = re.compile(r"metadata\[(.{1,64})\]")


def no_word_for_an_id(request: Request) -> None:
    """What takes an id takes LOOKUP too, with the methods that this does not know."""
    if request.url.path == LOOKUP and request.scope["endpoint"] is not lookup_jobs:
        raise HTTPException(405)


def only_known_filters(request: Request) -> None:
    """The list takes any `metadata[KEY]` too."""
    refuse_unknown(request, METADATA if request.scope["endpoint"] is list_jobs else None)


def known_id(job_id: Annotated[str, path_id(JOB_ID.pattern)]) -> str:
    """An id that no job can have is not found, like any other that is not there."""
    if not JOB_ID.fullmatch(job_id):
        raise JobNotFound(param="job_id")
    return job_id


JobId = Annotated[str, Depends(known_id)]
CHECKS = [Depends(no_word_for_an_id), Depends(only_known_filters)]
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=CHECKS)


@router.post("", status_code=202, openapi_extra=openapi.CREATE_JOB)
async def create_job(request: Request, tenant: Tenant, use: Use) -> Response:
    """Queue a job: one line of an OpenAI batch file, plus options. `Prefer: wait=N` waits for its end."""
    job = await _read_job(request, use)
    wait = read_prefer(request.headers).wait_seconds or 0
    submitted = await accept(use, request.headers, job, tenant)
    try:
        record = await unless_gone(request, use.hub.until_ended(submitted.job_id, tenant, wait))
    except ClientGone:  # a job that was asked for by name of job outlives its connection
        return Response(status_code=CLIENT_LEFT)
    headers = replay_headers(submitted)
    if wait and record.terminal:
        return await job_response(request, use, record, 200, headers)
    return await accepted_response(request, use, record, headers)


@router.put("/{job_id}", status_code=202, openapi_extra=openapi.PUT_JOB)
async def put_job(
    job_id: Annotated[str, path_id(JOB_ID.pattern)], request: Request, tenant: Tenant, use: Use
) -> Response:
    """Queue a job under an id of the caller's choice, `job_` and 32 hexadecimal digits. Repeating it is safe."""
    if not JOB_ID.fullmatch(job_id):
        raise InvalidRequest("a job id is job_ and 32 lower-case hexadecimal digits", param="job_id")
    job = await _read_job(request, use)
    submitted = await use.door.submit(await sealed(job), tenant, job_id=job_id)
    return await accepted_response(request, use, await use.ledger.get(job_id, tenant), replay_headers(submitted))


@router.get("", openapi_extra=openapi.LIST_JOBS)
async def list_jobs(
    request: Request,
    tenant: Tenant,
    use: Use,
    status: Annotated[names.State | None, Query(description="only jobs in this state")] = None,
    model: Annotated[str | None, Query(max_length=256, description="only jobs of this model")] = None,
    after: Annotated[str | None, query_id(JOB_ID.pattern)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
) -> Response:
    """The caller's jobs, newest first, without their answers. `metadata[KEY]=VALUE` filters too."""
    metadata = {match[1]: value for name, value in request.query_params.items() if (match := METADATA.fullmatch(name))}
    check_after(after, JOB_ID, JobNotFound)
    page = await use.ledger.list(tenant, status, model, metadata or None, after, limit)
    data = [job.model_dump(mode="json") for job in await shown(request, use, page.jobs)]
    return page_response(data, page.has_more)


@router.post("/lookup", openapi_extra=openapi.LOOKUP_JOBS)
async def lookup_jobs(request: Request, tenant: Tenant, use: Use) -> Response:
    """Which idempotency keys have a job: after a failover that lost the last moments, submit the others again. A key is
    known as long as its job is kept: until result_ttl_seconds after its end (dead_letter_ttl_seconds for a dead
    letter), or until the job is deleted."""
    asked = await read_contract(request, use.settings.max_body_bytes, parser(openapi.JobLookup))
    found = await use.ledger.lookup(tenant, asked.idempotency_keys)
    jobs = [(key, found[key]) for key in asked.idempotency_keys]
    data = [{"idempotency_key": key, "job_id": job and job.job_id, "status": job and job.state} for key, job in jobs]
    return json_response({"object": "list", "data": data})


@router.get("/{job_id}", openapi_extra=openapi.GET_JOB)
async def get_job(
    request: Request,
    job_id: JobId,
    tenant: Tenant,
    use: Use,
    wait: Annotated[int, Query(ge=0, le=MAX_WAIT_SECONDS, description="seconds to wait for its end")] = 0,
) -> Response:
    """One job with its answer or error; `wait` holds the request until the job ends or the time is over."""
    try:
        return await job_response(request, use, await unless_gone(request, use.hub.until_ended(job_id, tenant, wait)))
    except ClientGone:
        return Response(status_code=CLIENT_LEFT)


@router.get("/{job_id}/events", openapi_extra=openapi.EVENTS)
async def job_events(
    request: Request,
    job_id: JobId,
    tenant: Tenant,
    use: Use,
    starting_after: Annotated[
        int | None, Query(ge=-1, le=MAX_PLACE, description="the last sequence_number seen")
    ] = None,
) -> Response:
    """The job's events as they happen, from the first or behind `starting_after` (or `Last-Event-ID`), to its end."""
    after = starting_after if starting_after is not None else _last_event_id(request)
    events = use.hub.follow(job_id, tenant, after=after)
    first = await anext(events)
    if not first:
        if (await use.ledger.get(job_id, tenant)).terminal:
            await events.aclose()
            return Response(status_code=204)  # tells an EventSource that there is nothing to reconnect for
        if after >= 0 and not await use.ledger.events(job_id, tenant, after=after - 1, count=1):
            raise InvalidRequest(f"the job has no event {after} yet", param="starting_after")
    return EventStream(_event_frames(first, events), stop=use.hub.draining)


@router.post("/{job_id}/cancel", status_code=202, openapi_extra=openapi.CANCEL_JOB)
async def cancel_job(request: Request, job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Stop a job: at once while it waits, at the next step while it runs."""
    await use.ledger.cancel(job_id, tenant)
    return await job_response(request, use, await use.ledger.get(job_id, tenant), 202)


@router.patch("/{job_id}", openapi_extra=openapi.PATCH_JOB)
async def update_job(request: Request, job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Change the priority (lower runs first) or the deadline of a job that waits."""
    change = await read_contract(request, use.settings.max_body_bytes, parser(openapi.JobUpdate))
    if change.priority is None and change.deadline is None:
        raise InvalidRequest("give priority, deadline or both", param="priority")
    deadline_ms = None if change.deadline is None else round(change.deadline * 1000)
    await use.ledger.update(job_id, tenant, priority=change.priority, deadline_ms=deadline_ms)
    return await job_response(request, use, await use.ledger.get(job_id, tenant))


@router.post("/{job_id}/retry", status_code=202, openapi_extra=openapi.RETRY_JOB)
async def retry_job(request: Request, job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Queue a job again that failed, expired or was cancelled; it starts from nothing, under the same id."""
    await use.ledger.retry(job_id, tenant)
    record = await use.ledger.get(job_id, tenant)
    use.door.ring(record.model)
    return await job_response(request, use, record, 202)


@router.get("/{job_id}/result", openapi_extra=openapi.RESULT)
async def job_result(request: Request, job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """The answer alone; a job that ended without one gives its error, one that has not ended 409."""
    record = await use.ledger.get(job_id, tenant)
    if not record.terminal:
        raise NotTerminal(f"the job is {record.state}; wait for its end with GET /v1/jobs/{job_id}?wait=60")
    return await answer_response(request, use, record, {})


@router.delete("/{job_id}", openapi_extra=openapi.DELETE_JOB)
async def delete_job(job_id: JobId, tenant: Tenant, use: Use) -> Response:
    """Forget a job that has ended, with its answer and its events."""
    await use.ledger.delete(job_id, tenant)
    return json_response({"id": job_id, "object": "job.deleted", "deleted": True})


async def _read_job(request: Request, use: Services) -> JobRequest:
    job = await read_contract(request, use.settings.max_body_bytes, parse_job)
    await use.door.check(job.body)
    return job


def _last_event_id(request: Request) -> int:
    value = request.headers.get("last-event-id", "-1")
    if not re.fullmatch(r"-1|\d{1,15}", value, re.ASCII):
        raise InvalidRequest("Last-Event-ID must be the sequence_number of an event", param="Last-Event-ID")
    return int(value)


async def _event_frames(first: list[Event], events: AsyncGenerator[list[Event], None]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        try:
            yield _framed(first)
            async for batch in events:
                yield _framed(batch)
        except FleetError as error:
            yield frame({"error": error.to_dict()}, event="error")


def _framed(batch: list[Event]) -> bytes:
    parts = [frame(event, event=event["type"], event_id=event["sequence_number"]) for event in batch]
    return b"".join(parts) or KEEP_ALIVE
