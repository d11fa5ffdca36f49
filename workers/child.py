"""One engine process: how it is started, spoken to and ended. Knows the wire, not what a job is.

The wire is a socketpair with one JSON document a message (no pickle, so nothing that comes out of a broken engine can
run code here). End of file means that the other side died; both sides take it as "go away".
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from inferfleet.workers.loading import Loading

Message = dict[str, Any]

#: How the real engine is started; tests put a scripted one in its place.
ENGINE_COMMAND: tuple[str, ...] = (sys.executable, "-m", "inferfleet.engine.process")

_STOP_SECONDS = 5.0


class EngineGone(Exception):
    """The engine process ended or closed its side of the wire."""


class LoadRefused(Exception):
    """The engine process says that it cannot load the model; starting it again would not help."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)


class EngineChild:
    """A running engine process. `add`, `cancel`, `kill` and `stop` may be called from any thread and never wait for
    the engine to read: a thread of its own writes, because a hung engine stops reading and must hang nobody else.
    `receive` is for one thread."""

    def __init__(self, process: subprocess.Popen[bytes], wire: Connection) -> None:
        self._process = process
        self._wire = wire
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, name=f"engine-{process.pid}-writer", daemon=True).start()

    @classmethod
    def start(cls, command: Sequence[str], device: str, num_devices: int = 1) -> tuple["EngineChild", str]:
        """Start `command --fd N`, pinned to `device`; returns the child and the device's name inside it.

        num_devices: of a model that is split over several, from `device` on.

        Raises LoadRefused when there is no such device, or the command cannot be started.
        """
        env, inner_device = pinned(device, os.environ, num_devices)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                process = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=env,
                    # Own group: Ctrl-C at a terminal reaches the worker, which drains; the engine must outlive it.
                    process_group=0,
                )
            except OSError as error:
                raise LoadRefused("engine_error", f"the engine process cannot be started: {error}") from error
            return cls(process, Connection(ours.detach())), inner_device

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(
        self,
        model: str,
        spec: Mapping[str, Any],
        seconds: float,
        on_progress: Callable[[Loading], None] = lambda loading: None,
    ) -> Message:
        """Load a model and wait for it up to so many seconds; then the process is killed. Returns the card.

        Raises LoadRefused, EngineGone.
        """
        late = threading.Event()
        self._loading: Loading | None = None

        def give_up() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            return self._load(model, spec, on_progress)
        except EngineGone:
            if late.is_set():
                # One that still moved was not stuck: the reader shall know that it is a matter of the limit.
                place = f", at {self._loading}" if self._loading is not None else ""
                text = f"the engine process had not loaded within {seconds:g} s (load_seconds){place}"
                raise EngineGone(text) from None
            raise
        finally:
            timer.cancel()

    def _load(self, model: str, spec: Mapping[str, Any], on_progress: Callable[[Loading], None]) -> Message:
        self._send({"op": "load", "model": model, "spec": dict(spec)})
        for message in self.receive():
            if message["op"] == "loading":
                self._loading = Loading.of(message)
                on_progress(self._loading)
            if message["op"] == "ready":
                return dict(message["card"])
            if message["op"] == "failed":
                raise LoadRefused(str(message["code"]), str(message["message"]))
        raise EngineGone(self.last_words())

    def add(self, request: Mapping[str, Any]) -> None:
        """Hand over one request. An engine that is gone never answers: `receive` ends, which says it for all."""
        self._send({"op": "add", **request})

    def cancel(self, request_id: str) -> None:
        """Ask to stop a request at the next step."""
        self._send({"op": "cancel", "id": request_id})

    def receive(self) -> Iterator[Message]:
        """Messages until the other side is gone, or says what is not JSON: then it is as good as gone."""
        while True:
            try:
                message = json.loads(self._wire.recv_bytes())
            except (EOFError, OSError):
                break
            except ValueError:
                self.kill()
                break
            yield message
        self._wire.close()

    def step_back(self, niceness: int) -> None:
        """Run the process at lower priority than this one, on a scale of 19: its threads, and those that they start."""
        niceness = min(19, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        for thread in _threads_of(self.pid):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.setpriority(os.PRIO_PROCESS, thread, niceness)

    def kill(self) -> None:
        """SIGKILL: works on a stopped and on a hung process too. `receive` then ends."""
        self._process.kill()

    def stop(self) -> None:
        """Ask politely, then insist."""
        self._send({"op": "stop"})
        self.reap()

    def reap(self) -> None:
        """Take leave of a process that is dead or about to be; one that closed the wire and lives on is killed,
        for it may hold the device's memory."""
        self._outbox.put(None)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def last_words(self) -> str:
        """How the process ended, for logs and error messages."""
        self.reap()
        code = self._process.returncode
        if code < 0:
            return f"the engine process was ended by {signal.Signals(-code).name}"
        return f"the engine process exited with status {code}"

    def _send(self, message: Mapping[str, Any]) -> None:
        self._outbox.put(json.dumps(message, separators=(",", ":")).encode())

    def _write(self) -> None:
        while (data := self._outbox.get()) is not None:
            try:
                self._wire.send_bytes(data)
            except OSError:
                return


def _threads_of(pid: int) -> list[int]:
    """Linux keeps a priority for each thread; elsewhere the process has one."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except FileNotFoundError:
        return [pid]


def pinned(device: str, env: Mapping[str, str], num_devices: int = 1) -> tuple[dict[str, str], str]:
    """The child's environment and its name for `device`: a child told "cuda:1" sees one device, its cuda:0.

    With num_devices 2 it sees cuda:1 and cuda:2. Raises LoadRefused when CUDA_VISIBLE_DEVICES hides one of them.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return dict(env), device
    visible = env.get("CUDA_VISIBLE_DEVICES")
    wanted = range(int(index), int(index) + num_devices)
    devices = list(map(str, range(wanted.stop))) if visible is None else visible.split(",")
    hidden = [place for place in wanted if place >= len(devices) or not devices[place]]
    if hidden:
        raise LoadRefused("engine_error", f"there is no cuda:{hidden[0]} among CUDA_VISIBLE_DEVICES={visible}")
    return {**env, "CUDA_VISIBLE_DEVICES": ",".join(devices[place] for place in wanted)}, "cuda:0"
