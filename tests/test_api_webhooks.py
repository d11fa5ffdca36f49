"""/v1/webhook_endpoints and /v1/webhook_deliveries as the OpenAI SDK and curl meet them; and what the door refuses."""

import json

import openai
import pytest
from live_api import running_api
from receivers import Receiver

from inferfleet.workers.keys import digest, new_key
from inferfleet.workers.webhooks.courier import Courier
from inferfleet.workers.webhooks.guard import Policy
from inferfleet.workers.webhooks.sender import Sender

URL = "https://receiver.example/hook"
CHAT = {"model": "paper", "messages": [{"role": "user", "content": "say hello"}]}


@pytest.fixture(scope="module")
def production(session_redis):
    """An API as in production: webhooks go to public https addresses alone."""
    with running_api(session_redis.url, webhook_timeout_seconds=0.1) as api:
        yield api


@pytest.fixture(scope="module")
def api(session_redis):
    """An API whose webhooks may go to this machine."""
    with running_api(session_redis.url, webhook_allow_loopback=True) as api:
        yield api


@pytest.fixture
def http(production):
    production.worker.renew()
    with production.http() as client:
        yield client


def create(http, **changes):
    body = {"name": "ops", "url": URL, "event_types": ["job.completed"], **changes}
    return http.post("/v1/webhook_endpoints", json=body)


# Endpoints -----------------------------------------------------------------------------------------------------------


def test_the_sdk_makes_lists_changes_and_deletes_endpoints(production):
    hooks = production.sdk().webhooks
    # when one is made
    made = hooks.create(name="ops", url=URL, event_types=["job.completed", "job.failed"])
    assert made.object == "webhook_endpoint"
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint.endswith(made.signing_secret[-5:])
    # then it is listed and shown, without its secret
    assert made.id in [each.id for each in hooks.list(limit=1)]
    seen = hooks.retrieve(made.id)
    assert (seen.name, seen.url, seen.event_types) == ("ops", URL, ["job.completed", "job.failed"])
    assert made.signing_secret not in seen.model_dump_json()
    # and can be changed and deleted
    changed = hooks.update(made.id, name="new", event_types=["job.expired"])
    assert (changed.name, changed.url, changed.event_types) == ("new", URL, ["job.expired"])
    assert hooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        hooks.retrieve(made.id)
    assert caught.value.code == "webhook_endpoint_not_found"


def test_a_secret_is_shown_when_it_is_made_and_never_again(http):
    made = create(http).json()
    path = f"/v1/webhook_endpoints/{made['id']}"
    rotated = http.post(f"{path}/rotate_secret", json={"keep_old_secret_active_for_24_hours": False}).json()
    secrets = {made["signing_secret"], rotated["signing_secret"]}
    assert len(secrets) == 2
    later = [http.get(path), http.get("/v1/webhook_endpoints"), http.post(path, json={"name": "x"}),
             http.get("/v1/webhook_deliveries")]  # fmt: skip
    for answer in later:
        assert answer.status_code == 200
        assert not any(secret in answer.text for secret in secrets)


def test_pages_of_endpoints_follow_each_other(http, production):
    for endpoint in http.get("/v1/webhook_endpoints?limit=100").json()["data"]:
        http.delete(f"/v1/webhook_endpoints/{endpoint['id']}")
    ids = [create(http).json()["id"] for _ in range(5)]
    assert [each.id for each in production.sdk().webhooks.list(limit=2)] == ids[::-1]
    assert http.get(f"/v1/webhook_endpoints?after={'we_' + '0' * 32}").status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"url": "http://receiver.example/"}, "url"),
        ({"url": "https://receiver.example:22/"}, "url"),
        ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "https://localhost/"}, "url"),
        ({"url": "https://[::ffff:7f00:1]/"}, "url"),
        ({"url": "https://127.1/"}, "url"),
        ({"url": "https://user:pass@receiver.example/"}, "url"),
        ({"url": "https://receiver.example/" + "a" * 3000}, "url"),
        ({"url": 7}, "url"),
        ({"name": ""}, "name"),
        ({"name": "n" * 129}, "name"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["job.completed", "job.completed"]}, "event_types"),
        ({"event_types": ["job.done"]}, "event_types.0"),
        ({"secret": "abc"}, "secret"),
    ],
)
def test_a_bad_endpoint_is_refused_by_name(http, change, param):
    answer = create(http, **change)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"].startswith(param)


def test_a_url_is_asked_for_at_a_change_too(http):
    made = create(http).json()
    answer = http.post(f"/v1/webhook_endpoints/{made['id']}", json={"url": "http://169.254.169.254/"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "url_not_allowed")


@pytest.mark.parametrize("endpoint_id", ["we_1", "default", "we_" + "0" * 32, "..%2f..%2fx", "we_%00"])
def test_an_endpoint_that_is_not_there_is_not_found(http, endpoint_id):
    for answer in (
        http.get(f"/v1/webhook_endpoints/{endpoint_id}"),
        http.post(f"/v1/webhook_endpoints/{endpoint_id}", json={"name": "x"}),
        http.delete(f"/v1/webhook_endpoints/{endpoint_id}"),
        http.post(f"/v1/webhook_endpoints/{endpoint_id}/test", json={"event_type": "job.completed"}),
    ):
        # a path with a slash in it is no endpoint's
        code = "not_found" if "%2f" in endpoint_id else "webhook_endpoint_not_found"
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


def test_a_test_without_a_worker_says_so(http):
    made = create(http).json()
    answer = http.post(f"/v1/webhook_endpoints/{made['id']}/test", json={"event_type": "job.completed"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_webhook_worker")


def test_the_event_types_are_listed(production):
    assert "job.completed" in production.sdk().webhooks.event_types.list().data


def test_tenants_do_not_see_each_others_endpoints_and_deliveries(production):
    # given two tenants, one with an endpoint and a delivery
    keys = {tenant: new_key() for tenant in ("a", "b")}
    for tenant, key in keys.items():
        production.worker.ledger.put_key(digest(key), tenant, "")
    one, other = (production.http(headers={"authorization": f"Bearer {keys[tenant]}"}) for tenant in ("a", "b"))
    with one, other:
        made = create(one).json()
        job = one.post("/v1/jobs?", json={"body": CHAT, "webhook": made["id"]}, headers={"prefer": "wait=30"}).json()
        assert job["status"] == "completed"
        [delivery] = one.get("/v1/webhook_deliveries").json()["data"]
        # then the other finds none of them, in no way
        path = f"/v1/webhook_endpoints/{made['id']}"
        assert other.get("/v1/webhook_endpoints").json()["data"] == []
        assert other.get("/v1/webhook_deliveries").json()["data"] == []
        assert other.get(f"/v1/webhook_deliveries?job_id={job['id']}").json()["data"] == []
        for answer in (
            other.get(path), other.post(path, json={"name": "x"}), other.delete(path),
            other.post(f"{path}/rotate_secret", json={}),
            other.post(f"{path}/test", json={"event_type": "job.completed"}),
            other.get(f"/v1/webhook_deliveries/{delivery['id']}"),
            other.post(f"/v1/webhook_deliveries/{delivery['id']}/replay"),
            other.get(f"/v1/webhook_deliveries?after={delivery['id']}"),
        ):  # fmt: skip
            assert answer.status_code == 404
        refused = other.post("/v1/jobs", json={"body": CHAT, "webhook": made["id"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "webhook")


# Jobs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "webhook",
    ["http://receiver.example/", "https://127.0.0.1/", "https://receiver.example:8443/", "https://10.0.0.1/hook",
     "https://[fd00:ec2::254]/", "https://168.63.129.16/", "we_" + "0" * 32],
)  # fmt: skip
@pytest.mark.parametrize("way", ["job", "body", "chat"])
def test_a_webhook_that_is_not_allowed_is_refused_at_every_door(http, webhook, way):
    if way == "chat":
        answer = http.post("/v1/chat/completions", json=CHAT | {"webhook": webhook})
    else:
        inside, outside = ({"webhook": webhook}, {}) if way == "body" else ({}, {"webhook": webhook})
        answer = http.post("/v1/jobs", json={"body": CHAT | inside, **outside})
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "webhook"


def test_a_webhook_is_part_of_what_an_idempotency_key_is_bound_to(http):
    headers = {"idempotency-key": "hook-key"}
    first = http.post("/v1/jobs", json={"body": CHAT, "webhook": URL}, headers=headers)
    again = http.post("/v1/jobs", json={"body": CHAT, "webhook": URL}, headers=headers)
    other = http.post("/v1/jobs", json={"body": CHAT, "webhook": URL + "2"}, headers=headers)
    assert (first.status_code, again.json()["id"], other.status_code) == (202, first.json()["id"], 409)


def test_a_delivery_is_shown_and_replayed(api):
    with Receiver(500, 200) as receiver, api.http() as http:
        job = http.post("/v1/jobs", json={"body": CHAT, "webhook": receiver.url}, headers={"prefer": "wait=30"}).json()
        sender = Sender(Policy(loopback=True))
        courier = Courier(api.worker.ledger, sender, timeout_seconds=10, keep_seconds=60)
        # when its first attempt failed
        courier.take_turn()
        [shown] = http.get(f"/v1/webhook_deliveries?job_id={job['id']}&status=pending").json()["data"]
        assert (shown["event_type"], shown["attempts"], shown["last_status_code"]) == ("job.completed", 1, 500)
        assert shown["next_attempt_at"] > shown["last_attempt_at"]
        # then a replay sends it now
        again = http.post(f"/v1/webhook_deliveries/{shown['id']}/replay")
        assert (again.status_code, again.json()["attempts"]) == (202, 0)
        courier.take_turn()
        shown = http.get(f"/v1/webhook_deliveries/{shown['id']}").json()
        assert (shown["status"], shown["attempts"], shown["next_attempt_at"]) == ("delivered", 1, None)
    assert receiver.events() == [shown["event_id"]] * 2
    assert json.loads(receiver.requests[0].body)["data"] == {"id": job["id"], "status": "completed", "seq": 3}


@pytest.mark.parametrize("query", ["status=sent", "limit=0", "limit=101", "job_id=x", "after=x", "colour=red",
                                   "metadata[a]=b", "webhook_endpoint_id=default"])  # fmt: skip
def test_a_bad_filter_of_deliveries_is_refused(http, query):
    assert http.get(f"/v1/webhook_deliveries?{query}").status_code in (404, 422)


def test_the_document_describes_the_routes(http):
    document = http.get("/openapi.json").json()
    assert "/v1/webhook_endpoints/{endpoint_id}/rotate_secret" in document["paths"]
    assert "WebhookDelivery" in document["components"]["schemas"]
