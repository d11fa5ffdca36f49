"""Turns the files that jobs bring into what an engine takes. No file is decoded in this process.

Each picture is read by a short-lived process with limits of memory and time (`decode_image.py`), and only a few at
once: what a file breaks is that process, and the job that brought it.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from inferfleet.tasks.errors import EngineError, InvalidRequest

DECODE_COMMAND: tuple[str, ...] = (sys.executable, "-m", "inferfleet.workers.decode_image")
#: Decoders at once.
MAX_DECODERS = 2
#: Of one decoder: seconds of a clock and of a processor, and address space. The largest picture that the contract lets
#: pass (40 million pixels of four bytes) needs four times 160 MB beside the interpreter where it is transparent.
SECONDS, CPU_SECONDS, MEBIBYTES = 60.0, 15, 1024
#: Exit status of a decoder that blames the picture.
REFUSED = 3
#: Whoever stops a service tells all its processes. The worker itself goes on until its jobs are done or handed back.
STOPS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


class Media:
    """The decoders of one worker. Many threads use one."""

    def __init__(self, command: Sequence[str] = DECODE_COMMAND, seconds: float = SECONDS) -> None:
        self._command = tuple(command)
        self._seconds = seconds
        self._free = threading.BoundedSemaphore(MAX_DECODERS)

    def picture(self, data: bytes, width: int, height: int) -> bytes:
        """A PNG, JPEG or WebP file -> a PNG of width x height, RGB. Waits its turn.

        Raises InvalidRequest when the file cannot be decoded within the limits, EngineError when no decoder can run.
        """
        with self._free:
            done = self._decoded(data, width, height)
            if done.returncode in STOPS:
                done = self._decoded(data, width, height)
        if done.returncode == 0:
            return done.stdout
        if done.returncode == REFUSED:
            raise InvalidRequest(f"image: {done.stderr.decode(errors='replace').strip()[:200]}", param="image")
        if done.returncode < 0 and done.returncode not in STOPS:
            limits = f"{CPU_SECONDS} s and {MEBIBYTES} MiB"
            raise InvalidRequest(f"image: it cannot be decoded within {limits}", param="image")
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise EngineError(f"a picture cannot be decoded on this worker: {lines[-1][:200] if lines else 'no reason'}")

    def _decoded(self, data: bytes, width: int, height: int) -> subprocess.CompletedProcess[bytes]:
        """Raises as `picture`."""
        command = [*self._command, str(width), str(height)]
        try:
            # A group of its own: a terminal's Ctrl-C is meant for the worker, which drains.
            return subprocess.run(command, input=data, capture_output=True, timeout=self._seconds, process_group=0)
        except subprocess.TimeoutExpired:
            raise InvalidRequest(f"image: it is not decoded within {self._seconds:g} s", param="image") from None
        except OSError as error:
            raise EngineError(f"no process for decoding a picture can be started: {error}") from error
