"""Child processes of one supervisor: started with a log, watched, ended in order. Knows nothing of what they do."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inferfleet.tasks.errors import SetupError

POLL_SECONDS = 0.02
TAIL_LINES = 20
TAIL_BYTES = 64 * 1024
PR_SET_PDEATHSIG = 1


class ChildFailed(SetupError):
    """A part of the fleet ended, or did not come up in time; the message ends with the tail of its log."""

    code = "child_failed"


@dataclass
class Child:
    """One running process."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    started: float = field(default_factory=time.monotonic)
    asked: bool = False

    def check(self) -> None:
        """Raises ChildFailed if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise ChildFailed(f"{self.name} ended with {_describe(code)}\n{self.tail()}")

    def wait_until(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Polls `ready` until it is true. Raises ChildFailed when the process ends first or time runs out."""
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ChildFailed(f"{self.name} did not {what} within {seconds:.0f} s\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def tail(self) -> str:
        """The last lines of the log, with the place of the whole."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"  last lines of {self.log}:", *(f"  | {line}" for line in lines)])

    def ask_to_stop(self) -> None:
        """One SIGTERM, however often it is asked: a worker takes a second one as "hand everything back now"."""
        if not self.asked:
            self.asked = True
            self.insist()

    def insist(self) -> None:
        """A SIGTERM, also if it already had one."""
        if self.process.poll() is None:
            self.process.terminate()

    def stop(self, grace: float) -> bool:
        """SIGTERM, up to `grace` seconds, then SIGKILL. True if it ended by itself."""
        self.ask_to_stop()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False
        return True


def start_child(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
) -> Child:
    """Starts a process in its own session, so that Ctrl-C reaches the supervisor alone and it decides the order.

    The log of the one before, which may tell why it died, is kept beside it as `.1`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    if stdin is not None and process.stdin is not None:
        process.stdin.write(stdin)
        process.stdin.close()
    return Child(name, process, log)


# Loaded before any fork: importing or loading a library between fork and exec can deadlock.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """In the child: SIGTERM when the supervisor is gone, so that `kill -9` of it leaves nothing behind."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _describe(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
