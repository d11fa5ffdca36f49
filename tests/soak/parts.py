"""The processes of the fleet that is soaked. Each speaks to Redis and to the bucket through a proxy that has faults."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
from chaosproxy import ChaosProxy
from conftest import RedisServer, free_port
from fleet import WorkerProcess
from hook_worker import HookWorker
from swift_s3 import SwiftServer

from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.tasks.stores import open_store
from inferfleet.workers.torn_file import mend

NAMESPACE = "soak"
MODELS = {"m": {"path": "fake"}, "p": {"path": "image"}}
#: Short leases, so that a minute holds many of them; more deaths than usual, so that faults bury no innocent job.
TIMES = {"lease_seconds": 2, "heartbeat_seconds": 0.5, "sweep_seconds": 0.3, "drain_grace_seconds": 3,
         "stall_seconds": 4, "max_deaths": 5}  # fmt: skip
WORKERS = 2


class Program:
    """`inferfleet NAME` as a child process."""

    def __init__(self, name: str, settings: Settings, log: Path, **given) -> None:
        self.name, self.log = name, log
        values = {"redis_url": settings.redis_url, "namespace": settings.namespace, "log_format": "json",
                  "result_store": settings.result_store, **TIMES, **given}  # fmt: skip
        env = {f"INFERFLEET_{key.upper()}": str(value) for key, value in values.items()}
        secret = settings.s3.secret_access_key
        s3 = settings.s3.model_dump(mode="json") | {"secret_access_key": secret and secret.get_secret_value()}
        env |= {f"INFERFLEET_S3__{key.upper()}": str(value) for key, value in s3.items() if value is not None}
        with log.open("ab") as output:
            command = [sys.executable, "-m", "inferfleet.workers.cli", name]
            self.process = subprocess.Popen(command, env=os.environ | env, stdout=output, stderr=output, cwd=log.parent)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Hooks(HookWorker):
    """The webhook worker."""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.is_alive()


class Parts:
    """`with Parts(binary, swift, folder) as parts:` starts them; `parts.wires` are their ways to Redis, by part."""

    def __init__(self, redis_binary: str, swift: SwiftServer, folder: Path) -> None:
        # With any other policy than `always` a kill may take what was acknowledged, and the verdict would be luck.
        self.redis = RedisServer(redis_binary, folder, fsync="always")
        self.swift, self.folder = swift, folder
        self.names = ["api", "batches", "hooks", *(f"worker{number}" for number in range(WORKERS))]
        self.wires: dict[str, ChaosProxy] = {}
        self.running: dict = {}
        self.ended: list = []
        self.api_port = free_port()
        #: What each worker's clock is ahead of the truth, in seconds.
        self.clock_shift = dict.fromkeys(self.names, 0)
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    def __enter__(self) -> "Parts":
        self.redis.start()
        self._stack.callback(self.redis.kill)
        for name in self.names:
            self.wires[name] = self._stack.enter_context(ChaosProxy(self.redis.port))
        self.bucket = self._stack.enter_context(ChaosProxy(self.swift.port))
        self._stack.callback(self._close)
        self.ledger = Ledger.from_url(self.redis.url, NAMESPACE)
        self._stack.callback(self.ledger.close)
        # The checker reads the bucket past the proxy.
        self.store = open_store(self.settings(self.redis.url, self.swift.port), self.ledger)
        for name in self.names:
            self.start(name)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def settings(self, redis_url: str, bucket_port: int, **more) -> Settings:
        given = self.swift.settings("soak", deadline_seconds=2, read_timeout_seconds=2)
        given["s3"]["endpoint_url"] = f"http://127.0.0.1:{bucket_port}"
        return Settings.model_validate({"redis_url": redis_url, "namespace": NAMESPACE, **TIMES, **given, **more})

    def start(self, name: str) -> None:
        """Start a part (again), as whatever watches over processes would."""
        if name in self.running:
            self.ended.append(self.running[name])
        log = self.folder / f"{name}-{len(self.ended)}.log"
        url = self.wires[name].url
        settings = self.settings(url, self.bucket.port)
        if name == "hooks":
            self.running[name] = Hooks(url, NAMESPACE, log, sweep_seconds=0.3)
        elif name.startswith("worker"):
            chosen = self.settings(url, self.bucket.port, models=MODELS, slots=32, run_slots=0)
            self.running[name] = WorkerProcess(chosen, log, real=False, clock_shift=self.clock_shift[name])
        else:
            given = {"api_port": self.api_port, "webhook_allow_loopback": True} if name == "api" else {}
            self.running[name] = Program(name, settings, log, **given)

    def revive(self) -> list[str]:
        """Start again what ended by itself; its names."""
        dead = [name for name in self.names if not self.running[name].alive]
        for name in dead:
            self.start(name)
        if self.redis.process is not None and self.redis.process.poll() is not None:
            self.start_redis()
            dead.append("redis")
        return dead

    def start_redis(self) -> None:
        """Again, from what it wrote, without an unfinished script; a moment passes until its port is free."""
        mend(self.redis.binary, self.redis.folder, 60)
        for _ in range(50):
            try:
                self.redis.start()
            except AssertionError:
                time.sleep(0.1)
            else:
                return
        raise AssertionError("Redis did not start again: " + (self.folder / "redis.log").read_text()[-2000:])

    def engines(self) -> list[psutil.Process]:
        """All engine processes."""
        found = []
        for name in self.names:
            if name.startswith("worker") and self.running[name].alive:
                with suppress(psutil.NoSuchProcess):
                    found += self.running[name].engines()
        return found

    def log_lines(self, event: str) -> list[dict]:
        """What the parts logged under one name."""
        lines = []
        for path in sorted(self.folder.glob("*-*.log")):
            for raw in path.read_text(errors="replace").splitlines():
                if raw.startswith("{") and f'"{event}"' in raw:
                    with suppress(ValueError):
                        lines.append(json.loads(raw))
        return [line for line in lines if line.get("event") == event]

    def _close(self) -> None:
        for part in [*self.running.values(), *self.ended]:
            if isinstance(part, WorkerProcess):
                part.close()
            else:
                part.kill()
