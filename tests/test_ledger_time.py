"""The ledger's clock, its deletions and its questions: leases, deadlines, time to live, tenants, waiting readers."""

import asyncio

import pytest
from ledger_moves import FAR, PAST, claim, delta, submit, types

from inferfleet.tasks.errors import (
    AlreadyTerminal,
    JobNotFound,
    LedgerUnavailable,
    NotTerminal,
    RedisMisconfigured,
)
from inferfleet.tasks.ledger import AsyncLedger, Ledger

# Time ----------------------------------------------------------------------------------------------------------------


def test_a_lease_that_is_over_costs_a_death_and_the_third_makes_a_dead_letter(ledger):
    submit(ledger)
    outcomes = []
    for i in range(3):
        assert claim(ledger, f"t{i}", lease_ms=0).deaths == i
        outcomes += ledger.reap(max_deaths=3)
    assert outcomes == [("job_1", "requeued"), ("job_1", "requeued"), ("job_1", "dead")]
    record = ledger.get("job_1")
    assert (record.state, record.dead_letter, record.deaths, record.attempts) == ("failed", True, 3, 3)
    assert record.error["code"] == "worker_lost"
    assert types(ledger)[-1] == "job.failed"
    assert claim(ledger, "t9") is None


def test_a_running_lease_is_left_alone(ledger):
    submit(ledger)
    claim(ledger, lease_ms=60_000)
    assert ledger.reap() == []


def test_a_reap_takes_no_more_than_its_limit(ledger):
    for i in range(5):
        submit(ledger, f"job_{i}")
        claim(ledger, f"t{i}", lease_ms=0)
    assert [len(ledger.reap(limit=2)) for _ in range(4)] == [2, 2, 1, 0]


def test_a_known_death_counts_at_once(ledger):
    submit(ledger)
    for i, outcome in enumerate(("requeued", "requeued", "dead")):
        assert ledger.lose("job_1", claim(ledger, f"t{i}").fence, max_deaths=3) == outcome
    assert ledger.get("job_1").dead_letter


def test_a_deadline_in_the_past_expires_at_the_claim(ledger):
    submit(ledger, "job_1", deadline_ms=PAST)
    submit(ledger, "job_2")
    assert claim(ledger).job_id == "job_2"
    record = ledger.get("job_1")
    assert (record.state, record.error["code"]) == ("expired", "deadline_exceeded")
    assert types(ledger) == ["job.queued", "job.expired"]


def test_a_deadline_in_the_past_expires_in_the_sweep(ledger):
    submit(ledger, "job_1", deadline_ms=PAST)
    submit(ledger, "job_2", deadline_ms=FAR)
    assert ledger.sweep(result_ttl_ms=60_000).expired == ["job_1"]
    assert (ledger.get("job_1").state, ledger.get("job_2").state) == ("expired", "queued")


def test_a_start_timeout_ends_a_job_that_did_not_start(ledger):
    submit(ledger, start_timeout_ms=1)
    while not ledger.sweep(result_ttl_ms=60_000).expired:
        pass
    assert ledger.get("job_1").error["code"] == "start_timeout"


def test_a_start_timeout_says_nothing_about_a_job_that_once_started(ledger):
    # given a job that started in time and was handed back after its start_timeout
    submit(ledger, start_timeout_ms=60_000)
    fence = claim(ledger, "t1").fence
    ledger.redis.hset(f"{ledger.prefix}job:job_1", mapping={"created_ms": 1, "start_timeout_ms": 1})
    ledger.release("job_1", fence)
    # then it may start again
    assert ledger.sweep(result_ttl_ms=60_000).expired == []
    assert claim(ledger, "t2").job_id == "job_1"


def test_a_running_job_past_its_deadline_is_stopped_and_expires(ledger):
    submit(ledger, deadline_ms=FAR)
    fence = claim(ledger).fence
    ledger.redis.hset(f"{ledger.prefix}job:job_1", "deadline_ms", PAST)
    assert ledger.beat("w", [("job_1", fence)], 15_000) == {"job_1": "cancel"}
    assert ledger.complete("job_1", fence, state="cancelled", usage={"completion_tokens": 2}) == "done"
    record = ledger.get("job_1")
    assert (record.state, record.error["code"]) == ("expired", "deadline_exceeded")
    assert record.usage == {"completion_tokens": 2}


def test_a_lost_job_past_its_deadline_expires_instead_of_waiting_again(ledger):
    submit(ledger, deadline_ms=FAR)
    claim(ledger, lease_ms=0)
    ledger.redis.hset(f"{ledger.prefix}job:job_1", "deadline_ms", PAST)
    assert ledger.reap() == [("job_1", "expired")]


def test_the_time_to_live_takes_everything_of_a_job(ledger):
    # given an ended job that used every kind of key
    submit(ledger, idempotency_key="k", deadline_ms=FAR, metadata={"team": "x"})
    first = claim(ledger, "t1", lease_ms=0)
    ledger.publish("job_1", first.fence, [delta("x")], "p")
    ledger.reap()
    ledger.complete("job_1", claim(ledger, "t2").fence, state="completed", response=b"{}")
    # when its time is over
    assert ledger.sweep(result_ttl_ms=60_000).deleted == 0
    assert ledger.sweep(result_ttl_ms=0).deleted == 1
    # then nothing speaks of it but used tokens, which die by themselves, and its key may be used anew
    left = {key for key in ledger.redis.scan_iter("*") if b"job_1" in key or b"idem" in key or b":a" in key}
    assert left == set()
    tokens = list(ledger.redis.scan_iter(f"{ledger.prefix}claim:*"))
    assert tokens
    assert all(ledger.redis.pttl(key) > 0 for key in tokens)
    assert submit(ledger, "job_2", idempotency_key="k", body_hash="other").job_id == "job_2"


def test_a_sweep_says_what_waits_by_model(ledger):
    submit(ledger, "job_1", model="m")
    submit(ledger, "job_2", model="m")
    submit(ledger, "job_3", model="other")
    claim(ledger)
    assert ledger.sweep(result_ttl_ms=60_000).ring == {"m": 1, "other": 1}


# Asking for and about jobs -------------------------------------------------------------------------------------------


def test_another_tenants_job_is_not_found_by_any_call(ledger):
    submit(ledger, tenant="a")
    asked = (
        lambda: ledger.get("job_1", "b"),
        lambda: ledger.events("job_1", "b"),
        lambda: ledger.wait_events("job_1", "b", block_ms=1),
        lambda: ledger.cancel("job_1", "b"),
        lambda: ledger.update("job_1", "b", priority=1),
        lambda: ledger.retry("job_1", "b"),
        lambda: ledger.delete("job_1", "b"),
        lambda: ledger.list("b", after="job_1"),
    )
    for ask in asked:
        with pytest.raises(JobNotFound):
            ask()
    assert ledger.list("b").jobs == []
    assert ledger.get("job_1", "a").state == "queued"


def test_a_queued_job_knows_its_place(ledger):
    for i in range(3):
        submit(ledger, f"job_{i}")
    assert [ledger.get(f"job_{i}").queue_position for i in range(3)] == [0, 1, 2]
    claim(ledger)
    assert [ledger.get(f"job_{i}").queue_position for i in range(3)] == [None, 0, 1]


def test_a_job_can_be_run_again_from_the_start(ledger):
    # given a dead letter with a log
    submit(ledger, deadline_ms=FAR, start_timeout_ms=60_000)
    fence = claim(ledger, "t1").fence
    ledger.publish("job_1", fence, [delta("x")], "p")
    ledger.lose("job_1", fence, max_deaths=1)
    # when it is retried
    ledger.retry("job_1", "a")
    # then it waits like a new one, and readers see a new log with higher numbers
    record = ledger.get("job_1")
    assert (record.state, record.deaths, record.attempts, record.error) == ("queued", 0, 0, None)
    assert (record.dead_letter, record.deadline_ms, record.finished_ms) == (False, None, None)
    assert [event["sequence_number"] for event in ledger.events("job_1")] == [4]
    again = claim(ledger, "t2")
    assert (again.published, again.attempt) == ([], 1)
    assert ledger.complete("job_1", again.fence, state="completed", response=b"{}") == "done"
    with pytest.raises(AlreadyTerminal):
        ledger.retry("job_1")


def test_only_an_ended_job_is_retried_or_deleted(ledger):
    submit(ledger)
    for ask in (ledger.retry, ledger.delete):
        with pytest.raises(NotTerminal):
            ask("job_1")
    ledger.cancel("job_1")
    ledger.delete("job_1", "a")
    with pytest.raises(JobNotFound):
        ledger.get("job_1")
    with pytest.raises(JobNotFound):
        ledger.delete("job_1", "a")


def test_wait_events_gives_what_is_there_then_what_comes(ledger, redis_server):
    submit(ledger)
    assert [event["type"] for event in ledger.wait_events("job_1")] == ["job.queued"]
    assert ledger.wait_events("job_1", after=0, block_ms=20) == []

    async def meet():
        reader = AsyncLedger.from_url(redis_server.url, "test")
        waiting = asyncio.create_task(reader.wait_events("job_1", after=0))
        while not any(client["cmd"] == "xread" for client in ledger.redis.client_list()):
            await asyncio.sleep(0.01)
        ledger.cancel("job_1")
        found = await waiting
        await reader.close()
        return found

    assert [event["type"] for event in asyncio.run(meet())] == ["job.cancelled"]


def test_wait_events_of_an_ended_job_returns_without_waiting(ledger):
    submit(ledger)
    ledger.cancel("job_1")
    assert ledger.wait_events("job_1", after=1) == []


def test_stats_count_what_waits_and_runs(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    claim(ledger)
    ledger.redis.zadd(f"{ledger.prefix}ages:m", {"job_2": 1000})
    stats = ledger.stats()
    assert (stats["m"]["waiting"], stats["m"]["running"]) == (1, 1)
    assert stats["m"]["oldest_age_s"] > 1_000_000


def test_two_namespaces_share_a_server_and_nothing_else(ledger, redis_server):
    other = Ledger.from_url(redis_server.url, "other")
    submit(ledger)
    assert submit(other, body_hash="different").queued
    assert other.claim("m", worker="w", token="t").job_id == "job_1"
    assert ledger.get("job_1").state == "queued"
    assert all(key.startswith((b"{test}:", b"{other}:")) for key in ledger.redis.scan_iter("*"))
    other.close()


def test_a_server_that_cannot_write_is_unavailable_and_not_an_unknown_error(ledger):
    submit(ledger)
    used = ledger.redis.info("memory")["used_memory"]
    ledger.redis.config_set("maxmemory", used // 2)
    try:
        with pytest.raises(LedgerUnavailable) as caught:
            submit(ledger, "job_2")
        assert caught.value.retry_after is not None
        assert ledger.get("job_1").state == "queued"
    finally:
        ledger.redis.config_set("maxmemory", 0)


@pytest.mark.parametrize("namespace", ["", "a{b", "a}b"])
def test_a_namespace_that_would_break_the_hash_tag_is_refused(redis_server, namespace):
    with pytest.raises(RedisMisconfigured):
        Ledger.from_url(redis_server.url, namespace)


def test_the_async_ledger_has_every_method_of_the_sync_one():
    def public(cls):
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(AsyncLedger) == public(Ledger)
