"""One attempt against receivers of every kind, and the signatures that the field's libraries accept."""

import json
import ssl
import time
import tracemalloc

import openai
import pytest
import receivers
from openai import InvalidWebhookSignatureError
from receivers import CERTIFICATES, Receiver, answer
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from inferfleet.tasks.webhooks import new_secret
from inferfleet.workers.webhooks.guard import Policy
from inferfleet.workers.webhooks.sender import KEPT_ANSWER_BYTES, Sender
from inferfleet.workers.webhooks.signing import signed_headers

OPEN = Policy(loopback=True)


def post(receiver, seconds=5.0, **options):
    return Sender(OPEN, seconds=seconds, **options).post(receiver.url, {"webhook-id": "evt_1"}, b'{"a":1}')


def test_a_receiver_gets_the_bytes_and_the_headers():
    with Receiver(answer(204)) as receiver:
        assert post(receiver).status == 204
    [request] = receiver.requests
    assert request.line == "POST /hook HTTP/1.1"
    assert request.body == b'{"a":1}'
    wanted = {"content-type": "application/json", "accept-encoding": "identity", "connection": "close",
              "webhook-id": "evt_1", "host": f"127.0.0.1:{receiver.port}"}  # fmt: skip
    assert wanted.items() <= request.headers.items()


@pytest.mark.parametrize("status", [200, 201, 299, 400, 401, 404, 410, 429, 500, 503])
def test_a_status_is_an_answer(status):
    with Receiver(answer(status, body=b"thanks")) as receiver:
        got = post(receiver)
    assert (got.status, got.error, got.text) == (status, None, "thanks")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_is_not_followed(status):
    with Receiver() as other, Receiver(answer(status, f"location: {other.url}\r\n")) as receiver:
        assert post(receiver).status == status
    assert (receiver.connections, other.connections) == (1, 0)


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (receivers.reset, "connection_lost"),
        (receivers.silence, "timeout"),
        (receivers.drip, "timeout"),
        (receivers.endless_hints, "timeout"),
        (receivers.nonsense, "not_http"),
        (receivers.endless_headers, "not_http"),
    ],
)
def test_a_receiver_that_gives_no_answer_costs_the_attempt_its_time_at_most(behaviour, error):
    started = time.monotonic()
    with Receiver(behaviour) as receiver:
        got = post(receiver, seconds=0.5)
    assert (got.status, got.error) == (None, error)
    assert time.monotonic() - started < 2


def test_nobody_listening_is_a_refused_connection():
    with Receiver() as receiver:
        pass
    assert post(receiver).error == "connection_refused"


@pytest.mark.parametrize("behaviour", [receivers.endless_body, receivers.gzip_bomb, receivers.dripping_body])
def test_a_body_without_an_end_changes_no_status_and_takes_no_memory(behaviour):
    assert len(receivers.bomb()) < 4096
    tracemalloc.start()
    with Receiver(behaviour) as receiver:
        got = post(receiver, seconds=0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (got.status, got.error) == (200, None)
    assert len(got.text) <= KEPT_ANSWER_BYTES
    assert peak < 2 << 20


def test_of_an_answer_one_kilobyte_is_kept_and_a_coded_one_not_at_all():
    with Receiver(answer(500, body=b"\xff" + b"x" * 5000), receivers.gzip_bomb) as receiver:
        assert post(receiver).text == "\ufffd" + "x" * 1023
        assert post(receiver).text == ""


# TLS -----------------------------------------------------------------------------------------------------------------


def over_tls(receiver, host="receiver.example", seconds=5):
    trust = ssl.create_default_context(cafile=CERTIFICATES / "ca.pem")
    sender = Sender(OPEN, resolver=lambda *_: ["127.0.0.1"], ssl_context=trust, seconds=seconds)
    return sender.post(f"https://{host}:{receiver.port}/hook", {}, b"{}")


def test_the_certificate_is_asked_for_the_name_and_not_for_the_address():
    with Receiver(certificate="good.pem") as receiver:
        assert over_tls(receiver).status == 200
    assert receiver.requests[0].headers["host"] == f"receiver.example:{receiver.port}"


@pytest.mark.parametrize(("certificate", "host"), [("expired.pem", "receiver.example"), ("good.pem", "other.example")])
def test_a_certificate_that_is_over_or_of_another_name_fails(certificate, host):
    with Receiver(certificate=certificate) as receiver:
        got = over_tls(receiver, host)
    assert (got.status, got.error) == (None, "tls_failed")
    assert receiver.requests == []


def test_a_certificate_that_nobody_vouches_for_fails():
    with Receiver(certificate="good.pem") as receiver:
        sender = Sender(OPEN, resolver=lambda *_: ["127.0.0.1"])
        assert sender.post(f"https://receiver.example:{receiver.port}/", {}, b"{}").error == "tls_failed"


def test_a_receiver_that_speaks_no_tls_fails():
    with Receiver() as receiver:
        assert over_tls(receiver, seconds=0.3).error == "timeout"  # it waits for a request and the TLS hello is none


# Signatures ----------------------------------------------------------------------------------------------------------

BODY = json.dumps(
    {"id": "evt_1", "object": "event", "type": "job.completed", "created_at": 1, "data": {"id": "job_1"}}
).encode()


def test_the_libraries_of_the_field_accept_a_signature():
    secret, now = new_secret(), int(time.time())
    headers = signed_headers("evt_1", now, BODY, [secret])
    assert Webhook(secret).verify(BODY, headers)["type"] == "job.completed"
    with openai.OpenAI(api_key="none", webhook_secret=secret) as client:
        event = client.webhooks.unwrap(BODY, headers)
    assert (event.type, event.data.id) == ("job.completed", "job_1")


def test_while_a_secret_rotates_both_are_accepted():
    old, new = new_secret(), new_secret()
    headers = signed_headers("evt_1", int(time.time()), BODY, [new, old])
    for secret in (old, new):
        Webhook(secret).verify(BODY, headers)
        with openai.OpenAI(api_key="none") as client:
            client.webhooks.verify_signature(BODY, headers, secret=secret)


@pytest.mark.parametrize("change", ["body", "id", "timestamp", "secret"])
def test_whatever_is_changed_the_signature_is_refused(change):
    secret, now = new_secret(), int(time.time())
    headers, body = signed_headers("evt_1", now, BODY, [secret]), BODY
    if change == "body":
        body = BODY.replace(b"job_1", b"job_2")
    elif change == "id":
        headers["webhook-id"] = "evt_2"
    elif change == "timestamp":
        headers["webhook-timestamp"] = str(now + 1)
    else:
        secret = new_secret()
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(body, headers)
    with openai.OpenAI(api_key="none") as client, pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=secret)


def test_a_secret_holds_256_random_bits():
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(secret.startswith("whsec_") and len(secret) == 6 + 44 for secret in secrets)
