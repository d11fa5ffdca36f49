"""How long a job stands still when its worker is killed with kill -9: from the kill to the next word of another worker.

    python ops/bench/recovery.py [--kills 20] [--vanish] [--lease 15] [--heartbeat 5] [--json]

The other worker is on the same machine and sees that the process is gone. --vanish: the worker is stopped (SIGSTOP)
instead, which to the others is what the loss of its machine is: they have to wait for the end of its lease.

Two workers with the tests' scripted engine (its words cost nothing), a Redis with an append-only file. Each kill comes
at a random moment of the lease; the killed worker is replaced before the next one, and model loading is no part of it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from conftest import RedisServer, redis_binary
from fleet import Fleet, deltas, until

#: Longer than any recovery: the job must still run when its worker dies.
ENDLESS = "tokens=4000 step=0.05"


def recover(fleet: Fleet, settings: dict[str, Any], *, vanish: bool) -> float:
    """Seconds from the death of a job's worker to the job's next word."""
    job_id = fleet.submit(ENDLESS)
    fleet.wait_for_words(job_id, 2)
    holder = fleet.ledger.get(job_id).worker
    time.sleep(random.uniform(0, settings["lease_seconds"] / 2))
    victim = next(worker for worker in fleet.workers if worker.alive and holder == name_of(worker))
    victim.signal(signal.SIGSTOP) if vanish else victim.kill()
    killed = time.monotonic()
    said = len(deltas(fleet.ledger.events(job_id)))
    until(lambda: len(deltas(fleet.ledger.events(job_id))) > said, seconds=20 * settings["lease_seconds"])
    seconds = time.monotonic() - killed
    victim.kill()
    assert fleet.ledger.get(job_id).deaths == 1
    fleet.ledger.cancel(job_id)
    fleet.wait(job_id)
    fleet.start_worker(**settings)
    return seconds


def name_of(worker: Any) -> str:
    """What the ledger calls a worker."""
    return str(worker.lines("worker_started")[0]["worker"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--vanish", action="store_true", help="stop workers instead of killing them")
    parser.add_argument("--lease", type=float, default=15)
    parser.add_argument("--heartbeat", type=float, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    binary = redis_binary()
    if binary is None:
        parser.error("redis-server or valkey-server is missing")
    settings = {"lease_seconds": options.lease, "heartbeat_seconds": options.heartbeat, "sweep_seconds": 1}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recovery-")))
        server = RedisServer(binary, folder)
        server.start()
        stack.callback(server.kill)
        fleet = stack.enter_context(closing(Fleet(server.url, folder)))
        for _ in range(2):
            fleet.start_worker(**settings)
        times = [recover(fleet, settings, vanish=options.vanish) for _ in range(options.kills)]
    figures = {"kills": len(times), **settings, "p50_s": round(statistics.median(times), 2),
               "min_s": round(min(times), 2), "max_s": round(max(times), 2)}  # fmt: skip
    print(json.dumps(figures) if options.json else "\n".join(f"{name:18} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
