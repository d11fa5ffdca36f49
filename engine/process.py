"""The engine as a child process: `python -m inferfleet.engine.process --fd N`.

The parent speaks UTF-8 JSON over a socket, one message a frame (multiprocessing's, without pickle). One thread reads
without waiting while there is work, computes, and sends what is new; with no work it sleeps in the read. The end of
the socket is the end of the process, so no engine outlives its parent.

    in:   load (first), add, cancel, stop           out:   loading, then ready or failed, then step
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from inferfleet.engine.errors import EngineError, GroupBroken
from inferfleet.engine.json_log import start_logging
from inferfleet.engine.news import News
from inferfleet.engine.progress import Progress
from inferfleet.engine.services import Service, load_service
from inferfleet.kernels import build, threads

#: While it computes, the child says so at least this often, so that a stalled engine is told from a slow one.
SIGN_OF_LIFE_SECONDS = 1.0

log = logging.getLogger("inferfleet.engine.process")


class Closed(Exception):
    """The parent is gone, or said stop."""


class Child:
    """One model behind one socket."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._last_sent = 0.0
        self._service: Service[Any] | None = None

    def run(self) -> None:
        """Load, then serve until the parent closes. Raises what loading raised, after telling it."""
        message = self._receive()
        if message.get("op") != "load":
            raise ValueError(f"the first message must be load, not {message.get('op')!r}")
        service = self._load(message)
        # What loading made stays for ever: the collector need not look at it again while requests run.
        gc.collect()
        gc.freeze()
        while True:
            while self._has_mail(service):
                self._handle(service, self._receive())
            self._step(service)

    def _has_mail(self, service: Service[Any]) -> bool:
        """Whether the parent said something; waits for it if there is no work. GroupBroken for a rank that is gone."""
        others, seconds = service.connections, 0 if service.engine.has_work else None
        if not others:
            return self.connection.poll(seconds)
        heard = wait([self.connection, *others], seconds)
        if heard != [self.connection]:
            service.check()
        return self.connection in heard

    def _load(self, message: Mapping[str, Any]) -> Service[Any]:
        try:
            service = load_service(message["spec"], Progress(self._tell_progress), self._alive)
        except GroupBroken:
            raise  # a rank died on the way: another try may go well
        except Exception as error:
            code = getattr(error, "code", "load_failed")
            self._send({"op": "failed", "code": code, "message": str(error) or type(error).__name__})
            raise
        self._send({"op": "ready", "card": service.card})
        # Says which C++ kernels run, or why the slower references do.
        facts = {"model": message.get("model"), "kernels": build.status(), **service.card}
        log.info("ready", extra={"fields": facts})
        self._service = service
        return service

    def _tell_progress(self, phase: str, done: int, total: int) -> None:
        self._send({"op": "loading", "phase": phase, "done": done, "total": total})

    def _handle(self, service: Service[Any], message: Mapping[str, Any]) -> None:
        operation = message.get("op")
        if operation == "add":
            self._add(service, message)
        elif operation == "cancel":
            service.engine.cancel(message["id"])
        elif operation == "stop":
            raise Closed
        else:
            log.error("unknown operation", extra={"fields": {"op": str(operation)}})

    def _add(self, service: Service[Any], message: Mapping[str, Any]) -> None:
        try:
            service.add(message)
            return
        except EngineError as error:
            refusal = error
        except Exception as error:  # nothing that a request says may end the process
            log.exception("a request could not be taken", extra={"fields": {"id": message["id"]}})
            refusal = EngineError(f"the request could not be taken: {type(error).__name__}")
        self._send_step(service, service.news((message["id"], refusal)))

    def _step(self, service: Service[Any]) -> None:
        news = service.engine.step()
        if news or (service.engine.has_work and self._is_silent):
            self._send_step(service, news)

    def _alive(self) -> None:
        """Called within a step that may take long."""
        if self._service is not None and self._is_silent:
            # That the parent is gone is noticed between steps.
            with suppress(Closed):
                self._send_step(self._service, self._service.news())

    @property
    def _is_silent(self) -> bool:
        return time.monotonic() - self._last_sent >= SIGN_OF_LIFE_SECONDS

    def _send_step(self, service: Service[Any], news: News[Any, Any]) -> None:
        stats = service.engine.stats() | news.figures
        self._send({"op": "step", "step": service.engine.num_steps, **news.to_dict(), "stats": stats})

    def _receive(self) -> dict[str, Any]:
        try:
            return json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise Closed from error

    def _send(self, message: Mapping[str, Any]) -> None:
        self._last_sent = time.monotonic()
        try:
            self.connection.send_bytes(json.dumps(message, separators=(",", ":")).encode())
        except ConnectionError as error:
            raise Closed from error


def usable_cores() -> int:
    """The cores that this process may use; a spec's `threads` goes over it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    """Exit status 0 when the parent closed the socket, 1 when the model could not be loaded or the engine broke."""
    parser = argparse.ArgumentParser(prog="python -m inferfleet.engine.process", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited socket that the parent speaks over")
    options = parser.parse_args()
    start_logging()
    os.set_inheritable(options.fd, False)
    threads.use(usable_cores())
    try:
        Child(Connection(options.fd)).run()
    except Closed:
        return 0
    except Exception:
        log.exception("the engine process ends")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
