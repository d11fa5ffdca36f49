"""A real worker in a child process, with scripted engines or our own; a fork server imports it once."""

import os
import sys
import time
from pathlib import Path

from inferfleet.tasks.settings import Settings
from inferfleet.workers.child import ENGINE_COMMAND
from inferfleet.workers.worker import run_worker

SCRIPTED = (sys.executable, "-S", str(Path(__file__).with_name("fake_engine.py")))


def main(settings: str, log_path: str, real: bool, clock_shift: float = 0) -> None:
    """Runs until a signal, its output in a file. `settings` are JSON; its clock is ahead by clock_shift seconds."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if clock_shift:
        right = time.time
        time.time = lambda: right() + clock_shift
    sys.exit(run_worker(Settings.model_validate_json(settings), engine_command=ENGINE_COMMAND if real else SCRIPTED))
