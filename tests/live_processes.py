"""A whole fleet of processes, as its operator starts them: API, worker, batches, webhooks, on one real Redis."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from conftest import free_port
from fleet import Fleet, WorkerProcess, until

from inferfleet.workers.keys import digest, new_key


class Role:
    """`inferfleet NAME` as a child process; its log is a file of JSON lines."""

    def __init__(self, name: str, folder: Path, **settings: Any) -> None:
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
        env = {f"INFERFLEET_{key.upper()}": value for key, value in values.items()}
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as output:
            command = [sys.executable, "-m", "inferfleet.workers.cli", name]
            self.process = subprocess.Popen(
                command, env={**os.environ, "INFERFLEET_LOG_FORMAT": "json", **env}, stdout=output, stderr=output,
                cwd=folder,
            )  # fmt: skip

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class LiveFleet:
    url: str
    fleet: Fleet
    api: Role
    worker: WorkerProcess

    def http(self, **kwargs: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, trust_env=False, timeout=60, **kwargs)

    def key(self, tenant: str) -> str:
        """A new API key."""
        key = new_key()
        self.fleet.ledger.put_key(digest(key), tenant, "a test")
        return key


@contextmanager
def live_fleet(
    redis_url: str, folder: Path, models: dict[str, Any], *, real: bool = False, **settings: Any
) -> Iterator[LiveFleet]:
    """Ready to serve; `settings` are the API's and the worker's, `real` means our own engine in place of the script."""
    fleet, port = Fleet(redis_url, folder), free_port()
    shared = {"redis_url": redis_url, "namespace": "test", **settings}
    with ExitStack() as running:
        running.callback(fleet.close)
        worker = fleet.start_worker(models, real=real, wait=False, **settings)
        roles = {name: Role(name, folder, **shared) for name in ("batches", "webhooks")}
        roles["api"] = Role("api", folder, api_port=port, models=models, **shared)
        for role in roles.values():
            running.callback(role.kill)
        live = LiveFleet(f"http://127.0.0.1:{port}", fleet, roles["api"], worker)
        with live.http() as http:
            until(lambda: set(ready_models(http)) >= set(models))
        yield live


def ready_models(http: httpx2.Client) -> list[str]:
    with contextlib.suppress(httpx2.TransportError):
        answer = http.get("/ready")
        return answer.json()["models"] if answer.status_code == 200 else []
    return []
