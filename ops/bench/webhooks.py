"""Webhook deliveries per second: a full outbox, one webhook worker, receivers on loopback that answer 200 at once.

    python ops/bench/webhooks.py [--events 5000] [--receivers 8] [--slots 16] [--json]

Every delivery is signed, connects anew and is recorded in Redis (append-only file, everysec). A receiver gets two at
once at most, so one alone is slower than several.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from conftest import RedisServer, redis_binary
from fleet import until
from hook_worker import hook_worker
from ledger_moves import claim, submit
from receivers import Receiver

from inferfleet.tasks.ledger import Ledger

NAMESPACE = "bench"


def fill(ledger: Ledger, count: int, urls: list[str]) -> None:
    """End so many jobs, each with a webhook."""
    for number in range(count):
        submit(ledger, f"job_{number}", webhook=urls[number % len(urls)])
        ledger.complete(f"job_{number}", claim(ledger, f"t-{number}").fence, state="completed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=5000)
    parser.add_argument("--receivers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    binary = redis_binary()
    if binary is None:
        parser.error("redis-server or valkey-server is missing")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="webhooks-")))
        server = RedisServer(binary, folder)
        server.start()
        stack.callback(server.kill)
        ledger = stack.enter_context(closing(Ledger.from_url(server.url, NAMESPACE)))
        receivers = [stack.enter_context(Receiver()) for _ in range(options.receivers)]
        fill(ledger, options.events, [receiver.url for receiver in receivers])

        def heard() -> int:
            return sum(len(receiver.requests) for receiver in receivers)

        stack.enter_context(
            hook_worker(server.url, NAMESPACE, folder / "log", webhook_slots=options.slots, webhook_timeout_seconds=10)
        )
        until(lambda: heard() > 0)
        began, before = time.monotonic(), heard()
        until(lambda: heard() >= options.events, seconds=600)
        seconds = time.monotonic() - began
        once = len({event for receiver in receivers for event in receiver.events()})
    figures = {"events": options.events, "receivers": options.receivers, "slots": options.slots,
               "per_second": round((options.events - before) / seconds, 1), "delivered_once": once}  # fmt: skip
    print(json.dumps(figures) if options.json else "\n".join(f"{name:16} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
