"""A second real S3 server for the tests, stricter than Swift: Ceph's radosgw with one monitor and one disk in memory.

It comes from the distribution (`apt-get install radosgw ceph-mon ceph-osd ceph-common`), so it is there for the tests
that are marked slow, and skipped where nobody installed it.
"""

import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

from swift_s3 import free_port

from inferfleet.tasks.settings import S3Settings
from inferfleet.tasks.stores.s3_store import make_client

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool", "setpriv")
START_SECONDS = 60
ACCESS_KEY, SECRET_KEY = "LABACCESSKEY", "lab-secret-key-of-a-gateway"
BUCKET = "results"
MONITOR, DISK, GATEWAY = "mon", "osd", "rgw"

# Without a key of its own for each part the gateway waits for ever: `auth … = none` is understood by ceph alone.
CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_old}]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = true
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 1
ms bind ipv6 = false
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file =
keyring = {folder}/keyring
[mon.a]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 1073741824
ms bind port min = {osd}
ms bind port max = {osd_last}
[client.admin]
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw override bucket index max shards = 1
"""


def is_installed() -> bool:
    return all(shutil.which(program) for program in PROGRAMS)


class RadosGateway:
    """`with RadosGateway(folder) as server:` serves S3 at `server.url`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._nodes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def settings(self, prefix: str, **more: Any) -> dict[str, Any]:
        """What a fleet is told to keep its files here; `more` goes over the S3 settings."""
        keys = {"access_key_id": ACCESS_KEY, "secret_access_key": SECRET_KEY}
        # This version stores an object whatever x-amz-checksum-sha256 says of it, but checks Content-MD5.
        s3 = {"endpoint_url": self.url, "addressing_style": "path", "checksums": "md5", "deadline_seconds": 20, **keys}
        return {"result_store": f"s3://{BUCKET}/{prefix}", "s3": s3 | more}

    def __enter__(self) -> "RadosGateway":
        for name in (MONITOR, DISK):
            (self.folder / name).mkdir(parents=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for node in reversed(self._nodes):
            node.kill()
            node.wait()

    def _start(self) -> None:
        self._make_monitor()
        self._serve("ceph-mon", "-f", "-i", "a")
        self._until(lambda: self._run("ceph", "--connect-timeout", "2", "-s", check=False) == 0, "monitor")
        self._make_disk()
        self._serve("ceph-osd", "-f", "-i", "0")
        self._serve("radosgw", "-f", "-n", "client.admin")
        self._until(self._listens, "gateway")
        user = ("user", "create", "--uid=lab", "--display-name=lab")
        self._run("radosgw-admin", *user, f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
        make_client(S3Settings(**self.settings("")["s3"])).create_bucket(Bucket=BUCKET)

    def _make_monitor(self) -> None:
        fsid, keys, monitors = str(uuid.uuid4()), self.folder / "keyring", self.folder / "monmap"
        mon, mon_old, osd = (free_port() for _ in range(3))
        filled = CONFIG.format(
            folder=self.folder, fsid=fsid, mon=mon, mon_old=mon_old, osd=osd, osd_last=osd + 40, rgw=self.port
        )
        (self.folder / "ceph.conf").write_text(filled)
        key = ("ceph-authtool", str(keys), "--gen-key")
        self._run(*key, "--create-keyring", "-n", "mon.", "--cap", "mon", "allow *")
        caps = [word for part in ("mon", "osd", "mgr") for word in ("--cap", part, "allow *")]
        self._run(*key, "-n", "client.admin", *caps)
        address = f"[v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_old}]"
        self._run("monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, str(monitors))
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monitors), "--keyring", str(keys))

    def _make_disk(self) -> None:
        disk, key = str(uuid.uuid4()), self.folder / "osd.key"
        self._run("ceph", "osd", "new", disk, "0")
        caps = ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd")
        self._run("ceph", "auth", "get-or-create", "osd.0", *caps, "-o", str(key))
        self._run("ceph-authtool", str(self.folder / "keyring"), "--import-keyring", str(key))
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)

    def _run(self, *command: str, check: bool = True) -> int:
        with (self.folder / "commands.log").open("ab") as log:
            done = subprocess.run(command, env=self._environment, stdout=log, stderr=log, timeout=START_SECONDS)
        assert done.returncode == 0 or not check, (self.folder / "commands.log").read_text()[-2000:]
        return done.returncode

    def _serve(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            dies_with_us = ("setpriv", "--pdeathsig", "KILL")
            node = subprocess.Popen(
                (*dies_with_us, *command), env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._nodes.append(node)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            outputs = "\n".join(path.read_text()[-1000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"the {what} did not come up\n{outputs}"
            assert all(node.poll() is None for node in self._nodes), outputs
            time.sleep(0.1)
