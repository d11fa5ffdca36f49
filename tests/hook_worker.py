"""A real webhook worker in a child process."""

import json
import os
import sys
from contextlib import contextmanager

from fleet import FORK_SERVER, until

from inferfleet.tasks.settings import Settings
from inferfleet.workers.webhooks.process import run_webhooks

FAST = {"sweep_seconds": 0.2, "heartbeat_seconds": 0.5, "webhook_timeout_seconds": 1, "webhook_allow_loopback": True,
        "webhook_slots": 4}  # fmt: skip


def main(settings, log_path):
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(run_webhooks(Settings.model_validate_json(settings)))


class HookWorker:
    """One process; its log is a list of JSON lines."""

    def __init__(self, redis_url, namespace, log_path, **settings):
        chosen = Settings.model_validate({"redis_url": redis_url, "namespace": namespace, **FAST, **settings})
        self.log_path = log_path
        log_path.touch()
        self.process = FORK_SERVER.Process(target=main, args=(chosen.model_dump_json(), str(log_path)))
        self.process.start()

    def lines(self, event=None):
        whole = self.log_path.read_text().rpartition("\n")[0]  # the last line may be on its way
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return [line for line in lines if event in (None, line["event"])]

    def kill(self):
        self.process.kill()
        self.process.join()

    def stop(self):
        """SIGTERM; its exit status."""
        self.process.terminate()
        self.process.join(60)
        return self.process.exitcode


@contextmanager
def hook_worker(redis_url, namespace, log_path, **settings):
    worker = HookWorker(redis_url, namespace, log_path, **settings)
    try:
        until(lambda: worker.lines("webhooks_started"))
        yield worker
    finally:
        worker.kill()
