"""The ledger's questions about a job's events: what to send to Redis and how to read the answer."""

import json
from collections.abc import Sequence
from typing import Any

from inferfleet.tasks import names
from inferfleet.tasks.call import Call, Key, Steps, opt, text
from inferfleet.tasks.errors import Conflict, InvalidRequest, JobNotFound
from inferfleet.tasks.records import Event

EVENTS_PER_READ = 1000
#: Longest time that a read of events blocks on the server, below redis-py's own 5 s for a silent socket.
MAX_BLOCK_MS = 4000
#: Doubles, which Lua counts with, are exact up to here; far more than a job can have events.
MAX_PLACE = 2**53
LOST_EVENTS = (
    "the ledger has lost events of this job that were told before (Redis failed over to a replica that lagged); "
    "read the job's events again from their beginning"
)


def events(
    job_id: str, tenant: str | None = None, *, after: int = -1, count: int = EVENTS_PER_READ
) -> Call[list[Event]]:
    """The events with a number above `after`, oldest first, at most `count`."""
    check_place(after)
    return Call("events", (job_id, opt(tenant), after, count), lambda answer: read_log(answer)[1])


def log(
    job_id: str, tenant: str | None = None, *, after: int = -1, last: Event | None = None
) -> Call[tuple[str, list[Event]]]:
    """The job's state and, read in the same moment, its events: when it has ended and none is left, none will come.

    last: event `after` as it was read before. Raises Conflict where the log has none or another there: Redis failed
    over to a replica that had not seen it, and what comes behind it now does not follow from what was read.
    """
    check_place(after)
    known = int(last is not None)

    def parse(answer: list[Any] | None) -> tuple[str, list[Event]]:
        state, found = read_log(answer)
        if last is None:
            return state, found
        # Of a job that was retried the old events are gone, and the numbers go on.
        if not found or (found[0]["sequence_number"] == after and found[0] != last):
            raise Conflict(LOST_EVENTS)
        return state, [event for event in found if event["sequence_number"] > after]

    return Call("events", (job_id, opt(tenant), after - known, EVENTS_PER_READ + known), parse)


def check_place(after: int) -> None:
    """Raises InvalidRequest for what is no sequence_number, nor -1 for the beginning."""
    if isinstance(after, bool) or not isinstance(after, int) or not -1 <= after <= MAX_PLACE:
        raise InvalidRequest("after must be a whole number between -1 and 2**53", param="after")


def read_log(answer: list[Any] | None) -> tuple[str, list[Event]]:
    if answer is None:
        raise JobNotFound(param="job_id")
    return text(answer[0]), [event(entry) for entry in answer[2]]


def event(entry: Sequence[Any]) -> Event:
    """A stream entry: `[b"<n+1>-0", [b"e", json]]`."""
    number = int(entry[0].partition(b"-")[0]) - 1
    return {"sequence_number": number, **json.loads(entry[1][1])}


def wait_events(
    job_id: str, tenant: str | None = None, *, after: int = -1, block_ms: int = MAX_BLOCK_MS
) -> Steps[list[Event]]:
    """Like `events`, but waits on the server for the next one. Empty when nothing came in block_ms, or none can."""
    state, found = yield log(job_id, tenant, after=after)
    if found or state in names.TERMINAL:
        return found
    return (yield next_events(job_id, after=after, block_ms=block_ms))


def next_events(
    job_id: str, *, after: int, count: int = EVENTS_PER_READ, block_ms: int = MAX_BLOCK_MS
) -> Call[list[Event]]:
    """Wait on the server for events after a number. For whoever may see the job: it asks for no tenant. Empty when
    nothing came in block_ms, also for a job that was deleted or has ended."""
    check_place(after)
    block = max(1, min(block_ms, MAX_BLOCK_MS))
    args = ("XREAD", "COUNT", count, "BLOCK", block, "STREAMS", Key(f"events:{job_id}"), f"{after + 1}-0")
    return Call("", args, parse_stream)


def parse_stream(answer: Any) -> list[Event]:
    """XREAD's answer, a list under RESP2 and a dict under RESP3."""
    if not answer:
        return []
    entries = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
    return [event_of(fields, stream_id) for stream_id, fields in entries]


def event_of(fields: Any, stream_id: bytes) -> Event:
    body = fields[b"e"] if isinstance(fields, dict) else fields[1]
    return event((stream_id, (b"e", body)))


def all_events(job_id: str) -> Steps[list[Event]]:
    found: list[Event] = []
    while True:
        log = yield events(job_id, after=found[-1]["sequence_number"] if found else -1, count=EVENTS_PER_READ)
        found += log
        if len(log) < EVENTS_PER_READ:
            return found
