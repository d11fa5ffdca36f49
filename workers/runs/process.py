"""The process that carries runs: they only wait, and wait for turns, so they have slots of their own beside the
worker's. However many of them wait, every slot is free for turns, and nothing can wait in a circle."""

import os
import signal
import socket
import sys
import threading

from inferfleet.tasks import names
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.workers import logs
from inferfleet.workers.app import make_app
from inferfleet.workers.runs.keeper import Keeper
from inferfleet.workers.runs.run import Runs
from inferfleet.workers.runs.task import obey_revoke, register_runs
from inferfleet.workers.worker import CeleryWorker


def main() -> int:
    """Settings come as one line of JSON on stdin, and its end means that the parent is gone."""
    settings = Settings.model_validate_json(sys.stdin.readline())
    logs.configure(settings.log_level, settings.log_format)
    queue = names.run_queue(settings.namespace)
    app = make_app(settings, [queue])
    app.intake.open(queue)
    ledger = Ledger.from_url(settings.redis_url, settings.namespace)
    runs = Runs(settings, ledger, Doorbell(settings.redis_url, settings.namespace))
    keeper = Keeper(
        ledger,
        runs.closing,
        lease_seconds=settings.lease_seconds,
        heartbeat_seconds=settings.heartbeat_seconds,
        sweep_seconds=settings.sweep_seconds,
    )
    register_runs(app, runs, keeper)
    obey_revoke(runs, keeper)
    threading.Thread(target=_follow_parent, name="parent", daemon=True).start()
    worker = CeleryWorker.make(
        app,
        f"inferfleet-runs-{os.getpid()}@{socket.gethostname()}",
        settings.run_slots,
        runs.closing.set,
        runs.closing.set,
    )
    keeper.start()
    try:
        worker.start()
    finally:
        keeper.stop()
        ledger.close()
    return int(worker.exitcode or 0)


def _follow_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
