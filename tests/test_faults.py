"""Faults of Redis and of clocks, and what is still true then. FAULTS.md says which test stands for which fault."""

import os
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis
from conftest import RedisServer, missing
from fleet import Fleet, assert_published_once, until
from ledger_moves import claim, submit
from live_api import api_of_workers

from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.names import new_job_id

CHAT = {"body": {"model": "paper", "messages": [{"role": "user", "content": "hold on"}]}}
#: Accepted, and waits: no worker serves it.
NOBODY = {"paper": {"path": "paper"}}
HOUR = 3600


@pytest.fixture
def fleet(own_redis, tmp_path):
    fleet = Fleet(own_redis.url, tmp_path)
    yield fleet
    fleet.close()


# A power cut ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def disk(tmp_path_factory):
    """disk.c, compiled."""
    compiler = shutil.which("cc") or missing("a C compiler")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    source = Path(__file__).with_name("disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@contextmanager
def redis_on(disk, binary, folder, fsync):
    """A server whose disk can be full, and can lose what was not synced."""
    server = RedisServer(binary, folder, fsync)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LD_PRELOAD", str(disk))
        environment.setenv("FSYNC_LOG", str(folder / "fsync.log"))
        environment.setenv("DISK_FULL", str(folder / "full"))
        server.start()
    try:
        yield server
    finally:
        server.kill()


def cut_the_power(server):
    """kill -9, and what was not synced is gone."""
    server.kill()
    synced = {}
    for entry in (server.folder / "fsync.log").read_text().splitlines():
        size, path = entry.split(" ", 1)
        synced[path] = int(size)
    (log,) = server.folder.rglob("*.incr.aof")
    lost = log.stat().st_size - synced[str(log)]
    os.truncate(log, synced[str(log)])
    return lost


def test_a_power_cut_takes_no_job_that_was_accepted(disk, redis_binary_path, tmp_path):
    with redis_on(disk, redis_binary_path, tmp_path, "always") as server:
        accepted, left = accepted_and_left(server)
    assert len(accepted) > 100
    assert accepted - left == set()


def accepted_and_left(server):
    """Jobs before a power cut that came while clients submitted as fast as they could, and those after it."""
    stopping = threading.Event()
    ledger = Ledger.from_url(server.url, "test")

    def accept(_):
        accepted = []
        while not stopping.is_set():
            job_id = new_job_id()
            try:
                submit(ledger, job_id)
            except Exception:
                return accepted
            accepted.append(job_id)
        return accepted

    with ThreadPoolExecutor(8) as clients:
        futures = [clients.submit(accept, number) for number in range(8)]
        time.sleep(1.5)
        cut_the_power(server)
        stopping.set()
        accepted = {job_id for future in futures for job_id in future.result()}
    server.start()
    left = {name.decode() for name in ledger.redis.zrange(f"{ledger.prefix}jobs:a", 0, -1)}
    ledger.close()
    return accepted, left


# A Redis that stands still, or takes nothing -------------------------------------------------------------------------


def test_a_redis_that_stood_still_for_longer_than_a_lease_costs_no_job_a_death(fleet, own_redis):
    fleet.start_worker(lease_seconds=1, heartbeat_seconds=0.3)
    fleet.start_worker(lease_seconds=1, heartbeat_seconds=0.3)
    server = psutil.Process(own_redis.process.pid)
    jobs = [fleet.submit("tokens=250 step=0.02") for _ in range(6)]
    for job_id in jobs:
        fleet.wait_for_words(job_id)

    for _ in range(4):
        server.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        server.send_signal(signal.SIGCONT)
        time.sleep(0.7)

    records = [fleet.wait(job_id) for job_id in jobs]
    assert {(record.state, record.deaths) for record in records} == {("completed", 0)}
    for record in records:
        assert_published_once(fleet.ledger, record, 250)


def refuses(http):
    answer = http.post("/v1/jobs", json=CHAT)
    return answer.status_code != 202 and answer


def test_a_redis_without_memory_is_a_503_and_takes_jobs_again_once_it_has_some(own_redis):
    with (
        api_of_workers(own_redis.url, "test", models=NOBODY) as api,
        api.http() as http,
        redis.Redis(port=own_redis.port) as client,
    ):
        kept = http.post("/v1/jobs", json=CHAT).json()["id"]
        client.config_set("maxmemory", "1mb")
        answer = refuses(http)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        # what is there can be read
        assert http.get(f"/v1/jobs/{kept}").status_code == 200
        client.config_set("maxmemory", "0")
        assert http.post("/v1/jobs", json=CHAT).status_code == 202


def test_a_full_disk_is_a_503_and_loses_nothing_once_there_is_room(disk, redis_binary_path, tmp_path):
    with (
        redis_on(disk, redis_binary_path, tmp_path, "everysec") as server,
        api_of_workers(server.url, "test", models=NOBODY) as api,
        api.http() as http,
    ):
        accepted = [http.post("/v1/jobs", json=CHAT).json()["id"] for _ in range(20)]
        # when no byte more goes into the append-only file
        (tmp_path / "full").touch()
        answer = until(lambda: refuses(http))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        shown = http.get(f"/v1/jobs/{accepted[0]}")
        assert shown.status_code == 200, shown.text
        # and when there is room again
        (tmp_path / "full").unlink()
        until(lambda: not refuses(http))
        accepted.append(http.post("/v1/jobs", json=CHAT).json()["id"])
        time.sleep(1.5)  # everysec: what is accepted now is on the disk after a second
        server.kill()
        server.start()
        assert {http.get(f"/v1/jobs/{job_id}").status_code for job_id in accepted} == {200}


# Clocks and sweepers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [HOUR, -HOUR])
def test_a_worker_whose_clock_is_an_hour_off_keeps_its_jobs_and_meets_their_deadlines(fleet, shift):
    fleet.start_worker(clock_shift=shift)
    fleet.start_worker()
    jobs = [fleet.submit("tokens=100 step=0.02", deadline=time.time() + 30) for _ in range(8)]
    late = fleet.submit("tokens=4000 step=0.02", deadline=time.time() + 2)

    records = [fleet.wait(job_id) for job_id in jobs]

    assert {(record.state, record.deaths) for record in records} == {("completed", 0)}
    expired = fleet.wait(late)
    assert expired.state == "expired"
    assert expired.finished_ms - expired.deadline_ms < 2000
    assert len({record.worker for record in records}) == 2


def test_sweepers_that_meet_count_one_death(ledger):
    for number in range(40):
        submit(ledger, f"job_{number:02}")
        claim(ledger, f"t{number}", lease_ms=1)
    time.sleep(0.05)
    with ThreadPoolExecutor(8) as sweepers:
        reaped = list(sweepers.map(lambda _: ledger.reap(100, 3), range(16)))
    assert sorted(job_id for each in reaped for job_id, _ in each) == [f"job_{number:02}" for number in range(40)]
    assert {ledger.get(f"job_{number:02}").deaths for number in range(40)} == {1}
