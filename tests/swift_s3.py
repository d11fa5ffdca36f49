"""A real S3 server for the tests: OpenStack Swift with its S3 API, four processes on loopback, one replica.

Swift comes from the package index into a virtual environment of its own, because it patches sockets and wants old
libraries. Each of its processes can be stopped or killed, which makes the partial failures that a fake never has.
"""

import fcntl
import getpass
import os
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from inferfleet.tasks.settings import S3Settings
from inferfleet.tasks.stores.s3_store import make_client

REQUIREMENT = "swift==2.38.3"
INSTALL_SECONDS, START_SECONDS = 180, 30
NODE = Path(__file__).with_name("swift_node.py")
ACCESS_KEY, SECRET_KEY = "lab:results", "lab-secret-key"
BUCKET = "results"
BACKENDS = ("account", "container", "object")

COMMON = """\
[DEFAULT]
swift_dir = {folder}
user = {user}
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
log_name = {kind}
log_level = WARNING
"""
BACKEND = """\
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
# Without the error_suppression lines one slow answer takes the only node out of service for a minute.
PROXY = """\
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
error_suppression_interval = 0
error_suppression_limit = 1000000
node_timeout = 3
recoverable_node_timeout = 3
conn_timeout = 1
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
dns_compliant_bucket_names = true
[filter:tempauth]
use = egg:swift#tempauth
user_lab_results = {secret} .admin
[filter:slo]
use = egg:swift#slo
"""
SWIFT = """\
[swift-hash]
swift_hash_path_suffix = lab
swift_hash_path_prefix = lab
[storage-policy:0]
name = one
default = yes
"""


class SwiftMissing(Exception):
    """Swift cannot be installed here."""


def swift_python(cache: Path) -> Path:
    """The python of a virtual environment with Swift, made at the first call; several processes may ask at once."""
    folder = cache / f"{REQUIREMENT.replace('==', '-')}-py{sys.version_info.major}.{sys.version_info.minor}"
    folder.mkdir(parents=True, exist_ok=True)
    python, done = folder / "bin" / "python", folder / "installed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            venv.create(folder, with_pip=False)
            # The pip of whoever runs the tests: a bare Debian has none to put into a new environment.
            pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--only-binary=:all:"]
            command = [str(part) for part in (*pip, REQUIREMENT)]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_SECONDS)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                raise SwiftMissing((error.stderr or b"").decode(errors="replace")[-2000:]) from None
            done.touch()
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SwiftServer:
    """`with SwiftServer(python, folder) as swift:` serves S3 at `swift.url`. `swift.nodes[kind]` are its processes."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder
        self.ports = {kind: free_port() for kind in (*BACKENDS, "proxy")}
        self.nodes: dict[str, subprocess.Popen] = {}

    @property
    def port(self) -> int:
        return self.ports["proxy"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "SwiftServer":
        (self.folder / "devices" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(SWIFT)
        for kind, port in self.ports.items():
            text = COMMON + (PROXY if kind == "proxy" else BACKEND)
            filled = text.format(folder=self.folder, user=getpass.getuser(), port=port, kind=kind, secret=SECRET_KEY)
            (self.folder / f"{kind}.conf").write_text(filled)
        rings = [f"{kind}={self.ports[kind]}" for kind in BACKENDS]
        subprocess.run([self.python, "-W", "ignore", NODE, "rings", self.folder, *rings], check=True)
        for kind in self.ports:
            self.start(kind)
        for kind in self.ports:
            self.wait_until_listening(kind)
        make_client(S3Settings(**self.settings("")["s3"])).create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *exc: object) -> None:
        for kind in self.nodes:
            self.kill(kind)

    def settings(self, prefix: str, **more: Any) -> dict[str, Any]:
        """What a fleet is told to keep its files here; `more` goes over the S3 settings."""
        keys = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}
        s3 = {"endpoint_url": self.url, "addressing_style": "path", "deadline_seconds": 5, **keys, **more}
        return {"result_store": f"s3://{BUCKET}/{prefix}", "s3": s3}

    def start(self, kind: str) -> None:
        """Start one of the processes (again)."""
        with (self.folder / f"{kind}.log").open("ab") as log:
            command = [self.python, "-W", "ignore", NODE, "serve", self.folder, kind]
            self.nodes[kind] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_until_listening(self, kind: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.ports[kind])) == 0:
                    return
            assert self.nodes[kind].poll() is None, (self.folder / f"{kind}.log").read_text()[-2000:]
            assert time.monotonic() < deadline, f"Swift's {kind} server did not come up within {START_SECONDS} s"
            time.sleep(0.02)

    def signal(self, kind: str, number: int) -> None:
        os.kill(self.nodes[kind].pid, number)

    def kill(self, kind: str) -> None:
        self.nodes[kind].kill()
        self.nodes[kind].wait()
