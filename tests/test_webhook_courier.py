"""From the outbox to a receiver: the schedule on a clock of the tests' own, and receivers that do all that is bad."""

import json
import random
import threading
import time
from datetime import UTC, datetime
from email.utils import format_datetime

import openai
import pytest
import receivers
from ledger_moves import claim, submit
from outbox_moves import deliveries, pass_time, put_endpoint
from receivers import Receiver, answer
from standardwebhooks.webhooks import Webhook

from inferfleet.tasks.webhooks import Taken, new_secret
from inferfleet.workers.webhooks.courier import Courier
from inferfleet.workers.webhooks.guard import Policy
from inferfleet.workers.webhooks.schedule import JITTER, SCHEDULE, allowed, judge, retry_after
from inferfleet.workers.webhooks.sender import Answer, Sender

DAY = 86_400
NOW_MS = 1_800_000_000_000


def taken(attempts=0, tries=None):
    return Taken("whd_1", 1, "evt_1", "job.completed", b"{}", "u", "a", attempts, tries, ("s",), NOW_MS)


# The schedule --------------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_one_that_the_readme_names():
    assert SCHEDULE == (0, 5, 60, 300, 1800, 7200, 18_000, 36_000, 86_400)


@pytest.mark.parametrize("attempts", range(8))
def test_a_failed_attempt_is_followed_after_its_delay_and_a_fifth_of_it_more_or_less(attempts):
    delay = SCHEDULE[attempts + 1]
    for spread in (-1, 0, 1):
        verdict = judge(taken(attempts), Answer(500), spread=spread)
        assert (verdict.outcome, verdict.delay_ms) == ("again", round(1000 * delay * (1 + JITTER * spread)))
    random.seed(attempts)
    drawn = {judge(taken(attempts), Answer(500)).delay_ms for _ in range(200)}
    assert 800 * delay <= min(drawn) < max(drawn) <= 1200 * delay
    assert len(drawn) > 100


def test_the_last_attempt_is_followed_by_none():
    assert judge(taken(8), Answer(500)).outcome == "failed"
    assert judge(taken(0, tries=1), Answer(500)).outcome == "failed"
    assert [judge(taken(n, tries=3), Answer(500)).outcome for n in range(3)] == ["again", "again", "failed"]
    assert allowed(taken(tries=100)) == len(SCHEDULE)


@pytest.mark.parametrize(
    ("got", "outcome", "error"),
    [
        (Answer(200), "delivered", None),
        (Answer(204), "delivered", None),
        (Answer(301), "again", "redirect"),
        (Answer(304), "again", "redirect"),
        (Answer(400), "again", "bad_status"),
        (Answer(410), "gone", "gone"),
        (Answer(429), "again", "bad_status"),
        (Answer(500), "again", "bad_status"),
        (Answer(error="timeout"), "again", "timeout"),
        (Answer(error="url_not_allowed"), "again", "url_not_allowed"),
    ],
)
def test_what_follows_from_an_answer(got, outcome, error):
    verdict = judge(taken(), got)
    assert (verdict.outcome, verdict.error) == (outcome, error)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0), ("", 0), ("120", 120), (" 7 ", 7), ("-1", 0), ("1.5", 0), ("soon", 0), ("１２", 0),
        ("1000000000", DAY), ("9" * 5000, DAY),
        (format_datetime(datetime.fromtimestamp(NOW_MS / 1000 + 90, UTC), usegmt=True), 90),
        (format_datetime(datetime.fromtimestamp(NOW_MS / 1000 - 90, UTC), usegmt=True), 0),
        ("Wed, 01 Jan 3000 00:00:00 GMT", DAY), ("Wed, 99 Jan 3000 99:00:00 GMT", 0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date_and_at_most_a_day(value, seconds):
    assert retry_after(value, NOW_MS) == seconds


def test_retry_after_makes_a_wait_longer_and_never_shorter():
    assert judge(taken(0), Answer(429, retry_after="120")).delay_ms == 120_000
    assert judge(taken(6), Answer(429, retry_after="1"), spread=0).delay_ms == 36_000_000
    verdict = judge(taken(0), Answer(503, retry_after="1000000000"))
    assert verdict.delay_ms == verdict.pause_ms == DAY * 1000


# Deliveries ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def courier(ledger):
    return Courier(ledger, Sender(Policy(loopback=True), seconds=0.5), timeout_seconds=0.5, keep_seconds=60)


def end_job(ledger, webhook=None, job_id="job_1"):
    submit(ledger, job_id, webhook=webhook)
    ledger.complete(job_id, claim(ledger, f"t-{job_id}").fence, state="completed")


def test_a_receiver_gets_a_signed_event_that_the_sdk_unwraps(ledger, courier):
    secret = new_secret()
    ledger.rotate_secret(None, "a", secret)
    with Receiver() as receiver:
        end_job(ledger, receiver.url)
        assert courier.take_turn() == 1
    [request] = receiver.requests
    with openai.OpenAI(api_key="none", webhook_secret=secret) as client:
        event = client.webhooks.unwrap(request.body, request.headers)
    assert (event.type, event.data.id) == ("job.completed", "job_1")
    assert json.loads(request.body)["id"] == request.headers["webhook-id"]
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 5
    assert deliveries(ledger)[0].state == "delivered"


def test_a_receiver_that_always_fails_is_asked_on_the_schedule_and_then_given_up(ledger, courier):
    # given a receiver that answers 500
    with Receiver(500) as receiver:
        end_job(ledger, receiver.url)
        waits = []
        # when time passes
        while (delivery := deliveries(ledger)[0]).state == "pending":
            assert courier.take_turn() == 1
            assert courier.take_turn() == 0
            if due := deliveries(ledger)[0].due_ms:
                now = ledger.redis.time()
                waits.append(due / 1000 - now[0] - now[1] / 1e6)
                pass_time(ledger, waits[-1] + 0.01)
    # then it was asked nine times with the same event, each time signed anew, and the log tells of the last
    assert len(receiver.requests) == 9
    assert len(set(receiver.events())) == 1
    for wait, planned in zip(waits, SCHEDULE[1:], strict=True):
        assert 0.79 * planned < wait < 1.21 * planned
    assert (delivery.state, delivery.attempts, delivery.last_status, delivery.last_error) == (
        "failed", 9, 500, "bad_status",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [(500, "bad_status"), (receivers.reset, "connection_lost"), (receivers.silence, "timeout"),
     (receivers.drip, "timeout"), (answer(301, "location: http://127.0.0.1:1/\r\n"), "redirect"),
     (receivers.nonsense, "not_http")],
)  # fmt: skip
def test_a_fault_of_the_receiver_delays_the_event_and_loses_nothing(ledger, courier, behaviour, error):
    with Receiver(behaviour, 200) as receiver:
        end_job(ledger, receiver.url)
        courier.take_turn()
        assert deliveries(ledger)[0].last_error == error
        pass_time(ledger, 7)
        courier.take_turn()
        assert receiver.events()[0] == receiver.events()[1]
    assert (deliveries(ledger)[0].state, deliveries(ledger)[0].attempts) == ("delivered", 2)


@pytest.mark.parametrize("behaviour", [receivers.endless_body, receivers.gzip_bomb, receivers.dripping_body])
def test_a_strange_body_is_no_fault(ledger, courier, behaviour):
    with Receiver(behaviour) as receiver:
        end_job(ledger, receiver.url)
        courier.take_turn()
    assert deliveries(ledger)[0].state == "delivered"


def test_a_huge_retry_after_holds_the_receiver_for_a_day_and_nobody_else(ledger, courier):
    busy = answer(429, "retry-after: 1000000000\r\n")
    with Receiver(busy, 200) as receiver, Receiver() as other:
        for i in range(3):
            end_job(ledger, receiver.url, f"job_{i}")
        end_job(ledger, other.url, "job_3")
        courier.take_turn()
        assert (len(receiver.requests), len(other.requests)) == (1, 1)
        pass_time(ledger, DAY - 60)
        courier.take_turn()
        assert len(receiver.requests) == 1
        pass_time(ledger, 61)
        courier.take_turn()
        assert len(receiver.requests) == 4


def test_a_receiver_that_is_gone_is_asked_once(ledger, courier):
    with Receiver(410) as receiver:
        put_endpoint(ledger, events=("job.completed",), url=receiver.url)
        for i in range(3):
            end_job(ledger, job_id=f"job_{i}")
        courier.take_turn()
        pass_time(ledger)
        courier.take_turn()
    assert len(receiver.requests) == 1
    assert {each.state for each in deliveries(ledger)} == {"pending"}


def test_a_receiver_is_met_by_two_at_once_however_many_send(ledger, courier):
    def slow(connection):
        time.sleep(0.05)
        answer(200)(connection)

    with Receiver(slow) as receiver:
        for i in range(12):
            end_job(ledger, receiver.url, f"job_{i}")

        def send():
            while any(each.state == "pending" for each in deliveries(ledger)):
                courier.take_turn()

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert receiver.most_at_once == 2
    assert sorted(set(receiver.events())) == sorted(receiver.events())
    assert len(receiver.requests) == 12


def test_a_flaky_receiver_gets_every_end_at_least_once_under_one_id_each(ledger, courier):
    # given a receiver that answers every other request with something bad
    bad = [500, receivers.reset, 429, receivers.nonsense, 301]
    behaviours = [bad[i % 5] if random.Random(i).random() < 0.5 else 200 for i in range(60)] + [200]
    with Receiver(*behaviours) as receiver:
        secret = new_secret()
        ledger.rotate_secret(None, "a", secret)
        for i in range(20):
            end_job(ledger, receiver.url, f"job_{i}")
        while any(each.state == "pending" for each in deliveries(ledger)):
            courier.take_turn()
            pass_time(ledger, 3600)
    # then all were delivered, and each event kept its id
    events = {}
    for request in receiver.requests:
        events.setdefault(json.loads(request.body)["data"]["id"], set()).add(request.headers["webhook-id"])
        Webhook(secret).verify(request.body, request.headers)
    assert sorted(events) == sorted(f"job_{i}" for i in range(20))
    assert all(len(ids) == 1 for ids in events.values())
    assert {each.state for each in deliveries(ledger)} == {"delivered"}


def test_an_event_whose_senders_were_lost_every_time_is_given_up_unsent(ledger, courier):
    with Receiver() as receiver:
        end_job(ledger, receiver.url)
        for i in range(9):
            assert ledger.take_delivery(f"lost{i}", 1000).attempts == i
            pass_time(ledger, 2)
        courier.take_turn()
    assert receiver.requests == []
    assert (deliveries(ledger)[0].state, deliveries(ledger)[0].last_error) == ("failed", "sender_lost")


def test_a_courier_that_closes_takes_nothing_more(ledger, courier):
    with Receiver() as receiver:
        end_job(ledger, receiver.url)
        courier.closing.set()
        assert courier.take_turn() == 0
    assert receiver.requests == []
