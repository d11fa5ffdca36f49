"""Calls about batches: what tenants ask, and what the runner of a batch says. Knows neither files' bytes nor HTTP.

A runner holds a batch by a lease and a fence, as a worker holds a job. Every call may be sent twice.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from inferfleet.tasks import names
from inferfleet.tasks.call import Arg, Call, Key, from_json, integer, opt, text, to_json
from inferfleet.tasks.calls import as_word
from inferfleet.tasks.errors import (
    BatchNotFound,
    BatchState,
    FileNotFound,
    IdempotencyKeyReuse,
    InvalidRequest,
    OutputNotFound,
)
from inferfleet.tasks.files import UPLOAD_SECONDS, Part, as_fields, read_parts

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
TERMINAL = frozenset({"failed", "completed", "expired", "cancelled"})
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
#: The record of a batch outlives its end so long.
KEEP_MS = 30 * 86400 * 1000
MAX_FILENAME = 255
#: About so many bytes of answers are read at once.
COLLECT_BYTES = 2 << 20


@dataclass(frozen=True)
class BatchRecord:
    """One batch as the ledger holds it. Times are Unix milliseconds of the Redis server."""

    id: str
    tenant: str
    status: Status
    endpoint: str
    input_file_id: str
    input_shelf: str
    completion_window: str
    created_ms: int
    expires_ms: int
    fence: int
    #: Lines of the input; that ended in the output file, and in the error file.
    total: int
    completed: int
    failed: int
    #: Lines on the shelf, and parts that it has.
    lines: int
    parts: int
    output_bytes: int
    error_bytes: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    priority: int
    #: Seconds that the files live.
    keep_seconds: int
    model: str | None = None
    #: The batch whose failed lines this one runs again, and which of them; None = all.
    retry_of: str | None = None
    custom_ids: list[str] | None = None
    metadata: dict[str, str] | None = None
    #: A URL or the id of an endpoint, and of names.BATCH_ENDS those that it is told.
    webhook: str | None = None
    webhook_words: tuple[str, ...] = ()
    #: The object that the input file was, or is to be, copied from.
    input_url: str | None = None
    #: What the files are written to as well; where they lie then, or why they do not.
    output_url_prefix: str | None = None
    output_url: str | None = None
    error_url: str | None = None
    output_problem: str | None = None
    #: code, line (from 1), message, param.
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    #: status -> when it began.
    times: dict[str, int] = field(default_factory=dict)

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL


def new_batch_id() -> str:
    """`batch_` and 32 hexadecimal digits, random."""
    return f"batch_{uuid.uuid4().hex}"


def line_job(batch_id: str, line: int) -> str:
    """The job that runs one line (from 0): the same for every runner, so a line that was submitted is not run twice."""
    return f"job_{hashlib.sha256(f'{batch_id}.{line}'.encode()).hexdigest()[:32]}"


def fetched_file(batch_id: str) -> str:
    """The file that the input of this batch is copied into."""
    return f"file-{hashlib.sha256(f'{batch_id}:input'.encode()).hexdigest()[:32]}"


def record(batch_id: str, answer: Any) -> BatchRecord:
    raw = as_fields(answer)
    numbers = ("fence", "total", "completed", "failed", "lines", "parts", "output_bytes", "error_bytes",
               "input_tokens", "cached_tokens", "output_tokens", "priority", "keep_seconds", "created_ms",
               "expires_ms")  # fmt: skip
    texts = ("tenant", "status", "endpoint", "input_file_id", "input_shelf", "completion_window")
    optional = ("model", "retry_of", "output_file_id", "error_file_id", "webhook", "input_url", "output_url_prefix",
                "output_url", "error_url", "output_problem")  # fmt: skip
    values: dict[str, Any] = {name: int(raw[name]) for name in numbers} | {name: raw[name] for name in texts}
    values |= {name: raw.get(name) or None for name in optional}
    values |= {name: json.loads(raw[name]) if raw.get(name) else None for name in ("custom_ids", "metadata", "errors")}
    values["webhook_words"] = tuple(raw.get("webhook_events", "").split())
    times: dict[str, int] = {status: int(raw[f"{status}_ms"]) for status in STATUSES if f"{status}_ms" in raw}
    return BatchRecord(id=batch_id, times=times, **values)


# What tenants ask ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Idempotency:
    """How a repeated request is known: a digest, whether an earlier object is looked for, how long it is remembered
    (None = as long as the object)."""

    digest: str
    look: bool
    ttl_ms: int | None


def create(
    batch_id: str,
    tenant: str,
    *,
    body_hash: str,
    window: str,
    window_seconds: int,
    endpoint: str,
    keep_seconds: int,
    input_file_id: str | None = None,
    input_url: str | None = None,
    output_url_prefix: str | None = None,
    retry_of: str | None = None,
    custom_ids: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    priority: int = 0,
    webhook: str | None = None,
    webhook_words: Sequence[str] = names.BATCH_ENDS,
    idempotency: Idempotency | None = None,
) -> Call[tuple[str, bool]]:
    """Accept a batch of a file, of an object that its runner copies into a file, or of the failed lines of another
    batch: its id, and whether it was there before."""

    def parse(answer: list[Any]) -> tuple[str, bool]:
        verdict = text(answer[0])
        if verdict == "reuse":
            raise IdempotencyKeyReuse()
        if verdict == "no_file":
            raise FileNotFound("there is no batch file with this id", param="input_file_id")
        if verdict == "no_parent":
            raise BatchNotFound(param="batch_id")
        if verdict == "parent":
            raise BatchState(f"the batch is {text(answer[1])}; its failed lines can be run again once it has ended")
        if verdict == "nothing":
            raise BatchState("no line of the batch has failed")
        if verdict == "no_endpoint":
            raise InvalidRequest(f"there is no webhook endpoint {webhook}", param="webhook")
        return text(answer[1]), verdict == "replay"

    known = idempotency or Idempotency("", False, None)
    fields: dict[str, Arg] = {
        "completion_window": window, "endpoint": endpoint, "keep_seconds": keep_seconds, "priority": priority,
        "metadata": to_json(metadata or None), "custom_ids": to_json(custom_ids),
        "webhook_events": " ".join(webhook_words), "input_url": opt(input_url),
        "output_url_prefix": opt(output_url_prefix),
    }  # fmt: skip
    args: list[Arg] = [batch_id, tenant, known.digest, opt(known.ttl_ms), "1" if known.look else "", body_hash]
    fetched = "" if input_url is None else input_url.rpartition("/")[2][-MAX_FILENAME:]
    if fetched:
        input_file_id = fetched_file(batch_id)
    args += [opt(input_file_id), opt(retry_of), window_seconds, opt(webhook), fetched, 1000 * UPLOAD_SECONDS]
    return Call("batch_create", args + [part for pair in fields.items() for part in pair], parse)


def get(batch_id: str, tenant: str | None = None) -> Call[BatchRecord]:
    """One batch. Another tenant's is not found."""

    def parse(answer: Any) -> BatchRecord:
        if not answer:
            raise BatchNotFound(param="batch_id")
        return record(batch_id, answer)

    return Call("batch_get", (batch_id, opt(tenant)), parse)


def list_batches(tenant: str, after: str | None, limit: int) -> Call[tuple[list[BatchRecord], bool]]:
    """A tenant's batches, newest first, and whether there are more. `after` is the last id of the page before."""

    def parse(answer: list[Any] | None) -> tuple[list[BatchRecord], bool]:
        if answer is None:
            raise BatchNotFound("after names no batch of this tenant", param="after")
        found = [record(text(batch_id), fields) for batch_id, fields in answer]
        return found[:limit], len(found) > limit

    return Call("batch_list", (tenant, opt(after), limit), parse)


def cancel(batch_id: str, tenant: str | None = None) -> Call[None]:
    """Ask a batch to stop. Raises BatchState where it is too late."""

    def parse(answer: bytes | None) -> None:
        if answer is None:
            raise BatchNotFound(param="batch_id")
        if answer not in (b"cancelling", b"cancelled"):
            raise BatchState(f"the batch is {text(answer)} and cannot be cancelled any more")

    return Call("batch_cancel", (batch_id, opt(tenant)), parse)


@dataclass(frozen=True)
class Results:
    """What a batch has written: parts in the store, and marked lines behind them."""

    batch: BatchRecord
    parts: list[Part]
    tail: bytes


def results(batch_id: str, tenant: str | None = None) -> Call[Results]:
    """The shelf of a batch as it is now."""

    def parse(answer: list[Any] | None) -> Results:
        if answer is None:
            raise BatchNotFound(param="batch_id")
        fields, parts, tail = answer
        return Results(record(batch_id, fields), read_parts(parts), tail)

    return Call("batch_results", (batch_id, opt(tenant)), parse)


# What runners say ----------------------------------------------------------------------------------------------------


def claim(runner: str, lease_ms: int) -> Call[BatchRecord | None]:
    """The batch that has waited longest for a runner, with a new fence; None = none waits."""

    def parse(answer: list[Any] | None) -> BatchRecord | None:
        return None if answer is None else record(text(answer[0]), answer[1])

    return Call("batch_claim", (runner, lease_ms), parse)


@dataclass(frozen=True)
class Held:
    """What a beat tells."""

    status: str
    #: The window ended before the lines did.
    overdue: bool


def beat(batch_id: str, fence: int, lease_ms: int) -> Call[Held | None]:
    """Keep a batch for lease_ms more (0 gives it back). None = it is somebody else's, or has ended."""

    def parse(answer: list[Any] | None) -> Held | None:
        return None if answer is None else Held(text(answer[0]), bool(answer[1]))

    return Call("batch_beat", (batch_id, fence, lease_ms), parse)


def start(batch_id: str, fence: int, total: int, model: str | None) -> Call[str | None]:
    """The input is valid and has so many lines; gives the status, None if stale. `model`: of all lines, if one."""
    return Call("batch_start", (batch_id, fence, total, opt(model)), word_or_none)


def word_or_none(answer: bytes | None) -> str | None:
    return None if answer is None else text(answer)


def reject(batch_id: str, fence: int, errors: Sequence[Mapping[str, Any]]) -> Call[str | None]:
    """The input is not valid: end the batch. Gives the status, None if stale."""
    return Call("batch_reject", (batch_id, fence, to_json(list(errors)), KEEP_MS), word_or_none)


@dataclass(frozen=True)
class Ended:
    """How the job of a line ended; state "missing" = there is no such job (any more)."""

    place: int
    state: str
    response: bytes
    error: dict[str, Any] | None
    usage: dict[str, Any] | None
    outputs: list[dict[str, Any]] | None


def collect(job_ids: Sequence[str]) -> Call[list[Ended]]:
    """Those of some jobs that have ended, by their place in the list; perhaps not all of them at once."""

    def parse(answer: list[Any]) -> list[Ended]:
        return [
            Ended(place, text(state), response, from_json(error), from_json(usage), from_json(outputs))
            for place, state, response, error, usage, outputs in answer
        ]

    return Call("batch_collect", [COLLECT_BYTES, *job_ids], parse)


@dataclass(frozen=True)
class Line:
    """The end of one line: its number (from 0), its marked text, and what it adds to the batch's counts."""

    number: int
    text: bytes
    failed: bool
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    #: Its job, and what becomes of that: it is forgotten now, or kept because the text names its pictures.
    job_id: str | None = None
    job_then: Literal["", "forget", "keep"] = ""


def commit(batch_id: str, fence: int, lines_before: int, ended: Sequence[Line]) -> Call[int | None]:
    """Put ends of lines on the shelf: the bytes behind its last part, or None if the fence is stale.

    Sent again after a lost reply it changes nothing and gives 0.
    """

    def parse(answer: Any) -> int | None:
        if answer == b"stale":
            return None
        return 0 if answer == b"same" else integer(answer[0])

    def size(failed: bool) -> int:
        return sum(len(line.text) - 1 for line in ended if line.failed is failed)

    args: list[Arg] = [batch_id, fence, lines_before, b"".join(line.text for line in ended)]
    failed = sum(line.failed for line in ended)
    args += [len(ended) - failed, failed, size(False), size(True)]
    args += [sum(getattr(line, f"{kind}_tokens") for line in ended) for kind in ("input", "cached", "output")]
    args += [len(ended), *(line.number for line in ended), *("1" if line.failed else "" for line in ended)]
    args += [*(line.job_then for line in ended), *(opt(line.job_id) for line in ended)]
    return Call("batch_commit", args, parse)


def seal(batch_id: str, fence: int, n: int, part: Part, *, in_ledger: bool) -> Call[str]:
    """The tail lies in the store as part n: ok | same | stale. Raises OutputNotFound if it does not."""

    def parse(answer: bytes) -> str:
        if answer == b"missing":
            raise OutputNotFound(f"part {n} of {batch_id} is not in the store")
        return text(answer)

    args = (batch_id, fence, n, part.key, to_json(asdict(part)), part.size, "1" if in_ledger else "")
    return Call("batch_seal", args, parse)


def read_bits(key: str) -> Call[bytes]:
    """A bitmap of lines."""
    return Call("", ("GET", Key(key)), lambda answer: answer or b"")


def read_tail(batch_id: str) -> Call[bytes]:
    """The marked lines behind the last part."""
    return read_bits(f"tail:{batch_id}")


def finish(
    batch_id: str,
    fence: int,
    how_far: Literal["finalizing", "end"],
    keep_seconds: int,
    about: Mapping[str, str] | None = None,
) -> Call[str]:
    """End a batch of which all lines have ended, in two steps. Gives the status, or stale, or open while lines or a
    tail are left. keep_seconds: how long its files live. about: output_url, error_url, output_problem."""
    files: list[Arg] = []
    for kind in ("output", "error"):
        digest = hashlib.sha256(f"{batch_id}:{kind}".encode()).hexdigest()
        files += [f"file-{digest[:32]}", f"{batch_id}_{kind}.jsonl"]
    said = [part for pair in (about or {}).items() for part in pair]
    return Call("batch_finish", [batch_id, fence, how_far, *files, keep_seconds, KEEP_MS, *said], as_word)


def sweep(limit: int = 100) -> Call[int]:
    """Forget batches that ended long ago."""
    return Call("batch_sweep", (limit,), int)


def bit(bits: bytes, number: int) -> bool:
    """Bit `number` as Redis counts them: the highest of a byte first."""
    place = number >> 3
    return place < len(bits) and bool(bits[place] & (0x80 >> (number & 7)))
