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
from multiprocessing.connection import Connection, wait
from typing import Any

from inferfleet.engine.admission import Published
from inferfleet.engine.engine import Engine
from inferfleet.engine.errors import EngineError, GroupBroken, InvalidRequest
from inferfleet.engine.json_log import start_logging
from inferfleet.engine.loader import EngineSpec, Loaded, load_engine
from inferfleet.engine.output import StepOutput
from inferfleet.engine.progress import Progress
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.text.chat import ChatTemplateError
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

    def run(self) -> None:
        """Load, then serve until the parent closes. Raises what loading raised, after telling it."""
        message = self._receive()
        if message.get("op") != "load":
            raise ValueError(f"the first message must be load, not {message.get('op')!r}")
        loaded = self._load(message)
        # What loading made stays for ever: the collector need not look at it again while requests run.
        gc.collect()
        gc.freeze()
        while True:
            while self._has_mail(loaded):
                self._handle(loaded, self._receive())
            self._step(loaded.engine)

    def _has_mail(self, loaded: Loaded) -> bool:
        """Whether the parent said something; waits for it if there is no work. GroupBroken for a rank that is gone."""
        followers, seconds = loaded.followers, 0 if loaded.engine.has_work else None
        if followers is None:
            return self.connection.poll(seconds)
        heard = wait([self.connection, *followers.connections], seconds)
        if heard != [self.connection]:
            followers.check()
        return self.connection in heard

    def _load(self, message: Mapping[str, Any]) -> Loaded:
        try:
            loaded = load_engine(EngineSpec.from_dict(message["spec"]), Progress(self._tell_progress))
        except GroupBroken:
            raise  # a rank died on the way: another try may go well
        except Exception as error:
            code = getattr(error, "code", "load_failed")
            self._send({"op": "failed", "code": code, "message": str(error) or type(error).__name__})
            raise
        self._send({"op": "ready", "card": loaded.card})
        # Says which C++ kernels run, or why the slower references do.
        facts = {"model": message.get("model"), "kernels": build.status(), **loaded.card}
        log.info("ready", extra={"fields": facts})
        return loaded

    def _tell_progress(self, phase: str, done: int, total: int) -> None:
        self._send({"op": "loading", "phase": phase, "done": done, "total": total})

    def _handle(self, loaded: Loaded, message: Mapping[str, Any]) -> None:
        engine, operation = loaded.engine, message.get("op")
        if operation == "add":
            self._add(loaded, message)
        elif operation == "cancel":
            engine.cancel(message["id"])
        elif operation == "stop":
            raise Closed
        else:
            log.error("unknown operation", extra={"fields": {"op": str(operation)}})

    def _add(self, loaded: Loaded, message: Mapping[str, Any]) -> None:
        try:
            add(loaded, message)
            return
        except EngineError as error:
            refusal = error
        except Exception as error:  # nothing that a request says may end the process
            log.exception("a request could not be taken", extra={"fields": {"id": message["id"]}})
            refusal = EngineError(f"the request could not be taken: {type(error).__name__}")
        refused = StepOutput(errors=[(message["id"], refusal)])
        self._send_step(loaded.engine, refused)

    def _step(self, engine: Engine) -> None:
        out = engine.step()
        if out or (engine.has_work and time.monotonic() - self._last_sent >= SIGN_OF_LIFE_SECONDS):
            self._send_step(engine, out)

    def _send_step(self, engine: Engine, news: StepOutput) -> None:
        stats = engine.stats() | {"batch_tokens": news.batch_tokens}
        self._send({"op": "step", "step": engine.num_steps, **news.to_dict(), "stats": stats})

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


def add(loaded: Loaded, message: Mapping[str, Any]) -> None:
    """Turn the messages of an add into a prompt and give it to the engine. EngineError with the field at fault."""
    try:
        sampling = SamplingParams.from_dict(message.get("sampling") or {})
    except (TypeError, ValueError) as error:
        # Its message begins with the field's name.
        raise InvalidRequest(str(error), param=str(error).partition(" ")[0]) from error
    try:
        prompt = loaded.prompts.encode_chat(message["messages"], **message.get("chat_template_kwargs") or {})
    except ChatTemplateError as error:
        raise InvalidRequest(str(error), param="messages") from error
    resume = message.get("resume") or {}
    loaded.engine.add(
        message["id"],
        prompt,
        sampling,
        cache_salt=message.get("cache_salt", ""),
        priority=message.get("priority", 0),
        matformer_slice=message.get("matformer_slice"),
        published={int(i): Published(tuple(told["token_ids"]), told["text"]) for i, told in resume.items()},
    )


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
