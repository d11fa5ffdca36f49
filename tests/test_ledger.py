"""One job's life in the ledger: accepted once, carried under a fence, ended once, whatever happens on the way."""

import pytest
from ledger_moves import FAR, PAST, claim, delta, submit, types

from inferfleet.tasks import calls, event_log
from inferfleet.tasks.errors import (
    AlreadyTerminal,
    Conflict,
    EventLogFull,
    IdempotencyKeyReuse,
    InvalidRequest,
    NotQueued,
    QueueFull,
)

# Accepting -----------------------------------------------------------------------------------------------------------


def test_the_same_id_with_the_same_body_is_a_replay_and_with_another_a_reuse(ledger):
    assert submit(ledger) == calls.Submitted("job_1", replayed=False, queued=True)
    assert submit(ledger) == calls.Submitted("job_1", replayed=True, queued=False)
    with pytest.raises(IdempotencyKeyReuse):
        submit(ledger, body_hash="other")


def test_idempotency_keys_of_two_tenants_never_meet(ledger):
    submit(ledger, "job_1", tenant="a", idempotency_key="k")
    assert submit(ledger, "job_2", tenant="b", idempotency_key="k", body_hash="other").job_id == "job_2"


def test_a_tenant_that_sends_another_tenants_job_id_gets_no_job(ledger):
    submit(ledger, tenant="a")
    with pytest.raises(IdempotencyKeyReuse):
        submit(ledger, tenant="b")


def test_a_full_queue_refuses_with_a_time_to_come_back_and_takes_a_replay(ledger):
    # given a queue with room for two
    submit(ledger, "job_1", max_queued=2)
    submit(ledger, "job_2", max_queued=2)
    # when a third comes
    with pytest.raises(QueueFull) as caught:
        submit(ledger, "job_3", max_queued=2)
    # then it is told when to return and leaves nothing behind, and a repeated submit is still answered
    assert 0.5 <= caught.value.retry_after <= 72
    assert "limit is 2" in caught.value.message
    assert [job.id for job in ledger.list("a").jobs] == ["job_2", "job_1"]
    assert submit(ledger, "job_2", max_queued=2).replayed


def test_another_models_queue_may_be_full(ledger):
    submit(ledger, "job_1", model="busy", max_queued=1)
    assert submit(ledger, "job_2", model="idle", max_queued=1).queued


@pytest.mark.parametrize("priority", [-101, 101])
def test_a_priority_out_of_its_limits_is_refused(ledger, priority):
    with pytest.raises(InvalidRequest, match="-100 and 100"):
        submit(ledger, priority=priority)


# The order of claims -------------------------------------------------------------------------------------------------


def drain(ledger):
    order = []
    while (found := claim(ledger, token=f"t{len(order)}")) is not None:
        order.append(found.job_id)
    return order


def test_lower_priority_runs_first_then_the_earlier_deadline_then_the_older_job(ledger):
    submit(ledger, "job_late", priority=5)
    submit(ledger, "job_z_old")
    submit(ledger, "job_a_young")
    submit(ledger, "job_far", deadline_ms=FAR)
    submit(ledger, "job_near", deadline_ms=FAR - 1)
    submit(ledger, "job_first", priority=-100)
    assert drain(ledger) == ["job_first", "job_near", "job_far", "job_z_old", "job_a_young", "job_late"]


def test_a_requeued_job_keeps_its_age(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    first = claim(ledger, "first")
    ledger.release("job_1", first.fence)
    assert drain(ledger) == ["job_1", "job_2"]


def test_models_have_queues_of_their_own(ledger):
    submit(ledger, "job_1", model="other")
    assert claim(ledger) is None
    assert ledger.claim("other", worker="w", token="t2").job_id == "job_1"


def test_update_moves_a_waiting_job(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    ledger.update("job_2", "a", priority=-1)
    ledger.update("job_1", "a", deadline_ms=FAR)
    record = ledger.get("job_2")
    assert (record.priority, record.queue_position) == (-1, 0)
    assert ledger.get("job_1").deadline_ms == FAR
    assert drain(ledger) == ["job_2", "job_1"]


def test_update_refuses_a_running_job(ledger):
    submit(ledger)
    claim(ledger)
    with pytest.raises(NotQueued):
        ledger.update("job_1", priority=1)
    assert ledger.get("job_1").priority == 0
    assert claim(ledger, "t2") is None


def test_a_claim_looks_past_expired_jobs_but_not_without_bound(ledger):
    # given more overdue jobs in front than one claim looks at
    for i in range(calls.LOOK_AHEAD + 1):
        submit(ledger, f"job_{i:02}", deadline_ms=PAST)
    submit(ledger, "job_good")
    # when claims are made
    first, second = claim(ledger, "t1"), claim(ledger, "t2")
    # then the first ends as many as it may, and the second reaches the good one
    assert first is None
    assert second.job_id == "job_good"
    assert len(ledger.list("a", status="expired", limit=100).jobs) == calls.LOOK_AHEAD + 1


# Carrying under a fence ----------------------------------------------------------------------------------------------


def test_a_claim_carries_the_envelope_and_makes_the_job_run(ledger):
    ledger.submit("job_1", b'{"x":"\xc3\xa9"}', model="m", tenant="a", body_hash="h", deadline_ms=FAR)
    found = claim(ledger)
    assert (found.job_id, found.attempt, found.deaths) == ("job_1", 1, 0)
    assert found.envelope == b'{"x":"\xc3\xa9"}'
    assert found.deadline_ms == FAR
    assert found.now_ms >= found.created_ms > 1_700_000_000_000
    assert not found.suspect
    assert found.published == []
    record = ledger.get("job_1")
    assert (record.state, record.worker, record.attempts, record.fence) == ("in_progress", "w", 1, found.fence)
    assert types(ledger) == ["job.queued", "job.in_progress"]


def test_a_claim_repeated_with_its_token_is_the_same_claim(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    first, again = claim(ledger, "t1"), claim(ledger, "t1")
    assert (first.job_id, first.fence) == (again.job_id, again.fence)
    assert claim(ledger, "t2").job_id == "job_2"


def test_a_used_token_never_takes_a_second_job(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    found = claim(ledger, "t1")
    ledger.complete("job_1", found.fence, state="completed", response=b"{}")
    assert claim(ledger, "t1") is None
    assert ledger.get("job_2").state == "queued"


def test_the_same_token_of_two_workers_makes_two_claims(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    assert claim(ledger, worker="w1").job_id == "job_1"
    assert claim(ledger, worker="w2").job_id == "job_2"


def take_from_a_zombie(ledger):
    """A job whose first holder lost it, as (fence of the zombie, fence of the holder)."""
    submit(ledger)
    zombie = claim(ledger, "t1", worker="zombie", lease_ms=0)
    assert ledger.reap() == [("job_1", "requeued")]
    return zombie.fence, claim(ledger, "t2", worker="w").fence


def test_a_stale_fence_can_change_nothing(ledger):
    # given a worker that was stopped longer than its lease, and another that took its job
    stale, fresh = take_from_a_zombie(ledger)
    before = ledger.get("job_1"), ledger.events("job_1")
    # when it wakes up
    answers = (
        ledger.beat("zombie", [("job_1", stale)], 15_000),
        ledger.publish("job_1", stale, [delta("late")], "p"),
        ledger.complete("job_1", stale, state="completed", response=b"late"),
        ledger.release("job_1", stale),
        ledger.lose("job_1", stale),
    )
    # then every call of its is refused and the job is untouched
    assert answers == ({"job_1": "stale"}, "stale", "stale", "stale", "stale")
    assert (ledger.get("job_1"), ledger.events("job_1")) == before
    assert ledger.complete("job_1", fresh, state="completed", response=b"{}") == "done"


def test_a_stale_fence_is_refused_after_the_end_too(ledger):
    stale, fresh = take_from_a_zombie(ledger)
    ledger.complete("job_1", fresh, state="completed", response=b"good")
    assert ledger.complete("job_1", stale, state="completed", response=b"late") == "stale"
    assert ledger.get("job_1").response == b"good"


def test_a_beat_keeps_the_job_and_answers_each_job_by_itself(ledger):
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    one, two = claim(ledger, "t1", lease_ms=0), claim(ledger, "t2", lease_ms=0)
    assert ledger.beat("w", [("job_1", one.fence), ("job_2", two.fence + 1), ("job_none", 1)], 60_000) == {
        "job_1": "ok",
        "job_2": "stale",
        "job_none": "stale",
    }
    assert ledger.reap() == [("job_2", "requeued")]


def test_a_beat_of_no_jobs_is_answered(ledger):
    assert ledger.beat("w", [], 15_000) == {}


def test_a_beat_of_another_worker_renews_nothing(ledger):
    submit(ledger)
    found = claim(ledger, lease_ms=0)
    assert ledger.beat("other", [("job_1", found.fence)], 60_000) == {"job_1": "stale"}


def test_published_events_are_numbered_in_order_and_come_back_with_the_next_claim(ledger):
    # given a job that published and was then lost
    submit(ledger)
    first = claim(ledger, "t1")
    ledger.publish("job_1", first.fence, [delta("a"), delta("é")], "p1")
    ledger.publish("job_1", first.fence, [delta("c")], "p2")
    ledger.lose("job_1", first.fence)
    # when it is claimed again
    second = claim(ledger, "t2")
    # then the claim says what readers have already seen, and the numbers have no gap
    assert [(event["sequence_number"], event["delta"]) for event in second.published] == [(2, "a"), (3, "é"), (4, "c")]
    assert [event["sequence_number"] for event in ledger.events("job_1")] == list(range(7))
    assert (second.attempt, second.deaths) == (2, 1)


def test_a_long_log_comes_back_whole(ledger):
    submit(ledger)
    first = claim(ledger, "t1")
    many = [delta(str(i)) for i in range(2 * event_log.EVENTS_PER_READ)]
    ledger.publish("job_1", first.fence, many, "p1")
    ledger.release("job_1", first.fence)
    assert [event["delta"] for event in claim(ledger, "t2").published] == [event["delta"] for event in many]


def test_a_publish_repeated_with_its_token_appends_once_also_after_the_next_one(ledger):
    submit(ledger)
    fence = claim(ledger).fence
    for token in ("p1", "p2", "p1", "p2"):
        assert ledger.publish("job_1", fence, [delta(token)], token) == "ok"
    assert [event["delta"] for event in ledger.events("job_1", after=1)] == ["p1", "p2"]


def test_a_log_that_would_grow_beyond_its_limit_refuses(ledger, monkeypatch):
    monkeypatch.setattr(calls, "MAX_EVENTS", 4)
    submit(ledger)
    fence = claim(ledger).fence
    with pytest.raises(EventLogFull, match="at most 4 events"):
        ledger.publish("job_1", fence, [delta("x")] * 3, "p1")
    assert ledger.publish("job_1", fence, [delta("x")] * 2, "p2") == "ok"


# Ending --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["completed", "failed", "incomplete", "cancelled", "expired"])
def test_a_job_ends_once_in_the_state_its_worker_says(ledger, state):
    submit(ledger)
    fence = claim(ledger).fence
    end = {"state": state, "error": {"code": "x"}, "usage": {"total_tokens": 3}, "metrics": {"ttft_ms": 1.5}}
    assert ledger.complete("job_1", fence, response=b"{}", **end) == "done"
    assert ledger.complete("job_1", fence, response=b"{}", **end) == "same"
    record = ledger.get("job_1")
    assert (record.state, record.response, record.usage, record.metrics) == (
        state,
        b"{}",
        {"total_tokens": 3},
        {"ttft_ms": 1.5},
    )
    assert record.terminal
    assert types(ledger) == ["job.queued", "job.in_progress", f"job.{state}"]
    last = ledger.events("job_1")[-1]
    assert (last["status"], last["error"], last["usage"]) == (state, {"code": "x"}, {"total_tokens": 3})


def test_late_progress_never_overwrites_a_terminal_state(ledger):
    submit(ledger)
    fence = claim(ledger).fence
    ledger.complete("job_1", fence, state="completed", response=b"{}")
    before = ledger.get("job_1"), ledger.events("job_1")
    assert ledger.publish("job_1", fence, [delta("late")], "p") == "stale"
    assert ledger.beat("w", [("job_1", fence)], 15_000) == {"job_1": "stale"}
    assert ledger.complete("job_1", fence, state="failed", error={"code": "x"}) == "same"
    assert ledger.release("job_1", fence) == "stale"
    assert (ledger.get("job_1"), ledger.events("job_1")) == before


def test_a_worker_cannot_end_a_job_in_a_state_that_is_no_end(ledger):
    with pytest.raises(ValueError, match="state must be one of"):
        ledger.complete("job_1", 1, state="queued")


def test_cancel_ends_a_waiting_job_at_once(ledger):
    submit(ledger)
    assert ledger.cancel("job_1", "a") == "cancelled"
    assert ledger.cancel("job_1", "a") == "cancelled"
    assert claim(ledger) is None
    assert ledger.get("job_1").error["code"] == "cancelled"
    assert types(ledger) == ["job.queued", "job.cancelled"]


def test_cancel_of_a_running_job_is_told_to_its_worker_and_final_whatever_it_answers(ledger):
    # given a running job that is cancelled
    submit(ledger)
    fence = claim(ledger).fence
    assert ledger.cancel("job_1") == "cancelling"
    assert ledger.cancel("job_1") == "cancelling"
    # when its worker calls
    assert ledger.beat("w", [("job_1", fence)], 15_000) == {"job_1": "cancel"}
    assert ledger.publish("job_1", fence, [delta("x")], "p") == "cancel"
    # then the job ends as cancelled, with its usage, also if the answer was ready
    usage = {"completion_tokens": 1}
    assert ledger.complete("job_1", fence, state="completed", response=b"{}", usage=usage) == "done"
    record = ledger.get("job_1")
    assert (record.state, record.response, record.usage) == ("cancelled", None, usage)


def test_cancel_of_an_ended_job_says_so(ledger):
    submit(ledger)
    ledger.complete("job_1", claim(ledger).fence, state="completed", response=b"{}")
    with pytest.raises(AlreadyTerminal, match="already completed"):
        ledger.cancel("job_1")


def test_a_cancelled_job_that_is_handed_back_or_lost_ends_as_cancelled(ledger):
    for job_id, give_up in (("job_1", ledger.release), ("job_2", ledger.lose)):
        submit(ledger, job_id)
        fence = claim(ledger, job_id).fence
        ledger.cancel(job_id)
        give_up(job_id, fence)
        assert ledger.get(job_id).state == "cancelled"


def test_release_hands_a_job_back_without_a_death_or_an_attempt(ledger):
    submit(ledger)
    fence = claim(ledger, "t1").fence
    assert ledger.release("job_1", fence, suspect=True) == "released"
    record = ledger.get("job_1")
    assert (record.state, record.deaths, record.attempts) == ("queued", 0, 0)
    assert record.fence > fence
    again = claim(ledger, "t2")
    assert (again.attempt, again.deaths, again.suspect) == (1, 0, True)


def test_a_reader_goes_on_behind_a_retry_and_is_told_of_events_that_are_gone(ledger):
    submit(ledger)
    fence = claim(ledger, "t1").fence
    ledger.complete("job_1", fence, state="failed", error={"code": "x"})
    *_, last = ledger.events("job_1")
    ledger.retry("job_1")
    # the numbers go on, and the old events are gone for a reason
    state, found = ledger.run(event_log.log("job_1", after=last["sequence_number"], last=last))
    assert (state, [event["type"] for event in found]) == ("queued", ["job.queued"])
    # while another event in the place of the one that was read, or none, is a loss
    (newest,) = found
    for lost in (newest | {"status": "other"}, newest | {"sequence_number": 99}):
        with pytest.raises(Conflict, match="from their beginning"):
            ledger.run(event_log.log("job_1", after=lost["sequence_number"], last=lost))
