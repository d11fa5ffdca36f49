"""Names that two parts must agree on: tasks, queues, states, events, ids. Knows no values that a user may set."""

import re
import uuid
from typing import Literal, get_args

#: A Celery message "somebody, carry one job of this model"; args `[model]`.
TURN_TASK = "inferfleet.turn"
#: What events about a job call their task; its id is the job's. No message has this name.
JOB_TASK = "inferfleet.job"
#: An ordinary Celery task that submits a job or a chat body and returns the answer; for chains, groups and chords.
RUN_TASK = "inferfleet.run"
#: A Celery message "somebody, send the webhooks that are due"; no args.
DELIVER_TASK = "inferfleet.deliver"

State = Literal["queued", "in_progress", "cancelling", "completed", "failed", "cancelled", "expired", "incomplete"]
STATES: tuple[State, ...] = get_args(State)
TERMINAL: frozenset[str] = frozenset({"completed", "failed", "cancelled", "expired", "incomplete"})

#: What of a job's life a webhook may tell: its ends, and on request what comes before.
WebhookWord = Literal["completed", "failed", "cancelled", "expired", "incomplete", "started", "progress", "output"]
WEBHOOK_WORDS: tuple[WebhookWord, ...] = get_args(WebhookWord)
#: What a job's webhook is told unless the job says what else.
WEBHOOK_ENDS = WEBHOOK_WORDS[:5]
#: What a batch's webhook may be told.
BatchEnd = Literal["completed", "failed", "expired", "cancelled"]
BATCH_ENDS: tuple[BatchEnd, ...] = get_args(BatchEnd)
#: The event types that a webhook endpoint may ask for; responses and batches end in OpenAI's words.
EventType = Literal[
    "job.completed", "job.failed", "job.cancelled", "job.expired", "job.incomplete", "job.started", "job.progress",
    "job.output", "response.completed", "response.failed", "response.cancelled", "response.incomplete",
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
]  # fmt: skip
WEBHOOK_EVENTS: tuple[EventType, ...] = get_args(EventType)

DELTA = "response.output_text.delta"
PROGRESS = "job.progress"
PREVIEW = "job.preview"
OUTPUT = "job.output"
CHAT_URL = "/v1/chat/completions"
RESPONSES_URL = "/v1/responses"
IMAGES_URL = "/v1/images/generations"
EDITS_URL = "/v1/images/edits"
#: Where a body may go: what a job's url, and the endpoint of a batch, may be.
JobUrl = Literal["/v1/chat/completions", "/v1/responses", "/v1/images/generations", "/v1/images/edits"]
RESPONSE_ID = re.compile(r"resp_([0-9a-f]{32})")
OUTPUT_ID = re.compile(r"out_([0-9a-f]{32})_[0-9]{1,16}_[0-9]{1,2}")


def turn_queue(model: str, namespace: str = "inferfleet") -> str:
    """The Celery queue that carries the turns of one model. Two fleets on one Redis differ by their namespace."""
    return f"{namespace}.turn.{model}"


def run_queue(namespace: str = "inferfleet") -> str:
    """The Celery queue that carries RUN_TASK."""
    return f"{namespace}.run"


def deliver_queue(namespace: str = "inferfleet") -> str:
    """The Celery queue that carries DELIVER_TASK."""
    return f"{namespace}.deliver"


def new_job_id() -> str:
    """`job_` and 32 hexadecimal digits, random."""
    return f"job_{uuid.uuid4().hex}"


def request_id(job_id: str) -> str:
    """The `req_...` id that a job's response carries."""
    return f"req_{job_id.removeprefix('job_')}"


def response_id(job_id: str) -> str:
    """The `resp_...` id of the response that a job of RESPONSES_URL makes."""
    return f"resp_{job_id.removeprefix('job_')}"


def job_of_response(response: str) -> str | None:
    """The job whose response this may be; None for what is no id of a response."""
    found = RESPONSE_ID.fullmatch(response)
    return f"job_{found[1]}" if found else None


def output_id(job_id: str, fence: int, index: int) -> str:
    """The id of a file that one run of a job makes, which is its key in the store too: another run writes another."""
    return f"out_{job_id.removeprefix('job_')}_{fence}_{index}"


def job_of_output(output: str) -> str | None:
    """The job whose file this may be; None for what is no id of a file."""
    found = OUTPUT_ID.fullmatch(output)
    return f"job_{found[1]}" if found else None


def is_terminal_event(event_type: str) -> bool:
    """Whether an event of this type is the last one of its job."""
    return event_type.removeprefix("job.") in TERMINAL and event_type.startswith("job.")
