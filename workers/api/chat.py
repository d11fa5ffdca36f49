"""POST /v1/chat/completions: the OpenAI SDK's call, answered by a job that waits its turn like every other."""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from inferfleet.tasks import names
from inferfleet.tasks.contracts import ChatCompletionRequest, JobRequest, parse_chat
from inferfleet.tasks.errors import FleetError
from inferfleet.tasks.records import Event, Submitted
from inferfleet.workers.api.accept import accept, replay_headers
from inferfleet.workers.api.auth import Tenant
from inferfleet.workers.api.body import read_contract
from inferfleet.workers.api.chunks import ChunkWriter
from inferfleet.workers.api.openapi import CHAT
from inferfleet.workers.api.prefer import read_prefer
from inferfleet.workers.api.services import Services, Use
from inferfleet.workers.api.showing import answer_of
from inferfleet.workers.api.sse import DONE, KEEP_ALIVE, EventStream, frame
from inferfleet.workers.api.waiting import ClientGone, answered, leave, unless_gone

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", openapi_extra=CHAT)
async def create_chat_completion(request: Request, tenant: Tenant, use: Use) -> Response:
    """Answer a dialogue: at once, as a stream (`stream`), or as a job (`Prefer: respond-async` or `wait=N`).

    A client that leaves cancels its job, unless it sent an Idempotency-Key: then it may come back for it.
    """
    chat = await read_contract(request, use.settings.max_body_bytes, parse_chat)
    prefer = read_prefer(request.headers)
    await use.door.check(chat)
    submitted = await accept(use, request.headers, JobRequest.from_body(chat), tenant)
    try:
        if chat.stream and prefer.wait_seconds is None:
            return await _answer_stream(request, use, submitted, tenant, chat)
        return await answered(request, use, submitted, tenant, prefer)
    except ClientGone:
        return await leave(request, use, submitted.job_id, tenant)


async def _answer_stream(
    request: Request, use: Services, submitted: Submitted, tenant: str, chat: ChatCompletionRequest
) -> Response:
    """Headers wait for the first text, so that a job that fails before it is an HTTP error like any other."""
    job_id = submitted.job_id
    events = use.hub.follow(job_id, tenant)
    try:
        seen = await unless_gone(request, _until_text(events))
    except BaseException:
        await events.aclose()
        raise
    if seen and names.is_terminal_event(seen[-1]["type"]):
        answer_of(await use.ledger.get(job_id, tenant))
    usage = bool(chat.stream_options and chat.stream_options.include_usage)
    writer = ChunkWriter(job_id, chat.model, int(time.time()), num_choices=chat.n or 1, include_usage=usage)

    async def on_gone() -> None:
        await leave(request, use, job_id, tenant)

    frames = _frames(use, job_id, tenant, writer, seen, events)
    return EventStream(frames, on_gone=on_gone, headers=replay_headers(submitted))


async def _until_text(events: AsyncIterator[list[Event]]) -> list[Event]:
    """The events up to the first text, the end, or the first tick of silence."""
    seen: list[Event] = []
    async for batch in events:
        seen += batch
        if not batch or any(event["type"] == names.DELTA for event in batch):
            break
    return seen


async def _frames(
    use: Services,
    job_id: str,
    tenant: str,
    writer: ChunkWriter,
    seen: list[Event],
    events: AsyncGenerator[list[Event], None],
) -> AsyncIterator[bytes]:
    async with aclosing(events):
        try:
            yield _joined(writer.opening()) + _text_frames(writer, seen)
            async for batch in events:
                if data := _text_frames(writer, batch) if batch else KEEP_ALIVE:
                    yield data
            completion = json.loads(answer_of(await use.ledger.get(job_id, tenant)))
            yield _joined(writer.closing(completion)) + DONE
        except FleetError as error:
            # The status line is long gone; the SDK raises APIError from a chunk like this.
            yield frame({"error": error.to_dict()}) + DONE


def _text_frames(writer: ChunkWriter, events: list[Event]) -> bytes:
    return b"".join(_joined(writer.delta(event)) for event in events if event["type"] == names.DELTA)


def _joined(chunks: Any) -> bytes:
    return b"".join(frame(chunk) for chunk in chunks)
