"""Tells everybody who waits in this process what happened to their job, over one Redis connection.

A blocking read a waiter would take one connection each; here one XREAD blocks on the event logs of all watched jobs.
A stream of our own among them interrupts it when the set of jobs changes. Nothing is believed on the hub's word alone:
a follower reads the log itself when it starts, when numbers are missing and at every tick of silence.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import redis.asyncio
import structlog
from redis.exceptions import RedisError

from inferfleet.tasks import calls, names
from inferfleet.tasks.errors import LedgerUnavailable
from inferfleet.tasks.ledger import AsyncLedger
from inferfleet.tasks.records import Event

log = structlog.get_logger(__name__)

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

#: (number of the event, its JSON without the number)
Entry = tuple[int, bytes]


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
        if not self.changed.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self.changed.wait()
            except TimeoutError:
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
        self._wake_key = f"{ledger.prefix}wake:{uuid4().hex}"
        self._wake_id = "0-0"
        self._woken = False
        self._pokes: set[asyncio.Task[None]] = set()
        self._failing_since: float | None = None

    @property
    def outage_seconds(self) -> float:
        """How long the reading has been failing; 0 while it works."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    async def run(self) -> None:
        """Reads for ever; a Redis that goes away is tried again."""
        while True:
            try:
                await self._read()
                self._failing_since = None
            except (RedisError, OSError) as error:
                if self._failing_since is None:
                    self._failing_since = time.monotonic()
                    log.warning("hub.read_failed", error=type(error).__name__)
                await asyncio.sleep(0.2)

    def watched(self, job_id: str) -> bool:
        """Whether somebody in this process still waits for the job."""
        return job_id in self._streams

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

    async def follow(
        self, job_id: str, tenant: str | None, *, after: int = -1, states_only: bool = False, tick: float = TICK_SECONDS
    ) -> AsyncGenerator[list[Event], None]:
        """The job's events above `after` in order, [] at a tick of silence, until it has ended.

        `states_only` leaves the deltas out undecoded, for those who want the end alone. Raises JobNotFound, and
        LedgerUnavailable at once if the first read fails, later only when Redis stays away for OUTAGE_SECONDS.
        """
        place = _Place(self._ledger, job_id, tenant, after, states_only)
        yield await place.read_log()
        with self.watch(job_id, place.after) as watch:
            behind = watch.joined_late
            while not place.ended:
                entries = [] if behind else await watch.take(tick)
                behind = behind or entries is None or watch.lagged
                if entries and not behind:
                    if events := place.accept(entries):
                        yield events
                    behind = place.missing
                if behind:
                    watch.lagged = False
                    yield await self._reread(place)
                    behind = place.more

    async def _reread(self, place: "_Place") -> list[Event]:
        try:
            return await place.read_log()
        except LedgerUnavailable:
            if self.outage_seconds > OUTAGE_SECONDS:
                raise
            return []  # the next tick asks again

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
        self._woken = False  # jobs added from here on are not in this read, so they poke again
        keys = [self._wake_key, *(f"{self._ledger.prefix}events:{job_id}" for job_id in self._streams)]
        ids = [self._wake_id, *(f"{stream.last + 1}-0" for stream in self._streams.values())]
        answer = await self._reader.execute_command(
            "XREAD", "COUNT", ENTRIES_PER_READ, "BLOCK", BLOCK_MS, "STREAMS", *keys, *ids
        )
        for key, entries in _by_stream(answer):
            if key == self._wake_key:
                self._wake_id = entries[-1][0].decode()
            else:
                self._deliver(key.rpartition(":")[2], [_entry(*entry) for entry in entries])

    def _deliver(self, job_id: str, entries: list[Entry]) -> None:
        stream = self._streams.get(job_id)
        if stream is not None:
            stream.last = entries[-1][0]
            for watch in stream.watches:
                watch.push(entries)


class _Place:
    """How far one reader has come in one log."""

    def __init__(self, ledger: AsyncLedger, job_id: str, tenant: str | None, after: int, states_only: bool) -> None:
        self._ledger = ledger
        self._job_id = job_id
        self._tenant = tenant
        self._states_only = states_only
        self.after = after
        self.ended = False
        self.missing = False
        self.more = False

    async def read_log(self) -> list[Event]:
        """One page of the log itself; `more` says that another may follow."""
        state, events = await self._ledger.run(calls.log(self._job_id, self._tenant, after=self.after))
        self.more, self.missing = len(events) == calls.EVENTS_PER_READ, False
        if events:
            self.after = events[-1]["sequence_number"]
        # A job that was retried has an earlier end in its numbers: the state decides, and only on the last page.
        self.ended = state in names.TERMINAL and not self.more
        return events

    def accept(self, entries: list[Entry]) -> list[Event]:
        """The new ones among entries that the hub brought; `missing` = there is a hole before them, read the log."""
        fresh = [entry for entry in entries if entry[0] > self.after]
        self.missing = bool(fresh) and fresh[0][0] != self.after + 1
        if self.missing or not fresh:
            return []
        self.after = fresh[-1][0]
        # Only the ledger's own events start like this; whoever waits for the end is spared decoding the rest.
        shown = [entry for entry in fresh if not self._states_only or entry[1].startswith(b'{"type":"job.')]
        events = [{"sequence_number": number, **json.loads(body)} for number, body in shown]
        self.ended = bool(events) and names.is_terminal_event(events[-1]["type"])
        return events


def _entry(stream_id: bytes, fields: Any) -> Entry:
    number = int(stream_id.partition(b"-")[0]) - 1
    return number, fields[b"e"] if isinstance(fields, dict) else fields[1]


def _by_stream(answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """XREAD's answer, a list of pairs under RESP2 and a dict under RESP3; None after silence."""
    if isinstance(answer, dict):
        for key, groups in answer.items():
            yield key.decode(), groups[0]
    else:
        for key, entries in answer or ():
            yield key.decode(), entries
