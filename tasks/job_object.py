"""How a job looks from outside: one shape for the API, the command line and the client. Knows no Redis."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from inferfleet.tasks import names
from inferfleet.tasks.errors import NotTerminal, from_dict
from inferfleet.tasks.records import JobRecord


class Progress(BaseModel):
    step: int
    steps: int
    message: str | None = None


class Response(BaseModel):
    """As in a line of an OpenAI batch's output file."""

    status_code: int
    request_id: str
    #: The chat completion, or the images response without its pictures: those are the job's outputs.
    body: dict[str, Any]


class JobError(BaseModel):
    code: str
    message: str
    type: str
    param: str | None = None


class Output(BaseModel):
    """A picture that a job made."""

    id: str
    #: Which of the n pictures.
    index: int
    content_type: str
    size_bytes: int
    #: "sha256:" and hexadecimal digits.
    hash: str
    width: int
    height: int
    seed: int
    #: Where it can be fetched without a key, and until when; only where an API shows the job.
    url: str | None = None
    url_expires_at: int | None = None


class Metrics(BaseModel):
    """Milliseconds; None where it did not happen."""

    model_config = ConfigDict(extra="allow")

    #: Waited before its first start.
    queue_ms: float | None = None
    #: Waited for the model to load, part of the execution.
    load_ms: float | None = None
    #: From submit to the first token.
    ttft_ms: float | None = None
    #: The last run, from claim to end.
    execution_ms: float | None = None


class Urls(BaseModel):
    self: str
    events: str
    cancel: str
    result: str


class Job(BaseModel):
    """The job object. Times are Unix seconds; priority: lower runs first."""

    id: str
    object: str = "job"
    custom_id: str | None
    status: names.State
    endpoint: str
    model: str
    created_at: int
    started_at: int | None
    completed_at: int | None
    failed_at: int | None
    cancelled_at: int | None
    #: When the result and everything else of the job is deleted.
    expires_at: int | None
    deadline: int | None
    priority: int
    #: Jobs ahead of it in its model's queue.
    queue_position: int | None
    eta_seconds: float | None
    #: Percent.
    progress: int | None
    progress_detail: Progress | None
    attempts: int
    max_attempts: int
    dead_letter: bool
    response: Response | None
    error: JobError | None
    outputs: list[Output]
    usage: dict[str, Any] | None
    metrics: Metrics
    metadata: dict[str, str]
    urls: Urls

    @property
    def terminal(self) -> bool:
        return self.status in names.TERMINAL

    def result(self) -> dict[str, Any]:
        """The answer's body. Raises the job's error, or NotTerminal while it is not done."""
        if self.response is not None:
            return self.response.body
        if self.error is not None:
            raise from_dict(self.error.model_dump())
        raise NotTerminal(f"the job is {self.status}")

    @property
    def text(self) -> str:
        """The first answer's text, of a chat or a response. Raises like `result`."""
        body = self.result()
        if self.endpoint == names.RESPONSES_URL:
            return str(body["output"][0]["content"][0]["text"])
        return str(body["choices"][0]["message"]["content"])


def to_job_object(
    record: JobRecord,
    *,
    base_url: str = "",
    max_attempts: int = 3,
    result_ttl_seconds: float | None = None,
) -> Job:
    """A record as users see it. `base_url` goes in front of the urls; without result_ttl_seconds no expires_at. The
    urls of its files are the API's to fill in: it signs them."""
    ended = seconds(record.finished_ms)
    expires = None if ended is None or result_ttl_seconds is None else int(ended + result_ttl_seconds)
    return Job(
        id=record.id,
        custom_id=record.custom_id,
        status=record.state,
        endpoint=record.endpoint,
        model=record.model,
        created_at=record.created_ms // 1000,
        started_at=seconds(record.started_ms),
        completed_at=ended if record.state in ("completed", "incomplete") else None,
        failed_at=ended if record.state in ("failed", "expired") else None,
        cancelled_at=ended if record.state == "cancelled" else None,
        expires_at=expires,
        deadline=seconds(record.deadline_ms),
        priority=record.priority,
        queue_position=record.queue_position,
        eta_seconds=None if record.eta_ms is None else record.eta_ms / 1000,
        progress=percent_of(record),
        progress_detail=None if record.progress is None else Progress.model_validate(record.progress),
        attempts=record.attempts,
        max_attempts=max_attempts,
        dead_letter=record.dead_letter,
        response=response_of(record),
        error=None if record.error is None else JobError.model_validate(record.error),
        outputs=[Output.model_validate(output) for output in record.outputs or ()],
        usage=record.usage,
        metrics=metrics_of(record),
        metadata=record.metadata or {},
        urls=urls_of(record.id, base_url),
    )


def seconds(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000


def percent_of(record: JobRecord) -> int | None:
    """Whole percent, rounded down; None while nothing was told."""
    if record.state == "completed":
        return 100
    told = record.progress
    return None if told is None else min(100, 100 * told["step"] // max(1, told["steps"]))


def response_of(record: JobRecord) -> Response | None:
    if record.response is None:
        return None
    return Response(status_code=200, request_id=names.request_id(record.id), body=json.loads(record.response))


def metrics_of(record: JobRecord) -> Metrics:
    """The ledger's own times, under what the worker measured itself."""
    measured: dict[str, float] = {}
    if record.started_ms is not None:
        measured["queue_ms"] = max(0, record.started_ms - record.queued_ms)
    if record.claimed_ms is not None and record.finished_ms is not None:
        measured["execution_ms"] = record.finished_ms - record.claimed_ms
    return Metrics.model_validate(measured | (record.metrics or {}))


def urls_of(job_id: str, base_url: str) -> Urls:
    here = f"{base_url}/v1/jobs/{job_id}"
    return Urls(self=here, events=f"{here}/events", cancel=f"{here}/cancel", result=f"{here}/result")
