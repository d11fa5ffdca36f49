"""In which order jobs are claimed: fair turns of tenants, ageing, room for online work, warm prefixes, old queues."""

import itertools
import json
from collections import Counter

import pytest
from ledger_moves import FAR, PAST, claim, submit

from inferfleet.tasks import calls, names
from inferfleet.tasks.contracts import parse_job
from inferfleet.tasks.records import Work

numbers = itertools.count()


def drain(ledger, limit=10_000, **options):
    """The ids in the order of claims, each ended at once."""
    order = []
    while len(order) < limit and (found := claim(ledger, f"drain{next(numbers)}", **options)) is not None:
        ledger.complete(found.job_id, found.fence, state="completed", response=b"{}")
        order.append(found.job_id)
    return order


def fill(ledger, tenant, count, **options):
    for number in range(count):
        submit(ledger, f"job_{tenant}{number}", tenant=tenant, **options)


def tenants_of(order):
    return "".join(job_id[4] for job_id in order)


def test_a_tenant_with_one_job_starts_within_two_claims_of_one_with_a_thousand(ledger):
    fill(ledger, "a", 1000)
    drain(ledger, 10)
    submit(ledger, "job_b0", tenant="b")
    assert "job_b0" in drain(ledger, 2)


def test_tenants_take_turns_and_a_tenants_own_jobs_keep_their_order(ledger):
    fill(ledger, "a", 6)
    fill(ledger, "b", 3)
    order = drain(ledger)
    assert tenants_of(order) == "abababaaa"
    assert [job_id for job_id in order if job_id[4] == "a"] == [f"job_a{n}" for n in range(6)]


def test_shares_are_of_work_and_not_of_jobs(ledger):
    fill(ledger, "a", 40, cost=30)
    fill(ledger, "b", 40, cost=10)
    counts = Counter(tenants_of(drain(ledger, 24)))
    assert 17 <= counts["b"] <= 19


def test_nobody_saves_up_turns_by_staying_away_nor_gets_more_by_coming_again_and_again(ledger):
    fill(ledger, "a", 100)
    drain(ledger, 50)
    fill(ledger, "b", 10)
    assert tenants_of(drain(ledger, 6)).count("b") == 3
    # when c comes with one large job after the other, each only when the one before has ended
    fill(ledger, "d", 100)
    order = ""
    for number in range(8):
        submit(ledger, f"job_c{number}", tenant="c", cost=5)
        order += tenants_of(drain(ledger, 6))
    # then it has had about the share of d in work, and not a turn for each time it came
    assert 5 * order.count("c") <= order.count("d") + 10


def test_a_more_urgent_class_goes_first_whoever_it_is_of(ledger):
    fill(ledger, "a", 3)
    fill(ledger, "b", 2, priority=-1)
    assert tenants_of(drain(ledger)) == "bbaaa"


def test_a_class_that_was_passed_over_long_enough_has_its_turn(ledger):
    fill(ledger, "a", 20)
    fill(ledger, "b", 3, priority=100)
    assert tenants_of(drain(ledger, ageing=4)) == "aaaabaaaabaaaabaaaaaaaa"


def test_ageing_takes_the_class_that_waits_longest_first(ledger):
    fill(ledger, "a", 12)
    fill(ledger, "b", 2, priority=2)
    fill(ledger, "c", 2, priority=1)
    order = tenants_of(drain(ledger, ageing=3))
    assert sorted(order[3:5]) == ["b", "c"]
    assert order.index("b", 5) <= 9


def test_lines_of_batches_wait_behind_online_jobs_of_their_priority_and_stay_out_of_reserved_slots(ledger):
    fill(ledger, "a", 2, batch_id="batch_1")
    fill(ledger, "b", 2)
    assert tenants_of(drain(ledger, online=True)) == "bb"
    assert claim(ledger, "none", online=True) is None
    fill(ledger, "c", 1)
    assert tenants_of(drain(ledger)) == "caa"


def test_a_warm_job_goes_before_its_tenants_older_ones_and_before_nobody_elses(ledger):
    for number in range(6):
        submit(ledger, f"job_a{number}", tenant="a", affinity="xy"[number % 2])
    fill(ledger, "b", 3)
    first = claim(ledger, "t")
    order = []
    for number in range(8):
        order.append(claim(ledger, f"t{number}", affinity=first.affinity).job_id)
    assert tenants_of(order) == "bababaaa"
    assert [job_id for job_id in order if "a" in job_id[4]] == ["job_a2", "job_a4", "job_a1", "job_a3", "job_a5"]


def test_a_cold_job_is_passed_over_no_more_often_than_the_look_ahead(ledger):
    submit(ledger, "job_warm", affinity="x")
    warm = claim(ledger, "t").affinity
    submit(ledger, "job_cold", affinity="y")
    for number in range(2 * calls.LOOK_AHEAD):
        submit(ledger, f"job_{number}", affinity="x")
    order = []
    for number in range(2 * calls.LOOK_AHEAD):
        submit(ledger, f"job_late{number}", affinity="x")
        order.append(claim(ledger, f"t{number}", affinity=warm).job_id)
    assert order.index("job_cold") <= calls.LOOK_AHEAD


def test_a_warm_job_does_not_pass_an_earlier_deadline(ledger):
    submit(ledger, "job_soon", deadline_ms=FAR, affinity="y")
    submit(ledger, "job_warm", affinity="x")
    assert claim(ledger, affinity=calls.affinity_code("x")).job_id == "job_soon"


def test_tenants_with_nothing_queued_leave_nothing_that_a_claim_looks_at(ledger):
    # given a class that is never empty, and many tenants that came and went
    fill(ledger, "a", 3)
    for number in range(50):
        submit(ledger, f"job_{number}", tenant=f"t{number}")
        submit(ledger, f"job_a{number + 3}", tenant="a")
        drain(ledger, 2)
    # then only the tenants of the last turns are still known
    assert ledger.queues("m")[0].waiting > 0
    sizes = [ledger.redis.zcard(key) for kind in ("turns", "rested") for key in ledger.redis.keys(f"*{kind}:*")]
    assert sum(sizes) <= 3


def test_queue_positions_are_the_order_of_claims(ledger):
    fill(ledger, "a", 7, cost=2)
    fill(ledger, "b", 9, cost=1)
    fill(ledger, "c", 2, cost=5)
    fill(ledger, "d", 2, priority=-3)
    fill(ledger, "e", 2, priority=3)
    drain(ledger, 5)
    told = {job.id: ledger.get(job.id).queue_position for t in "abcde" for job in ledger.list(t, status="queued").jobs}
    order = drain(ledger)
    assert sorted(told, key=told.__getitem__) == order
    assert [told[job_id] for job_id in order] == list(range(len(order)))


# What an older version queued --------------------------------------------------------------------------------------


def queue_as_before(ledger, *jobs):
    """Put waiting jobs where the format before this one had them."""
    redis, prefix = ledger.redis, ledger.prefix
    for job_id in jobs:
        key = f"{prefix}job:{job_id}"
        model, priority, deadline, seq = (
            value.decode() for value in redis.hmget(key, "model", "priority", "deadline_ms", "seq")
        )
        place = f"{int(priority) + 100:03}:{int(deadline or 9999999999999):013}:{int(seq):016}:{job_id}"
        redis.hset(key, "place", place)
        redis.hdel(key, "cost", "affinity")
        redis.zadd(f"{prefix}waiting:{model}", {place: 0})
    for kind in ("order", "classes", "turns", "rested", "costs"):
        redis.delete(*redis.keys(f"{prefix}{kind}:*") or ["nothing"])
    redis.delete(*redis.keys(f"{prefix}waiting:*\n*"))


def test_jobs_of_the_format_before_are_claimed_in_their_order(ledger):
    submit(ledger, "job_2", priority=5)
    submit(ledger, "job_1", tenant="b", deadline_ms=FAR)
    submit(ledger, "job_3", priority=7)
    queue_as_before(ledger, "job_1", "job_2", "job_3")
    submit(ledger, "job_new", priority=6)
    assert drain(ledger) == ["job_1", "job_2", "job_new", "job_3"]
    assert ledger.redis.keys(f"{ledger.prefix}waiting:*") == []


def test_more_jobs_of_the_format_before_than_one_call_takes_over_are_all_claimed_once(ledger):
    jobs = [f"job_{number:04}" for number in range(450)]
    for job_id in jobs:
        submit(ledger, job_id)
    queue_as_before(ledger, *jobs)
    assert drain(ledger) == jobs


@pytest.mark.parametrize("how", ["cancel", "update", "expire", "purge", "sweep"])
def test_a_job_of_the_format_before_can_be_steered_before_it_is_taken_over(ledger, how):
    submit(ledger, "job_1", deadline_ms=PAST if how == "expire" else None)
    queue_as_before(ledger, "job_1")
    assert ledger.get("job_1").queue_position is None
    if how == "cancel":
        assert ledger.cancel("job_1") == "cancelled"
    elif how == "update":
        ledger.update("job_1", priority=3)
        assert ledger.get("job_1").queue_position == 0
        assert drain(ledger) == ["job_1"]
    elif how == "expire":
        assert ledger.sweep(result_ttl_ms=1000).expired == ["job_1"]
    elif how == "purge":
        assert ledger.purge("m", confirm="m").cancelled == 1
    else:
        assert ledger.sweep(result_ttl_ms=1000).ring == {"m": 1}
        assert ledger.get("job_1").queue_position == 0
        ledger.cancel("job_1")
    assert claim(ledger, "t") is None
    left = {key.decode().removeprefix(ledger.prefix) for key in ledger.redis.keys("*")}
    assert not {key for key in left if key.startswith(("waiting:", "classes:", "turns:", "rested:", "costs:"))}


# What workers make of it ---------------------------------------------------------------------------------------------


def test_lines_of_batches_leave_the_reserved_slots_to_online_work_and_all_run(fleet):
    fleet.start_worker(slots=4, reserved_slots=2)
    lines = [fleet.submit("tokens=80 step=0.02", batch_id="batch_1") for _ in range(6)]
    for job_id in lines[:2]:
        fleet.wait_for_words(job_id)
    chats = [fleet.submit("tokens=5 step=0.01") for _ in range(4)]
    for job_id in chats:
        assert fleet.wait(job_id).state == "completed"
    assert [fleet.state(job_id) for job_id in lines].count("queued") >= 4
    records = [fleet.wait(job_id) for job_id in lines]
    assert {record.state for record in records} == {"completed"}
    claimed = sorted(record.claimed_ms for record in records)
    ended = sorted(record.finished_ms for record in records)
    # never more than two at once, and the next one begins when one ends, without waiting for a janitor
    assert all(start >= end for start, end in zip(claimed[2:], ended, strict=False))
    assert claimed[-1] - ended[3] < 500


def test_a_worker_of_one_slot_carries_lines_of_batches_too(fleet):
    fleet.start_worker(slots=1, reserved_slots=1)
    assert fleet.wait(fleet.submit("tokens=2", batch_id="batch_1")).state == "completed"


def test_many_waiting_lines_are_worth_few_rings(ledger):
    fill(ledger, "a", 100, batch_id="batch_1")
    fill(ledger, "b", 5)
    assert ledger.sweep(result_ttl_ms=1000).ring == {"m": 37}


@pytest.mark.parametrize(
    ("url", "body", "tokens", "cost", "affinity"),
    [
        (names.CHAT_URL, {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 50}, 150, 150, "x" * 400),
        (names.CHAT_URL, {"messages": [{"role": "user", "content": "x"}], "n": 2}, 1024, 1024, "x"),
        (
            names.CHAT_URL,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 20}] * 2}], "max_tokens": 50},
            60,
            60,
            "x" * 40,
        ),
        (names.RESPONSES_URL, {"input": "hi", "instructions": "be kind", "max_output_tokens": 5}, 7, 7, "be kind"),
        (names.IMAGES_URL, {"prompt": "a cat", "size": "512x256", "num_inference_steps": 4}, 513, 2048, "a cat"),
        (names.IMAGES_URL, {"prompt": "a", "loras": [{"name": "ink"}], "n": 2}, 8192, 229376, "ink:1"),
    ],
)
def test_a_jobs_work_is_estimated_from_its_body(url, body, tokens, cost, affinity):
    job = parse_job(json.dumps({"url": url, "body": {"model": "m", **body}}).encode())
    assert job.work == Work(tokens, cost, affinity)
