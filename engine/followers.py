"""Rank 0's side of a split model: starts the other ranks, has them load and follow every step, and ends them.

    rank 0 (scheduler, sampler, text)  ── wire ──>  follower 1 .. n-1 (layers alone)
          └──────────── sums and gathers inside a step ────────────┘

No rank can go on without the others. So whatever fails while a step runs breaks the group for good (GroupBroken): the
process of rank 0 ends, its wires end, and with them the followers.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inferfleet.engine import frames, ranks
from inferfleet.engine.batch import Batch
from inferfleet.engine.errors import GroupBroken, LoadError
from inferfleet.engine.families import Model
from inferfleet.engine.layout import CacheLayout
from inferfleet.engine.ranks import Ranks
from inferfleet.engine.wire import Closed, Message, Wire, watch

#: How long a follower may take to end once its wire has.
END_SECONDS = 2.0
#: How long a step may go on after a follower's death. Gloo notices at once; a GPU may wait in a kernel for ever.
BROKEN_SECONDS = 15.0
COMMAND = (sys.executable, "-m", "inferfleet.engine.follower")

log = logging.getLogger(__name__)


class Followers:
    """The processes of ranks 1 .. size-1. One thread uses them; they end with this object."""

    def __init__(self, size: int) -> None:
        self.group = Ranks(0, size)
        self._seconds = ranks.COLLECTIVE_SECONDS
        self._folder = Path(tempfile.mkdtemp(prefix="inferfleet-ranks-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._wires: list[Wire] = []
        self._state = _State()
        self.close = weakref.finalize(self, _end, self._state, self._processes, self._wires, self.group, self._folder)
        for _ in range(1, size):
            self._start()
        state, processes, group = self._state, self._processes, self.group
        watch(self._wires, lambda number: _on_end(state, number + 1, processes[number], group))

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._wires.append(Wire(ours, self._seconds))
            command = [*COMMAND, "--fd", str(theirs.fileno())]
            self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def connections(self) -> Sequence[Connection]:
        """Readable, while no step runs, only where a follower is gone."""
        return [wire.connection for wire in self._wires]

    def load(
        self, path: str, settings: Mapping[str, Any], matformer: tuple[str, str | None] | None, threads: int
    ) -> None:
        """Have every follower begin to load its share of a folder; `wait_for_load` says how it went.

        matformer: file and default of the table of slices, where there is one.
        """
        order = {
            "path": path,
            "settings": dict(settings),
            "matformer": matformer,
            "threads": threads,
            "seconds": self._seconds,
        }
        for rank, wire in enumerate(self._wires, start=1):
            self._tell(wire, "load", rank=rank, size=self.group.size, **order)

    def wait_for_load(self) -> None:
        """LoadError with what a follower could not do."""
        self.group.free_elsewhere = [int(answer["free"]) for answer in self._answers("loaded")]

    def lead(self, model: Model, layout: CacheLayout, device: torch.device) -> Leader:
        """Have every follower build its cache, and meet them."""
        meeting_point = self._folder / "meeting"
        for wire in self._wires:
            self._tell(wire, "cache", layout=asdict(layout), meeting_point=str(meeting_point))
        self._answers("ready")
        with self.step():
            self.group.connect(meeting_point, device, self._seconds)
        return Leader(model, self)

    def follow(self, batch: Batch) -> None:
        """The step that comes next."""
        frame = frames.pack(batch)
        for wire in self._wires:
            wire.send(frame)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around what all ranks do together: whatever fails in it breaks the group. GroupBroken says who is gone."""
        if self._state.lost is not None:
            raise GroupBroken(self._state.lost)
        self._state.in_step = True
        try:
            yield
        except Exception as error:
            # A rank that died is known a moment later than its neighbours' sockets know it.
            self._state.ended.wait(1.0)
            raise GroupBroken(
                self._state.lost or f"a step of a split model failed: {error or type(error).__name__}"
            ) from error
        finally:
            self._state.in_step = False

    def check(self) -> None:
        """GroupBroken if a follower is gone. Between steps: inside one, they have nothing to say either."""
        if any(connection.poll() for connection in self.connections):
            self._state.ended.wait(END_SECONDS)
            raise GroupBroken(self._state.lost or "a rank closed its wire")

    def _tell(self, wire: Wire, operation: str, **fields: Any) -> None:
        try:
            wire.tell(operation, **fields)
        except Closed as error:
            self._state.ended.wait(END_SECONDS)
            raise GroupBroken(self._state.lost or "a rank closed its wire") from error

    def _answers(self, wanted: str) -> list[Message]:
        """What each follower says; LoadError if one could not."""
        found = []
        for rank, wire in enumerate(self._wires, start=1):
            try:
                answer = wire.hear()
            except Closed as error:
                self._state.ended.wait(END_SECONDS)
                raise GroupBroken(self._state.lost or f"rank {rank} closed its wire") from error
            if answer["op"] != wanted:
                raise LoadError(f"rank {rank} of {self.group.size}: {answer['message']}", param=answer.get("param"))
            found.append(answer)
        return found


class Leader:
    """A model whose every step is taken by all ranks; to the engine it looks like one that is here alone."""

    def __init__(self, model: Model, followers: Followers) -> None:
        self._model, self._followers = model, followers

    def forward(self, input_ids: Tensor, positions: Tensor, batch: Batch) -> Tensor:
        with self._followers.step():
            self._followers.follow(batch)
            return self._model.forward(input_ids, positions, batch)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        with self._followers.step():
            return self._model.compute_logits(hidden)


class _State:
    """What the watching thread and the computing one tell each other."""

    def __init__(self) -> None:
        self.closing = False
        self.in_step = False
        #: Which rank is gone, and how it ended.
        self.lost: str | None = None
        self.ended = threading.Event()


def _on_end(state: _State, rank: int, process: subprocess.Popen[bytes], group: Ranks) -> None:
    """In the watching thread: a wire has ended, which is our doing or a death."""
    if state.closing:
        return
    state.lost = f"rank {rank} (process {process.pid}) {_how(process)}"
    state.ended.set()
    log.error("a rank is gone", extra={"fields": {"rank": rank, "pid": process.pid, "reason": state.lost}})
    if state.in_step:
        threading.Event().wait(BROKEN_SECONDS)
        if state.in_step and not state.closing:
            log.error("a step does not end without the rank that is gone: this process ends")
            os._exit(1)


def _how(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return "closed its wire"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _end(
    state: _State, processes: list[subprocess.Popen[bytes]], wires: list[Wire], group: Ranks, folder: Path
) -> None:
    """Nothing of the followers is left afterwards."""
    state.closing = True
    for wire in wires:
        wire.close()
    for process in processes:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    group.close()
    shutil.rmtree(folder, ignore_errors=True)
