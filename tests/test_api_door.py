"""What the API refuses: every error typed, naming the field and the limit, in one shape and with a request id."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from live_api import LiveApi, running_api
from text_models import byte_level, write_folder

from inferfleet.engine.text.chat import ChatTemplate
from inferfleet.engine.text.tokenizer import Tokenizer
from inferfleet.tasks import names
from inferfleet.tasks.settings import ModelSpec

LIMIT = 64 * 1024
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    return write_folder(tmp_path_factory.mktemp("model"), byte_level(), config=config)


@pytest.fixture(scope="module")
def shared_api(session_redis, folder: Path) -> Iterator[LiveApi]:
    models = {
        "counted": ModelSpec(path=str(folder), max_model_len=100),
        "unserved": ModelSpec(path="/nowhere"),
        "odd": ModelSpec(path="/"),
    }
    with running_api(session_redis.url, max_body_bytes=LIMIT, max_queued=2, models=models) as api:
        yield api


def chat(**fields) -> dict:
    return {"model": "paper", "messages": [{"role": "user", "content": "say hi"}], **fields}


def post(http: httpx2.Client, raw: bytes, **headers: str) -> httpx2.Response:
    return http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json", **headers})


def refusal(answer: httpx2.Response) -> tuple[int, str, str | None]:
    """Status, code and param of an error, whose shape is checked on the way."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert answer.headers["x-request-id"]
    return answer.status_code, body["error"]["code"], body["error"]["param"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[" * 100_00,
        b'{"temperature": NaN}',
        b'{"temperature": 1e400}',
        b'{"temperature": Infinity}',
        b'\xef\xbb\xbf{"model": "paper"}',
        '{"model": "paper"}'.encode("utf-16"),
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
    ],
)
def test_what_is_not_json_is_invalid_json(http, raw):
    status, code, _ = refusal(post(http, raw))

    assert (status, code) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"n": True}, "n"),
        ({"n": 1_000_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"top_logprobs": 1000, "logprobs": True}, "top_logprobs"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pope", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages.0.content"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
        ({"priority": 101}, "priority"),
        ({"matformer_slice": ""}, "matformer_slice"),
        ({"matformer_slice": 4}, "matformer_slice"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(http, fields, param):
    status, _, found = refusal(post(http, json.dumps(chat(**fields)).encode()))

    assert (status, found) == (422, param)


def test_a_field_that_appears_twice_is_refused(http):
    raw = b'{"model": "paper", "model": "other", "messages": []}'

    assert refusal(post(http, raw)) == (422, "invalid_request", "model")


def test_the_sdk_raises_its_own_class_for_a_bad_field(api):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        api.sdk().chat.completions.create(**chat(temperature=3))

    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    assert caught.value.request_id


@pytest.mark.parametrize("model", ["nobody", "../../etc/passwd", "paper ", "x" * 256])
def test_an_unknown_model_is_not_found(api, model):
    with pytest.raises(openai.NotFoundError) as caught:
        api.sdk().chat.completions.create(**chat(model=model))

    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    2**64,
    10**90,
    "",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    {"type": "image_url"},
    float("nan"),
    "9" * 400,
]


def twisted(value: Any, rng: random.Random) -> Any:
    """A copy with one leaf, or one key, replaced by something odd."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value, "surprise"])
        return value | {key: twisted(value.get(key), rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], twisted(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_sent_is_answered_and_never_breaks_the_server(http, seed):
    rng = random.Random(seed)
    whole = chat(
        model="odd", n=2, stop=["a"], logit_bias={"1": 2}, metadata={"a": "b"}, stream_options=None, user="x", seed=1
    )
    for _ in range(150):
        raw = bytearray(json.dumps({"body": twisted(whole, rng), "priority": 1}).encode())
        if rng.random() < 0.3:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        answer = http.post("/v1/jobs", content=bytes(raw), headers={"content-type": "application/json"})
        if answer.status_code not in (202, 429):
            assert 400 <= refusal(answer)[0] < 500, bytes(raw)


# Bodies --------------------------------------------------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_is_refused(http):
    answer = post(http, b"x" * (LIMIT + 1))

    assert refusal(answer) == (413, "body_too_large", None)
    assert str(LIMIT) in answer.json()["error"]["message"]


def test_a_body_in_chunks_is_refused_when_it_crosses_the_limit(http):
    def chunks() -> Iterator[bytes]:
        for _ in range(2 * LIMIT // 1024):
            yield b"x" * 1024

    answer = http.post("/v1/chat/completions", content=chunks(), headers={"content-type": "application/json"})

    assert refusal(answer) == (413, "body_too_large", None)


def test_a_body_in_chunks_below_the_limit_is_read(http):
    raw = json.dumps(chat()).encode()
    parts = iter([raw[:10], raw[10:]])

    answer = http.post("/v1/chat/completions", content=parts, headers={"content-type": "application/json"})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    "media", ["text/plain", "", "application/json; charset=utf-16", "application/x-www-form-urlencoded"]
)
def test_a_body_that_is_not_json_by_its_header_is_refused(http, media):
    answer = http.post("/v1/chat/completions", content=json.dumps(chat()), headers={"content-type": media})

    assert refusal(answer) == (415, "unsupported_media_type", "Content-Type")


def test_a_compressed_body_is_refused(http):
    status, code, param = refusal(post(http, b"\x1f\x8b", **{"content-encoding": "gzip"}))

    assert (status, code, param) == (415, "unsupported_media_type", "Content-Encoding")


def test_an_unknown_route_and_a_wrong_method_have_the_same_shape(http):
    assert refusal(http.get("/v1/nothing")) == (404, "not_found", None)
    assert refusal(http.put("/v1/chat/completions")) == (405, "method_not_allowed", None)


@pytest.mark.parametrize(
    "path", ["jobs", "files", "batches", "dead_letters", "webhook_endpoints", "webhook_deliveries"]
)
def test_a_page_behind_what_is_no_id_is_not_found_by_the_parameter_s_name(http, path):
    status, _, param = refusal(http.get(f"/v1/{path}?after=x"))
    assert (status, param) == (404, "after")


def test_a_callers_request_id_comes_back_if_it_is_harmless(http):
    kept = http.get("/v1/nothing", headers={"x-request-id": "trace-1"})
    replaced = http.get("/v1/nothing", headers={"x-request-id": "a b\tc"})

    assert kept.headers["x-request-id"] == "trace-1"
    assert replaced.headers["x-request-id"].startswith("req_")


# Length --------------------------------------------------------------------------------------------------------------


def prompt_tokens(folder: Path, content: str) -> int:
    tokenizer = Tokenizer(folder)
    template = ChatTemplate.load(tokenizer)
    assert template is not None
    rendered = template.render([{"role": "user", "content": content}])
    return len(tokenizer.encode_rendered(rendered.text, rendered.plain))


def test_a_prompt_is_counted_at_the_door_to_the_token(http, folder):
    # Given a model of 100 tokens whose folder is here, and a prompt that leaves exactly `room` for the answer,
    content = "hello world " * 10
    count = prompt_tokens(folder, content)
    asked = {"model": "counted", "messages": [{"role": "user", "content": content}]}

    # when just as many are asked for, the job is accepted; with one more it is refused by name, limit and count.
    fits = post(http, json.dumps(asked | {"max_tokens": 100 - count}).encode(), prefer="respond-async")
    over = post(http, json.dumps(asked | {"max_tokens": 101 - count}).encode(), prefer="respond-async")

    assert fits.status_code == 202
    assert refusal(over) == (422, "context_length_exceeded", "max_tokens")
    assert all(str(number) in over.json()["error"]["message"] for number in (count, 101 - count, 100))


def test_a_prompt_that_fills_the_context_alone_is_refused_by_its_messages(http):
    asked = chat(model="counted", messages=[{"role": "user", "content": "hello world " * 100}])
    answer = post(http, json.dumps(asked).encode())

    assert refusal(answer) == (422, "context_length_exceeded", "messages")
    assert "100" in answer.json()["error"]["message"]


def test_a_prompt_too_long_by_its_bytes_is_refused_without_the_tokenizer(http):
    # `paper` has no folder here; its card says 4096 tokens of at most 8 bytes.
    answer = post(http, json.dumps(chat(messages=[{"role": "user", "content": "x" * 4096 * 8}])).encode())

    assert refusal(answer) == (422, "context_length_exceeded", "messages")


def test_max_tokens_beyond_the_context_is_refused(http):
    answer = post(http, json.dumps(chat(max_tokens=4096)).encode())

    assert refusal(answer) == (422, "context_length_exceeded", "max_tokens")


# Load ----------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_429_and_says_when_to_come_back(api, http):
    api.worker.paused = True
    model = {"model": "unserved", "messages": chat()["messages"]}
    for _ in range(2):
        assert post(http, json.dumps(model).encode(), prefer="respond-async").status_code == 202

    answer = post(http, json.dumps(model).encode(), prefer="respond-async")

    assert refusal(answer)[:2] == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert int(answer.headers["retry-after-ms"]) >= 800


def test_the_door_of_jobs_is_the_same_door(http):
    bad = http.post("/v1/jobs", json={"body": chat(temperature=3)})
    unknown = http.post("/v1/jobs", json={"body": chat(), "colour": "red"})
    other = http.put(f"/v1/jobs/{names.new_job_id()}", json={"body": chat(model="nobody")})

    assert refusal(bad) == (422, "invalid_request", "body.temperature")
    assert refusal(unknown) == (422, "invalid_request", "colour")
    assert refusal(other) == (404, "model_not_found", "model")
