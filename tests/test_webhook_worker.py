"""The webhook worker as a process: Celery turns that are lost or doubled, kill -9, SIGTERM, a Redis that is away."""

import json
import time
from contextlib import closing

import openai
import pytest
from fleet import Fleet, until
from hook_worker import hook_worker
from ledger_moves import claim, submit
from live_api import api_of_workers, running_api
from outbox_moves import deliveries
from receivers import Receiver, answer

from inferfleet.tasks import names
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.webhooks import new_secret


def end_job(ledger, webhook, job_id="job_1"):
    submit(ledger, job_id, webhook=webhook)
    ledger.complete(job_id, claim(ledger, f"t-{job_id}").fence, state="completed")


def slow(connection):
    time.sleep(0.8)
    answer(200)(connection)


def test_an_end_is_told_at_once_and_what_failed_again_later(redis_url, ledger, tmp_path):
    with Receiver(500, 200) as receiver, hook_worker(redis_url, "test", tmp_path / "log"):
        end_job(ledger, receiver.url)
        until(lambda: receiver.requests)
        failed = time.monotonic()
        # the second attempt comes by the worker's own clock, 5 s later or a fifth less or more
        until(lambda: deliveries(ledger)[0].state == "delivered")
        assert time.monotonic() - failed > 3.5
    assert len(set(receiver.events())) == 1


def test_turns_that_are_lost_or_doubled_change_nothing(redis_url, ledger, tmp_path):
    # given twenty events, and a queue from which every turn disappears for a while
    with Receiver() as receiver:
        for i in range(20):
            end_job(ledger, receiver.url, f"job_{i}")
        bell = Doorbell(redis_url, "test")
        # patient: an answer that comes late on a busy machine would rightly be asked for again
        with hook_worker(redis_url, "test", tmp_path / "log", webhook_timeout_seconds=30):
            for _ in range(5):
                ledger.redis.delete(names.deliver_queue("test"))
            # and then come many at once
            bell.ring_webhooks(30)
            until(lambda: {each.state for each in deliveries(ledger)} == {"delivered"})
            bell.ring_webhooks(10)
            until(lambda: ledger.redis.llen(names.deliver_queue("test")) == 0)
        bell.close()
    assert len(receiver.requests) == len(set(receiver.events())) == 20


def test_a_delivery_in_the_hands_of_a_worker_that_is_killed_goes_again_under_the_same_id(redis_url, ledger, tmp_path):
    with Receiver(slow) as receiver:
        end_job(ledger, receiver.url)
        with hook_worker(redis_url, "test", tmp_path / "first") as worker:
            until(lambda: receiver.requests)
            worker.kill()
        assert deliveries(ledger)[0].attempts == 0
        # when another worker runs
        with hook_worker(redis_url, "test", tmp_path / "second"):
            until(lambda: deliveries(ledger)[0].state == "delivered")
    assert len(receiver.requests) == 2
    assert len(set(receiver.events())) == 1
    assert receiver.requests[0].body == receiver.requests[1].body


def test_a_worker_that_is_asked_to_stop_finishes_what_it_sends_and_takes_nothing_more(redis_url, ledger, tmp_path):
    with Receiver(slow) as receiver:
        for i in range(10):
            end_job(ledger, receiver.url, f"job_{i}")
        with hook_worker(redis_url, "test", tmp_path / "log") as worker:
            until(lambda: receiver.requests)
            assert worker.stop() == 0
        states = [each.state for each in deliveries(ledger)]
        assert 1 <= states.count("delivered") == len(receiver.requests) < 10
        # nothing is leased: another goes on without waiting
        assert ledger.redis.keys(ledger.prefix + "sending:*") == []
        assert worker.lines("webhooks_stopped")


def test_a_redis_that_was_killed_delays_webhooks_and_loses_none(own_redis, tmp_path):
    ledger = Ledger.from_url(own_redis.url, "test")
    with Receiver() as receiver, hook_worker(own_redis.url, "test", tmp_path / "log"):
        end_job(ledger, receiver.url)
        until(lambda: receiver.requests)
        own_redis.kill()
        time.sleep(0.5)
        own_redis.start()
        end_job(ledger, receiver.url, "job_2")
        until(lambda: len(set(receiver.events())) == 2)
    ledger.close()


def test_the_log_holds_no_secret_and_no_url(redis_url, ledger, tmp_path):
    secret = new_secret()
    ledger.rotate_secret(None, "a", secret)
    with Receiver(500) as receiver, hook_worker(redis_url, "test", tmp_path / "log", log_level="debug") as worker:
        end_job(ledger, receiver.url + "?token=canary")
        until(lambda: worker.lines("webhook_not_delivered"))
        worker.stop()
    log = worker.log_path.read_text()
    assert "canary" not in log
    assert secret.removeprefix("whsec_") not in log


# End to end ----------------------------------------------------------------------------------------------------------


def test_the_webhook_of_a_job_arrives_signed(redis_url, tmp_path):
    """A live API, a Celery worker with a scripted engine and a webhook worker; the OpenAI SDK asks and unwraps."""
    with (
        closing(Fleet(redis_url, tmp_path)) as fleet,
        Receiver() as receiver,
        api_of_workers(redis_url, "test", webhook_allow_loopback=True) as api,
        hook_worker(redis_url, "test", tmp_path / "hooks") as hooks,
        api.http() as http,
    ):
        fleet.start_worker()
        # given the secret that signs for the URLs of jobs, and an endpoint with its own
        shown = http.post("/v1/webhook_endpoints/default/rotate_secret", json={}).json()["signing_secret"]
        endpoint = api.sdk().webhooks.create(
            name="ops", url=receiver.url + "/ops", event_types=["job.started", "job.completed"]
        )
        # when a chat is asked for with a webhook
        chat = api.sdk().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "tokens=3"}], extra_body={"webhook": receiver.url}
        )
        assert chat.choices[0].message.content
        until(lambda: len(receiver.requests) == 3)
        # then both receivers hear of its end, each signed with its own secret
        seen = []
        for request in receiver.requests:
            secret = endpoint.signing_secret if "/ops" in request.line else shown
            with openai.OpenAI(api_key="none", webhook_secret=secret) as client:
                event = client.webhooks.unwrap(request.body, request.headers)
            seen.append((request.line.split()[1], event.type))
            assert event.data.id.removeprefix("job_") == chat.id.removeprefix("chatcmpl-")
        assert sorted(seen) == [
            ("/hook", "job.completed"),
            ("/hook/ops", "job.completed"),
            ("/hook/ops", "job.started"),
        ]
        # and the deliveries tell of it
        page = until(lambda: _delivered(http, 3))
        assert {each["webhook_endpoint_id"] for each in page} == {None, endpoint.id}
        until(lambda: 'inferfleet_webhook_deliveries_total{outcome="delivered"' in http.get("/metrics").text)
        assert hooks.stop() == 0


def _delivered(http, count):
    page = http.get("/v1/webhook_deliveries", params={"status": "delivered"}).json()["data"]
    return page if len(page) == count else None


@pytest.fixture(scope="module")
def hooked(session_redis, tmp_path_factory):
    """An API whose webhooks may go to this machine, with a webhook worker."""
    with running_api(session_redis.url, webhook_allow_loopback=True, webhook_timeout_seconds=1) as api:
        log = tmp_path_factory.mktemp("hooks") / "log"
        with hook_worker(session_redis.url, api.settings.namespace, log):
            yield api


@pytest.mark.parametrize("status", [200, 500])
def test_an_endpoint_is_tried_and_the_sdk_is_told_the_answer(hooked, status):
    with Receiver(status) as receiver:
        endpoint = hooked.sdk().webhooks.create(name="n", url=receiver.url, event_types=["job.completed"])
        tested = hooked.sdk().webhooks.test(endpoint.id, event_type="job.failed")
    assert (tested.status_code, tested.event_type, tested.webhook_endpoint_id) == (status, "job.failed", endpoint.id)
    assert json.loads(receiver.requests[0].body)["type"] == "job.failed"


def test_an_endpoint_that_does_not_answer_is_a_typed_error(hooked):
    with Receiver() as receiver:
        pass
    endpoint = hooked.sdk().webhooks.create(name="n", url=receiver.url, event_types=["job.completed"])
    with pytest.raises(openai.InternalServerError) as caught:
        hooked.sdk().webhooks.test(endpoint.id, event_type="job.failed")
    assert (caught.value.status_code, caught.value.code) == (502, "webhook_receiver_failed")
    assert "connection_refused" in str(caught.value)
    assert caught.value.response.headers["x-should-retry"] == "false"
