"""A runner of batches for the tests, in a thread beside a live API or as the program that users start; a worker whose
model costs nothing; lines."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from inferfleet.tasks.batches import TERMINAL
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.names import new_job_id
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


class NullWorker:
    """Answers every job of its model at once with `size` letters, from one thread."""

    def __init__(self, redis_url, namespace, model="null", size=10):
        self.ledger = Ledger.from_url(redis_url, namespace)
        self.ledger.put_card(model, {"id": model, "state": "ready"}, "null", 3600)
        self.model = model
        self.answers: Counter[str] = Counter()
        self._choice = {"index": 0, "message": {"role": "assistant", "content": "x" * size}, "finish_reason": "stop"}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stopping.set()
        self._thread.join()
        self.ledger.close()

    def _run(self):
        usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
        while not self._stopping.is_set():
            claim = self.ledger.claim(self.model, worker="null", token=new_job_id(), lease_ms=60_000)
            if claim is None:
                self._stopping.wait(0.005)
                continue
            body = {"id": claim.job_id, "object": "chat.completion", "choices": [self._choice], "usage": usage}
            response = json.dumps(body).encode()
            self.ledger.complete(claim.job_id, claim.fence, state="completed", response=response, usage=usage)
            self.answers[claim.job_id] += 1


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


def start(
    client: Any, lines: list[Any], endpoint: str = "/v1/chat/completions", window: str = "24h", **options: Any
) -> Any:
    """A batch of these lines."""
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, **options)


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
