"""Dead letters: jobs that took down every worker or engine that tried them. Listed, looked into, replayed, deleted.

A dead letter is a failed job like others, with the code worker_lost, but kept longer, and with what is known of each
attempt. Replaying it is a retry; deleting it is what deletes any job.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inferfleet.tasks import calls
from inferfleet.tasks.call import Call, Key, Steps, text
from inferfleet.tasks.errors import JobNotFound
from inferfleet.tasks.records import JobPage, JobRecord


@dataclass(frozen=True)
class Attempt:
    """An attempt that ended in a death, or in a crash with others. Times are Unix milliseconds of the Redis server."""

    #: Counts from 1; an attempt that was handed back did not count, so its number comes again.
    attempt: int
    worker: str
    claimed_ms: int
    ended_ms: int
    #: lost: its worker or engine died with it; crowd: the engine died with others in it, so it is tried alone next.
    how: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As the API shows it, times in Unix seconds."""
        return {
            "attempt": self.attempt,
            "worker": self.worker,
            "started_at": self.claimed_ms / 1000,
            "ended_at": self.ended_ms / 1000,
            "outcome": self.how,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class DeadLetter:
    record: JobRecord
    #: The last twenty, oldest first.
    attempts: list[Attempt]


def dead_letters(tenant: str, model: str | None = None, after: str | None = None, limit: int = 20) -> Steps[JobPage]:
    """A tenant's dead letters, newest first. `after` is the last id of the page before."""
    return (yield from calls.page(tenant, "dead", model, None, after, limit))


def dead_letter(job_id: str, tenant: str | None = None) -> Steps[DeadLetter]:
    """One, with its attempts. JobNotFound for a job that is none."""
    record = yield calls.get(job_id, tenant)
    if not record.dead_letter:
        raise JobNotFound("there is no dead letter with this id", param="job_id")
    attempts = yield Call("", ("LRANGE", Key(f"tries:{job_id}"), 0, -1), read_attempts)
    return DeadLetter(record, attempts)


def read_attempts(answer: Sequence[bytes]) -> list[Attempt]:
    return [Attempt(**json.loads(text(entry))) for entry in answer]


def replay(job_id: str, tenant: str | None = None) -> Steps[str]:
    """Queue a dead letter again from the start; answers its model, which wants a ring. JobNotFound as above."""
    letter = yield from dead_letter(job_id, tenant)
    yield calls.retry(job_id, tenant)
    return letter.record.model


def delete_dead_letter(job_id: str, tenant: str | None = None) -> Steps[None]:
    """Forget a dead letter. JobNotFound as above."""
    yield from dead_letter(job_id, tenant)
    yield calls.delete(job_id, tenant)
