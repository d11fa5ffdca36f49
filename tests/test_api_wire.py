"""What comes over a socket and is no request, or not in time: refused in the shape of all errors, and the connection
closed. httpx2 would not send any of it, so these tests write bytes."""

import json
import socket
import time
from collections.abc import Iterator

import pytest
from live_api import LiveApi, running_api

from inferfleet.workers.api.protocol import MAX_HEAD_BYTES

PATIENCE = 0.6
POST = b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url, read_timeout_seconds=PATIENCE) as api:
        yield api


def connect(api: LiveApi) -> socket.socket:
    host, _, port = api.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(10)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes, or resets because we were still sending."""
    told = b""
    try:
        while part := connection.recv(65536):
            told += part
    except ConnectionResetError:
        pass
    return told


def told(api: LiveApi, first: bytes, more: bytes = b"", times: int = 0) -> bytes:
    """The answer to `first` and then `times` times `more`."""
    with connect(api) as connection:
        try:
            connection.sendall(first)
            for _ in range(times):
                connection.sendall(more)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return rest(connection)


def refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"x-request-id: req_" in head
    assert b"connection: close" in head
    return int(head.split()[1]), error["code"]


@pytest.mark.parametrize(
    "raw",
    [
        b"good morning\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT inside:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx\0y: z\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx: y\r\n folded: z\r\n\r\n",
        POST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: 99999999999999999999999\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}",
        POST + b"transfer-encoding: gzip\r\n\r\n{}",
    ],
)
def test_what_is_no_request_is_invalid_http(api, raw):
    assert refusal(told(api, raw)) == (400, "invalid_http")


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (b"GET /", b"a" * 10_000),
        (b"GET /health HTTP/1.1\r\nx: ", b"a" * 10_000),
        (b"GET /health HTTP/1.1\r\n", b"x: y\r\n" * 1000),
        (POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nx: ", b"a" * 10_000),
        (POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"x: y\r\n" * 1000),
        (POST + b"transfer-encoding: chunked\r\n\r\n1;", b"a" * 10_000),
    ],
    ids=["url", "header", "headers", "trailer", "trailers", "chunk extension"],
)
def test_a_head_without_an_end_is_cut_at_the_limit(api, first, more):
    answer = told(api, first, more, times=40)

    assert refusal(answer) == (431, "headers_too_large")
    assert str(MAX_HEAD_BYTES).encode() in answer


def test_a_head_that_does_not_end_in_time_is_refused(api):
    started = time.monotonic()
    answer = told(api, b"GET /health HTTP/1.1\r\nhost: x\r\nx:")

    assert refusal(answer) == (408, "request_timeout")
    assert PATIENCE * 0.9 < time.monotonic() - started < PATIENCE + 5


def test_a_connection_on_which_nothing_is_asked_is_closed(api):
    assert told(api, b"") == b""


def test_a_body_that_stops_is_refused_and_one_that_goes_on_slowly_is_read(api):
    # Given a body that stays away, and another whose three parts take longer than the patience for one,
    stopped = told(api, POST + b"content-length: 2\r\n\r\n{")
    with connect(api) as connection:
        connection.sendall(POST + b"content-length: 3072\r\nconnection: close\r\n\r\n")
        for _ in range(3):
            time.sleep(PATIENCE * 0.5)
            connection.sendall(b" " * 1024)
        slow = rest(connection)

    # then the first is told to hurry, and the second that it is no JSON.
    assert refusal(stopped) == (408, "request_timeout")
    assert b"read_timeout_seconds" in stopped
    assert refusal(slow) == (400, "invalid_json")


def test_a_body_that_drips_is_refused_although_it_never_stops(api):
    with connect(api) as connection:
        connection.sendall(POST + b"content-length: 100\r\n\r\n")
        for _ in range(20):
            time.sleep(PATIENCE / 6)
            try:
                connection.sendall(b" ")
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            raise AssertionError("the server read on")


def test_a_slow_client_waits_for_its_answer_as_long_as_it_takes(api):
    # Given a request that was sent at once, then an answer that comes after the patience is over is not cut off.
    api.worker.paused = True
    body = b'{"body": {"model": "paper", "messages": [{"role": "user", "content": "x"}]}}'
    prefer = b"prefer: wait=1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)

    assert told(api, POST + prefer + body).startswith(b"HTTP/1.1 202")


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_crash(api, http, capfd):
    with connect(api) as connection:
        connection.sendall(POST + b"content-length: 100\r\n\r\n{")
        time.sleep(0.1)
    time.sleep(0.2)

    assert 'status="499"' in http.get("/metrics").text
    assert "request_crashed" not in capfd.readouterr().out


def test_a_method_that_a_path_does_not_know_is_told_all_that_it_knows(http):
    answer = http.request("OPTIONS", "/v1/jobs/job_0")

    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, PATCH, PUT"


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "PUT", "PATCH", "DELETE"])
def test_the_lookup_of_keys_is_no_job_of_that_id(http, method):
    answer = http.request(method, "/v1/jobs/lookup", json={"idempotency_keys": ["k"]})

    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert http.get("/v1/jobs/lookup/result").json()["error"]["code"] == "job_not_found"
