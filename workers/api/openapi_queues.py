"""The OpenAPI document's part about queues."""

from typing import Annotated

from pydantic import BaseModel, Field

from inferfleet.tasks.contracts import Contract
from inferfleet.workers.api.openapi import BODY_ERRORS, ErrorAnswer, answer, answers, body


class QueueAnswer(BaseModel):
    """A model's queue."""

    object: str
    model: str
    queued: int
    running: int
    #: Of the job that waits longest; 0 when none does.
    oldest_age_seconds: float
    paused: bool
    #: Unix seconds.
    paused_at: float | None
    #: Between the ends of two jobs, as far as it was measured.
    seconds_per_job: float | None
    #: tenant -> jobs that wait
    tenants: dict[str, int]


class QueueList(BaseModel):
    object: str
    data: list[QueueAnswer]


class Purge(Contract):
    """Which waiting jobs to cancel."""

    #: The model again, so that nobody purges by mistake.
    confirm: Annotated[str, Field(max_length=256)]
    #: Only this tenant's jobs; another than the caller's own is for operators.
    tenant: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class PurgeAnswer(BaseModel):
    """What was cancelled."""

    object: str
    model: str
    cancelled: int
    #: Jobs are left that waited when the purge began: repeat it.
    more: bool


MODELS: tuple[type[BaseModel], ...] = (QueueAnswer, QueueList, Purge, PurgeAnswer)

_QUEUE = {"200": answer("the queue", QueueAnswer)}
_OPERATORS = {"403": answer("this is for operators", ErrorAnswer)}
LIST = answers({"200": answer("the queues", QueueList)}, 422)
GET = answers(_QUEUE, 404, 422)
PAUSE = answers(_QUEUE | _OPERATORS, 404, 422)
PURGE = body(Purge) | answers({"200": answer("what was cancelled", PurgeAnswer)} | _OPERATORS, *BODY_ERRORS, 404)
