"""schemathesis reads our OpenAPI document and tries what it promises: good and bad values of every field and parameter,
sequences along its links, other methods, absent keys; every answer is compared with the document.

It runs as its own command against a live API that asks for keys, with a scripted worker behind it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import missing
from fleet import Fleet
from live_api import LiveApi, api_of_workers
from schemathesis_hooks import IMAGE, TEXT

from inferfleet.workers.keys import digest, new_key

CONFIG = Path(__file__).with_name("schemathesis.toml")
COUNT = re.compile(r"(\d+) generated")


@pytest.fixture
def fleet(redis_url, tmp_path) -> Iterator[Fleet]:
    fleet = Fleet(redis_url, tmp_path)
    fleet.start_worker({TEXT: "fake", IMAGE: "fake-image"})
    yield fleet
    fleet.close()


@pytest.fixture
def guarded(fleet, redis_url) -> Iterator[LiveApi]:
    """It believes that it can be reached from elsewhere, and asks for keys."""
    with api_of_workers(redis_url, "test", api_host="0.0.0.0", webhook_timeout_seconds=0.5) as api:
        yield api


def examine(api: LiveApi, fleet: Fleet, folder: Path, *flags: str) -> int:
    """The number of cases, in all of which the API kept to its document."""
    if find_spec("schemathesis") is None:
        missing("schemathesis")
    key = new_key()
    fleet.ledger.put_key(digest(key), "acme", "a test")
    command = [sys.executable, "-m", "schemathesis.cli", f"--config-file={CONFIG}", "run", f"{api.url}/openapi.json"]
    done = subprocess.run(
        [*command, "--header", f"Authorization: Bearer {key}", *flags],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(CONFIG.parent), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    (folder / "schemathesis.log").write_text(done.stdout + done.stderr)
    counted = COUNT.search(done.stdout)
    assert done.returncode == 0 and counted, f"{done.stdout}{done.stderr}"[-20_000:]
    return int(counted[1])


def still_well(fleet: Fleet, pid: int) -> None:
    (worker,) = fleet.workers
    assert worker.alive and worker.pid == pid
    assert len(worker.lines("engine_ready")) == 2
    assert fleet.wait(fleet.submit("still there?", model=TEXT)).state == "completed"


def test_the_api_keeps_to_its_document(guarded, fleet, tmp_path):
    # Their bodies have the fields of the chat body and hundreds of cases each; the long run has them too.
    alike = (
        "POST /v1/responses", "POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/jobs",
        "PUT /v1/jobs/{job_id}",
    )  # fmt: skip
    flags = [part for name in alike for part in ("--exclude-name", name)]

    cases = examine(guarded, fleet, tmp_path, "--seed", "1", "--phases", "coverage", *flags)

    assert cases > 1500
    still_well(fleet, fleet.workers[0].pid)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_api_keeps_to_its_document_along_its_links_and_in_random_cases(guarded, fleet, tmp_path, seed):
    flags = ("--seed", str(seed), "--max-examples", "20", "--phases", "coverage,fuzzing,stateful", "--max-time", "400")
    cases = examine(guarded, fleet, tmp_path, *flags)

    print(f"schemathesis, seed {seed}: {cases} cases")
    assert cases > 10_000  # the coverage phase alone makes 7,400; a busy machine of two cores made 18,000
    still_well(fleet, fleet.workers[0].pid)
