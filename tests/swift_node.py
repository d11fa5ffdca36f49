"""Runs in Swift's own virtual environment: one server process of it, or the making of its rings.

swift_node.py rings FOLDER KIND=PORT ...    one partition table for each kind of server
swift_node.py serve FOLDER KIND             account, container, object or proxy, until a signal
"""

import ctypes
import signal
import sys
from pathlib import Path

PARTITION_POWER = 4


def make_rings(folder, ports):
    from swift.common.ring import RingBuilder

    for kind, port in ports.items():
        builder = RingBuilder(PARTITION_POWER, 1, 0)  # one replica
        place = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
        builder.add_dev({"region": 1, "zone": 1, **place, "device": "d1", "weight": 1.0, "meta": ""})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))


def serve(folder, kind):
    # Swift shares its ports (SO_REUSEPORT): a server that outlived its test would take half of the next one's requests.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    import swift.common.utils as utils

    utils.SWIFT_CONF_FILE = str(folder / "swift.conf")
    utils.HASH_PATH_SUFFIX = utils.HASH_PATH_PREFIX = b""
    from swift.common import constraints
    from swift.common.storage_policy import reload_storage_policies
    from swift.common.wsgi import run_wsgi

    constraints.reload_constraints()
    reload_storage_policies()
    sys.exit(run_wsgi(str(folder / f"{kind}.conf"), f"{kind}-server", default_port=0, verbose=False))


if __name__ == "__main__":
    verb, where, *rest = sys.argv[1:]
    if verb == "rings":
        make_rings(Path(where), {kind: int(port) for kind, port in (pair.split("=") for pair in rest)})
    else:
        serve(Path(where), rest[0])
