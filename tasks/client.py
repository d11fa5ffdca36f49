"""The producer's face: submit jobs and follow them, straight through Redis. Loads no torch, and Celery only to ring.

What a method does is written once, as a generator of steps (`_submit`, `_wait`, ...). Client and AsyncClient only
carry the steps, in a thread or in an event loop.
"""

import asyncio
import functools
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Generator, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from inferfleet.tasks import calls, dead_letters, event_log, names, queues, roster
from inferfleet.tasks.call import Call
from inferfleet.tasks.contracts import Body, JobRequest, body_hash, check_card, parse_chat, parse_job
from inferfleet.tasks.dead_letters import Attempt
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.errors import InvalidRequest, ModelNotFound, OutputNotFound, SettingsError
from inferfleet.tasks.job_object import Job, to_job_object
from inferfleet.tasks.ledger import AsyncLedger, Ledger
from inferfleet.tasks.lookup import lookup
from inferfleet.tasks.queues import Purged, Queue
from inferfleet.tasks.records import Event, JobRecord
from inferfleet.tasks.settings import RESULT_STORE, S3Settings
from inferfleet.tasks.stores import AsyncS3Store, async_store_at, store_at

T = TypeVar("T")
P = ParamSpec("P")

DEFAULT_URL = "redis://127.0.0.1:6379/0"
#: What a body has that is none of a chat -> where it goes.
OTHER_BODIES = {"prompt": names.IMAGES_URL, "input": names.RESPONSES_URL}


@dataclass(frozen=True)
class Ring:
    """A step that rings for a model instead of asking the ledger."""

    model: str


@dataclass(frozen=True)
class Fetch:
    """A step that reads a file of the store."""

    key: str
    sha256: str


@dataclass(frozen=True)
class JobList:
    """One page, newest first. The next page is that after the last job's id."""

    jobs: list[Job]
    has_more: bool


Errand = Generator[Call[Any] | Ring | Fetch, Any, T]


@dataclass(frozen=True)
class Caller:
    """Who asks: the tenant, and what may be submitted beside the models that workers announce."""

    tenant: str = "default"
    models: frozenset[str] = frozenset()
    max_queued: int = 10_000


def as_job(request: JobRequest | Body | Mapping[str, Any]) -> JobRequest:
    """A job or a body, or as JSON values a job or a chat body: a body of another kind needs the job's url around it.
    Checked exactly as the HTTP API checks bytes."""
    if isinstance(request, JobRequest):
        return request
    if isinstance(request, Body):
        return JobRequest.from_body(request)
    if not isinstance(request, Mapping):
        raise InvalidRequest(f"a request is a JSON object, not {type(request).__name__}")
    for name, url in OTHER_BODIES.items():
        if name in request and not {"body", "messages"} & set(request):
            hint = f'{{"url": "{url}", "body": ...}}'
            raise InvalidRequest(
                f"a body with {name} and no messages needs its url around it: {hint}", param="messages"
            )
    try:
        raw = json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the request is not JSON: {error}") from None
    return parse_job(raw) if "body" in request else JobRequest.from_body(parse_chat(raw))


def _submit(
    caller: Caller,
    request: JobRequest | Body | Mapping[str, Any],
    *,
    wait: bool = False,
    timeout: float | None = None,
    idempotency_key: str | None = None,
) -> Errand[Job]:
    """Accept a job and ring for it; with `wait`, come back when it has ended. A call that raised LedgerUnavailable
    may be repeated without doubling the job if it carried an idempotency_key."""
    job = as_job(request)
    model = job.body.model
    cards = yield roster.cards()
    if model in cards:
        check_card(job.body, cards[model])
    elif model not in caller.models:
        raise ModelNotFound(f"no worker serves {model!r}", param="model")
    envelope = job.envelope()
    submitted = yield calls.submit(
        names.new_job_id(),
        envelope,
        tenant=caller.tenant,
        body_hash=body_hash(envelope),
        idempotency_key=idempotency_key,
        max_queued=caller.max_queued,
        **job.terms(),
    )
    if submitted.queued:
        yield Ring(model)
    if wait:
        return (yield from _wait(caller, submitted.job_id, timeout))
    return (yield from _get(caller, submitted.job_id))


def _get(caller: Caller, job_id: str) -> Errand[Job]:
    """A job as it is now."""
    record = yield calls.get(job_id, caller.tenant)
    return to_job_object(record)


def _wait(caller: Caller, job_id: str, timeout: float | None = None) -> Errand[Job]:
    """A job that has ended. TimeoutError after `timeout` seconds; the job goes on then."""
    give_up = None if timeout is None else time.monotonic() + timeout
    after = -1
    record: JobRecord = yield calls.get(job_id, caller.tenant)
    while not record.terminal:
        left = event_log.MAX_BLOCK_MS if give_up is None else round(1000 * (give_up - time.monotonic()))
        if left <= 0:
            raise TimeoutError(f"{job_id} is {record.state} after {timeout} s")
        found = yield event_log.next_events(job_id, after=after, block_ms=left)
        after = found[-1]["sequence_number"] if found else after
        # A silent job is asked again too: it may have been deleted, or queued anew under higher numbers.
        if not found or names.is_terminal_event(found[-1]["type"]):
            record = yield calls.get(job_id, caller.tenant)
    return to_job_object(record)


def _events(caller: Caller, job_id: str, after: int, last: Event | None) -> Errand[list[Event] | None]:
    """The next events of a job, waiting for them a while: empty when nothing came, None when nothing will."""
    state, found = yield event_log.log(job_id, caller.tenant, after=after, last=last)
    if found:
        return found
    if state in names.TERMINAL:
        return None
    # Only waits: another Redis may answer than the one that was asked, and only the log is compared with `last`.
    yield event_log.next_events(job_id, after=after)
    return (yield event_log.log(job_id, caller.tenant, after=after, last=last))[1]


def _cancel(caller: Caller, job_id: str) -> Errand[Job]:
    """Stop a job: at once if it waits, at its next step if it runs. AlreadyTerminal if it ended otherwise."""
    yield calls.cancel(job_id, caller.tenant)
    return (yield from _get(caller, job_id))


def _retry(caller: Caller, job_id: str) -> Errand[Job]:
    """Queue a failed, cancelled, expired or incomplete job again."""
    yield calls.retry(job_id, caller.tenant)
    job = yield from _get(caller, job_id)
    yield Ring(job.model)
    return job


def _delete(caller: Caller, job_id: str) -> Errand[None]:
    """Forget an ended job now, before its time to live is over."""
    yield calls.delete(job_id, caller.tenant)


def _output(caller: Caller, job_id: str, index: int = 0) -> Errand[bytes]:
    """The file of picture `index` of a completed job, checked by its digest. OutputNotFound if there is none."""
    record: JobRecord = yield calls.get(job_id, caller.tenant)
    found = [output for output in record.outputs or () if output["index"] == index]
    if not found:
        raise OutputNotFound(f"the job is {record.state} and has no picture {index}", param="index")
    return (yield Fetch(found[0]["id"], found[0]["hash"].removeprefix("sha256:")))


def _list(
    caller: Caller,
    status: str | None = None,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Errand[JobList]:
    """The tenant's jobs, newest first, without response bodies."""
    page = yield from calls.list_jobs(caller.tenant, status, model, metadata, after, limit)
    return JobList([to_job_object(record) for record in page.jobs], page.has_more)


def _lookup(caller: Caller, keys: Collection[str]) -> Errand[dict[str, str | None]]:
    """idempotency_key -> id of its job, or None, for 1 to 1000 keys. What has none may be submitted again: its job was
    never accepted, was lost with the Redis that held it, was deleted, or ended longer ago than results are kept."""
    found = yield lookup(caller.tenant, keys)
    return {key: job and job.job_id for key, job in found.items()}


def _dead_letters(
    caller: Caller, model: str | None = None, after: str | None = None, limit: int = 20
) -> Errand[JobList]:
    """The tenant's dead letters, newest first: jobs that took down every worker that tried them."""
    page = yield from dead_letters.dead_letters(caller.tenant, model, after, limit)
    return JobList([to_job_object(record) for record in page.jobs], page.has_more)


def _attempts(caller: Caller, job_id: str) -> Errand[list[Attempt]]:
    """What is known of each attempt at a dead letter. JobNotFound for a job that is none."""
    letter = yield from dead_letters.dead_letter(job_id, caller.tenant)
    return letter.attempts


def _replay(caller: Caller, job_id: str) -> Errand[Job]:
    """Queue a dead letter again. JobNotFound for a job that is none."""
    model = yield from dead_letters.replay(job_id, caller.tenant)
    yield Ring(model)
    return (yield from _get(caller, job_id))


def _models(caller: Caller) -> Errand[dict[str, roster.Card]]:
    """model -> card, for every model that a worker serves now."""
    return (yield roster.cards())


def _queues(caller: Caller) -> Errand[list[Queue]]:
    """Every model's queue that has or had jobs."""
    return (yield queues.queues())


def _pause(caller: Caller, model: str) -> Errand[None]:
    """Start no more jobs of a model, of any tenant; what runs goes on, what comes waits."""
    yield queues.pause(model)


def _resume(caller: Caller, model: str) -> Errand[None]:
    """Start a model's jobs again. The workers look for those that wait within a second."""
    yield queues.resume(model)
    yield Ring(model)


def _purge(caller: Caller, model: str, *, confirm: str) -> Errand[Purged]:
    """Cancel the tenant's jobs that wait for a model now. confirm: the model again."""
    return (yield from queues.purge(model, confirm=confirm, tenant=caller.tenant))


def errand(plan: Callable[Concatenate[Caller, P], Errand[T]]) -> Callable[Concatenate["Client", P], T]:
    """A method of the sync client."""

    @functools.wraps(plan)
    def method(client: "Client", *args: P.args, **kwargs: P.kwargs) -> T:
        return client._run(plan(client.caller, *args, **kwargs))

    return method


def async_errand(
    plan: Callable[Concatenate[Caller, P], Errand[T]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """The same for the async client."""

    @functools.wraps(plan)
    async def method(client: "AsyncClient", *args: P.args, **kwargs: P.kwargs) -> T:
        return await client._run(plan(client.caller, *args, **kwargs))

    return method


class Face(ABC):
    """What both clients hold. `models` may be submitted though no worker announces them yet.

    result_store, s3: as in the fleet's settings, for the files of jobs. Raises SettingsError for a place that is none,
    and where boto3 is needed and not installed.
    """

    def __init__(
        self,
        redis_url: str = DEFAULT_URL,
        namespace: str = "inferfleet",
        *,
        tenant: str = "default",
        models: Iterable[str] = (),
        max_queued: int = 10_000,
        result_store: str = "redis://",
        s3: S3Settings | None = None,
    ) -> None:
        if not re.fullmatch(RESULT_STORE, result_store):
            raise SettingsError("result_store is redis:// or s3://bucket/prefix", param="result_store")
        self._files = (result_store, s3 or S3Settings())
        self.caller = Caller(tenant, frozenset(models), max_queued)
        self._bell = Doorbell(redis_url, namespace)
        self._open(redis_url, namespace)

    @abstractmethod
    def _open(self, redis_url: str, namespace: str) -> None:
        """Make the ledger and the store of files that the client's steps are carried to."""


class Client(Face):
    """Submits and follows jobs from threads."""

    def _open(self, redis_url: str, namespace: str) -> None:
        self._ledger = Ledger.from_url(redis_url, namespace)
        self._store = store_at(*self._files, self._ledger, 0)  # it only reads

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._bell.close()
        self._ledger.close()

    def _run(self, steps: Errand[T]) -> T:
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Ring):
                    answer = self._bell.ring(step.model)
                elif isinstance(step, Fetch):
                    answer = self._store.get(step.key, step.sha256)
                else:
                    answer = self._ledger.run(step)
        except StopIteration as stop:
            return stop.value

    def stream(self, job_id: str, after: int = -1) -> Iterator[Event]:
        """A job's events as they come, those with a number above `after`, up to the one that ends it.

        Raises Conflict where Redis lost events that were told (see `event_log.log`).
        """
        last: Event | None = None
        while (found := self._run(_events(self.caller, job_id, after, last))) is not None:
            if found:
                after, last = found[-1]["sequence_number"], deepcopy(found[-1])  # whose event it is may change it
            yield from found

    submit = errand(_submit)
    get = errand(_get)
    wait = errand(_wait)
    cancel = errand(_cancel)
    retry = errand(_retry)
    delete = errand(_delete)
    output = errand(_output)
    list = errand(_list)
    lookup = errand(_lookup)
    dead_letters = errand(_dead_letters)
    attempts = errand(_attempts)
    replay = errand(_replay)
    models = errand(_models)
    queues = errand(_queues)
    pause = errand(_pause)
    resume = errand(_resume)
    purge = errand(_purge)


class AsyncClient(Face):
    """Submits and follows jobs from one event loop."""

    def _open(self, redis_url: str, namespace: str) -> None:
        self._ledger = AsyncLedger.from_url(redis_url, namespace)
        self._store = async_store_at(*self._files, self._ledger, 0)  # it only reads

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await asyncio.to_thread(self._bell.close)
        if isinstance(self._store, AsyncS3Store):
            self._store.close()
        await self._ledger.close()

    async def _run(self, steps: Errand[T]) -> T:
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Ring):
                    answer = await asyncio.to_thread(self._bell.ring, step.model)
                elif isinstance(step, Fetch):
                    answer = await self._store.get(step.key, step.sha256)
                else:
                    answer = await self._ledger.run(step)
        except StopIteration as stop:
            return stop.value

    async def stream(self, job_id: str, after: int = -1) -> AsyncIterator[Event]:
        """A job's events as they come, those with a number above `after`, up to the one that ends it.

        Raises Conflict where Redis lost events that were told (see `event_log.log`).
        """
        last: Event | None = None
        while (found := await self._run(_events(self.caller, job_id, after, last))) is not None:
            if found:
                after, last = found[-1]["sequence_number"], deepcopy(found[-1])  # whose event it is may change it
            for event in found:
                yield event

    submit = async_errand(_submit)
    get = async_errand(_get)
    wait = async_errand(_wait)
    cancel = async_errand(_cancel)
    retry = async_errand(_retry)
    delete = async_errand(_delete)
    output = async_errand(_output)
    list = async_errand(_list)
    lookup = async_errand(_lookup)
    dead_letters = async_errand(_dead_letters)
    attempts = async_errand(_attempts)
    replay = async_errand(_replay)
    models = async_errand(_models)
    queues = async_errand(_queues)
    pause = async_errand(_pause)
    resume = async_errand(_resume)
    purge = async_errand(_purge)
