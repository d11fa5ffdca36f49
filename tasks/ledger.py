"""The truth about jobs, in Redis. Two carriers, sync and async, of the calls in calls.py and its neighbours.

Every method of a ledger is one function there, with its arguments and its docstring. A call that Redis does not
answer raises LedgerUnavailable; repeating it is always safe.
"""

import functools
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from inferfleet.tasks import calls, event_log, kept_runs, roster, webhooks
from inferfleet.tasks import dead_letters as letters
from inferfleet.tasks import lookup as reconciling
from inferfleet.tasks import queues as lines
from inferfleet.tasks.call import Call, Key, Steps, script_sha, script_text
from inferfleet.tasks.errors import LedgerUnavailable, RedisMisconfigured

T = TypeVar("T")
P = ParamSpec("P")

#: A silent socket is given up after this, longer than any read blocks on the server (event_log.MAX_BLOCK_MS).
SOCKET_TIMEOUT = 8.0
CONNECT_TIMEOUT = 2.0
#: Repeats of a command whose connection broke: about 2 s in all, so that a dead Redis is a quick 503.
RETRIES = 6
BACKOFF = ExponentialWithJitterBackoff(cap=0.5, base=0.02)
#: Of an event loop. uvloop says with a RuntimeError that a connection was cut since it was last used.
BROKEN: tuple[Any, ...] = (exceptions.ConnectionError, exceptions.TimeoutError, RuntimeError)
#: Each waiting reader of events holds one connection.
MAX_CONNECTIONS = 10_000

#: What a server says when it cannot write now, though nothing is wrong with the command. Redis 6.2 puts it behind
#: "Error running script ...: -".
REFUSAL = re.compile(r"(^|: -)(MISCONF|OOM|NOREPLICAS|READONLY|MASTERDOWN|LOADING|BUSY)\b")

#: The same where redis-py takes the first word off and makes a class of it.
REFUSALS = (exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.MasterDownError)


def refuses_writes(error: exceptions.ResponseError) -> bool:
    """Whether a server's error says that it cannot write now, rather than that the command is wrong."""
    return isinstance(error, REFUSALS) or REFUSAL.search(str(error)) is not None


@contextmanager
def as_unavailable() -> Iterator[None]:
    """Turn a Redis that cannot be reached or cannot write into LedgerUnavailable, without its address."""
    try:
        yield
    except exceptions.AuthenticationError as error:
        raise RedisMisconfigured("Redis refused the user or password of redis_url") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise LedgerUnavailable(f"the ledger (Redis) does not answer: {type(error).__name__}", retry_after=1) from error
    except exceptions.ResponseError as error:
        if not refuses_writes(error):
            raise
        raise LedgerUnavailable("the ledger (Redis) refuses to write now", retry_after=5) from error
    except RuntimeError as error:
        if "closed" not in str(error):
            raise
        raise LedgerUnavailable(
            "the ledger (Redis) does not answer: its connection is closed", retry_after=1
        ) from error


class Carrier:
    """What both ledgers share: the namespace, and how a call becomes a Redis command."""

    def __init__(self, namespace: str) -> None:
        if not namespace or "{" in namespace or "}" in namespace:
            raise RedisMisconfigured("a namespace is not empty and holds no braces", param="namespace")
        self.namespace = namespace
        self.prefix = f"{{{namespace}}}:"

    def command(self, call: Call[Any], *, by_text: bool = False) -> list[Any]:
        """The command of a call. `by_text` sends the script itself, for a server that does not hold it yet."""
        if not call.script:
            return [self.prefix + part if isinstance(part, Key) else part for part in call.args]
        script = ("EVAL", script_text(call.script)) if by_text else ("EVALSHA", script_sha(call.script))
        return [*script, 1, self.prefix, *call.args]


def verb(build: Callable[P, Call[T] | Steps[T]]) -> Callable[Concatenate["Ledger", P], T]:
    """A method of the sync ledger that carries what `build` describes."""

    @functools.wraps(build)
    def method(ledger: "Ledger", *args: P.args, **kwargs: P.kwargs) -> T:
        return ledger.run(build(*args, **kwargs))

    return method


def async_verb(
    build: Callable[P, Call[T] | Steps[T]],
) -> Callable[Concatenate["AsyncLedger", P], Coroutine[Any, Any, T]]:
    """The same for the async ledger."""

    @functools.wraps(build)
    async def method(ledger: "AsyncLedger", *args: P.args, **kwargs: P.kwargs) -> T:
        return await ledger.run(build(*args, **kwargs))

    return method


class Ledger(Carrier):
    """The ledger for threads. One object may be shared by all of them."""

    def __init__(self, client: "redis.Redis", namespace: str = "inferfleet") -> None:
        super().__init__(namespace)
        self.redis = client

    @classmethod
    def from_url(cls, redis_url: str, namespace: str = "inferfleet") -> "Ledger":
        client = redis.Redis.from_url(
            redis_url,
            socket_timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=Retry(BACKOFF, RETRIES),
            max_connections=MAX_CONNECTIONS,
        )
        return cls(client, namespace)

    def run(self, work: Call[T] | Steps[T]) -> T:
        """Carry one call, or all calls of a Steps generator."""
        if isinstance(work, Call):
            return self._carry(work)
        answer = None
        try:
            while True:
                answer = self._carry(work.send(answer))
        except StopIteration as stop:
            return stop.value

    def _carry(self, call: Call[T]) -> T:
        command = self.command(call)
        with as_unavailable():
            try:
                answer = self.redis.execute_command(*command)
            except exceptions.NoScriptError:
                answer = self.redis.execute_command(*self.command(call, by_text=True))
        return call.parse(answer)

    def close(self) -> None:
        self.redis.close()

    submit = verb(calls.submit)
    get = verb(calls.get)
    list = verb(calls.list_jobs)
    events = verb(event_log.events)
    wait_events = verb(event_log.wait_events)
    next_events = verb(event_log.next_events)
    lookup = verb(reconciling.lookup)
    cancel = verb(calls.cancel)
    update = verb(calls.update)
    retry = verb(calls.retry)
    delete = verb(calls.delete)

    claim = verb(calls.claim)
    beat = verb(calls.beat)
    publish = verb(calls.publish)
    complete = verb(calls.complete)
    release = verb(calls.release)
    lose = verb(calls.lose)
    reap = verb(calls.reap)
    bury = verb(calls.bury)
    sweep = verb(calls.sweep)

    dead_letters = verb(letters.dead_letters)
    dead_letter = verb(letters.dead_letter)
    replay = verb(letters.replay)
    delete_dead_letter = verb(letters.delete_dead_letter)

    queues = verb(lines.queues)
    pause = verb(lines.pause)
    resume = verb(lines.resume)
    purge = verb(lines.purge)

    stats = verb(roster.stats)
    put_worker = verb(roster.put_worker)
    workers = verb(roster.workers)
    put_role = verb(roster.put_role)
    roles = verb(roster.roles)
    put_neighbour = verb(roster.put_neighbour)
    neighbours = verb(roster.neighbours)
    put_card = verb(roster.put_card)
    cards = verb(roster.cards)
    note_server = verb(roster.note_server)
    failovers = verb(roster.failovers)
    put_tenants = verb(roster.put_tenants)
    put_key = verb(roster.put_key)
    find_key = verb(roster.find_key)
    list_keys = verb(roster.list_keys)
    delete_key = verb(roster.delete_key)

    put_endpoint = verb(webhooks.put_endpoint)
    update_endpoint = verb(webhooks.update_endpoint)
    rotate_secret = verb(webhooks.rotate_secret)
    delete_endpoint = verb(webhooks.delete_endpoint)
    endpoints = verb(webhooks.endpoints)
    endpoint = verb(webhooks.endpoint)
    test_endpoint = verb(webhooks.test_endpoint)
    get_delivery = verb(webhooks.get_delivery)
    list_deliveries = verb(webhooks.list_deliveries)
    replay_delivery = verb(webhooks.replay_delivery)
    take_delivery = verb(webhooks.take_delivery)
    record_delivery = verb(webhooks.record_delivery)
    sweep_deliveries = verb(webhooks.sweep_deliveries)

    keep_run = verb(kept_runs.keep_run)
    beat_runs = verb(kept_runs.beat_runs)
    drop_run = verb(kept_runs.drop_run)
    return_run = verb(kept_runs.return_run)
    sweep_runs = verb(kept_runs.sweep_runs)


class AsyncLedger(Carrier):
    """The ledger for one event loop."""

    def __init__(self, client: "redis.asyncio.Redis", namespace: str = "inferfleet") -> None:
        super().__init__(namespace)
        self.redis = client

    @classmethod
    def from_url(cls, redis_url: str, namespace: str = "inferfleet") -> "AsyncLedger":
        client = redis.asyncio.Redis.from_url(
            redis_url,
            socket_timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=AsyncRetry(BACKOFF, RETRIES, supported_errors=BROKEN),
            max_connections=MAX_CONNECTIONS,
        )
        return cls(client, namespace)

    async def run(self, work: Call[T] | Steps[T]) -> T:
        """Carry one call, or all calls of a Steps generator."""
        if isinstance(work, Call):
            return await self._carry(work)
        answer = None
        try:
            while True:
                answer = await self._carry(work.send(answer))
        except StopIteration as stop:
            return stop.value

    async def _carry(self, call: Call[T]) -> T:
        command = self.command(call)
        with as_unavailable():
            try:
                answer = await self.redis.execute_command(*command)
            except exceptions.NoScriptError:
                answer = await self.redis.execute_command(*self.command(call, by_text=True))
        return call.parse(answer)

    async def close(self) -> None:
        await self.redis.aclose()

    submit = async_verb(calls.submit)
    get = async_verb(calls.get)
    list = async_verb(calls.list_jobs)
    events = async_verb(event_log.events)
    wait_events = async_verb(event_log.wait_events)
    next_events = async_verb(event_log.next_events)
    lookup = async_verb(reconciling.lookup)
    cancel = async_verb(calls.cancel)
    update = async_verb(calls.update)
    retry = async_verb(calls.retry)
    delete = async_verb(calls.delete)

    claim = async_verb(calls.claim)
    beat = async_verb(calls.beat)
    publish = async_verb(calls.publish)
    complete = async_verb(calls.complete)
    release = async_verb(calls.release)
    lose = async_verb(calls.lose)
    reap = async_verb(calls.reap)
    bury = async_verb(calls.bury)
    sweep = async_verb(calls.sweep)

    dead_letters = async_verb(letters.dead_letters)
    dead_letter = async_verb(letters.dead_letter)
    replay = async_verb(letters.replay)
    delete_dead_letter = async_verb(letters.delete_dead_letter)

    queues = async_verb(lines.queues)
    pause = async_verb(lines.pause)
    resume = async_verb(lines.resume)
    purge = async_verb(lines.purge)

    stats = async_verb(roster.stats)
    put_role = async_verb(roster.put_role)
    roles = async_verb(roster.roles)
    put_worker = async_verb(roster.put_worker)
    workers = async_verb(roster.workers)
    put_neighbour = async_verb(roster.put_neighbour)
    neighbours = async_verb(roster.neighbours)
    put_card = async_verb(roster.put_card)
    cards = async_verb(roster.cards)
    note_server = async_verb(roster.note_server)
    failovers = async_verb(roster.failovers)
    put_tenants = async_verb(roster.put_tenants)
    put_key = async_verb(roster.put_key)
    find_key = async_verb(roster.find_key)
    list_keys = async_verb(roster.list_keys)
    delete_key = async_verb(roster.delete_key)

    put_endpoint = async_verb(webhooks.put_endpoint)
    update_endpoint = async_verb(webhooks.update_endpoint)
    rotate_secret = async_verb(webhooks.rotate_secret)
    delete_endpoint = async_verb(webhooks.delete_endpoint)
    endpoints = async_verb(webhooks.endpoints)
    endpoint = async_verb(webhooks.endpoint)
    test_endpoint = async_verb(webhooks.test_endpoint)
    get_delivery = async_verb(webhooks.get_delivery)
    list_deliveries = async_verb(webhooks.list_deliveries)
    replay_delivery = async_verb(webhooks.replay_delivery)
    take_delivery = async_verb(webhooks.take_delivery)
    record_delivery = async_verb(webhooks.record_delivery)
    sweep_deliveries = async_verb(webhooks.sweep_deliveries)

    keep_run = async_verb(kept_runs.keep_run)
    beat_runs = async_verb(kept_runs.beat_runs)
    drop_run = async_verb(kept_runs.drop_run)
    return_run = async_verb(kept_runs.return_run)
    sweep_runs = async_verb(kept_runs.sweep_runs)
