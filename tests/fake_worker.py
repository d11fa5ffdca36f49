"""A real worker with scripted engines: `python fake_worker.py SETTINGS [real]`, the settings as JSON; real = our engine."""

import sys
from pathlib import Path

from inferfleet.tasks.settings import Settings
from inferfleet.workers.child import ENGINE_COMMAND
from inferfleet.workers.worker import run_worker

SCRIPTED = (sys.executable, "-S", str(Path(__file__).with_name("fake_engine.py")))

if __name__ == "__main__":
    command = ENGINE_COMMAND if sys.argv[2:] == ["real"] else SCRIPTED
    sys.exit(run_worker(Settings.model_validate_json(sys.argv[1]), engine_command=command))
