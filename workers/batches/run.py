"""One batch from its input to its files. Knows the ledger and the store; no HTTP, no Celery but the bell.

Whatever happens to the process, the next runner goes on from what the ledger holds: which lines have ended. A line's
job has an id that follows from batch and line, so submitting it again finds it; its end is written and its job
forgotten in one script. Never more than a window of lines is under way for one model, and only these are in memory.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from inferfleet.tasks import batches, files, names, roster
from inferfleet.tasks.batches import BatchRecord, Ended, Held, Line
from inferfleet.tasks.call import Call, Key
from inferfleet.tasks.contracts import body_hash
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.errors import (
    AlreadyTerminal,
    FileNotFound,
    FleetError,
    IdempotencyKeyReuse,
    JobNotFound,
    QueueFull,
    QuotaExceeded,
)
from inferfleet.tasks.files import Part
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import Store
from inferfleet.workers import logs
from inferfleet.workers.batches import lines
from inferfleet.workers.batches.exchange import CONTENT_TYPE, Exchange
from inferfleet.workers.batches.plan import Plan, Rules, Wrong, make_plan
from inferfleet.workers.batches.reader import LineReader, Prepared
from inferfleet.workers.batches.spool import Spool
from inferfleet.workers.patience import until_answered
from inferfleet.workers.url_signing import signed_url

log = logs.get("batches")

T = TypeVar("T")

#: The tail becomes a part of the shelf when it has so many bytes.
SEAL_BYTES = 1 << 20
#: Lines in one commit, so that no script holds Redis for long.
COMMIT_LINES = 200
#: How long a runner waits for an end before it looks for itself, and before it sees that it should stop.
LOOK_MS = 500
#: Ends that come close to each other are read together.
GATHER_SECONDS = 0.01
FULL_SECONDS = 1.0


class Stopped(Exception):
    """The runner ends, or lost the batch to another one."""


@dataclass
class Tools:
    """What all runs of one process share."""

    settings: Settings
    ledger: Ledger
    store: Store
    doorbell: Doorbell
    #: Set when the process ends.
    closing: threading.Event


@dataclass
class Feed:
    """The lines of one model: those that wait here, in order, and how many are under way."""

    waiting: deque[int]
    flying: int = 0
    #: time.monotonic() before which nothing more is submitted, because the queue was full.
    pause_until: float = 0.0


@dataclass
class Flying:
    """A line whose job is in the ledger."""

    number: int
    line: Prepared
    model: str


@dataclass
class BatchRun:
    """Runs one batch. The runner that carries it keeps `held` up to date, and sets `lost`."""

    tools: Tools
    batch: BatchRecord
    held: Held
    lost: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._feeds: dict[str, Feed] = {}
        self._flying: dict[str, Flying] = {}
        self._ready: list[Line] = []
        self._num_ended = self.batch.lines
        self._num_parts = self.batch.parts
        self._tail_bytes = 0
        self._total = 0
        self._seen = "$"
        self._halted = False

    def run(self) -> str:
        """Until the batch has ended: its status. Raises Stopped."""
        exchange = Exchange(self.tools.settings, self.tools.store, self)
        with Spool() as spool:
            try:
                if self.batch.input_url is not None:
                    exchange.fetch()
            except Wrong as wrong:
                return self._give_up(wrong)
            self._fetch(spool)
            plan = self._plan(spool)
            if plan.errors:
                return self._reject(plan.errors)
            self._start(plan, spool)
            while self._num_ended < self._total:
                self.check()
                self._round()
            return self._finish(exchange)

    # Reading the input ------------------------------------------------------------------------------------------

    def _fetch(self, spool: Spool) -> None:
        for part in self.say(files.parts_of(self.batch.input_shelf)):
            self.check()
            spool.write(self.patiently(partial(self.tools.store.get, part.key, part.sha256)))

    def _plan(self, spool: Spool) -> Plan:
        settings, only, custom_ids = self.tools.settings, b"", self.batch.custom_ids
        if self.batch.retry_of is not None:
            only = self.say(batches.read_bits(f"batch_only:{self.batch.id}"))
        chosen = None if custom_ids is None else frozenset(custom_ids)

        def wanted(place: int, custom_id: str) -> bool:
            return (not only or batches.bit(only, place)) and (chosen is None or custom_id in chosen)

        models = {*self._say_cards(), *settings.models}
        largest = settings.max_edit_bytes if self.batch.endpoint == names.EDITS_URL else settings.max_body_bytes
        return make_plan(spool, Rules(self.batch.endpoint, models, largest, wanted), self.check)

    def _say_cards(self) -> dict[str, dict[str, Any]]:
        return self.patiently(self.tools.ledger.cards)

    def _reject(self, errors: list[dict[str, Any]]) -> str:
        return self._ours(self.say(batches.reject(self.batch.id, self.batch.fence, errors)))

    def _give_up(self, wrong: Wrong) -> str:
        """The input cannot be had; what was copied of it goes."""
        status = self._reject([wrong.told(None)])
        try:
            keys = self.say(files.delete_file(self.batch.input_file_id, uploading=True))
        except FileNotFound:
            return status
        if keys and not self.tools.store.in_ledger:
            self.patiently(partial(self.tools.store.forget, keys))
        return status

    def _start(self, plan: Plan, spool: Spool) -> None:
        self._total = plan.total
        status = self._ours(self.say(batches.start(self.batch.id, self.batch.fence, self._total, plan.model)))
        self.held = Held(status, self.held.overdue)
        done = self.say(batches.read_bits(f"batch_done:{self.batch.id}"))
        for model, order in plan.order.items():
            self._feeds[model] = Feed(deque(number for number in order if not batches.bit(done, number)))
        self._reader = LineReader(spool, self.batch, self._say_cards, self._link)
        self._tail_bytes = len(self.say(batches.read_tail(self.batch.id)))
        log.info("batch_started", total=self._total, ended=self._num_ended, models=len(self._feeds))

    # Running the lines ------------------------------------------------------------------------------------------

    @property
    def _stopping(self) -> bool:
        """No line begins any more."""
        return self.held.status == "cancelling" or self.held.overdue

    def _round(self) -> None:
        """Give out lines, take in ends."""
        if not self._stopping:
            for model, feed in self._feeds.items():
                self._top_up(model, feed)
        elif not self._halted:
            self._halt()
        self._collect()
        if self._stopping and not self._flying:
            self._end_the_rest()
        if self._ready:
            self._commit()
        elif self._num_ended < self._total:
            self._wait_for_ends()

    def _top_up(self, model: str, feed: Feed) -> None:
        num_new, now = 0, time.monotonic()
        while feed.waiting and feed.flying < self.tools.settings.batch_window and now >= feed.pause_until:
            if len(self._ready) >= COMMIT_LINES or self._stopping:
                break
            number = feed.waiting.popleft()
            job_id = batches.line_job(self.batch.id, number)
            try:
                line = self._reader.read(number)
                num_new += self._submit(job_id, line)
            except (QueueFull, QuotaExceeded):
                feed.waiting.appendleft(number)
                feed.pause_until = now + FULL_SECONDS
            except FleetError as error:
                custom_id = self._reader.custom_id(number)
                self._ready.append(lines.refused(self.batch.id, number, custom_id, job_id, error.to_dict(), None))
            else:
                self._flying[job_id] = Flying(number, line, model)
                feed.flying += 1
        if num_new:
            self.tools.doorbell.ring(model, num_new)

    def _submit(self, job_id: str, line: Prepared) -> bool:
        """Whether the job is new and waits. Raises QueueFull, QuotaExceeded."""
        job, envelope = line.job, line.job.envelope()
        of_a_line = {
            "priority": line.priority,
            "deadline_ms": min(job.deadline_ms or self.batch.expires_ms, self.batch.expires_ms),
            "metadata": (job.labels or {}) | {"batch_id": self.batch.id},
        }
        submit = partial(
            self.tools.ledger.submit,
            job_id,
            envelope,
            tenant=self.batch.tenant,
            body_hash=body_hash(envelope),
            # Online work finds room in the queue, however many batches there are.
            max_queued=max(1, self.tools.settings.max_queued // 2),
            batch_id=self.batch.id,
            **job.terms() | of_a_line,
        )
        try:
            return self.patiently(submit).queued
        except IdempotencyKeyReuse:
            return False  # submitted by a runner of another version, which wrote the same line in other words

    def _halt(self) -> None:
        """Stop what is under way; lines that have not begun end with it."""
        self._halted = True
        for job_id in self._flying:
            try:
                self.patiently(partial(self.tools.ledger.cancel, job_id))
            except (AlreadyTerminal, JobNotFound):
                continue

    def _collect(self) -> None:
        """Take in jobs that have ended."""
        ids = list(self._flying)
        if not ids:
            return
        for ended in self.say(batches.collect(ids)):
            job_id = ids[ended.place]
            flying = self._flying.pop(job_id)
            feed = self._feeds[flying.model]
            feed.flying -= 1
            if ended.state == "missing" and not self._stopping:
                # Somebody deleted it, or it ended so long ago that it was forgotten: nobody has seen its end.
                feed.waiting.appendleft(flying.number)
            else:
                self._ready.append(self._ended(job_id, flying, ended))

    def _ended(self, job_id: str, flying: Flying, ended: Ended) -> Line:
        """What the files say of a job that ended."""
        batch_id, number, custom_id = self.batch.id, flying.number, flying.line.custom_id
        if ended.state in ("completed", "incomplete"):
            body, keep = self._reader.with_pictures(ended, self._picture)
            return lines.succeeded(batch_id, number, custom_id, job_id, body, ended.usage, keep)
        code = (ended.error or {}).get("code")
        if ended.state == "expired" and code == "deadline_exceeded" and not flying.line.own_deadline:
            return lines.not_run(batch_id, number, custom_id, lines.EXPIRED, job_id)
        if self._stopping and ended.state in ("cancelled", "missing"):
            return lines.not_run(batch_id, number, custom_id, self._why, job_id)
        return lines.refused(batch_id, number, custom_id, job_id, ended.error or {}, ended.usage)

    def _link(self, output_id: str) -> tuple[str, int]:
        """A picture's url, and until when it works: a result's time from the end of the window, so that whoever reads
        the batch when it has ended finds all of them."""
        settings = self.tools.settings
        base = settings.public_url or settings.local_api_url
        secret = self.patiently(lambda: self.tools.ledger.run(roster.signing_secret()))
        until = int(max(time.time(), self.batch.expires_ms / 1000) + settings.result_ttl_seconds)
        return signed_url(base.rstrip("/"), output_id, until, secret), until

    def _picture(self, output: dict[str, Any]) -> bytes:
        sha256 = output["hash"].removeprefix("sha256:")
        return self.patiently(partial(self.tools.store.get, output["id"], sha256))

    @property
    def _why(self) -> tuple[str, str]:
        return lines.CANCELLED if self.held.status == "cancelling" else lines.EXPIRED

    def _end_the_rest(self) -> None:
        """Lines that never began, some at a time."""
        for feed in self._feeds.values():
            while feed.waiting and len(self._ready) < COMMIT_LINES:
                number = feed.waiting.popleft()
                self._ready.append(lines.not_run(self.batch.id, number, self._reader.custom_id(number), self._why))

    def _wait_for_ends(self) -> None:
        stream = Call("", ("XREAD", "COUNT", 1000, "BLOCK", LOOK_MS, "STREAMS", Key("ended"), self._seen), last_entry)
        if last := self.say(stream):
            self._seen = last
            time.sleep(GATHER_SECONDS)

    # Writing what became of them ----------------------------------------------------------------------------------

    def _commit(self) -> None:
        """Put the lines that ended on the shelf, and the tail into the store when it has grown."""
        while self._ready:
            some, self._ready = self._ready[:COMMIT_LINES], self._ready[COMMIT_LINES:]
            tail = self.say(batches.commit(self.batch.id, self.batch.fence, self._num_ended, some))
            if tail is None:
                raise Stopped
            self._num_ended += len(some)
            self._tail_bytes += sum(len(line.text) for line in some)
            if self._tail_bytes >= SEAL_BYTES:
                self._seal()

    def _seal(self) -> None:
        """Nothing is committed meanwhile, so the tail that is written is the tail that is dropped."""
        batch, store = self.batch, self.tools.store
        while data := self.say(batches.read_tail(batch.id)):
            self.check()
            key = files.part_key(batch.id, batch.fence, self._num_parts)
            stored = self.patiently(partial(store.put, key, data, CONTENT_TYPE))
            part = Part(key, stored.size_bytes, stored.sha256, data.count(b"\n"))
            sealed = batches.seal(batch.id, batch.fence, self._num_parts, part, in_ledger=store.in_ledger)
            if self.say(sealed) == "stale":
                raise Stopped
            self._num_parts += 1
        self._tail_bytes = 0

    def _finish(self, exchange: Exchange) -> str:
        about: dict[str, str] = {}
        for how_far in ("finalizing", "end"):
            if how_far == "end":
                self._seal()
                about = exchange.deliver() if self.batch.output_url_prefix is not None else {}
            finish = batches.finish(self.batch.id, self.batch.fence, how_far, self.batch.keep_seconds, about)
            status = self.say(finish)
            if status in ("stale", "open"):
                raise Stopped
        return status

    # Staying in touch ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        if self.lost.is_set() or self.tools.closing.is_set():
            raise Stopped

    def _ours(self, status: str | None) -> str:
        if status is None:
            raise Stopped
        return status

    def say(self, call: Call[T]) -> T:
        """One call, not a generator of steps: that could not be said again."""
        return self.patiently(lambda: self.tools.ledger.run(call))

    def patiently(self, call: Callable[[], T]) -> T:
        return until_answered(call, self.tools.closing)


def last_entry(answer: Any) -> str | None:
    """The id of the last entry that XREAD gave."""
    if not answer:
        return None
    entries = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
    last: bytes = entries[-1][0]
    return last.decode()
