"""Structured logs: JSON when not on a terminal, the job's id on every line about a job.

Never prompts, texts, secrets or the locals of a frame.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

import structlog

#: Chatty libraries: a line for every turn would drown ours, and the URL of a webhook may hold a secret.
QUIET = ("celery.app.trace", "celery.worker.strategy", "kombu", "amqp", "httpcore2")

#: Keys that must never carry their value into a log, whoever writes the line.
SECRET = frozenset(
    {"prompt", "messages", "content", "text", "delta", "envelope", "password", "authorization", "api_key", "secret"}
)


def get(name: str) -> Any:
    """The logger of one part; lines carry it as `part`."""
    return structlog.get_logger(part=name)


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Every line that this thread writes inside carries `fields`."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's logging, once, at the start of a process.

    `log_format` is json, console, or auto: console on a terminal.
    """
    stream = stream or cast(TextIO, _Stderr())
    as_json = log_format == "json" or (log_format == "auto" and not stream.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _redact,
    ]
    last: list[Any] = [_console()]
    if as_json:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    number = logging.getLevelName(level.upper())
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
            foreign_pre_chain=[*shared, _name_of],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


class _Stderr:
    """Whatever sys.stderr is at the time: who draws on the terminal puts something in its place for a while."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def _console() -> Any:
    # Plain traces: the pretty ones print the locals of every frame, and those hold prompts.
    return structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)


def _redact(_logger: Any, _method: str, event: Any) -> Any:
    for key in SECRET & event.keys():
        event[key] = "[redacted]"
    return event


def _name_of(_logger: Any, _method: str, event: Any) -> Any:
    record = event.get("_record")
    if record is not None:
        event["part"] = record.name
    return event
