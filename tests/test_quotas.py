"""What a tenant may ask for, and what is refused because it cannot be in time: from the ledger to the HTTP answer."""

import time
from contextlib import closing

import openai
import pytest
from fleet import Fleet
from ledger_moves import PAST, claim, submit
from live_api import running_api

from inferfleet.tasks import names
from inferfleet.tasks.errors import DeadlineUnmeetable, InvalidRequest, QuotaExceeded
from inferfleet.tasks.settings import load_settings

CHAT = {"model": "paper", "messages": [{"role": "user", "content": "say hi"}], "max_tokens": 10}


def refused(ledger, job_id, **options):
    with pytest.raises(QuotaExceeded) as caught:
        submit(ledger, job_id, **options)
    error = caught.value
    return error.facts["quota"], error.facts["limit"], error.facts["used"], error.retry_after


def let_pass(ledger, seconds):
    """As if so much time had passed for the rates of tenant a."""
    key = f"{ledger.prefix}quota:a"
    for name in ledger.redis.hkeys(key):
        if name.endswith(b"_ms"):
            ledger.redis.hincrby(key, name, -round(seconds * 1000))


def test_requests_beyond_the_rate_are_refused_with_the_time_until_one_passes(ledger):
    ledger.put_tenants({"a": {"requests_per_minute": 2}})
    submit(ledger, "job_1")
    submit(ledger, "job_2")
    quota, limit, used, wait = refused(ledger, "job_3")
    assert (quota, limit, used) == ("requests_per_minute", 2, 2)
    assert 29 < wait <= 30
    # the refused one counts for nothing, a repeated one neither, and another tenant has its own
    assert submit(ledger, "job_2").replayed
    assert submit(ledger, "job_b", tenant="b").queued
    let_pass(ledger, 30.5)
    assert submit(ledger, "job_3").queued
    assert refused(ledger, "job_4")[0] == "requests_per_minute"


def test_tokens_are_counted_by_the_minute_and_the_day(ledger):
    ledger.put_tenants({"a": {"tokens_per_minute": 100, "tokens_per_day": 150}})
    submit(ledger, "job_1", tokens=90)
    assert refused(ledger, "job_2", tokens=50)[:3] == ("tokens_per_minute", 100, 90)
    let_pass(ledger, 60)
    submit(ledger, "job_2", tokens=50)
    let_pass(ledger, 60)
    quota, limit, used, wait = refused(ledger, "job_3", tokens=90)
    assert (quota, limit, used) == ("tokens_per_day", 150, 140)
    assert 10 < wait < 86400


def used_tokens(ledger):
    return [
        round(float(ledger.redis.hget(f"{ledger.prefix}quota:a", f"tokens_per_{name}"))) for name in ("minute", "day")
    ]


def test_tokens_that_an_ended_job_did_not_take_come_back_and_what_it_took_more_is_charged(ledger):
    ledger.put_tenants({"a": {"tokens_per_minute": 1000, "tokens_per_day": 10_000}})
    for job_id in ("job_1", "job_2"):
        submit(ledger, job_id, tokens=400)
    first, second = claim(ledger, "t1"), claim(ledger, "t2")
    let_pass(ledger, 6)  # a hundred a minute leak away
    ledger.complete("job_1", first.fence, state="completed", response=b"{}", usage={"total_tokens": 100})
    assert used_tokens(ledger) == [pytest.approx(400, abs=3), pytest.approx(499, abs=3)]
    ledger.complete("job_2", second.fence, state="failed", error={"code": "x"}, usage={"total_tokens": 450})
    assert used_tokens(ledger) == [pytest.approx(450, abs=3), pytest.approx(549, abs=3)]
    # of a job that runs again the last run counts
    ledger.retry("job_2")
    again = claim(ledger, "t3")
    assert used_tokens(ledger)[1] == pytest.approx(549, abs=3)
    ledger.complete("job_2", again.fence, state="completed", response=b"{}", usage={"total_tokens": 50})
    assert used_tokens(ledger)[1] == pytest.approx(149, abs=3)


def test_tokens_of_a_job_that_never_ran_come_back_and_those_of_one_that_says_nothing_do_not(ledger):
    ledger.put_tenants({"a": {"tokens_per_minute": 1000, "tokens_per_day": 10_000}})
    submit(ledger, "job_1", tokens=400)
    submit(ledger, "job_2", tokens=300)
    submit(ledger, "job_3", tokens=200, deadline_ms=PAST)
    ledger.sweep(result_ttl_ms=60_000)
    ledger.complete("job_1", claim(ledger).fence, state="failed", error={"code": "x"})
    ledger.cancel("job_2")
    assert used_tokens(ledger)[1] == pytest.approx(400, abs=3)


def test_in_the_end_chats_responses_and_pictures_count_what_their_usage_says(redis_url, tmp_path):
    with closing(Fleet(redis_url, tmp_path)) as fleet:
        fleet.ledger.put_tenants({"default": {"tokens_per_day": 10_000}})
        fleet.start_worker({"m": "fake", "p": "image"})
        response = {"url": names.RESPONSES_URL, "body": {"model": "m", "input": "tokens=50"}}
        picture = {"n": 3, "size": "128x128", "num_inference_steps": 2}
        jobs = [fleet.submit("tokens=70"), fleet.submit_job(response), fleet.paint("a circle", body=picture)]
        took = sum(fleet.wait(job_id).usage["total_tokens"] for job_id in jobs)
        used = float(fleet.ledger.redis.hget(f"{fleet.ledger.prefix}quota:default", "tokens_per_day"))
        # of what was estimated, 512 an answer, nothing is left; seven a minute leak away
        assert used == pytest.approx(took, abs=5)


def test_a_job_larger_than_a_whole_quota_is_wrong_and_not_early(ledger):
    ledger.put_tenants({"a": {"tokens_per_minute": 100}})
    with pytest.raises(InvalidRequest, match="counts 101 against the quota tokens_per_minute of 100") as caught:
        submit(ledger, tokens=101)
    assert caught.value.param == "max_tokens"


def test_waiting_and_open_jobs_are_counted_as_they_are(ledger):
    ledger.put_tenants({"a": {"queued_jobs": 2, "concurrent_jobs": 3}})
    submit(ledger, "job_1")
    submit(ledger, "job_2", model="n")
    assert refused(ledger, "job_3")[:3] == ("queued_jobs", 2, 2)
    running = claim(ledger)
    submit(ledger, "job_3")
    ledger.claim("n", worker="w", token="t2")
    assert refused(ledger, "job_4")[:3] == ("concurrent_jobs", 3, 3)
    ledger.complete("job_1", running.fence, state="completed", response=b"{}")
    assert submit(ledger, "job_4").queued


def test_queued_bytes_come_back_when_a_job_starts_or_ends(ledger):
    ledger.put_tenants({"a": {"queued_bytes": 5}})
    submit(ledger, "job_1")  # of two bytes
    submit(ledger, "job_2")
    assert refused(ledger, "job_3")[:3] == ("queued_bytes", 5, 4)
    fence = claim(ledger).fence
    assert submit(ledger, "job_3").queued
    ledger.release("job_1", fence)
    assert refused(ledger, "job_4")[:3] == ("queued_bytes", 5, 6)
    for job_id in ("job_1", "job_2", "job_3"):
        ledger.cancel(job_id)
    assert not ledger.redis.exists(f"{ledger.prefix}bytes")


def test_whoever_is_not_named_has_the_quotas_of_the_star(ledger):
    ledger.put_tenants({"*": {"queued_jobs": 1}, "a": {}})
    submit(ledger, "job_1", tenant="b")
    assert refused(ledger, "job_2", tenant="b")[0] == "queued_jobs"
    submit(ledger, "job_3")
    assert submit(ledger, "job_4").queued
    ledger.put_tenants({})
    assert submit(ledger, "job_2", tenant="b").queued


def test_lines_of_batches_leave_half_of_a_quota_to_other_work(ledger):
    ledger.put_tenants({"a": {"queued_jobs": 4, "tokens_per_minute": 100}})
    submit(ledger, "job_1", batch_id="batch_1", tokens=80)  # the first passes whatever it asks for
    assert refused(ledger, "job_2", batch_id="batch_1", tokens=1)[0] == "tokens_per_minute"
    let_pass(ledger, 60)
    submit(ledger, "job_2", batch_id="batch_1")
    assert refused(ledger, "job_3", batch_id="batch_1")[:3] == ("queued_jobs", 4, 2)
    assert submit(ledger, "job_3").queued


def test_a_weight_gives_a_larger_share(ledger):
    ledger.put_tenants({"a": {"weight": 3}})
    for number in range(30):
        submit(ledger, f"job_a{number}", cost=10)
        submit(ledger, f"job_b{number}", tenant="b", cost=10)
    order = "".join(claim(ledger, f"t{number}").tenant for number in range(20))
    assert order.count("a") == 15


# Deadlines -----------------------------------------------------------------------------------------------------------


def at_a_pace(ledger, gap_ms, waiting):
    """Jobs with a near deadline wait for a model whose jobs have ended every gap_ms lately."""
    for number in range(waiting):
        submit(ledger, f"job_{number}", tenant="b", deadline_ms=in_ms(3000))
    now = round(time.time() * 1000)
    pace = {"last": now, "gap": gap_ms, "busy_ms": 20 * gap_ms, "busy_ends": 20, "busy_seen": 20}
    ledger.redis.hset(f"{ledger.prefix}pace:m", mapping=pace)


def in_ms(ms):
    return round(time.time() * 1000) + ms


def test_a_deadline_before_the_jobs_turn_is_refused_with_the_time_until_then(ledger):
    at_a_pace(ledger, 1000, waiting=10)
    with pytest.raises(DeadlineUnmeetable) as caught:
        submit(ledger, "job_urgent", tenant="b", deadline_ms=in_ms(5000))
    assert caught.value.facts["eta_seconds"] == 11


def test_a_deadline_that_can_be_met_is_accepted(ledger):
    at_a_pace(ledger, 1000, waiting=10)
    assert submit(ledger, "job_1s", tenant="b", deadline_ms=in_ms(15_000)).queued


def test_a_job_whose_deadline_lets_it_go_first_is_accepted_however_many_wait(ledger):
    at_a_pace(ledger, 1000, waiting=10)
    assert submit(ledger, "job_first", tenant="b", deadline_ms=in_ms(2000)).queued
    assert submit(ledger, "job_other", tenant="a", deadline_ms=in_ms(4000)).queued


@pytest.mark.parametrize("why", ["no pace", "few ends", "long ago", "a line", "paused", "no deadline", "urgent"])
def test_a_deadline_is_refused_only_where_the_pace_is_sure(ledger, why):
    at_a_pace(ledger, 1000, waiting=10)
    key = f"{ledger.prefix}pace:m"
    if why == "no pace":
        ledger.redis.delete(key)
    elif why == "few ends":
        ledger.redis.hset(key, "busy_seen", 3)
    elif why == "long ago":
        ledger.redis.hset(key, "last", in_ms(-700_000))
    elif why == "paused":
        ledger.pause("m")
    options = {"batch_id": "batch_1"} if why == "a line" else {"priority": -5} if why == "urgent" else {}
    deadline = None if why == "no deadline" else in_ms(5000)
    assert submit(ledger, "job_x", tenant="b", deadline_ms=deadline, **options).queued


def test_a_start_timeout_that_cannot_be_met_is_refused_too(ledger):
    at_a_pace(ledger, 1000, waiting=10)
    with pytest.raises(DeadlineUnmeetable) as caught:
        submit(ledger, "job_x", tenant="b", start_timeout_ms=2000)
    assert caught.value.param == "start_timeout"


def test_the_pace_is_measured_while_jobs_wait(ledger):
    for number in range(40):
        submit(ledger, f"job_{number}")
    for number in range(20):
        claimed = claim(ledger, f"t{number}")
        time.sleep(0.005)
        ledger.complete(claimed.job_id, claimed.fence, state="completed", response=b"{}")
    assert 4 <= ledger.get("job_39").eta_ms / 20 <= 30
    with pytest.raises(DeadlineUnmeetable):
        submit(ledger, "job_x", deadline_ms=in_ms(10), priority=1)


# Over HTTP -----------------------------------------------------------------------------------------------------------


def test_a_used_up_quota_is_a_429_with_its_facts(redis_url):
    with running_api(redis_url, tenants={"default": {"requests_per_minute": 1}}) as api, api.http() as http:
        api.worker.paused = True
        assert http.post("/v1/jobs", json={"body": CHAT}).status_code == 202
        answer = http.post("/v1/jobs", json={"body": CHAT | {"seed": 1}})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (429, "quota_exceeded", "rate_limit_error")
        assert (error["quota"], error["limit"], error["used"]) == ("requests_per_minute", 1, 1)
        assert 50 <= int(answer.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            api.sdk().chat.completions.create(**CHAT)


def test_an_unmeetable_deadline_is_a_422_that_is_not_to_be_repeated(redis_url):
    with running_api(redis_url) as api, api.http() as http:
        api.worker.paused = True
        for seed in range(5):
            http.post("/v1/jobs", json={"body": CHAT | {"seed": seed}, "deadline": time.time() + 15})
        pace = {"last": in_ms(0), "gap": 9000, "busy_ms": 180_000, "busy_ends": 20, "busy_seen": 20}
        ledger = api.worker.ledger
        ledger.redis.hset(f"{ledger.prefix}pace:paper", mapping=pace)
        answer = http.post("/v1/jobs", json={"body": CHAT, "deadline": time.time() + 20})
        assert answer.status_code == 422
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert (error["code"], error["param"], error["eta_seconds"]) == ("deadline_unmeetable", "deadline", 54)


def test_quotas_come_from_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inferfleet.toml").write_text(
        '[tenants.lab]\nweight = 2\nqueued_jobs = 5\n[tenants."*"]\nweight = 0.5\n'
    )
    tenants = load_settings().tenants
    assert (tenants["lab"].weight, tenants["lab"].queued_jobs, tenants["*"].weight) == (2, 5, 0.5)
    (tmp_path / "inferfleet.toml").write_text("[tenants.lab]\nwait = 2\n")
    with pytest.raises(Exception, match=r"unknown setting tenants\.lab\.wait; did you mean weight"):
        load_settings()
