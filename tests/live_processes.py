"""A whole fleet of processes, as its operator starts them: API, worker, batches, webhooks, on one real Redis."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
from conftest import free_port
from fleet import Fleet, WorkerProcess, until

#: The scripted engine's models: one of text, one of images.
SCRIPTED = {"paper": "fake", "painter": "fake-image"}


class Role:
    """`inferfleet NAME` as a child process; its log is a file of JSON lines."""

    def __init__(self, name: str, folder: Path, *flags: str, **settings: Any) -> None:
        env = {f"INFERFLEET_{key.upper()}": str(value) for key, value in settings.items()}
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            command = [sys.executable, "-m", "inferfleet.workers.cli", name, *flags]
            self.process = subprocess.Popen(
                command, env={**os.environ, "INFERFLEET_LOG_FORMAT": "json", **env}, stdout=output, stderr=output,
                cwd=folder,
            )  # fmt: skip

    @property
    def rss(self) -> int:
        """Bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class LiveFleet:
    url: str
    redis_url: str
    fleet: Fleet
    api: Role
    worker: WorkerProcess

    def http(self, **kwargs: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, trust_env=False, timeout=60, **kwargs)


@contextmanager
def live_fleet(
    redis_url: str, folder: Path, models: dict[str, Any] | None = None, *, real: bool = False, **settings: Any
) -> Iterator[LiveFleet]:
    """Ready to serve; `settings` are the API's and the worker's, `real` means our own engine in place of the script."""
    fleet, port = Fleet(redis_url, folder), free_port()
    shared = {"redis_url": redis_url, "namespace": "test", **settings}
    with ExitStack() as running:
        running.callback(fleet.close)
        worker = fleet.start_worker(models or SCRIPTED, real=real, wait=False, **settings)
        roles = {name: Role(name, folder, **shared) for name in ("batches", "webhooks")}
        roles["api"] = Role("api", folder, api_port=port, **shared)
        for role in roles.values():
            running.callback(role.kill)
        live = LiveFleet(f"http://127.0.0.1:{port}", redis_url, fleet, roles["api"], worker)
        with live.http() as http:
            until(lambda: set(ready_models(http)) >= set(models or SCRIPTED))
        yield live


def ready_models(http: httpx2.Client) -> list[str]:
    with contextlib.suppress(httpx2.TransportError):
        answer = http.get("/ready")
        return answer.json()["models"] if answer.status_code == 200 else []
    return []
