"""The ledger's questions about jobs: what to send to Redis and how to read the answer. Every call may be sent twice."""

import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inferfleet.tasks import names
from inferfleet.tasks.call import Call, Steps, from_json, integer, opt, text, to_json
from inferfleet.tasks.errors import (
    AlreadyTerminal,
    EventLogFull,
    IdempotencyKeyReuse,
    InvalidRequest,
    JobNotFound,
    NotQueued,
    NotTerminal,
    QueueFull,
)
from inferfleet.tasks.event_log import all_events
from inferfleet.tasks.records import Beat, Claim, Done, Event, JobPage, JobRecord, Lost, Output, Submitted, Swept, Work
from inferfleet.tasks.refusals import refusal, retry_after

#: Of a job of which nothing more is known.
SMALL = Work()
#: Places that a claim looks at before it gives up; overdue jobs among them are ended on the way.
LOOK_AHEAD = 32
#: Claims in a row that may pass over a class of jobs that wait: then the least urgent has its turn (ageing).
AGEING = 32
#: Events of one job. The log is never cut, because a requeued job goes on from it; a fuller one is refused.
MAX_EVENTS = 100_000
ENTRIES_PER_SCAN = 500
MAX_PAGE = 100
#: Of how a process died.
MAX_REASON_CHARS = 500
MAX_KEY_CHARS = 255
#: An idempotency key: printable ASCII without spaces at its ends.
PRINTABLE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")

RECORD_FIELDS = (
    "state", "tenant", "model", "endpoint", "custom_id", "priority", "deadline_ms", "created_ms", "queued_ms",
    "started_ms", "claimed_ms", "finished_ms", "attempts", "deaths", "fence", "worker", "dead_letter", "error",
    "usage", "metrics", "metadata", "outputs", "progress", "response",
)  # fmt: skip
LIST_FIELDS = RECORD_FIELDS[:-1]


# Accepting and reading jobs ------------------------------------------------------------------------------------------


def submit(
    job_id: str,
    envelope: bytes,
    *,
    model: str,
    tenant: str,
    body_hash: str,
    priority: int = 0,
    deadline_ms: int | None = None,
    start_timeout_ms: int | None = None,
    idempotency_key: str | None = None,
    max_queued: int | None = None,
    custom_id: str | None = None,
    endpoint: str = names.CHAT_URL,
    metadata: Mapping[str, str] | None = None,
    webhook: str | None = None,
    webhook_words: Sequence[str] = names.WEBHOOK_ENDS,
    batch_id: str | None = None,
    work: Work = SMALL,
) -> Call[Submitted]:
    """Accept a job. Lower priority runs first. The same id or key with the same body_hash is a replay.

    webhook: a URL or the id of an endpoint, which is told of webhook_words (names.WEBHOOK_WORDS).
    batch_id: of the batch whose line this is; webhooks are told of the batch, not of its lines.
    work: for the tenant's fair turns and its quotas.
    """
    if not -100 <= priority <= 100:
        raise InvalidRequest("priority must lie between -100 and 100; lower runs first", param="priority")
    if idempotency_key is not None:
        check_idempotency_key(idempotency_key)
    digest = idempotency_digest(tenant, idempotency_key) if idempotency_key is not None else None

    def parse(answer: list[Any]) -> Submitted:
        verdict = text(answer[0])
        if verdict == "reuse":
            raise IdempotencyKeyReuse()
        if verdict == "no_endpoint":
            raise InvalidRequest(f"there is no webhook endpoint {webhook}", param="webhook")
        if verdict == "full":
            wait = retry_after(answer[1], integer(answer[2]))
            raise QueueFull(f"{answer[1]} jobs wait for {model}, the limit is {max_queued}", retry_after=wait)
        if verdict in ("quota", "beyond", "late"):
            raise refusal(verdict, answer[1:])
        return Submitted(text(answer[1]), replayed=verdict == "replay", queued=verdict == "new")

    fields = (job_id, envelope, model, tenant, priority, opt(deadline_ms), opt(start_timeout_ms), opt(digest))
    more = (body_hash, opt(max_queued), opt(custom_id), endpoint, to_json(metadata or None), opt(webhook))
    words = " ".join(webhook_words) if webhook else ""
    return Call(
        "submit", (*fields, *more, words, opt(batch_id), work.cost, affinity_code(work.affinity), work.tokens), parse
    )


def affinity_code(affinity: str | None) -> str:
    """Eight letters, so that it fits into a place in the queue."""
    return "" if affinity is None else hashlib.blake2b(affinity.encode(), digest_size=4).hexdigest()


def check_idempotency_key(key: str, param: str = "idempotency_key") -> None:
    """Raises InvalidRequest for a key that is empty, too long or not printable ASCII."""
    if not isinstance(key, str) or len(key) > MAX_KEY_CHARS or not PRINTABLE.fullmatch(key):
        raise InvalidRequest(f"{param} must be 1 to {MAX_KEY_CHARS} printable ASCII characters", param=param)


def idempotency_digest(tenant: str, key: str) -> str:
    """Keys of two tenants never meet, and a key of any length or alphabet makes a short Redis key."""
    return hashlib.sha256(f"{len(tenant)}:{tenant}{key}".encode()).hexdigest()


def get(job_id: str, tenant: str | None = None) -> Call[JobRecord]:
    """One job with its result. Another tenant's job is not found."""

    def parse(answer: list[Any] | None) -> JobRecord:
        if answer is None:
            raise JobNotFound(param="job_id")
        values, ahead, gap = answer
        rank, gap_ms = integer(ahead), integer(gap)
        eta = None if rank is None or gap_ms is None else (rank + 1) * gap_ms
        return record(job_id, RECORD_FIELDS, values, queue_position=rank, eta_ms=eta)

    return Call("get", (job_id, opt(tenant), *RECORD_FIELDS), parse)


def envelope(job_id: str, tenant: str | None = None) -> Call[bytes]:
    """A job as it was submitted. Another tenant's job is not found."""

    def parse(answer: list[Any] | None) -> bytes:
        if answer is None:
            raise JobNotFound(param="job_id")
        return bytes(answer[0][0])

    return Call("get", (job_id, opt(tenant), "envelope"), parse)


def record(job_id: str, fields: Sequence[str], values: Sequence[bytes | None], **extra: int | None) -> JobRecord:
    raw = {name: value or None for name, value in zip(fields, values, strict=True)}
    data: dict[str, Any] = {"response": None, **extra}
    for name, value in raw.items():
        if name in ("error", "usage", "metrics", "metadata", "outputs", "progress"):
            data[name] = from_json(value)
        elif name.endswith("_ms") or name in ("priority", "attempts", "deaths", "fence"):
            data[name] = integer(value)
        elif name == "dead_letter":
            data[name] = value is not None
        elif name == "response":
            data[name] = value
        else:
            data[name] = None if value is None else text(value)
    return JobRecord(id=job_id, **data)


def list_jobs(
    tenant: str,
    status: str | None = None,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Steps[JobPage]:
    """A tenant's jobs, newest first, without their response bodies. `after` is the last id of the page before."""
    if status is not None and status not in names.STATES:
        raise InvalidRequest(f"status must be one of {', '.join(names.STATES)}", param="status")
    return (yield from page(tenant, status, model, metadata, after, limit))


def page(
    tenant: str, index: str | None, model: str | None, metadata: Mapping[str, str] | None, after: str | None, limit: int
) -> Steps[JobPage]:
    """One page of those in an index: a state, `dead`, or None for all jobs."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequest(f"limit must lie between 1 and {MAX_PAGE}", param="limit")
    found: list[JobRecord] = []
    cursor = ""
    while True:
        filters = (tenant, opt(index), opt(model), to_json(metadata or None))
        rest = (opt(after), cursor, limit + 1 - len(found), ENTRIES_PER_SCAN, *LIST_FIELDS)
        cursor, more = yield Call("list", filters + rest, parse_list)
        found += more
        if not cursor or len(found) > limit:
            return JobPage(found[:limit], has_more=len(found) > limit)


def parse_list(answer: list[Any] | None) -> tuple[str, list[JobRecord]]:
    if answer is None:
        raise JobNotFound("after names no job of this tenant", param="after")
    return text(answer[0]), [record(text(job_id), LIST_FIELDS, values) for job_id, values in answer[1:]]


# Carrying jobs -------------------------------------------------------------------------------------------------------


def claim(
    model: str,
    *,
    worker: str,
    token: str,
    lease_ms: int = 15_000,
    online: bool = False,
    affinity: str = "",
    ageing: int = AGEING,
) -> Steps[Claim | None]:
    """The best waiting job of a model, or None. A token is good for one claim, however often it is sent.

    online: no lines of batches. affinity: of the claim before, for a job that runs well after it.
    """
    args = (model, worker, token, lease_ms, LOOK_AHEAD, ageing, "1" if online else "", affinity)
    found = yield Call("claim", args, lambda answer: answer)
    if text(found[0]) == "none":
        return None
    _, job_id, fence, envelope, attempt, deaths, created, deadline, now, next_seq, suspect, tenant, warm, priority = (
        found
    )
    published: list[Event] = []
    if int(next_seq) > 2:  # more than this claim's own job.queued and job.in_progress
        published = yield from all_events(text(job_id))
    return Claim(
        job_id=text(job_id),
        fence=int(fence),
        tenant=text(tenant),
        priority=int(priority),
        envelope=envelope,
        attempt=int(attempt),
        deaths=int(deaths),
        created_ms=int(created),
        now_ms=int(now),
        deadline_ms=integer(deadline),
        suspect=bool(suspect),
        published=[event for event in published if not event["type"].startswith("job.")],
        affinity=text(warm),
    )


def beat(worker: str, jobs: Sequence[tuple[str, int]], lease_ms: int) -> Call[dict[str, Beat]]:
    """Renew the leases of the jobs that moved since the last beat: job id -> ok | cancel | stale."""
    pairs = [part for pair in jobs for part in pair]

    def parse(answer: list[bytes]) -> dict[str, Any]:
        return {job_id: text(word) for (job_id, _), word in zip(jobs, answer, strict=True)}

    return Call("beat", (worker, lease_ms, *pairs), parse)


def publish(
    job_id: str, fence: int, events: Iterable[Mapping[str, Any]], token: str, *, behind: str = ""
) -> Call[Beat]:
    """Append events to a running job's log, once for each token; numbers are given by the ledger. The last progress
    among them is kept in the job's record too. behind: the token before, of the same fence; if the log lacks it (a
    failover lost it), the job is handed back and the answer is stale."""
    if " " in token:
        raise ValueError("a token holds no space")
    events = list(events)
    told = [event for event in events if event["type"] == names.PROGRESS][-1:]
    progress = to_json({"step": told[0]["step"], "steps": told[0]["steps"]}) if told else ""

    def parse(answer: bytes) -> Any:
        if answer == b"full":
            raise EventLogFull(f"a job may publish at most {MAX_EVENTS} events")
        return text(answer)

    said = [to_json(event) for event in events]
    return Call("publish", [job_id, fence, token, behind, MAX_EVENTS, progress, *said], parse)


def complete(
    job_id: str,
    fence: int,
    *,
    state: str,
    response: bytes | None = None,
    error: Mapping[str, Any] | None = None,
    usage: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    outputs: Sequence[Output] = (),
    keep: Sequence[str] = (),
    behind: str = "",
) -> Call[Done]:
    """End a running job and write its terminal event. A cancelling job ends as cancelled whatever is asked.

    outputs: the files of a job that completes. keep: keys of files in this Redis, which then live as long as the job;
    if the job ends otherwise, or the fence is stale, they are deleted. behind: the last token, as in `publish`.
    """
    if state not in names.TERMINAL:
        raise ValueError(f"state must be one of {sorted(names.TERMINAL)}, not {state!r}")
    texts = (to_json(value) for value in (error, usage, metrics, list(outputs) or None))
    return Call("complete", [job_id, fence, state, opt(response), *texts, behind, *keep], as_word)


def as_word(answer: bytes) -> Any:
    return text(answer)


def release(job_id: str, fence: int, *, suspect: bool = False) -> Call[str]:
    """Hand a running job back, deaths unchanged: released | stale. `suspect` asks that it run alone next time."""
    return Call("release", (job_id, fence, "1" if suspect else ""), as_word)


def lose(job_id: str, fence: int, *, max_deaths: int = 3, reason: str = "") -> Call[Lost]:
    """Count a death now, because the process that ran the job is known to be gone; reason: how, for whoever looks."""
    return Call("lose", (job_id, fence, max_deaths, reason[:MAX_REASON_CHARS]), as_word)


def reap(
    limit: int = 100, max_deaths: int = 3, *, silence_ms: int = 0, lease_ms: int = 0
) -> Call[list[tuple[str, Lost]]]:
    """Take back jobs whose lease is over on Redis time. Where nobody asked for longer than silence_ms (0 = no matter),
    Redis was away or stood still, and no lease could be renewed: for lease_ms from then nothing is taken back."""
    return Call("reap", (limit, max_deaths, silence_ms, lease_ms), as_lost)


def as_lost(answer: list[bytes]) -> list[tuple[str, Any]]:
    """Ids of jobs and what became of them."""
    words = [text(word) for word in answer]
    return list(zip(words[::2], words[1::2], strict=True))


def bury(worker: str, max_deaths: int = 3) -> Call[list[tuple[str, Lost]]]:
    """Take back the jobs of a worker whose process is known to be gone, whatever their leases."""
    return Call("bury", (worker, max_deaths), as_lost)


def sweep(limit: int = 100, *, result_ttl_ms: int, dead_ttl_ms: int | None = None) -> Call[Swept]:
    """Expire waiting jobs, delete ended jobs older than result_ttl_ms (dead letters: dead_ttl_ms, where given), count
    what waits by model."""

    def parse(answer: list[Any]) -> Swept:
        expired, deleted, ring = answer
        waiting = {text(model): count for model, count in zip(ring[::2], ring[1::2], strict=True)}
        return Swept([text(job_id) for job_id in expired], deleted, waiting)

    return Call("sweep", (limit, result_ttl_ms, dead_ttl_ms or result_ttl_ms), parse)


# Changing jobs -------------------------------------------------------------------------------------------------------


def cancel(job_id: str, tenant: str | None = None) -> Call[str]:
    """cancelled (it waited) or cancelling (it runs). Asking again is no error; another end is AlreadyTerminal."""

    def parse(answer: bytes | None) -> str:
        state = existing(answer)
        if state not in ("cancelled", "cancelling"):
            raise AlreadyTerminal(f"the job is already {state}")
        return state

    return Call("cancel", (job_id, opt(tenant)), parse)


def existing(answer: bytes | None) -> str:
    if answer is None:
        raise JobNotFound(param="job_id")
    return text(answer)


def update(
    job_id: str, tenant: str | None = None, *, priority: int | None = None, deadline_ms: int | None = None
) -> Call[None]:
    """Change a waiting job's place. None leaves a value as it is."""
    if priority is not None and not -100 <= priority <= 100:
        raise InvalidRequest("priority must lie between -100 and 100; lower runs first", param="priority")

    def parse(answer: bytes | None) -> None:
        state = existing(answer)
        if state != "queued":
            raise NotQueued(f"the job is {state}, and only a queued one can be changed")

    return Call("update", (job_id, opt(tenant), opt(priority), opt(deadline_ms)), parse)


def retry(job_id: str, tenant: str | None = None) -> Call[None]:
    """Queue a failed, cancelled, expired or incomplete job again from the start, without its old time limits."""

    def parse(answer: list[bytes] | None) -> None:
        if answer is None:
            raise JobNotFound(param="job_id")
        verdict, before = text(answer[0]), text(answer[1])
        if verdict == "refused":
            raise (
                AlreadyTerminal("a completed job is not run again")
                if before == "completed"
                else NotTerminal(f"the job is {before}")
            )

    return Call("retry", (job_id, opt(tenant), uuid.uuid4().hex), parse)


def delete(job_id: str, tenant: str | None = None) -> Call[None]:
    """Forget an ended job, its events and its idempotency key."""

    def parse(answer: bytes) -> None:
        word = text(answer)
        if word == "missing":
            raise JobNotFound(param="job_id")
        if word != "deleted":
            raise NotTerminal(f"the job is {word}; cancel it first")

    return Call("delete", (job_id, opt(tenant), uuid.uuid4().hex), parse)
