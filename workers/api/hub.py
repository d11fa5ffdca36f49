"""Tells everybody who waits in this process what happened to their job, over one Redis connection.

A blocking read a waiter would take one connection each; here one XREAD blocks on the stream of ends, which serves all
who want an answer whole, and on the event log of each job that somebody streams. A stream of our own among them
interrupts it when the set of jobs changes. Nothing is believed on the hub's word alone: whoever waits reads the ledger
itself when it starts, when numbers are missing and at every tick of silence.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import redis.asyncio
from redis.exceptions import RedisError

from inferfleet.tasks.errors import JobNotFound, LedgerUnavailable
from inferfleet.tasks.ledger import AsyncLedger
from inferfleet.tasks.records import Event, JobRecord
from inferfleet.workers import logs
from inferfleet.workers.api.place import Entry, Place

log = logs.get("api")

#: Longest block of one read: bounds how late a job is noticed whose wake-up Redis refused (disk full).
BLOCK_MS = 1000
ENTRIES_PER_READ = 1000
#: A reader that does not keep up loses its buffer and reads the log instead.
MAX_BUFFER = 2000
#: Silence after which a follower looks into the log itself.
TICK_SECONDS = 10.0
#: A Redis that restarts is waited for this long before waiters are told.
OUTAGE_SECONDS = 30.0
WAKE_TTL_SECONDS = 600
LOST_JOB = "the ledger has lost this job (Redis failed over to a replica that lagged); submit it again"
RETRY_SECONDS = 0.2
PAUSE_PER_STREAM, LONGEST_PAUSE = 0.00005, 0.01

T = TypeVar("T")


@dataclass(eq=False)
class Watch:
    """One reader's buffer of one job's entries."""

    job_id: str
    #: Somebody else watched the job before, so the hub may already be past what this reader has seen.
    joined_late: bool
    entries: list[Entry] = field(default_factory=list)
    lagged: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, entries: list[Entry]) -> None:
        if len(self.entries) + len(entries) > MAX_BUFFER:
            self.entries, self.lagged = [], True
        else:
            self.entries += entries
        self.changed.set()

    async def take(self, seconds: float) -> list[Entry] | None:
        """What came since the last call; None after `seconds` of silence."""
        if not await _set_within(self.changed, seconds):
            return None
        self.changed.clear()
        taken, self.entries = self.entries, []
        return taken


@dataclass(eq=False)
class _Stream:
    last: int
    watches: set[Watch] = field(default_factory=set)


class Hub:
    """The one reader. `run` is a task of the application; `follow` is for its routes."""

    def __init__(self, ledger: AsyncLedger, reader: "redis.asyncio.Redis") -> None:
        self._ledger = ledger
        self._reader = reader
        self._streams: dict[str, _Stream] = {}
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._ended_key = f"{ledger.prefix}ended"
        self._ended_id: str | None = None
        self._wake_key = f"{ledger.prefix}wake:{uuid4().hex}"
        self._wake_id = "0-0"
        self._woken = False
        self._pokes: set[asyncio.Task[None]] = set()
        self._failing_since: float | None = None
        self._num_outages = 0
        self.draining = asyncio.Event()

    @property
    def outage_seconds(self) -> float:
        """How long the reading has been failing; 0 while it works."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    async def run(self) -> None:
        """Reads for ever; a Redis that goes away is tried again."""
        while True:
            try:
                await self._read()
            except Exception as error:  # whatever it is: without this task everybody here would wait for ticks
                if self._failing_since is None:
                    self._failing_since = time.monotonic()
                    self._num_outages += 1
                    log.warning("hub_read_failed", error=type(error).__name__, reason=str(error)[:200])
                await asyncio.sleep(RETRY_SECONDS)

    def _look_again(self) -> None:
        """Redis was away, and another may have taken its place: who follows a job compares its log with what he saw."""
        for stream in self._streams.values():
            for watch in stream.watches:
                watch.lagged = True
                watch.changed.set()

    def watched(self, job_id: str) -> bool:
        """Whether somebody in this process still waits for the job."""
        return job_id in self._streams or job_id in self._waiting

    async def until_ended(self, job_id: str, tenant: str | None, seconds: float | None = None) -> JobRecord:
        """The job once it has ended, or as it is after `seconds` or when a shutdown begins; None = however long.

        Raises JobNotFound at once, LedgerUnavailable as `follow` does and for a job that was lost meanwhile.
        """
        give_up = None if seconds is None else time.monotonic() + seconds
        ended, outages = asyncio.Event(), self._num_outages
        self._waiting.setdefault(job_id, set()).add(ended)
        try:
            record = await self._ledger.get(job_id, tenant)
            # Not asyncio.timeout around it all: redis-py can swallow the cancellation that this would rest on.
            while not record.terminal and (left := self._patience(give_up)) > 0:
                await _set_within(ended, left)
                ended.clear()
                record = await self._patiently(self._ledger.get(job_id, tenant), outages) or record
            return record
        finally:
            self._waiting[job_id].discard(ended)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def _patience(self, give_up: float | None) -> float:
        """Seconds to wait for the next look."""
        if give_up is None:
            return TICK_SECONDS
        return 0.0 if self.draining.is_set() else min(TICK_SECONDS, give_up - time.monotonic())

    def drain(self) -> None:
        """A shutdown has begun: waits with a limit end now, their clients can take them up again elsewhere."""
        self.draining.set()
        for waiters in self._waiting.values():
            for ended in waiters:
                ended.set()

    @contextmanager
    def watch(self, job_id: str, after: int) -> Iterator[Watch]:
        """A buffer of the job's entries with numbers above `after`, or later ones if others watch it already."""
        stream = self._streams.get(job_id)
        watch = Watch(job_id, joined_late=stream is not None)
        if stream is None:
            stream = self._streams[job_id] = _Stream(after)
            self._poke()
        stream.watches.add(watch)
        try:
            yield watch
        finally:
            stream.watches.discard(watch)
            if not stream.watches and self._streams.get(job_id) is stream:
                del self._streams[job_id]

    async def follow(self, job_id: str, tenant: str | None, *, after: int = -1) -> AsyncGenerator[list[Event], None]:
        """The job's events above `after` in order, [] at a tick of silence, until it has ended.

        Raises JobNotFound at once; LedgerUnavailable at once if the first read fails, later only when Redis stays away
        for OUTAGE_SECONDS or has lost the job; and Conflict where events that were told are lost (`event_log.log`).
        """
        place, outages = Place(self._ledger, job_id, tenant, after), self._num_outages
        yield await place.read_log()
        with self.watch(job_id, place.after) as watch:
            behind = watch.joined_late
            while not place.ended:
                entries = [] if behind else await watch.take(TICK_SECONDS)
                behind = behind or entries is None or watch.lagged
                if entries and not behind:
                    if events := place.accept(entries):
                        yield events
                    behind = place.missing
                if behind:
                    watch.lagged = False
                    read = await self._patiently(place.read_log(), outages)
                    yield read or []
                    behind = place.more or read is None

    async def _patiently(self, asking: Awaitable[T], outages: int) -> T | None:
        """An answer of the ledger; None while Redis is away for no longer than a restart takes: the next tick asks.

        outages: how many there had been when the wait began. A job that is gone after another one was lost, and not
        deleted.
        """
        try:
            return await asking
        except JobNotFound:
            if self._num_outages == outages:
                raise
            raise LedgerUnavailable(LOST_JOB, retry_after=1) from None
        except LedgerUnavailable:
            if self.outage_seconds > OUTAGE_SECONDS:
                raise
            return None

    def _poke(self) -> None:
        """Makes the blocked read look at the set of jobs again; one poke serves all that come before it does."""
        if not self._woken:
            self._woken = True
            task = asyncio.ensure_future(self._send_wake())
            self._pokes.add(task)
            task.add_done_callback(self._pokes.discard)

    async def _send_wake(self) -> None:
        try:
            pipeline = self._ledger.redis.pipeline(transaction=False)
            pipeline.xadd(self._wake_key, {"w": "1"}, maxlen=1, approximate=False)
            pipeline.expire(self._wake_key, WAKE_TTL_SECONDS)
            await pipeline.execute()
        except (RedisError, OSError):
            self._woken = False  # the read's own timeout of BLOCK_MS picks the job up

    async def _read(self) -> None:
        if self._ended_id is None:
            # Not "$": that would skip what is added between two reads.
            last = await self._reader.execute_command("XREVRANGE", self._ended_key, "+", "-", "COUNT", 1)
            self._ended_id = last[0][0].decode() if last else "0-0"
        self._woken = False  # jobs added from here on are not in this read, so they poke again
        keys = [self._ended_key, self._wake_key, *(self._log_key(job_id) for job_id in self._streams)]
        ids = [self._ended_id, self._wake_id, *(f"{stream.last + 1}-0" for stream in self._streams.values())]
        command = ("XREAD", "COUNT", ENTRIES_PER_READ, "BLOCK", BLOCK_MS, "STREAMS", *keys, *ids)
        answer = list(_by_stream(await self._reader.execute_command(*command)))
        if self._failing_since is not None:
            self._failing_since = None
            self._look_again()
        for key, entries in answer:
            if key == self._wake_key:
                self._wake_id = entries[-1][0].decode()
            elif key == self._ended_key:
                self._ended_id = entries[-1][0].decode()
                self._tell_ended(_field(fields, b"id").decode() for _, fields in entries)
            else:
                self._deliver(key.rpartition(":")[2], [_entry(*entry) for entry in entries])
        if answer:
            # With many streams something is always there: a short pause lets one read bring it for all of them.
            await asyncio.sleep(min(LONGEST_PAUSE, PAUSE_PER_STREAM * len(self._streams)))

    def _log_key(self, job_id: str) -> str:
        return f"{self._ledger.prefix}events:{job_id}"

    def _tell_ended(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            for ended in self._waiting.get(job_id, ()):
                ended.set()

    def _deliver(self, job_id: str, entries: list[Entry]) -> None:
        stream = self._streams.get(job_id)
        if stream is not None:
            stream.last = entries[-1][0]
            for watch in stream.watches:
                watch.push(entries)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event was set before the time was over."""
    if not event.is_set():
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
    return True


def _entry(stream_id: bytes, fields: Any) -> Entry:
    number = int(stream_id.partition(b"-")[0]) - 1
    return number, _field(fields, b"e")


def _field(fields: Any, name: bytes) -> bytes:
    """A field of a stream entry, which redis-py gives as a dict or, raw, as a list of names and values."""
    value: bytes = fields[name] if isinstance(fields, dict) else fields[fields.index(name) + 1]
    return value


def _by_stream(answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """XREAD's answer, a list of pairs under RESP2 and a dict under RESP3; None after silence."""
    if isinstance(answer, dict):
        for key, groups in answer.items():
            yield key.decode(), groups[0]
    else:
        for key, entries in answer or ():
            yield key.decode(), entries
