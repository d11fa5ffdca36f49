"""The fleet that `inferfleet up` runs: every process of it, as a user starts it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 120


@dataclass(frozen=True)
class Up:
    #: Of the API, without /v1.
    url: str
    redis_url: str
    folder: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def running_up(folder: Path, *flags: str, **settings: str) -> Iterator[Up]:
    """A fleet with data, logs and settings of its own, ready; at the end it drains, and must do so well."""
    given = {"data_dir": str(folder / "data"), **settings}
    env = {f"INFERFLEET_{name.upper()}": value for name, value in given.items()}
    command = [sys.executable, "-m", "inferfleet.workers.cli", "up", "--json", "--port", "0", *flags]
    with (folder / "up.err").open("w") as errors:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        told = []
        for line in process.stdout or ():
            told.append(json.loads(line))
            if told[-1].get("note", "").startswith("ready"):
                break
        else:
            raise AssertionError(f"the fleet did not come up: {told}\n{(folder / 'up.err').read_text()}")
        facts = json.loads((folder / "data" / "up.json").read_text())
        yield Up(facts["api_url"], facts["redis_url"], folder)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, (folder / "up.err").read_text()
