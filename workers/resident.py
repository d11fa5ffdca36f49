"""One model that this worker serves: its engine process, brought up again when it dies, and the flights in it.

An image model that computes on the processors does so at lower priority, once it is loaded: a step of it takes long,
and whoever chats on the same processors would feel it. It still gets what nobody else wants, and a part in any case.

Knows no Redis. What is said goes to the publisher; how a flight ended stands in the flight; changes of state and the
progress of loading are told to a listener each. One thread a model starts the process, reads what it says and starts
the next one.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from inferfleet.tasks import errors
from inferfleet.workers import logs
from inferfleet.workers.child import EngineChild, EngineGone, LoadRefused, Message
from inferfleet.workers.flight import Ending, Flight
from inferfleet.workers.gate import Gate
from inferfleet.workers.loading import Loading
from inferfleet.workers.publisher import Publisher

#: Seconds before start n + 1 after n deaths in a row; the last one repeats.
BACKOFF = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
#: Deaths while loading, in a row, after which the model counts as one that cannot load.
MAX_LOAD_DEATHS = 3
#: How long an engine may take to load.
LOAD_SECONDS = 1800.0
#: How much nicer than this process an image model is on a CPU. By the kernel's weights a thread of it then gets about a
#: third of what a thread of a chat model gets where both want the same core.
NICENESS = 5
#: How long a cancelled request may take to say what it used.
CANCEL_SECONDS = 5.0

log = logs.get("host")


class State(Enum):
    """Where a model is. IDLE: nobody asked for it yet."""

    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class Resident:
    """A model of this worker. Methods may be called from any thread."""

    def __init__(
        self,
        model: str,
        spec: Mapping[str, Any],
        *,
        command: Sequence[str],
        publisher: Publisher,
        on_change: Callable[["Resident"], None],
        on_progress: Callable[["Resident"], None] = lambda resident: None,
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        self.model = model
        self.state = State.IDLE
        #: How far the engine is with loading, once it has said so.
        self.loading: Loading | None = None
        #: What the engine said about the model when it was ready.
        self.card: Message = {}
        #: Why the model cannot be loaded, as an error object.
        self.failure: dict[str, Any] | None = None
        #: The engine's last figures about itself.
        self.stats: dict[str, Any] = {}
        self.num_restarts = 0
        self._spec = dict(spec)
        self._command = command
        self._publisher = publisher
        self._on_change = on_change
        self._on_progress = on_progress
        self._load_seconds = load_seconds
        self._gate = Gate()
        self._lock = threading.RLock()
        self._child: EngineChild | None = None
        self._flights: set[Flight] = set()
        self._aboard: dict[str, Flight] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_steps = 0
        self._num_steps_beaten = 0
        #: time.monotonic() since when the engine owes a step; None = it owes none.
        self._owes_since: float | None = None
        self._in_doubt = False

    # What others ask -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the engine up, once."""
        with self._lock:
            if self._thread is not None or self._stopping.is_set():
                return
            self._thread = threading.Thread(target=self._supervise, name=f"host-{self.model}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the engine; whatever still flies in it ends as released."""
        with self._lock:
            self._stopping.set()
            child, thread, ready = self._child, self._thread, self.state is State.READY
        if child is not None:
            # While it loads it does not listen.
            child.stop() if ready else child.kill()
        if thread is not None:
            thread.join()
        self._become(State.STOPPED)

    @property
    def kind(self) -> str:
        """text or image; an engine tells when it is ready."""
        return str(self.card.get("kind", "text"))

    @property
    def batch_size(self) -> int:
        """Requests of text, or pictures, that share one step of the engine."""
        return int(self.card["max_batch_size"] if self.kind == "image" else self._spec["max_num_seqs"])

    @property
    def accepts(self) -> bool:
        """Whether a job that is claimed now would run: the engine is up and does not stand still."""
        return self.state is State.READY and not self._in_doubt

    def flights(self) -> list[Flight]:
        """Everything between claim and end, in the engine or before its gate."""
        with self._lock:
            return [flight for flight in self._flights if flight.ending is None]

    def take_moved(self) -> bool:
        """Whether a step was finished since the last call. An engine that only lives does not move."""
        with self._lock:
            moved = self._num_steps != self._num_steps_beaten
            self._num_steps_beaten = self._num_steps
            return moved

    def still_for(self) -> float:
        """Seconds for which the engine had work and finished no step; 0 while it has none."""
        with self._lock:
            return 0.0 if self._owes_since is None else time.monotonic() - self._owes_since

    def abandon(self) -> None:
        """The engine stands still and leases will lapse. Let go of all that need not share its fate: of those before
        the gate, and of a batch, whose members are then run alone. One who is alone in it is left to lose its lease.
        Nothing new is taken until the engine moves again.
        """
        with self._lock:
            if not self._in_doubt:
                smaller = "image.max_batch_size" if self.kind == "image" else "max_num_batched_tokens"
                hint = f"if steps are that slow here, raise lease_seconds or lower {smaller}"
                log.warning("engine_stands_still", model=self.model, seconds=round(self.still_for(), 1), hint=hint)
            self._in_doubt = True
            aboard = [flight for flight in self._aboard.values() if flight.ending is None]
            before_gate = [flight for flight in self._flights if flight.engine_id not in self._aboard]
        for flight in before_gate:
            flight.end(Ending.RELEASED)
        self._gate.recheck()
        if len(aboard) > 1:
            self._crash(aboard, "the engine stood still")

    def kill(self) -> None:
        """End the engine process the hard way; it is then treated like any engine that died."""
        with self._lock:
            child = self._child
        if child is not None:
            child.kill()

    def cancel(self, flight: Flight) -> None:
        """Stop a flight at the next step, or at once before the gate."""
        with self._lock:
            if flight.cancelled:
                return
            flight.cancelled = True
            if flight.engine_id not in self._aboard:
                flight.finish({})
                flight.end(Ending.FINISHED)
            elif flight.told:
                # The engine knows it no more; it need not wait for what else was to be stored.
                self._publisher.touch([flight], urgent=True)
            elif self._child is not None:
                self._child.cancel(flight.engine_id)
        self._gate.recheck()

    def let_go(self, flight: Flight, ending: Ending) -> bool:
        """End a flight that the engine is not done with; whoever flies it tells the engine. False = it had ended."""
        first = flight.end(ending)
        self._gate.recheck()
        return first

    def fly(
        self, flight: Flight, prepare: Callable[[], Mapping[str, Any]], *, alone: bool, seconds: float | None
    ) -> bool:
        """Carry a flight until it has ended; False when it was stopped because `seconds` were over.

        prepare: makes the request; what it raises is raised here. It may take a while, and the lease is renewed
        meanwhile.
        """
        until = None if seconds is None else time.monotonic() + seconds
        with self._lock:
            self._flights.add(flight)
        try:
            flight.preparing = True
            try:
                request = prepare()
            finally:
                flight.preparing = False
            if not self._gate.enter(alone, flight.ended, left(until)):
                return flight.ended.is_set()
            try:
                if not self._board(flight, request):
                    flight.end(Ending.RELEASED)
                return self._land(flight, until)
            finally:
                self._disembark(flight)
                self._gate.leave()
        finally:
            with self._lock:
                self._flights.discard(flight)

    # The life of the engine process ----------------------------------------------------------------------------------

    def _board(self, flight: Flight, request: Mapping[str, Any]) -> bool:
        with self._lock:
            if flight.ending is not None:
                return True
            if not self.accepts or self._child is None:
                return False
            if self._owes_since is None:
                self._owes_since = time.monotonic()
            self._aboard[flight.engine_id] = flight
            self._child.add({"id": flight.engine_id, **request})
            return True

    def _disembark(self, flight: Flight) -> None:
        with self._lock:
            if self._aboard.pop(flight.engine_id, None) is None:
                return
            if not flight.told and self._child is not None:
                # It answers with a step, and owes one until then.
                self._child.cancel(flight.engine_id)
            elif not self._aboard:
                self._owes_since = None

    def _land(self, flight: Flight, until: float | None) -> bool:
        if flight.ended.wait(left(until)):
            return True
        self.cancel(flight)
        flight.ended.wait(CANCEL_SECONDS)
        return False

    def _supervise(self) -> None:
        deaths, load_deaths = 0, 0
        while not self._stopping.wait(BACKOFF[min(deaths, len(BACKOFF) - 1)]):
            useful = False
            try:
                child = self._bring_up()
                load_deaths = 0
                useful = self._live(child)
            except LoadRefused as refusal:
                return self._give_up(refusal.code, refusal.message)
            except EngineGone as death:
                load_deaths += 1
                log.error("engine_died_loading", model=self.model, deaths=load_deaths, reason=str(death))
                if load_deaths == MAX_LOAD_DEATHS:
                    return self._give_up("engine_error", f"{death}, {load_deaths} times in a row while loading")
            except Exception:
                # No file descriptor left, or a listener that failed: no reason to leave the model without an engine.
                log.exception("engine_care_broke", model=self.model)
            deaths = 1 if useful else deaths + 1
        return None

    def _bring_up(self) -> EngineChild:
        self._become(State.LOADING)
        self.loading = None
        child, device = EngineChild.start(
            self._command, str(self._spec["device"]), int(self._spec.get("tensor_parallel_size", 1))
        )
        with self._lock:
            self._child = child
            if self._stopping.is_set():
                child.kill()
        log.info("engine_loading", model=self.model, pid=child.pid)
        try:
            spec = self._spec | {"device": device}
            self.card = child.load(self.model, spec, self._load_seconds, self._on_loading)
        except Exception as error:
            with self._lock:
                self._child = None
            if not isinstance(error, LoadRefused):
                child.kill()
            child.reap()
            raise
        if self.kind == "image" and self.card.get("device") == "cpu":
            child.step_back(NICENESS)
        log.info("engine_ready", model=self.model, pid=child.pid, load_seconds=self.card.get("load_seconds"))
        return child

    def _on_loading(self, loading: Loading) -> None:
        self.loading = loading
        self._on_progress(self)

    def _live(self, child: EngineChild) -> bool:
        """From ready to its end; answers whether it got any request done. Nothing of it is ever left."""
        try:
            self._become(State.READY)
            return self._read(child)
        except Exception:
            child.kill()
            raise
        finally:
            self._bury(child)

    def _read(self, child: EngineChild) -> bool:
        """Read until the process is gone; answers whether it got any request done."""
        useful = False
        try:
            for message in child.receive():
                if message["op"] == "step":
                    useful = useful or bool(message["finished"])
                    self._on_step(message)
        except (KeyError, TypeError, ValueError):
            # What it says makes no sense: as good as dead.
            log.exception("engine_speaks_nonsense", model=self.model)
            child.kill()
        return useful

    def _on_step(self, step: Message) -> None:
        touched: list[Flight] = []
        urgent = bool(step["finished"])
        with self._lock:
            self._num_steps += 1
            self.stats = step["stats"]
            aboard = self._aboard
            self._in_doubt = False
            for delta in step["deltas"]:
                if flight := aboard.get(delta["id"]):
                    urgent = flight.absorb(delta) or urgent
                    touched.append(flight)
            for done in step["finished"]:
                if flight := aboard.get(done["id"]):
                    flight.finish(done["usage"])
                    touched.append(flight)
            failed = [(flight, error) for error in step["errors"] if (flight := aboard.get(error["id"]))]
            for flight, _ in failed:
                flight.told = True
            # What is still aboard because its words or pictures are on their way elsewhere is not the engine's debt.
            owes = any(not flight.told for flight in aboard.values())
            self._owes_since = time.monotonic() if owes else None
        for flight, error in failed:
            flight.end(Ending.FAILED, _error(error["code"], error["message"], error["param"]))
        if touched:
            self._publisher.touch(touched, urgent=urgent)

    def _bury(self, child: EngineChild) -> None:
        """The process is gone: end what was in it. A flight that had all its words said still gets published."""
        with self._lock:
            self._child = None
            self._owes_since = None
            self._in_doubt = False
            self.stats = {}
            lost = [flight for flight in self._aboard.values() if flight.usage is None and flight.ending is None]
            before_gate = [flight for flight in self._flights if flight.engine_id not in self._aboard]
        stopping, reason = self._stopping.is_set(), ""
        try:
            self._become(State.STOPPED if stopping else State.LOADING)
        finally:
            if not stopping:
                self.num_restarts += 1
                reason = child.last_words()
                log.error("engine_died", model=self.model, pid=child.pid, reason=reason, flights=len(lost))
            for flight in [*before_gate, *(lost if stopping else ())]:
                flight.end(Ending.RELEASED)
            self._crash(lost, reason)
            self._gate.recheck()
            child.reap()

    def _crash(self, flights: Sequence[Flight], reason: str) -> None:
        for flight in flights:
            flight.num_crashed, flight.crash_reason = len(flights), reason
            flight.end(Ending.CRASHED)

    def _give_up(self, code: str, message: str) -> None:
        if self._stopping.is_set():
            return
        self.failure = _error(code, message)
        log.error("model_failed", model=self.model, code=code, reason=message)
        self._become(State.FAILED)

    def _become(self, state: State) -> None:
        with self._lock:
            if self.state is state:
                return
            self.state = state
            self.loading = None
        self._on_change(self)


def left(until: float | None) -> float | None:
    """Seconds until a time.monotonic(), at least 0."""
    return None if until is None else max(0.0, until - time.monotonic())


def _error(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An engine's complaint as an error object; a code that nobody knows is an engine_error."""
    known = code if code in errors.BY_CODE else "engine_error"
    return errors.from_dict({"code": known, "message": message, "param": param}).to_dict()
