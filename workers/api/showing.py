"""Turns records into what clients are shown: the job object, and the answer with its pictures as urls or base64."""

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from inferfleet.tasks.errors import JobFailed, OutputNotFound, from_dict
from inferfleet.tasks.job_object import Job, Output, to_job_object
from inferfleet.tasks.records import JobRecord
from inferfleet.workers.api.links import Link, links_for
from inferfleet.workers.api.services import Services
from inferfleet.workers.api.sse import compact

#: When to ask again, for clients that poll.
POLL_AFTER_MS = "1000"


def answer_of(record: JobRecord) -> bytes:
    """The JSON of an ended job's answer, without its pictures. Raises the error that it failed with."""
    if record.response is not None:
        return record.response
    raise from_dict(record.error) if record.error else JobFailed(f"the job ended as {record.state}")


async def render_answer(request: Request, use: Services, record: JobRecord) -> bytes:
    """The JSON of an ended job's answer, its pictures in it as they were asked for: as signed urls or in base64.

    Raises the error that the job failed with, OutputNotFound, OutputDamaged.
    """
    raw = answer_of(record)
    if not record.outputs:
        return raw
    body: dict[str, Any] = json.loads(raw)
    as_url = body.pop("response_format", "url") == "url"
    link = (await links_for(request, use, [record])).of(record)
    for picture in body["data"]:
        output = _output_of(record, picture["index"])
        if as_url:
            picture["url"], picture["url_expires_at"] = link(output["id"])
        else:
            data = await use.store.get(output["id"], output["hash"].removeprefix("sha256:"))
            picture["b64_json"] = (await asyncio.to_thread(base64.b64encode, data)).decode()
    return await asyncio.to_thread(lambda: compact(body).encode())


def _output_of(record: JobRecord, index: int) -> Mapping[str, Any]:
    for output in record.outputs or ():
        if output["index"] == index:
            return output
    raise OutputNotFound(f"picture {index} of the job is not there")


async def shown(request: Request, use: Services, records: Sequence[JobRecord]) -> list[Job]:
    """The job objects of records, the urls of their pictures signed."""
    settings, links = use.settings, await links_for(request, use, records)
    jobs = []
    for record in records:
        link = links.of(record)
        ttl = settings.dead_letter_ttl_seconds if record.dead_letter else settings.result_ttl_seconds
        job = to_job_object(record, max_attempts=settings.max_deaths, result_ttl_seconds=ttl)
        outputs = [_linked(output, link) for output in job.outputs]
        if outputs and job.response is not None:
            # Never in base64 here, whatever was asked for: a job is looked at often.
            urls = {output.index: output.url for output in outputs}
            data = [{**picture, "url": urls.get(picture["index"])} for picture in job.response.body["data"]]
            job.response.body["data"] = data
        jobs.append(job.model_copy(update={"outputs": outputs}))
    return jobs


def _linked(output: Output, link: Link) -> Output:
    url, until = link(output.id)
    return output.model_copy(update={"url": url, "url_expires_at": until})


async def answer_response(request: Request, use: Services, record: JobRecord, headers: dict[str, str]) -> Response:
    """The answer alone. Raises as render_answer."""
    return Response(await render_answer(request, use, record), headers=headers, media_type="application/json")


async def job_response(
    request: Request, use: Services, record: JobRecord, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """The job object as an answer, with the polling hint while it has not ended."""
    polling = {} if record.terminal else {"openai-poll-after-ms": POLL_AFTER_MS}
    (job,) = await shown(request, use, [record])
    return Response(job.model_dump_json(), status, {**polling, **(headers or {})}, media_type="application/json")


async def accepted_response(request: Request, use: Services, record: JobRecord, headers: dict[str, str]) -> Response:
    """202 with the job object, as far as it has come, and where to find it."""
    return await job_response(request, use, record, 202, {"location": f"/v1/jobs/{record.id}", **headers})
