"""What dies, stops or is lost on the way, and that every job still ends once. Real workers, a real Redis."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from fleet import Fleet, assert_published_once, until

from inferfleet.workers.janitor import Janitor
from inferfleet.workers.neighbours import Neighbours


def test_a_killed_worker_s_job_goes_on_in_another_where_it_was(fleet):
    first = fleet.start_worker()
    job_id = fleet.submit("tokens=120 step=0.01")
    fleet.wait_for_words(job_id, 3)
    engine = first.engines()[0]

    first.kill()
    fleet.start_worker()
    record = fleet.wait(job_id)

    assert (record.deaths, record.attempts) == (1, 2)
    assert_published_once(fleet.ledger, record, 120)
    until(lambda: not engine.is_running())


def test_a_worker_that_is_gone_from_its_machine_loses_its_jobs_long_before_their_leases_end(fleet):
    first = fleet.start_worker(lease_seconds=600)
    jobs = [fleet.submit("tokens=100 step=0.01") for _ in range(4)]
    for job_id in jobs:
        fleet.wait_for_words(job_id, 3)
    fleet.start_worker(lease_seconds=600)

    first.kill()
    records = [fleet.wait(job_id, 30) for job_id in jobs]

    assert {(record.state, record.deaths, record.attempts) for record in records} == {("completed", 1, 2)}
    for record in records:
        assert_published_once(fleet.ledger, record, 100)


def test_a_worker_that_stands_still_is_not_gone_from_its_machine(fleet):
    first = fleet.start_worker(lease_seconds=600)
    job_id = fleet.submit("tokens=150 step=0.01")
    fleet.wait_for_words(job_id, 3)
    fleet.start_worker(lease_seconds=600)

    first.signal(signal.SIGSTOP)
    time.sleep(2)
    assert (fleet.ledger.get(job_id).state, fleet.ledger.get(job_id).deaths) == ("in_progress", 0)
    first.signal(signal.SIGCONT)

    record = fleet.wait(job_id, 30)
    assert (record.state, record.deaths, record.attempts) == ("completed", 0, 1)


def test_a_killed_engine_s_job_is_taken_back_at_once_and_a_fresh_engine_finishes_it(fleet):
    worker = fleet.start_worker(lease_seconds=600)
    job_id = fleet.submit("tokens=100 step=0.01")
    fleet.wait_for_words(job_id, 3)

    worker.engines()[0].kill()
    record = fleet.wait(job_id)

    # Long before the lease is over: the worker knows that the engine is gone.
    assert (record.deaths, record.attempts) == (1, 2)
    assert_published_once(fleet.ledger, record, 100)


def test_only_the_culprit_of_a_crashed_batch_collects_deaths(fleet):
    fleet.start_worker()

    innocent = [fleet.submit("tokens=40 step=0.01") for _ in range(5)]
    for job_id in innocent:
        fleet.wait_for_words(job_id)
    culprit = fleet.submit("tokens=60 exit=5")
    record = fleet.wait(culprit)
    survivors = [fleet.wait(job_id) for job_id in innocent]

    assert (record.state, record.error["code"], record.deaths) == ("failed", "worker_lost", 3)
    assert record.dead_letter
    assert {(survivor.state, survivor.deaths) for survivor in survivors} == {("completed", 0)}
    for survivor in survivors:
        assert_published_once(fleet.ledger, survivor, 40)


def test_a_hung_engine_loses_its_job_and_is_replaced(fleet, tmp_path):
    worker = fleet.start_worker(stall_seconds=3)
    job_id = fleet.submit(f"tokens=20 hang_once={tmp_path}/hung")
    engine = worker.engines()[0]

    until((tmp_path / "hung").exists)
    until(lambda: fleet.state(job_id) == "queued")
    assert fleet.ledger.get(job_id).deaths == 1
    record = fleet.wait(job_id)

    assert_published_once(fleet.ledger, record, 20)
    assert [line["model"] for line in worker.lines("engine_stalled")] == ["m"]
    assert not engine.is_running()


@pytest.mark.slow
def test_a_batch_in_a_hung_engine_is_handed_back_and_only_the_culprit_collects_deaths(fleet):
    fleet.start_worker(stall_seconds=2.5, max_deaths=2)

    innocent = [fleet.submit("tokens=80 step=0.02") for _ in range(3)]
    for job_id in innocent:
        fleet.wait_for_words(job_id)
    culprit = fleet.submit("tokens=60 hang=5")
    record = fleet.wait(culprit, seconds=90)
    survivors = [fleet.wait(job_id) for job_id in innocent]

    assert (record.state, record.error["code"], record.deaths) == ("failed", "worker_lost", 2)
    assert {(survivor.state, survivor.deaths) for survivor in survivors} == {("completed", 0)}
    for survivor in survivors:
        assert_published_once(fleet.ledger, survivor, 80)


def test_a_stopped_worker_that_comes_back_writes_nothing_any_more(fleet):
    sleeper = fleet.start_worker()
    job_id = fleet.submit("tokens=120 step=0.01")
    fleet.wait_for_words(job_id, 3)

    sleeper.signal(signal.SIGSTOP)
    fleet.start_worker()
    until(lambda: fleet.ledger.get(job_id).attempts == 2)
    sleeper.signal(signal.SIGCONT)
    record = fleet.wait(job_id)

    assert record.deaths == 1
    assert_published_once(fleet.ledger, record, 120)
    # The zombie is a worker again.
    fleet.workers[1].kill()
    assert fleet.wait(fleet.submit("tokens=2")).state == "completed"


def test_a_turn_lost_on_the_wire_is_rung_again_by_a_janitor(fleet, proxy):
    # Nothing but the broker's BRPOP speaks on this worker's connections: its own janitor and heart are asleep.
    fleet.start_worker(redis_url=proxy.url, sweep_seconds=3600, heartbeat_seconds=3600, lease_seconds=7200)
    janitor = a_janitor(fleet)
    num_lost = 0

    while num_lost < 2:
        proxy.lose_next_reply()
        job_id = fleet.submit("tokens=3")
        until(lambda: proxy.faults.lose_replies == 0)
        until(lambda: fleet.ledger.redis.llen("test.turn.m") == 0)
        time.sleep(0.5)
        if fleet.state(job_id) == "queued":
            # The turn was popped, and its reply died: it is in no list any more.
            num_lost += 1
            janitor.round()
        assert_published_once(fleet.ledger, fleet.wait(job_id), 3)


def a_janitor(fleet):
    settings = {
        "sweep_seconds": 1,
        "lease_seconds": 2,
        "max_deaths": 3,
        "result_ttl_seconds": 60,
        "dead_letter_ttl_seconds": 60,
    }
    neighbours = Neighbours(fleet.ledger, "by hand", 60)
    return Janitor(fleet.ledger, fleet.doorbell, **settings, neighbours=neighbours, on_reaped=lambda tally: None,
                   upkeep=lambda: None)  # fmt: skip


@pytest.mark.slow
def test_lost_replies_on_every_path_publish_nothing_twice(fleet, proxy):
    fleet.start_worker(redis_url=proxy.url)
    proxy.faults.lose_chance = 0.08

    jobs = [fleet.submit("tokens=30 step=0.01") for _ in range(10)]
    records = [fleet.wait(job_id) for job_id in jobs]
    proxy.faults.lose_chance = 0.0

    assert {record.state for record in records} == {"completed"}
    for record in records:
        assert_published_once(fleet.ledger, record, 30)
    assert proxy.lost > 2


def test_connections_cut_over_and_over_end_no_worker_and_no_job(fleet, proxy):
    worker = fleet.start_worker(redis_url=proxy.url, lease_seconds=10)
    jobs = []

    for _ in range(25):
        jobs += [fleet.submit("tokens=4 step=0.01") for _ in range(4)]
        proxy.reset_all()
        time.sleep(0.05)
    records = [fleet.wait(job_id) for job_id in jobs]

    assert worker.alive and not worker.lines("draining")
    for record in records:
        assert_published_once(fleet.ledger, record, 4)


def test_jobs_in_flight_survive_a_restart_of_redis(own_redis, tmp_path):
    fleet = Fleet(own_redis.url, tmp_path)
    try:
        worker = fleet.start_worker()
        jobs = [fleet.submit("tokens=200 step=0.01") for _ in range(5)]
        for job_id in jobs:
            fleet.wait_for_words(job_id, 2)

        own_redis.kill()
        time.sleep(1.0)
        own_redis.start()
        records = [fleet.wait(job_id) for job_id in jobs]

        assert {(record.state, record.deaths) for record in records} == {("completed", 0)}
        for record in records:
            assert_published_once(fleet.ledger, record, 200)
        assert worker.alive
        # The broker's side lives too: a turn is heard, not only swept.
        assert fleet.wait(fleet.submit("tokens=2")).state == "completed"
    finally:
        fleet.close()


@pytest.mark.parametrize("trouble", ["NOREPLICAS", "MISCONF"])
def test_a_worker_outlives_a_redis_that_refuses_to_write(own_redis, tmp_path, trouble):
    fleet = Fleet(own_redis.url, tmp_path)
    try:
        worker = fleet.start_worker(run_slots=1)
        client = fleet.ledger.redis
        assert fleet.wait(fleet.submit("tokens=2")).state == "completed"
        runs = until(
            lambda: [child for child in worker.children() if "inferfleet.workers.runs.process" in child.cmdline()]
        )[0]

        if trouble == "NOREPLICAS":
            client.config_set("min-replicas-to-write", 1)
        else:
            fill_the_disk(client, own_redis.folder)
        until(lambda: sum(trouble in line["event"] for line in worker.lines()) >= 5)
        client.config_set("min-replicas-to-write", 0)
        client.config_set("stop-writes-on-bgsave-error", "no")

        assert fleet.wait(fleet.submit("tokens=2")).state == "completed"
        assert worker.alive and runs.is_running() and runs.status() != "zombie"
        assert not worker.lines("runs_process_died")
    finally:
        fleet.close()


def fill_the_disk(client, folder):
    """A snapshot that cannot be put in its place makes Redis refuse writes, and PING too, as on a full disk."""
    (folder / "dump.rdb").mkdir()
    client.config_set("save", "3600 1")
    client.bgsave()

    def refused():
        try:
            client.set("probe", "x")
        except redis.ResponseError as error:
            return "MISCONF" in str(error)

    until(refused)


def test_five_hundred_jobs_all_end_once_whatever_dies(fleet):
    """A worker and an engine are killed, a worker is stopped for longer than its lease, all while 500 jobs run."""
    victim = fleet.start_worker(stall_seconds=20)
    steady = fleet.start_worker(stall_seconds=20)
    with ThreadPoolExecutor(16) as clients:
        jobs = list(clients.map(lambda _: fleet.submit("tokens=12 step=0.03"), range(500)))

    until(lambda: ended(fleet) > 50)
    victim.kill()
    replacement = fleet.start_worker(wait=False, stall_seconds=20)
    until(lambda: ended(fleet) > 120)
    steady.engines()[0].kill()
    until(lambda: replacement.lines("job_started"))
    replacement.signal(signal.SIGSTOP)
    resume = threading.Timer(4.0, replacement.signal, [signal.SIGCONT])
    resume.start()
    records = [fleet.wait(job_id, seconds=120) for job_id in jobs]
    resume.join()

    assert {record.state for record in records} == {"completed"}
    for record in records:
        assert_published_once(fleet.ledger, record, 12)
    # All three faults hit jobs: leases lapsed, an engine was buried, and the stopped worker found its leases gone.
    assert max(record.deaths for record in records) >= 1
    assert steady.lines("engine_died")
    until(lambda: replacement.lines("lease_lost"))
    assert fleet.ledger.stats().get("m", {"running": 0})["running"] == 0


def ended(fleet):
    return fleet.ledger.redis.zcard("{test}:finished")
