"""The outbox in the ledger: who is told what, once, in the script of the change itself; and how deliveries move."""

import json

import pytest
from ledger_moves import PAST, claim, delta, submit
from outbox_moves import URL, body, deliveries, fail, pass_time, put_endpoint, record, take, told

from inferfleet.tasks import names
from inferfleet.tasks.contracts import parse_job
from inferfleet.tasks.errors import (
    DeliveryNotFound,
    EndpointDisabled,
    EndpointNotFound,
    InvalidRequest,
    TooManyEndpoints,
)
from inferfleet.tasks.webhooks import MAX_ENDPOINTS, new_secret

# Who is told --------------------------------------------------------------------------------------------------------


def test_lines_of_a_batch_are_told_to_nobody(ledger):
    # given an endpoint for everything that becomes of jobs
    put_endpoint(ledger, events=tuple(names.WEBHOOK_EVENTS))
    # when a line of a batch ends
    submit(ledger, batch_id="batch_1")
    ledger.complete("job_1", claim(ledger).fence, state="completed", response=b"{}")
    # then nothing is told: whoever wants to hear of the batch hears of the whole
    assert deliveries(ledger) == []


@pytest.mark.parametrize("state", ["completed", "failed", "incomplete"])
def test_the_end_of_a_job_is_told_to_its_webhook_once(ledger, state):
    # given a job with a webhook
    submit(ledger, webhook=URL, custom_id='cat "1"')
    given = claim(ledger)
    # when it ends, and the end is said twice
    error = {"message": "no", "type": "server_error", "param": None, "code": "engine_error"}
    for _ in range(2):
        ledger.complete("job_1", given.fence, state=state, response=b"{}", error=error if state == "failed" else None)
    # then one event tells of it, thin, with the number that its end has in the job's log
    [delivery] = deliveries(ledger)
    assert (delivery.type, delivery.subject, delivery.url, delivery.state) == (f"job.{state}", "job_1", URL, "pending")
    event = body(take(ledger))
    end = ledger.events("job_1")[-1]
    assert event["object"] == "event"
    assert event["id"].startswith("evt_")
    assert event["data"]["seq"] == end["sequence_number"]
    assert (event["data"]["id"], event["data"]["status"]) == ("job_1", state)
    assert event["data"]["custom_id"] == 'cat "1"'
    assert event["data"].get("error") == (error if state == "failed" else None)


def test_every_way_to_an_end_tells_of_it(ledger):
    # given jobs that are cancelled waiting, cancelled running, overdue at a claim, overdue in a sweep, and dead
    for job_id in ("waiting", "running", "dead"):
        submit(ledger, job_id, webhook=URL)
    ledger.cancel("waiting")
    running = claim(ledger, "t1", lease_ms=0)
    ledger.cancel("running")
    assert running.job_id == "running"
    claim(ledger, "t2", lease_ms=0)
    # when the ledger finds out
    ledger.reap(max_deaths=1)
    submit(ledger, "late", webhook=URL, deadline_ms=PAST)
    ledger.sweep(result_ttl_ms=60_000)
    submit(ledger, "later", webhook=URL, deadline_ms=PAST)
    assert claim(ledger, "t3") is None
    # then each end was told
    ends = {delivery.subject: delivery.type for delivery in deliveries(ledger)}
    assert ends == {
        "waiting": "job.cancelled", "running": "job.cancelled", "dead": "job.failed", "late": "job.expired",
        "later": "job.expired",
    }  # fmt: skip


def test_a_job_without_a_webhook_is_told_to_nobody(ledger):
    submit(ledger)
    ledger.cancel("job_1")
    assert deliveries(ledger) == []
    assert take(ledger) is None


def test_endpoints_hear_what_they_asked_for_of_their_own_tenant(ledger):
    # given three endpoints of one tenant and one of another
    ends = put_endpoint(ledger, events=("job.completed", "job.cancelled"))
    starts = put_endpoint(ledger, events=("job.started",))
    put_endpoint(ledger, events=("job.failed",))
    put_endpoint(ledger, tenant="b", events=names.WEBHOOK_EVENTS)
    # when a job starts and ends
    submit(ledger)
    ledger.complete("job_1", claim(ledger).fence, state="completed")
    # then each heard its own, and the other tenant nothing
    assert {delivery.endpoint: delivery.type for delivery in deliveries(ledger)} == {
        starts: "job.started",
        ends: "job.completed",
    }
    assert deliveries(ledger, "b") == []


def test_an_endpoint_named_by_a_job_that_also_asked_for_the_type_hears_once(ledger):
    endpoint = put_endpoint(ledger)
    submit(ledger, webhook=endpoint)
    ledger.complete("job_1", claim(ledger).fence, state="completed")
    assert [delivery.endpoint for delivery in deliveries(ledger)] == [endpoint]


def test_two_receivers_of_one_event_get_the_same_event_id(ledger):
    put_endpoint(ledger)
    submit(ledger, webhook=URL)
    ledger.complete("job_1", claim(ledger).fence, state="completed")
    events = [delivery.event for delivery in deliveries(ledger)]
    assert len(events) == 2
    assert len(set(events)) == 1


def test_a_job_can_not_name_the_endpoint_of_another_tenant(ledger):
    endpoint = put_endpoint(ledger, tenant="b")
    with pytest.raises(InvalidRequest) as caught:
        submit(ledger, webhook=endpoint)
    assert caught.value.param == "webhook"


def test_only_the_words_that_a_job_names_are_told(ledger):
    submit(ledger, webhook=URL, webhook_words=("started", "failed"))
    ledger.complete("job_1", claim(ledger).fence, state="completed")
    assert told(ledger) == ["job.started"]


def test_a_start_is_told_once_though_the_job_starts_again(ledger):
    submit(ledger, webhook=URL, webhook_words=("started",))
    ledger.release("job_1", claim(ledger, "t1").fence)
    claim(ledger, "t2")
    assert told(ledger) == ["job.started"]


def test_outputs_are_told_one_by_one_and_text_is_not(ledger):
    submit(ledger, webhook=URL, webhook_words=("output",))
    given = claim(ledger)
    made = [{"type": "job.output", "index": i, "id": f"out_{i}", "seed": 2**62 + i} for i in range(3)]
    ledger.publish("job_1", given.fence, [delta('"type":"job.output"'), *made], "p")
    assert told(ledger) == ["job.output"] * 3
    data = []
    while taken := take(ledger):
        data.append(body(taken)["data"])
        record(ledger, taken)
    data.sort(key=lambda each: each["seq"])
    assert [each["outputs"] for each in data] == [[{"index": i, "id": f"out_{i}", "seed": 2**62 + i}] for i in range(3)]


def progress(step):
    return {"type": "job.progress", "step": step, "steps": 100}


def test_progress_is_told_by_its_latest_and_not_more_than_once_a_second(ledger):
    # given a job that makes many steps before the first is sent
    submit(ledger, webhook=URL, webhook_words=("progress", "completed"))
    given = claim(ledger)
    for step in range(1, 50):
        ledger.publish("job_1", given.fence, [progress(step)], f"p{step}")
    # then one delivery waits, and tells the latest
    assert len(deliveries(ledger)) == 1
    first = take(ledger)
    assert body(first)["data"]["progress"] == {"step": 49, "steps": 100}
    # when more come while it is on its way
    ledger.publish("job_1", given.fence, [progress(50)], "p50")
    ledger.publish("job_1", given.fence, [progress(51)], "p51")
    record(ledger, first)
    # then they follow a second later, in one, under an id of its own
    assert take(ledger) is None
    pass_time(ledger, 1)
    second = take(ledger)
    assert body(second)["data"]["progress"] == {"step": 51, "steps": 100}
    assert second.event != first.event
    # and what was delivered leaves no record
    record(ledger, second)
    assert deliveries(ledger) == []


def test_progress_that_was_not_delivered_before_the_end_is_forgotten(ledger):
    submit(ledger, webhook=URL, webhook_words=("progress", "completed"))
    given = claim(ledger)
    ledger.publish("job_1", given.fence, [progress(1)], "p1")
    sent = take(ledger)
    ledger.publish("job_1", given.fence, [progress(2)], "p2")
    ledger.complete("job_1", given.fence, state="completed")
    assert told(ledger) == ["job.completed"]
    assert record(ledger, sent).word == "stale"
    assert body(take(ledger))["type"] == "job.completed"
    assert take(ledger) is None


def test_a_job_that_is_retried_tells_of_its_second_end_too(ledger):
    submit(ledger, webhook=URL)
    ledger.cancel("job_1")
    ledger.retry("job_1")
    ledger.complete("job_1", claim(ledger).fence, state="completed")
    assert told(ledger) == ["job.cancelled", "job.completed"]
    assert len({delivery.event for delivery in deliveries(ledger)}) == 2


def test_the_end_of_an_image_job_brings_what_its_pictures_are(ledger):
    made = [
        {"id": f"out_{'0' * 32}_1_{i}", "content_type": "image/png", "size_bytes": 10**7, "hash": f"sha256:{'a' * 64}",
         "index": i, "seed": 2**62 + i, "width": 4096, "height": 1024}
        for i in range(10)
    ]  # fmt: skip
    submit(ledger, webhook=URL, custom_id="\x01" * 512)
    ledger.complete("job_1", claim(ledger).fence, state="completed", response=b"{}", outputs=made)
    taken = take(ledger)
    assert body(taken)["data"]["outputs"] == made
    assert len(taken.body) < 8192


def test_an_event_stays_below_eight_kilobytes(ledger):
    submit(ledger, webhook=URL, custom_id="\x01" * 512)
    error = {"message": "m" * 1800, "type": "t", "param": None, "code": "c"}
    ledger.complete("job_1", claim(ledger).fence, state="failed", error=error)
    assert len(take(ledger).body) < 8192


def test_a_batch_line_brings_its_webhook_in_the_job_or_in_the_body():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "webhook": URL}
    job = parse_job(json.dumps({"body": body}).encode())
    assert (job.callback, job.callback_words) == (URL, names.WEBHOOK_ENDS)
    other = "we_" + "0" * 32
    job = parse_job(json.dumps({"body": body, "webhook": other, "webhook_events_filter": ["started"]}).encode())
    assert (job.callback, job.callback_words) == (other, ("started",))


@pytest.mark.parametrize(
    "webhook",
    ["", "ftp://a.example/", "we_1", "https://user:pw@a.example/", "https://a.example/#x", "https://" + "a" * 2048, 7,
     "https://a.example\\@b.example/", "https://１２７.0.0.1/", "//a.example", "https:///x", "https://a..b/"],
)  # fmt: skip
def test_a_webhook_of_bad_form_is_refused_by_name(webhook):
    raw = {"body": {"model": "m", "messages": [{"role": "user", "content": "x"}]}, "webhook": webhook}
    with pytest.raises(InvalidRequest) as caught:
        parse_job(json.dumps(raw).encode())
    assert caught.value.param == "webhook"


@pytest.mark.parametrize("words", [[], ["completed", "completed"], ["done"], "completed"])
def test_a_filter_of_bad_form_is_refused_by_name(words):
    raw = {"body": {"model": "m", "messages": [{"role": "user", "content": "x"}]}, "webhook": URL,
           "webhook_events_filter": words}  # fmt: skip
    with pytest.raises(InvalidRequest) as caught:
        parse_job(json.dumps(raw).encode())
    assert caught.value.param.startswith("webhook_events_filter")


# How deliveries move ------------------------------------------------------------------------------------------------


def waiting(ledger, count=1, webhook=URL, start=0):
    for i in range(start, start + count):
        submit(ledger, f"job_{i}", webhook=webhook)
        ledger.cancel(f"job_{i}")


def test_a_taken_delivery_is_taken_by_nobody_else_until_its_lease_is_over(ledger):
    waiting(ledger)
    first = take(ledger, lease_ms=60_000)
    assert take(ledger) is None
    pass_time(ledger, 61)
    second = take(ledger)
    # the lost attempt counts; the event's id is the same
    assert (second.id, second.event, second.attempts) == (first.id, first.event, 1)
    assert second.fence > first.fence
    # and the lost sender can change nothing any more
    assert record(ledger, first).word == "stale"
    assert record(ledger, second).word == "delivered"
    assert deliveries(ledger)[0].attempts == 2


def test_a_token_takes_one_delivery_however_often_it_is_sent(ledger):
    waiting(ledger, 2)
    first, again = take(ledger, "t"), take(ledger, "t")
    assert (first.id, first.fence) == (again.id, again.fence)
    record(ledger, first)
    assert take(ledger, "t") is None


def test_a_failed_attempt_comes_again_when_its_time_has_come(ledger):
    waiting(ledger)
    assert (
        record(ledger, take(ledger), "again", status=503, error="bad_status", answer="no", delay_ms=5000).word
        == "again"
    )
    assert take(ledger) is None
    [delivery] = deliveries(ledger)
    assert (delivery.state, delivery.attempts, delivery.last_status) == ("pending", 1, 503)
    assert (delivery.last_error, delivery.last_answer) == ("bad_status", "no")
    pass_time(ledger, 5)
    assert record(ledger, take(ledger)).word == "delivered"
    [delivery] = deliveries(ledger)
    assert (delivery.state, delivery.attempts, delivery.due_ms) == ("delivered", 2, None)


def test_a_receiver_gets_two_at_once_and_others_are_not_held_up(ledger):
    # given a receiver for which much waits, and a later one
    waiting(ledger, 5)
    waiting(ledger, 1, "https://other.example/", start=5)
    # when four senders take what is due
    taken = [take(ledger) for _ in range(4)]
    # then two went to the first, one to the other, and the fourth found nothing
    assert sorted(each.url for each in taken if each) == ["https://other.example/", URL, URL]
    assert taken[3] is None
    # and when one comes back, the next goes
    record(ledger, next(each for each in taken if each.url == URL))
    assert take(ledger).url == URL


def test_after_ten_failures_in_a_row_a_receiver_is_left_alone_for_a_minute(ledger):
    waiting(ledger, 12)
    fail(ledger, 10)
    assert take(ledger) is None
    pass_time(ledger, 59)
    assert take(ledger) is None
    pass_time(ledger, 1)
    # one that works closes the breaker
    record(ledger, take(ledger))
    assert record(ledger, take(ledger)).word == "delivered"


def test_the_breaker_waits_longer_each_time_and_never_more_than_an_hour(ledger):
    waiting(ledger, 30)
    waits = []
    for _ in range(10):
        fail(ledger, 9 if not waits else 0)
        record(ledger, take(ledger), "again", delay_ms=0)
        now = ledger.redis.time()
        [key] = ledger.redis.keys(ledger.prefix + "receiver:*")
        waits.append(round(int(ledger.redis.hget(key, "open_until_ms")) / 1000 - now[0] - now[1] / 1e6))
        pass_time(ledger, waits[-1] + 1)
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]


def test_a_receiver_that_asks_for_time_gets_it_for_all_its_deliveries(ledger):
    waiting(ledger, 3)
    record(ledger, take(ledger), "again", status=429, delay_ms=120_000, pause_ms=120_000)
    assert take(ledger) is None
    pass_time(ledger, 121)
    assert take(ledger) is not None


def test_an_endpoint_that_is_gone_is_disabled_and_its_queue_waits_until_it_is_enabled(ledger):
    # given two events for an endpoint that answers 410
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, 2, webhook=None)
    recorded = record(ledger, take(ledger), "gone", status=410)
    assert (recorded.word, recorded.disabled) == ("parked", "gone")
    # then nothing is sent there, also not what comes later
    waiting(ledger, 1, webhook=None, start=2)
    pass_time(ledger)
    assert take(ledger) is None
    assert ledger.endpoint(endpoint, "a").disabled == "gone"
    with pytest.raises(EndpointDisabled):
        ledger.replay_delivery(deliveries(ledger)[0].id, "a")
    # until it is enabled: all three go
    ledger.update_endpoint(endpoint, "a", enable=True)
    for _ in range(3):
        assert record(ledger, take(ledger)).word == "delivered"
    assert ledger.endpoint(endpoint, "a").disabled is None


def test_a_url_that_is_gone_fails_and_is_tried_again_only_after_a_replay(ledger):
    waiting(ledger, 2)
    assert record(ledger, take(ledger), "gone", status=410).word == "failed"
    pass_time(ledger)
    assert take(ledger) is None
    failed = deliveries(ledger, state="failed")[0]
    ledger.replay_delivery(failed.id, "a")
    assert {record(ledger, take(ledger)).word for _ in range(2)} == {"delivered"}


def test_an_endpoint_is_disabled_after_five_days_of_nothing_but_failures(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, 15, webhook=None)
    fail(ledger, 1)
    pass_time(ledger, 5 * 86400 - 120)
    for _ in range(9):
        pass_time(ledger, 5)
        record(ledger, take(ledger), "again", delay_ms=0)
    assert ledger.endpoint(endpoint, "a").disabled is None
    assert ledger.endpoint(endpoint, "a").failures == 10
    pass_time(ledger, 3600)
    assert record(ledger, take(ledger), "again", delay_ms=0).disabled == "failing"
    assert ledger.endpoint(endpoint, "a").disabled == "failing"


def test_one_success_in_five_days_keeps_an_endpoint_enabled(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, 25, webhook=None)
    fail(ledger, 9)
    pass_time(ledger, 5)
    record(ledger, take(ledger))
    assert ledger.endpoint(endpoint, "a").failing_since_ms is None
    pass_time(ledger, 6 * 86400)
    for _ in range(9):
        pass_time(ledger, 5)
        assert record(ledger, take(ledger), "again", delay_ms=0).disabled is None


def test_a_replayed_delivery_goes_again_under_the_same_event_id_with_all_its_attempts(ledger):
    waiting(ledger)
    first = take(ledger)
    record(ledger, first, "failed")
    ledger.replay_delivery(first.id, "a")
    second = take(ledger)
    assert (second.event, second.body, second.attempts) == (first.event, first.body, 0)


def test_a_delivery_of_another_tenant_is_not_there(ledger):
    waiting(ledger)
    [delivery] = deliveries(ledger)
    for call in (ledger.get_delivery, ledger.replay_delivery):
        with pytest.raises(DeliveryNotFound):
            call(delivery.id, "b")
    with pytest.raises(DeliveryNotFound):
        ledger.list_deliveries("b", after=delivery.id)


def test_an_endpoint_of_another_tenant_is_not_there(ledger):
    endpoint = put_endpoint(ledger)
    for call in (
        lambda: ledger.endpoint(endpoint, "b"),
        lambda: ledger.update_endpoint(endpoint, "b", name="x"),
        lambda: ledger.rotate_secret(endpoint, "b", new_secret()),
        lambda: ledger.delete_endpoint(endpoint, "b"),
        lambda: ledger.test_endpoint(endpoint, "b", "job.completed"),
    ):
        with pytest.raises(EndpointNotFound):
            call()
    assert ledger.endpoints("b") == []


def test_what_waits_for_a_deleted_endpoint_fails(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, 40, webhook=None)
    ledger.delete_endpoint(endpoint, "a")
    assert take(ledger) is None
    assert take(ledger) is None
    assert {(each.state, each.last_error) for each in deliveries(ledger)} == {("failed", "endpoint_deleted")}
    assert all(each.ended_ms for each in deliveries(ledger))
    with pytest.raises(EndpointNotFound):
        ledger.replay_delivery(deliveries(ledger)[0].id, "a")


def test_a_tenant_has_a_bounded_number_of_endpoints(ledger):
    for _ in range(MAX_ENDPOINTS):
        put_endpoint(ledger)
    with pytest.raises(TooManyEndpoints):
        put_endpoint(ledger)
    put_endpoint(ledger, tenant="b")


def test_an_endpoint_that_moves_takes_what_waits_with_it(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, webhook=None)
    ledger.update_endpoint(endpoint, "a", url="https://new.example/", name="new", events=("job.failed",))
    assert take(ledger).url == "https://new.example/"
    seen = ledger.endpoint(endpoint, "a")
    assert (seen.name, seen.events) == ("new", ("job.failed",))


def test_both_secrets_sign_for_a_day_after_a_rotation_and_then_the_new_one_alone(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, 3, webhook=None)
    [old] = take(ledger).secrets
    new = new_secret()
    ledger.rotate_secret(endpoint, "a", new)
    assert take(ledger).secrets == (new, old)
    pass_time(ledger, 86_401)
    assert take(ledger).secrets == (new,)


def test_a_rotation_that_keeps_nothing_ends_the_old_secret_at_once(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, webhook=None)
    new = new_secret()
    ledger.rotate_secret(endpoint, "a", new, 0)
    assert take(ledger).secrets == (new,)


def test_urls_of_jobs_are_signed_with_a_secret_of_their_tenant_which_can_be_rotated(ledger):
    submit(ledger, "job_1", webhook=URL)
    submit(ledger, "job_2", webhook="https://other.example/")
    submit(ledger, "job_3", webhook=URL, tenant="b")
    for job_id in ("job_1", "job_2", "job_3"):
        ledger.cancel(job_id)
    taken = {each.tenant + each.url: each.secrets for each in (take(ledger) for _ in range(3))}
    assert taken["a" + URL] == taken["ahttps://other.example/"] != taken["b" + URL]
    new = new_secret()
    ledger.rotate_secret(None, "a", new)
    submit(ledger, "job_4", webhook=URL)
    ledger.cancel("job_4")
    assert take(ledger).secrets == (new, *taken["a" + URL])


def test_a_test_event_is_tried_once_also_at_a_disabled_endpoint_and_changes_nothing_there(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, webhook=None)
    record(ledger, take(ledger), "gone", status=410)
    delivery_id = ledger.test_endpoint(endpoint, "a", "job.completed")
    taken = take(ledger)
    assert (taken.id, taken.url, taken.tries) == (delivery_id, URL, 1)
    assert body(taken)["data"]["test"] is True
    record(ledger, taken, "failed", status=500)
    assert ledger.endpoint(endpoint, "a").failures == 1
    assert ledger.get_delivery(delivery_id, "a").state == "failed"


def test_deliveries_are_listed_newest_first_by_endpoint_job_and_state(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger, 3)
    record(ledger, take(ledger))
    assert [each.subject for each in deliveries(ledger, endpoint_id=endpoint)] == ["job_2", "job_1", "job_0"]
    assert len(deliveries(ledger, subject="job_1")) == 2
    assert len(deliveries(ledger, state="delivered")) == 1
    page, more = ledger.list_deliveries("a", limit=4)
    rest, last = ledger.list_deliveries("a", after=page[-1].id, limit=4)
    assert (more, last) == (True, False)
    assert len({each.id for each in page + rest}) == 6


def test_records_of_deliveries_are_forgotten_in_time(ledger):
    # given one that was delivered and one that nobody ever takes
    waiting(ledger, 2)
    record(ledger, take(ledger))
    forget = (ledger.prefix + "forget_deliveries",)
    pass_time(ledger, 61, forget)
    assert ledger.sweep_deliveries() == 1
    assert [each.state for each in deliveries(ledger)] == ["pending"]
    pass_time(ledger, 7 * 86400, forget)
    assert ledger.sweep_deliveries() == 0
    assert deliveries(ledger) == []
    assert [key for key in ledger.redis.keys(ledger.prefix + "*") if b"deliver" in key and b"number" not in key] == []


def test_a_sweep_says_for_how_many_receivers_there_is_something_to_do(ledger):
    assert ledger.sweep_deliveries() == 0
    waiting(ledger, 5)
    waiting(ledger, 1, "https://other.example/", start=5)
    assert ledger.sweep_deliveries() == 2
    submit(ledger, "job_9", webhook="https://third.example/")  # it waits: there is nothing to tell yet
    assert ledger.sweep_deliveries() == 2


def test_no_secret_is_in_what_endpoints_and_deliveries_show(ledger):
    endpoint = put_endpoint(ledger, events=("job.cancelled",))
    waiting(ledger)
    secrets = [secret for each in (take(ledger), take(ledger)) for secret in each.secrets]
    shown = repr(ledger.endpoint(endpoint, "a")) + repr(deliveries(ledger))
    assert len(secrets) == 2
    for secret in secrets:
        assert secret not in shown
