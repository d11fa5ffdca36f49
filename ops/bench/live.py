"""A fleet for a benchmark: `inferfleet up` with given models, on a free port, with a Redis of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx2

READY_SECONDS = 300


@contextmanager
def fleet(models: Mapping[str, str]) -> Iterator[str]:
    """models: name -> folder. Yields the API's address once every one of them answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as folder:
        command = [sys.executable, "-m", "inferfleet.workers.cli", "up", "--port", str(port), "--data-dir", folder]
        for name, path in models.items():
            command += ["--model", f"{name}={path}"]
        environment = {name: value for name, value in os.environ.items() if name != "INFERFLEET_REDIS_URL"}
        up = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr, env=environment, cwd=folder)
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not ready(url, len(models)):
                if up.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the fleet did not become ready; its log is above")
                time.sleep(0.2)
            yield url
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)


def ready(url: str, num_models: int) -> bool:
    """Whether so many models are loaded."""
    try:
        return len(httpx2.get(f"{url}/ready", trust_env=False, timeout=2).json().get("models") or ()) >= num_models
    except httpx2.TransportError:
        return False
