"""The OpenAPI document's part about dead letters."""

from pydantic import BaseModel

from inferfleet.tasks.job_object import Job
from inferfleet.workers.api.openapi import JobPageAnswer, answer, answers


class AttemptAnswer(BaseModel):
    """An attempt that took its worker or engine down; times in Unix seconds."""

    attempt: int
    worker: str
    started_at: float
    ended_at: float
    #: lost, or crowd: the engine died with other jobs in it.
    outcome: str
    reason: str


class DeadLetterAnswer(BaseModel):
    """A dead letter."""

    id: str
    object: str
    last_worker: str | None
    attempts: list[AttemptAnswer]
    job: Job


MODELS: tuple[type[BaseModel], ...] = (AttemptAnswer, DeadLetterAnswer)

LIST = answers({"200": answer("one page", JobPageAnswer)}, 404, 422)
GET = answers({"200": answer("the dead letter", DeadLetterAnswer)}, 404)
REPLAY = answers({"202": answer("the job; poll its `Location`", Job)}, 404, 409)
DELETE = answers({"200": {"description": "gone"}}, 404)
