"""A runner of batches for the tests: in a thread beside a live API, or as the program that users start."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from inferfleet.tasks.batches import TERMINAL
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import open_store
from inferfleet.workers.batches.run import Tools
from inferfleet.workers.batches.runner import BatchRunner


@contextmanager
def running_batches(settings: Settings, ring: Callable[[str, int], Any], **changes: Any) -> Iterator[Tools]:
    """A runner in a thread; `changes` go over the settings."""
    chosen = Settings.model_validate({**settings.model_dump(), **changes})
    ledger = Ledger.from_url(chosen.redis_url, chosen.namespace)
    bell: Any = SimpleNamespace(ring=ring)
    tools = Tools(chosen, ledger, open_store(chosen, ledger), bell, threading.Event())
    thread = threading.Thread(target=BatchRunner(tools).run, daemon=True)
    thread.start()
    try:
        yield tools
    finally:
        tools.closing.set()
        thread.join(timeout=20)
        assert not thread.is_alive()
        ledger.close()


class RunnerProcess:
    """`inferfleet batches` as a child process, to be killed."""

    def __init__(self, settings: Settings, folder: Path, **changes: Any) -> None:
        given = {"redis_url": settings.redis_url, "namespace": settings.namespace, "log_format": "json", **changes}
        env = {f"INFERFLEET_{name.upper()}": str(value) for name, value in given.items()}
        self.log = folder / f"batches-{len(list(folder.glob('batches-*')))}.log"
        with self.log.open("wb") as output:
            command = [sys.executable, "-m", "inferfleet.workers.cli", "batches"]
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=output, stderr=output, cwd=folder
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def line(custom_id: str, text: str = "say hi", model: str = "paper", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": model, "messages": messages, **body},
    }


def response_line(custom_id: str, text: str = "say hi", model: str = "paper", **body: Any) -> dict[str, Any]:
    given = {"model": model, "input": text, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": given}


def image_line(custom_id: str, prompt: str = "a cat", model: str = "flux", **body: Any) -> dict[str, Any]:
    given = {"model": model, "prompt": prompt, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/images/generations", "body": given}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)


def wait_for_end(client: Any, batch_id: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch_id)).status not in TERMINAL:
        assert time.monotonic() < deadline, f"the batch is {batch.status} with {batch.request_counts}"
        time.sleep(0.1)  # the API, the runner and the worker often share this process with us
    return batch


def read_lines(client: Any, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file, none where there is none."""
    if file_id is None:
        return []
    return [json.loads(raw) for raw in client.files.content(file_id).read().splitlines()]
