"""Webhooks of batches and of responses in OpenAI's own words: what a receiver with the OpenAI SDK makes of them."""

import json

import openai
import pytest
from fleet import until
from live_api import running_api
from live_batches import line, running_batches, start, wait_for_end
from outbox_moves import deliveries
from receivers import Receiver

from inferfleet.tasks import batches
from inferfleet.workers.webhooks.courier import Courier
from inferfleet.workers.webhooks.guard import Policy
from inferfleet.workers.webhooks.sender import Sender

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared_api(session_redis):
    with (
        running_api(session_redis.url, served=("paper", "flux"), webhook_allow_loopback=True) as api,
        running_batches(api.settings, api.worker.ring),
    ):
        yield api


@pytest.fixture
def ledger(api):
    return api.worker.ledger


def received(api, receiver, secret=None):
    """What the SDK unwraps from what was sent."""
    with api.http() as http:
        if secret is None:
            answer = http.post("/v1/webhook_endpoints/default/rotate_secret", json={})
            secret = answer.json()["signing_secret"]
    Courier(api.worker.ledger, Sender(Policy(loopback=True)), timeout_seconds=10, keep_seconds=60).take_turn()
    with openai.OpenAI(api_key="none", webhook_secret=secret) as client:
        return [client.webhooks.unwrap(request.body, request.headers) for request in receiver.requests]


def expire(ledger, made):
    ledger.redis.hset(f"{ledger.prefix}batch:{made.id}", "expires_ms", 1)


@pytest.mark.parametrize(
    ("lines", "move", "kind"),
    [
        ([line("a")], None, "BatchCompletedWebhookEvent"),
        ([b"no batch"], None, "BatchFailedWebhookEvent"),
        ([line("a", "hold on")], lambda api, ledger, made: api.sdk().batches.cancel(made.id),
         "BatchCancelledWebhookEvent"),
        ([line("a", "hold on")], lambda api, ledger, made: expire(ledger, made), "BatchExpiredWebhookEvent"),
    ],
    ids=["completed", "failed", "cancelled", "expired"],
)  # fmt: skip
def test_the_end_of_a_batch_is_told_once_in_the_words_of_openai(api, ledger, lines, move, kind):
    with Receiver() as receiver:
        made = start(api.sdk(), lines, extra_body={"webhook": receiver.url})
        if move:
            until(lambda: api.sdk().batches.retrieve(made.id).status == "in_progress")
            move(api, ledger, made)
        batch = wait_for_end(api.sdk(), made.id)
        [event] = received(api, receiver)
    assert type(event).__name__ == kind
    assert (event.type, event.data.id) == (f"batch.{batch.status}", batch.id)
    # and its delivery is found by the batch
    with api.http() as http:
        [shown] = http.get("/v1/webhook_deliveries", params={"batch_id": made.id}).json()["data"]
        assert (shown["batch_id"], shown["job_id"], shown["event_type"]) == (made.id, None, f"batch.{batch.status}")
        both = http.get("/v1/webhook_deliveries", params={"batch_id": made.id, "job_id": "job_" + "0" * 32})
        assert (both.status_code, both.json()["data"]) == (200, [])


def test_a_batch_tells_only_the_ends_that_it_names_and_endpoints_what_they_asked_for(api, ledger):
    with Receiver() as receiver:
        hooks = api.sdk().webhooks
        endpoint = hooks.create(name="n", url=receiver.url + "/ops", event_types=["batch.completed", "job.completed"])
        told = {"webhook": receiver.url, "webhook_events_filter": ["failed", "expired"]}
        made = start(api.sdk(), [line("a")], extra_body=told)
        wait_for_end(api.sdk(), made.id)
        [event] = received(api, receiver, endpoint.signing_secret)
        assert (event.type, event.data.id) == ("batch.completed", made.id)
        assert "/ops" in receiver.requests[0].line
        hooks.delete(endpoint.id)


def test_a_retry_tells_where_its_batch_told(api):
    with Receiver() as receiver, api.http() as http:
        told = {"webhook": receiver.url, "webhook_events_filter": ["completed"]}
        first = start(api.sdk(), [line("a", "fail engine_error")], extra_body=told)
        wait_for_end(api.sdk(), first.id)
        again = http.post(f"/v1/batches/{first.id}/retry", json={}).json()
        wait_for_end(api.sdk(), again["id"])
        events = received(api, receiver)
    assert {event.data.id for event in events} == {first.id, again["id"]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"webhook": "http://10.0.0.1/"}, "webhook"),
        ({"webhook": "nowhere"}, "webhook"),
        ({"webhook": "we_" + "0" * 32}, "webhook"),
        ({"webhook_events_filter": ["started"]}, "webhook_events_filter.0"),
        ({"webhook_events_filter": []}, "webhook_events_filter"),
        ({"webhook_events_filter": ["failed", "failed"]}, "webhook_events_filter"),
    ],
)
def test_a_batch_with_a_bad_webhook_is_refused(api, change, param):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        start(api.sdk(), [line("a")], extra_body=change)
    assert caught.value.param == param


def test_an_end_that_is_said_twice_is_one_event(ledger):
    # given a batch that a runner holds
    made = start_by_hand(ledger)
    # when its end is said twice, as after a lost reply
    for _ in range(2):
        ledger.run(batches.reject(made.id, made.fence, [{"code": "x"}]))
    assert [each.type for each in deliveries(ledger, "hand", subject=made.id)] == ["batch.failed"]


def start_by_hand(ledger):
    """Of a tenant and a file that no runner gets to see before us."""
    shelf = "file-" + "a" * 32
    file = {"tenant": "hand", "status": "processed", "purpose": "batch", "shelf": shelf, "idem": "", "bytes": 1}
    ledger.redis.hset(f"{ledger.prefix}file:{shelf}", mapping=file)
    made, _ = ledger.run(
        batches.create(
            batches.new_batch_id(), "hand", body_hash="h", window="1h", window_seconds=3600, endpoint=CHAT,
            keep_seconds=3600, input_file_id=shelf, webhook="https://receiver.example/",
        )
    )  # fmt: skip
    ledger.redis.zadd(f"{ledger.prefix}batches:open", {made: 10**15})
    ledger.redis.hset(f"{ledger.prefix}batch:{made}", "fence", 10**6)
    return ledger.run(batches.get(made))


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("say well done", "completed", "ResponseCompletedWebhookEvent"),
        ("fail engine_error", "failed", "ResponseFailedWebhookEvent"),
        ("hold on", "cancelled", "ResponseCancelledWebhookEvent"),
        ("say two words", "incomplete", "ResponseIncompleteWebhookEvent"),
    ],
)
def test_the_end_of_a_background_response_is_told_in_the_words_of_openai(api, text, status, kind):
    client = api.sdk()
    with Receiver() as receiver:
        made = client.responses.create(
            model="paper", input=text, background=True, max_output_tokens=2 if status == "incomplete" else None,
            extra_body={"webhook": receiver.url},
        )  # fmt: skip
        if status == "cancelled":
            client.responses.cancel(made.id)
        until(lambda: client.responses.retrieve(made.id).status == status)
        [event] = received(api, receiver)
    assert type(event).__name__ == kind
    # the id is one that the SDK can ask for
    assert client.responses.retrieve(event.data.id).id == made.id
    assert json.loads(receiver.requests[0].body)["data"]["job_id"] == made.id.replace("resp_", "job_")


def test_a_response_that_expires_is_told_as_failed(ledger, api):
    api.worker.paused = True
    with Receiver() as receiver:
        made = api.sdk().responses.create(
            model="paper", input="say x", background=True,
            extra_body={"webhook": receiver.url, "webhook_events_filter": ["expired"], "deadline": 1.0},
        )  # fmt: skip
        ledger.sweep(100, result_ttl_ms=10**9)
        [event] = received(api, receiver)
    assert (event.type, event.data.id) == ("response.failed", made.id)


def test_an_endpoint_may_ask_for_every_type_and_be_tried_with_each(api, ledger):
    hooks = api.sdk().webhooks
    types = hooks.event_types.list().data
    assert len(types) == 16
    endpoint = hooks.create(name="all", url="https://receiver.example/", event_types=types)
    assert hooks.retrieve(endpoint.id).event_types == types
    prefixes = {"job": "job_", "response": "resp_", "batch": "batch_"}
    for kind in types:
        delivery = ledger.test_endpoint(endpoint.id, "default", kind)
        body = json.loads(ledger.redis.hget(f"{ledger.prefix}delivery:{delivery}", "body"))
        assert (body["type"], body["data"]["id"]) == (kind, prefixes[kind.partition(".")[0]] + "0" * 32)
    hooks.delete(endpoint.id)
