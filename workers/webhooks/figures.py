"""Counts of one webhook worker for Prometheus, and that it lives; laid into Redis like those of other workers."""

import os
import socket

from prometheus_client import CollectorRegistry, Counter, Histogram

from inferfleet.tasks.ledger import Ledger
from inferfleet.workers.metrics import put_snapshot, snapshot_of

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class HookFigures:
    """Attempts by how they went, and how long they took."""

    def __init__(self, ledger: Ledger, worker: str, ttl_seconds: float) -> None:
        self._ledger = ledger
        self._worker = worker
        self._ttl_seconds = ttl_seconds
        self._registry = CollectorRegistry()
        self._attempts = Counter(
            "inferfleet_webhook_deliveries",
            "Attempts to deliver a webhook: delivered, again, failed, parked.",
            ["outcome"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "inferfleet_webhook_attempt_seconds",
            "From the resolution of the receiver's name to the end of its answer.",
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )

    def count(self, outcome: str, seconds: float) -> None:
        """One attempt."""
        self._attempts.labels(outcome).inc()
        self._seconds.observe(seconds)

    def publish(self) -> None:
        self._ledger.run(put_snapshot(self._worker, snapshot_of(self._registry), self._ttl_seconds))
        info = {"host": socket.gethostname(), "pid": os.getpid()}
        self._ledger.put_role("webhooks", self._worker, info, self._ttl_seconds)

    def leave(self) -> None:
        self._ledger.run(put_snapshot(self._worker, [], 0))
        self._ledger.put_role("webhooks", self._worker, {}, 0)
