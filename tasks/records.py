"""What the ledger answers with: plain frozen data. Refuses to know Redis and how a record is shown to a user."""

from dataclasses import dataclass
from typing import Any, Literal

from inferfleet.tasks import names

#: One entry of a job's log: `{"type", "sequence_number", ...}`.
Event = dict[str, Any]
Beat = Literal["ok", "cancel", "stale"]
Lost = Literal["requeued", "dead", "cancelled", "expired", "stale"]
#: missing: a file that the job's end names is not there (any more).
Done = Literal["done", "same", "stale", "missing"]
#: A file as the job's record holds it: id, index, content_type, size_bytes, hash ("sha256:..."), width, height, seed.
Output = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a job asks for, as it was estimated when it was submitted."""

    #: Of prompt and answer, for quotas.
    tokens: int = 1
    #: For fair turns among the jobs of one model: any unit that they share.
    cost: int = 1
    #: Jobs with the same one run well one after the other on one worker. Any text.
    affinity: str | None = None


@dataclass(frozen=True)
class Submitted:
    job_id: str
    #: The job existed before this call: the same idempotency key or job id came with the same body.
    replayed: bool
    #: A new job waits, so a turn is worth ringing for.
    queued: bool


@dataclass(frozen=True)
class Claim:
    job_id: str
    #: Names this claim in every later call; a higher one exists as soon as the job was taken back.
    fence: int
    tenant: str
    #: In the engine too: that of the queue, which a batch or a later change may have set, not the envelope's.
    priority: int
    envelope: bytes
    #: Counts from 1. A released attempt does not count.
    attempt: int
    deaths: int
    created_ms: int
    #: Redis time of the claim; with deadline_ms it gives the time that is left, whatever this machine's clock says.
    now_ms: int
    deadline_ms: int | None
    #: Ran in a batch that crashed, so it should run alone this once.
    suspect: bool
    #: What earlier attempts published, in order, without the ledger's own `job.*` events: go on after it.
    published: list[Event]
    #: What to ask for in the next claim of this model; '' = nothing.
    affinity: str = ""


@dataclass(frozen=True)
class Swept:
    expired: list[str]
    deleted: int
    #: model -> turns that its waiting jobs are worth
    ring: dict[str, int]


@dataclass(frozen=True)
class JobRecord:
    """One job as the ledger holds it. Times are Unix milliseconds of the Redis server."""

    id: str
    state: names.State
    tenant: str
    model: str
    endpoint: str
    custom_id: str | None
    priority: int
    deadline_ms: int | None
    created_ms: int
    #: When it (last) began to wait: at submit, or at an explicit retry.
    queued_ms: int
    #: The first claim, and the latest.
    started_ms: int | None
    claimed_ms: int | None
    finished_ms: int | None
    attempts: int
    deaths: int
    fence: int
    worker: str | None
    dead_letter: bool
    #: JSON body of the answer. Pages of a list leave it out.
    response: bytes | None
    error: dict[str, Any] | None
    usage: dict[str, Any] | None
    metrics: dict[str, Any] | None
    metadata: dict[str, str] | None
    #: The files that it made, of a completed job.
    outputs: list[Output] | None = None
    #: How far the present run is, as it last told: {"step", "steps"}.
    progress: dict[str, int] | None = None
    #: Jobs ahead of this one in its model's queue; None unless it waits.
    queue_position: int | None = None
    #: Milliseconds until its turn at the present pace; None where no pace is known.
    eta_ms: int | None = None

    @property
    def terminal(self) -> bool:
        return self.state in names.TERMINAL


@dataclass(frozen=True)
class JobPage:
    jobs: list[JobRecord]
    has_more: bool
