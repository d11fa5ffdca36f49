"""`inferfleet endpoints` and `inferfleet deliveries` as a shell calls them, with a real webhook worker."""

import re

import openai
import pytest
from fleet import until
from hook_worker import hook_worker
from live_api import running_api
from live_batches import jsonl, line, running_batches
from receivers import Receiver

CHAT = {"model": "paper", "messages": [{"role": "user", "content": "say hello"}]}


@pytest.fixture(scope="module")
def shared_api(session_redis, tmp_path_factory):
    with running_api(session_redis.url, webhook_allow_loopback=True) as api:
        log = tmp_path_factory.mktemp("hooks") / "hooks.log"
        with hook_worker(api.settings.redis_url, api.settings.namespace, log):
            yield api


@pytest.fixture
def receiver():
    with Receiver(200) as receiver:
        yield receiver


@pytest.fixture
def endpoint(run, receiver):
    """One of its own for each test, and its secret."""
    made = run("endpoints", "create", "ops", receiver.url, "--json").json
    yield made
    run("endpoints", "delete", made["id"])


def unwrapped(request, secret):
    with openai.OpenAI(api_key="none") as client:
        return client.webhooks.unwrap(request.body, request.headers, secret=secret)


def test_an_endpoint_is_made_tried_listed_changed_and_deleted(run, receiver):
    # Given a new endpoint, whose secret is shown this once
    ran = run("endpoints", "create", "ops", receiver.url, "--event", "job.failed", "--event", "job.completed")
    endpoint, secret = re.fullmatch(r"id\s+(we_\w+)\s+signing secret\s+(whsec_\S+)\s+", ran.out).groups()
    assert "note it now" in ran.err
    # when it is tried, then the receiver got what the secret signs
    assert run("endpoints", "test", endpoint).out == "the receiver answered 200\n"
    assert unwrapped(receiver.requests[0], secret).type == "job.completed"
    # and it is listed, shown without the secret, changed and deleted
    assert re.search(rf"{endpoint}\s+enabled\s+0\s+\w+\s+ops\s+{receiver.url}", run("endpoints", "list").out)
    assert secret not in run("endpoints", "show", endpoint, "--json").out
    changed = run("endpoints", "update", endpoint, "--name", "night", "--event", "job.failed", "--enable")
    assert re.search(r"name\s+night", changed.out) and re.search(r"events\s+job.failed\s", changed.out)
    assert run("endpoints", "delete", endpoint).out == f"{endpoint} deleted\n"
    assert run("endpoints", "show", endpoint).code == 4


def test_a_new_secret_signs_beside_the_old_one_or_in_its_place(run, receiver, endpoint):
    second = run("endpoints", "rotate", endpoint["id"], "--json").json["signing_secret"]
    run("endpoints", "test", endpoint["id"])
    for secret in (endpoint["signing_secret"], second):
        assert unwrapped(receiver.requests[-1], secret).type == "job.completed"

    third = run("endpoints", "rotate", endpoint["id"], "--drop-old", "--json").json["signing_secret"]
    run("endpoints", "test", endpoint["id"], "--event", "job.failed")
    assert unwrapped(receiver.requests[-1], third).type == "job.failed"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrapped(receiver.requests[-1], second)
    assert "whsec_" in run("endpoints", "rotate", "default").out


def test_deliveries_are_listed_shown_and_sent_again(run, http, receiver, endpoint):
    job = http.post("/v1/jobs", json={"body": CHAT}).json()["id"]
    until(lambda: receiver.requests)
    until(lambda: run("deliveries", "list", "--job", job, "--status", "delivered", "--json").json["data"])

    listed = run("deliveries", "list", "--endpoint", endpoint["id"]).out
    delivery = re.search(rf"(whd_\w+)\s+delivered\s+1\s+200\s+\w+\s+job.completed\s+{job}\s+{endpoint['id']}", listed)[
        1
    ]
    assert re.search(rf"webhook_endpoint_id\s+{endpoint['id']}", run("deliveries", "show", delivery).out)
    assert run("deliveries", "replay", delivery).out == f"{delivery} pending\n"
    until(lambda: len(receiver.requests) == 2)
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1


def test_the_end_of_a_batch_is_told_to_whom_its_command_names(run, api, receiver, endpoint, tmp_path):
    (tmp_path / "work.jsonl").write_bytes(jsonl([line("a"), line("b")]))
    with running_batches(api.settings, api.worker.ring):
        ran = run("batch", "run", "work.jsonl", "--webhook", endpoint["id"], "--json")
    until(lambda: receiver.requests)

    event = unwrapped(receiver.requests[0], endpoint["signing_secret"])
    assert (event.type, event.data.id, ran.code) == ("batch.completed", ran.json["id"], 0)
    assert re.search(rf"batch.completed\s+{event.data.id}", run("deliveries", "list", "--batch", event.data.id).out)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("endpoints", "show", "we_" + "0" * 32), 4, ["webhook_endpoint_not_found", "endpoints list"]),
        (("endpoints", "delete", "../jobs"), 4, ["webhook_endpoint_not_found"]),
        (("endpoints", "create", "ops", "ftp://x"), 1, ["url"]),
        (("endpoints", "create", "ops", "http://10.0.0.1/x"), 1, ["url_not_allowed"]),
        (("endpoints", "create", "ops", "https://x.example/", "--event", "job.dance"), 1, ["event_types"]),
        (("endpoints", "update", "we_" + "0" * 32), 2, ["--enable"]),
        (("deliveries", "show", "whd_" + "0" * 32), 4, ["webhook_delivery_not_found", "deliveries list"]),
        (("deliveries", "replay", "x/y"), 4, ["webhook_delivery_not_found"]),
        (("deliveries", "list", "--status", "lost"), 1, ["status"]),
    ],
)
def test_an_error_says_what_why_and_what_to_try(run, arguments, code, words):
    ran = run(*arguments)

    assert (ran.code, ran.out) == (code, "")
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.err


def test_a_receiver_that_is_not_there_is_told_with_where_to_look(run):
    with Receiver(200) as gone:
        pass
    made = run("endpoints", "create", "gone", gone.url, "--json").json["id"]
    ran = run("endpoints", "test", made)
    run("endpoints", "delete", made)

    assert ran.code == 1
    assert all(word in ran.err for word in ("webhook_receiver_failed", "deliveries list")), ran.err
