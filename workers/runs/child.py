"""The process beside a worker that carries `inferfleet.run` tasks: started, revived and ended by the worker."""

import subprocess
import sys
import time

from inferfleet.tasks.settings import Settings
from inferfleet.workers import logs

log = logs.get("worker")

#: Not more often than this.
REVIVE_SECONDS = 5.0
#: A run that is told to end lets go within one read of events.
STOP_SECONDS = 10.0


class RunsProcess:
    """A child that holds no job: killing it loses no more than the waiting of its callers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    def start(self) -> None:
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "inferfleet.workers.runs.process"], stdin=subprocess.PIPE, process_group=0
        )
        assert self._process.stdin is not None
        # Through stdin: the Redis password must not show in `ps`. It stays open; its end tells the child of ours.
        self._process.stdin.write(self._settings.model_dump_json().encode() + b"\n")
        self._process.stdin.flush()

    def revive(self) -> None:
        """Start it again if it died."""
        died = self._process is not None and self._process.poll() is not None
        if died and time.monotonic() - self._started_at > REVIVE_SECONDS:
            log.error("runs_process_died", status=self._process.returncode if self._process else None)
            self.start()

    def ask_to_stop(self) -> None:
        """It hands its runs on and ends."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        self.ask_to_stop()
        if self._process is None:
            return
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
