"""Calls about a model's queue as a whole: what waits in it, pause, resume, purge. Knows no single job."""

from dataclasses import dataclass
from typing import Any

from inferfleet.tasks.call import Call, Steps, integer, opt, text
from inferfleet.tasks.errors import InvalidRequest

#: Jobs that one script cancels, so that none holds Redis for long, and that one purge cancels.
CLEAR_STEP = 100
MAX_PURGED = 100_000


@dataclass(frozen=True)
class Queue:
    """The jobs of one model. Times are seconds."""

    model: str
    waiting: int
    running: int
    #: Of those that wait; 0 when none does.
    oldest_age: float
    #: Unix seconds since when no job is given out; None while jobs are.
    paused_at: float | None
    #: Between two jobs' ends, as far as it was measured.
    seconds_per_job: float | None
    #: tenant -> jobs that wait
    tenants: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "object": "queue",
            "model": self.model,
            "queued": self.waiting,
            "running": self.running,
            "oldest_age_seconds": self.oldest_age,
            "paused": self.paused_at is not None,
            "paused_at": self.paused_at,
            "seconds_per_job": self.seconds_per_job,
            "tenants": self.tenants,
        }


@dataclass(frozen=True)
class Purged:
    """What a purge did, and what it left: jobs beyond MAX_PURGED, or that came meanwhile."""

    cancelled: int
    #: More of those that waited when it began are left; purge again.
    more: bool


def queues(model: str | None = None, tenant: str | None = None) -> Call[list[Queue]]:
    """The queues that have or had jobs, by model; or one. tenant: only its jobs are counted apart."""

    def parse(answer: list[Any]) -> list[Queue]:
        now = int(answer[0])
        return sorted((queue_of(entry, now) for entry in answer[1:]), key=lambda queue: queue.model)

    return Call("queues", (opt(model), opt(tenant)), parse)


def queue_of(entry: list[Any], now_ms: int) -> Queue:
    model, waiting, running, oldest, paused, gap, tenants = entry
    paused_ms, gap_ms = integer(paused), integer(gap)
    counts = zip(tenants[::2], tenants[1::2], strict=True)
    return Queue(
        model=text(model),
        waiting=waiting,
        running=running,
        oldest_age=max(0, now_ms - int(oldest)) / 1000 if oldest else 0.0,
        paused_at=None if paused_ms is None else paused_ms / 1000,
        seconds_per_job=None if gap_ms is None else gap_ms / 1000,
        tenants={text(tenant): count for tenant, count in sorted(counts) if count},
    )


def pause(model: str) -> Call[int]:
    """Give no job of this model to a worker any more; what runs goes on, what comes waits. Answers how many wait."""
    return Call("pause", (model, "1"), int)


def resume(model: str) -> Call[int]:
    """Give jobs again; answers how many wait, which want a ring."""
    return Call("pause", (model, ""), int)


def purge(model: str, *, confirm: str, tenant: str | None = None, limit: int = MAX_PURGED) -> Steps[Purged]:
    """Cancel the jobs that wait for a model now (of one tenant), at most `limit`. Each ends once, and whoever waits for
    it is told. confirm: the model again. Cut short, it may simply be repeated."""
    if confirm != model:
        raise InvalidRequest("confirm must be the name of the model whose jobs are to be cancelled", param="confirm")
    youngest, last, cancelled = "", "", 0
    while cancelled < limit:
        step = min(CLEAR_STEP, limit - cancelled)
        youngest, last, count = yield Call("clear", (model, opt(tenant), step, youngest, last), read_step)
        cancelled += count
        if not last:
            return Purged(cancelled, more=False)
    return Purged(cancelled, more=True)


def read_step(answer: list[Any]) -> tuple[str, str, int]:
    return text(answer[0]), text(answer[1]), answer[2]
