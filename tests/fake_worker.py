"""A real worker with scripted engines: `python fake_worker.py` reads its settings as JSON from its argument."""

import sys
from pathlib import Path

from inferfleet.tasks.settings import Settings
from inferfleet.workers.worker import run_worker

ENGINE = (sys.executable, "-S", str(Path(__file__).with_name("fake_engine.py")))

if __name__ == "__main__":
    sys.exit(run_worker(Settings.model_validate_json(sys.argv[1]), engine_command=ENGINE))
