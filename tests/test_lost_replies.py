"""Replies lost on the wire: the command is sent again, by redis-py or by the caller, and nothing happens twice."""

import asyncio
import threading

import pytest
import uvloop
from chaosproxy import ChaosProxy
from outbox_moves import URL, deliveries

from inferfleet.tasks import call
from inferfleet.tasks.errors import AlreadyTerminal, IdempotencyKeyReuse, LedgerUnavailable
from inferfleet.tasks.ledger import AsyncLedger, Ledger
from inferfleet.tasks.names import DELTA, new_job_id
from inferfleet.tasks.webhooks import Verdict, new_endpoint_id, new_secret


@pytest.fixture
def shaky(proxy: ChaosProxy):
    """A ledger whose replies may be lost."""
    ledger = Ledger.from_url(proxy.url, "test")
    # The server holds the scripts and a connection is greeted: the next lost reply is that of a script which ran.
    for script in call.SCRIPTS.glob("*.lua"):
        ledger.redis.script_load(call.script_text(script.stem))
    yield ledger
    ledger.close()


def submit(ledger, job_id="job_1", **options):
    return ledger.submit(job_id, b"{}", **({"model": "m", "tenant": "a", "body_hash": "h"} | options))


def answered(work):
    """Ask until the ledger answers, as a caller does that got 503."""
    while True:
        try:
            return work()
        except LedgerUnavailable:
            continue


def in_threads(count, work):
    """Run work(i) in `count` threads that start together; their results in order."""
    results = [None] * count
    gate = threading.Barrier(count)

    def one(i):
        gate.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_submit_from_sixteen_threads_with_one_key_through_lost_replies_makes_one_job(shaky, proxy, ledger):
    # given a link that loses every fourth reply or so
    proxy.faults.lose_chance = 0.25
    # when 16 threads submit the same body under one idempotency key, each with an id of its own
    answers = in_threads(16, lambda i: answered(lambda: submit(shaky, new_job_id(), idempotency_key="k")))
    # then all were told of the one job that exists
    assert proxy.lost > 0
    assert {answer.job_id for answer in answers} == {job.id for job in ledger.list("a").jobs}
    assert ledger.stats()["m"]["waiting"] == 1


def test_submit_from_sixteen_threads_without_a_key_makes_sixteen_jobs_through_lost_replies(shaky, proxy, ledger):
    proxy.faults.lose_chance = 0.25
    ids = [new_job_id() for _ in range(16)]
    in_threads(16, lambda i: answered(lambda: submit(shaky, ids[i])))
    assert proxy.lost > 0
    assert sorted(job.id for job in ledger.list("a").jobs) == sorted(ids)


def test_submit_with_a_used_key_and_another_body_is_refused_through_a_lost_reply(shaky, proxy):
    submit(shaky, "job_1", idempotency_key="k")
    proxy.lose_next_reply()
    with pytest.raises(IdempotencyKeyReuse):
        submit(shaky, "job_2", idempotency_key="k", body_hash="other")
    assert proxy.lost == 1


def test_a_claim_whose_reply_was_lost_takes_one_job_with_one_fence(shaky, proxy, ledger):
    submit(shaky, "job_1")
    submit(shaky, "job_2")
    proxy.lose_next_reply()
    claim = shaky.claim("m", worker="w", token="t")
    assert proxy.lost == 1
    assert (claim.job_id, claim.fence) == ("job_1", ledger.get("job_1").fence)
    assert ledger.stats()["m"]["running"] == 1


def test_events_whose_reply_was_lost_are_published_once(shaky, proxy, ledger):
    submit(shaky)
    claim = shaky.claim("m", worker="w", token="t")
    proxy.lose_next_reply()
    assert shaky.publish(claim.job_id, claim.fence, [{"type": DELTA, "delta": "x"}], "p1") == "ok"
    assert proxy.lost == 1
    assert [event["type"] for event in ledger.events("job_1")].count(DELTA) == 1


def test_a_completion_whose_reply_was_lost_answers_same_with_one_terminal_event(shaky, proxy, ledger):
    submit(shaky)
    claim = shaky.claim("m", worker="w", token="t")
    proxy.lose_next_reply()
    assert shaky.complete(claim.job_id, claim.fence, state="completed", response=b"{}") == "same"
    assert proxy.lost == 1
    assert [event["type"] for event in ledger.events("job_1")].count("job.completed") == 1


def test_a_cancel_whose_reply_was_lost_still_answers_cancelled(shaky, proxy):
    submit(shaky)
    proxy.lose_next_reply()
    assert shaky.cancel("job_1") == "cancelled"
    assert proxy.lost == 1


def test_a_release_whose_reply_was_lost_still_answers_released_and_moves_the_fence_once(shaky, proxy, ledger):
    submit(shaky)
    claim = shaky.claim("m", worker="w", token="t")
    proxy.lose_next_reply()
    assert shaky.release("job_1", claim.fence) == "released"
    assert proxy.lost == 1
    moved = ledger.get("job_1").fence
    assert moved > claim.fence
    assert shaky.release("job_1", claim.fence) == "released"
    assert ledger.get("job_1").fence == moved


def test_a_death_whose_reply_was_lost_is_counted_once(shaky, proxy, ledger):
    submit(shaky)
    claim = shaky.claim("m", worker="w", token="t")
    proxy.lose_next_reply()
    assert shaky.lose("job_1", claim.fence) == "requeued"
    assert proxy.lost == 1
    assert ledger.get("job_1").deaths == 1


def test_a_retry_whose_reply_was_lost_queues_the_job_once(shaky, proxy, ledger):
    submit(shaky)
    shaky.cancel("job_1")
    proxy.lose_next_reply()
    shaky.retry("job_1")
    assert proxy.lost == 1
    assert [event["type"] for event in ledger.events("job_1")] == ["job.queued"]


def test_a_delete_whose_reply_was_lost_is_no_error(shaky, proxy):
    submit(shaky)
    shaky.cancel("job_1")
    proxy.lose_next_reply()
    shaky.delete("job_1")
    assert proxy.lost == 1


def test_a_reap_whose_reply_was_lost_counts_one_death(shaky, proxy, ledger):
    submit(shaky)
    shaky.claim("m", worker="w", token="t", lease_ms=0)
    proxy.lose_next_reply()
    shaky.reap()
    assert proxy.lost == 1
    assert ledger.get("job_1").deaths == 1


def test_an_end_whose_reply_was_lost_is_in_the_outbox_once(shaky, proxy, ledger):
    submit(shaky, webhook=URL)
    claim = shaky.claim("m", worker="w", token="t")
    proxy.lose_next_reply()
    shaky.complete(claim.job_id, claim.fence, state="completed", response=b"{}")
    assert proxy.lost == 1
    assert [delivery.type for delivery in deliveries(ledger)] == ["job.completed"]


def test_a_delivery_whose_taking_lost_its_reply_is_held_once(shaky, proxy, ledger):
    for job_id in ("job_1", "job_2"):
        submit(shaky, job_id, webhook=URL)
        shaky.cancel(job_id)
    proxy.lose_next_reply()
    taken = shaky.take_delivery("t", 60_000)
    assert proxy.lost == 1
    assert taken.attempts == 0
    assert ledger.take_delivery("u", 60_000).id != taken.id
    assert ledger.take_delivery("v", 60_000) is None


@pytest.mark.parametrize("outcome", ["delivered", "again", "failed"])
def test_an_attempt_whose_record_lost_its_reply_counts_once(shaky, proxy, ledger, outcome):
    submit(shaky, webhook=URL)
    shaky.cancel("job_1")
    taken = shaky.take_delivery("t", 60_000)
    proxy.lose_next_reply()
    assert shaky.record_delivery(taken, Verdict(outcome, delay_ms=5000), 60_000).word == "same"
    assert proxy.lost == 1
    [delivery] = deliveries(ledger)
    assert (delivery.attempts, delivery.state) == (1, "pending" if outcome == "again" else outcome)


def test_changes_of_endpoints_whose_replies_were_lost_are_made_once(shaky, proxy, ledger):
    # when an endpoint is made, gets another secret, is tried and deleted, each time through a lost reply
    endpoint_id = new_endpoint_id()
    proxy.lose_next_reply()
    shaky.put_endpoint(endpoint_id, "a", "n", URL, ["job.completed"], new_secret())
    proxy.lose_next_reply()
    shaky.rotate_secret(endpoint_id, "a", "whsec_new")
    proxy.lose_next_reply()
    tried = shaky.test_endpoint(endpoint_id, "a", "job.completed")
    assert [delivery.id for delivery in deliveries(ledger)] == [tried]
    assert len(ledger.take_delivery("t", 60_000).secrets) == 2
    proxy.lose_next_reply()
    shaky.replay_delivery(tried, "a")
    assert len(ledger.endpoints("a")) == 1
    proxy.lose_next_reply()
    shaky.delete_endpoint(endpoint_id, "a")
    # then nothing is left of it, and no call failed
    assert proxy.lost == 5
    assert ledger.endpoints("a") == []


def test_a_ledger_without_a_server_is_unavailable_and_says_no_address(proxy, ledger):
    # given a server whose replies are always lost
    proxy.faults.lose_chance = 1
    shaky = Ledger.from_url(proxy.url, "test")
    # when it is asked
    with pytest.raises(LedgerUnavailable) as caught:
        shaky.stats()
    # then the error may be shown to a user
    assert str(proxy.port) not in caught.value.message
    assert caught.value.retry_after is not None
    shaky.close()


def test_a_reader_goes_on_after_its_connection_was_cut(shaky, proxy, ledger):
    # given a reader that waits on the server for the next event
    submit(shaky)
    found = []
    reader = threading.Thread(target=lambda: found.extend(answered(lambda: shaky.next_events("job_1", after=0))))
    reader.start()
    while not any(client["cmd"] == "xread" for client in ledger.redis.client_list()):
        pass
    # when all connections are reset and then something happens
    proxy.reset_all()
    ledger.cancel("job_1")
    # then the reader hears of it
    reader.join()
    assert [event["type"] for event in found] == ["job.cancelled"]


def test_the_async_ledger_survives_a_lost_reply_too(shaky, proxy, ledger):
    async def life():
        through = AsyncLedger.from_url(proxy.url, "test")
        await submit(through)
        claim = await through.claim("m", worker="w", token="t")
        proxy.lose_next_reply()
        answer = await through.complete("job_1", claim.fence, state="completed", response=b"{}")
        await through.close()
        return answer

    assert asyncio.run(life()) == "same"
    assert proxy.lost == 1
    assert [event["type"] for event in ledger.events("job_1")].count("job.completed") == 1


def test_connections_that_were_cut_while_uvloop_held_them_are_made_anew(proxy, ledger):
    """uvicorn's event loop says RuntimeError where asyncio's says that the connection is lost."""

    async def ask():
        shaky = AsyncLedger.from_url(proxy.url, "test")
        try:
            for _ in range(30):
                await asyncio.gather(*(shaky.stats() for _ in range(20)))
                await asyncio.to_thread(proxy.reset_all)
        finally:
            await shaky.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask())


def test_a_slow_link_changes_no_answer(shaky, proxy):
    proxy.faults.latency = 0.02
    submit(shaky)
    claim = shaky.claim("m", worker="w", token="t")
    assert shaky.complete("job_1", claim.fence, state="completed", response=b"{}") == "done"


def test_a_whole_life_through_lost_replies_ends_once(shaky, proxy, ledger):
    # given a link that loses every fifth reply or so
    proxy.faults.lose_chance = 0.2
    # when four workers carry 40 jobs and one caller cancels some of them
    for i in range(40):
        answered(lambda i=i: submit(shaky, f"job_{i:02}", webhook=URL))
    for i in range(0, 40, 8):
        answered(lambda i=i: shaky.cancel(f"job_{i:02}"))
    in_threads(4, lambda worker: carry_all(shaky, f"w{worker}"))
    # then each has exactly one terminal event, and the cancelled ones were not run
    for i in range(40):
        ends = [event["type"] for event in ledger.events(f"job_{i:02}") if event["type"] not in RUNNING]
        assert ends == ["job.cancelled" if i % 8 == 0 else "job.completed"]
    assert len(deliveries(ledger)) == 40
    assert proxy.lost > 10
    with pytest.raises(AlreadyTerminal):
        ledger.cancel("job_01")


RUNNING = ("job.queued", "job.in_progress", DELTA)


def carry_all(ledger, worker):
    """Claim, publish and complete until nothing waits. A token lasts until its claim was answered."""
    while True:
        token = new_job_id()
        claim = answered(lambda token=token: ledger.claim("m", worker=worker, token=token))
        if claim is None:
            return
        job = (claim.job_id, claim.fence)
        answered(lambda job=job, token=token: ledger.publish(*job, [{"type": DELTA, "delta": "x"}], token))
        answered(lambda job=job: ledger.complete(*job, state="completed", response=b"{}"))
