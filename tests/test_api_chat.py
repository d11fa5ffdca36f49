"""The chat route as the OpenAI SDK, unchanged, uses it."""

import concurrent.futures
from collections.abc import Iterator

import httpx2
import openai
import pytest
import redis
from live_api import LiveApi, running_api


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url) as api:
        yield api


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_question_is_answered(api):
    done = api.sdk().chat.completions.create(model="paper", messages=say("say hello there"))

    assert done.choices[0].message.content == "hello there"
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.total_tokens == 5
    assert done.id.startswith("chatcmpl-")


def test_a_stream_brings_the_role_the_words_and_the_end_in_order(api):
    chunks = list(api.sdk().chat.completions.create(model="paper", messages=say("say one two"), stream=True))

    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "one", " two", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_the_usage_when_asked(api):
    chunks = list(
        api.sdk().chat.completions.create(
            model="paper", messages=say("say one two"), stream=True, stream_options={"include_usage": True}
        )
    )

    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_on_the_wire_is_what_openai_sends(api):
    body = {"model": "paper", "messages": say("say hi"), "stream": True}
    with api.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_logprobs_come_in_the_answer_and_in_the_chunks(api):
    asked = {"model": "paper", "messages": say("say a b"), "logprobs": True, "top_logprobs": 1}
    whole = api.sdk().chat.completions.create(**asked)
    chunks = list(api.sdk().chat.completions.create(**asked, stream=True))

    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == ["a", " b"]
    assert streamed == whole.choices[0].logprobs.content
    assert streamed[0].top_logprobs[0].logprob == -0.5


def test_every_one_of_n_choices_is_streamed_and_finished(api):
    chunks = list(api.sdk().chat.completions.create(model="paper", messages=say("say x y"), n=3, stream=True))

    for index in range(3):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == "x y"
        assert [choice.finish_reason for choice in own].count("stop") == 1


def test_a_job_that_fails_before_its_first_word_is_an_http_error_for_a_stream_too(api):
    with pytest.raises(openai.InternalServerError) as caught:
        api.sdk().chat.completions.create(model="paper", messages=say("fail engine_error"), stream=True)

    assert caught.value.code == "engine_error"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_job_that_fails_is_the_error_of_its_code(api):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        api.sdk().chat.completions.create(model="paper", messages=say("fail context_length_exceeded"))

    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_leaves_a_stream_cancels_its_job(api):
    stream = api.sdk().chat.completions.create(model="paper", messages=say("hold on"), stream=True)
    assert next(stream).choices[0].delta.role == "assistant"

    stream.close()

    assert api.worker.cancel_seen.wait(10)


def test_a_client_that_leaves_a_waiting_request_cancels_its_job(api):
    with pytest.raises(openai.APITimeoutError):
        api.sdk().with_options(timeout=0.5).chat.completions.create(model="paper", messages=say("hold on"))

    assert api.worker.cancel_seen.wait(10)


def test_a_client_that_named_an_idempotency_key_may_leave_and_come_back(api):
    asked = {"model": "paper", "messages": say("hold on"), "extra_headers": {"Idempotency-Key": "mine"}}
    with pytest.raises(openai.APITimeoutError):
        api.sdk().with_options(timeout=0.5).chat.completions.create(**asked)

    asked["extra_headers"]["Prefer"] = "respond-async"
    again = api.sdk().chat.completions.with_raw_response.create(**asked)

    assert again.status_code == 202
    assert again.headers["idempotency-replayed"] == "true"
    assert again.http_response.json()["status"] == "in_progress"


def test_a_stream_that_is_asked_for_again_by_its_key_is_the_same_stream(api):
    asked = {"model": "paper", "messages": say("say one two"), "stream": True}
    asked["extra_headers"] = {"Idempotency-Key": "a stream of mine"}

    first = [chunk.choices[0] for chunk in api.sdk().chat.completions.create(**asked)]
    again = api.sdk().chat.completions.with_raw_response.create(**asked)

    assert again.headers["idempotency-replayed"] == "true"
    assert [chunk.choices[0] for chunk in again.parse()] == first


def test_respond_async_gives_the_job_even_if_it_has_ended_by_then(api):
    body = {"model": "paper", "messages": say("say hello")}
    with api.http() as http:
        first = http.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": "done"})
        headers = {"Idempotency-Key": "done", "Prefer": "respond-async"}
        again = http.post("/v1/chat/completions", json=body, headers=headers)

    assert (first.json()["object"], again.status_code) == ("chat.completion", 202)
    assert (again.json()["object"], again.json()["status"]) == ("job", "completed")


def test_respond_async_gives_the_job_at_once(api):
    api.worker.paused = True
    body = {"model": "paper", "messages": say("say later")}
    with api.http() as http:
        answer = http.post("/v1/chat/completions", json=body, headers={"Prefer": "respond-async"})

    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["object"], job["status"]) == ("job", "queued")


def test_prefer_wait_gives_the_answer_if_it_comes_in_time_and_else_the_job(api):
    with api.http() as http:
        quick = http.post(
            "/v1/chat/completions", json={"model": "paper", "messages": say("say now")}, headers={"Prefer": "wait=20"}
        )
        slow = http.post(
            "/v1/chat/completions", json={"model": "paper", "messages": say("hold on")}, headers={"Prefer": "wait=1"}
        )

    assert (quick.status_code, quick.json()["object"]) == (200, "chat.completion")
    assert (slow.status_code, slow.json()["status"]) == (202, "in_progress")


@pytest.mark.parametrize("value", ["wait=61", "wait=-1", "wait=soon"])
def test_a_wait_beyond_its_limit_is_refused_by_name(api, value):
    with api.http() as http:
        answer = http.post(
            "/v1/chat/completions", json={"model": "paper", "messages": say("say no")}, headers={"Prefer": value}
        )

    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "Prefer"
    assert "60" in answer.json()["error"]["message"]


def test_many_waiters_share_one_connection_to_the_events(api, session_redis):
    # Given 100 requests that wait in one process, when they are all under way, then Redis sees one blocked client.
    def ask(http: httpx2.Client, number: int) -> str:
        body = {"model": "paper", "messages": say(f"say {number}")}
        return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    api.worker.paused = True
    pool = concurrent.futures.ThreadPoolExecutor(100)
    with pool, redis.Redis(port=session_redis.port) as probe, api.http(limits=httpx2.Limits()) as http:
        answers = [pool.submit(ask, http, number) for number in range(100)]
        while api.worker.ledger.stats().get("paper", {}).get("waiting", 0) < 100:
            concurrent.futures.wait(answers, timeout=0.05)
        blocked = probe.info("clients")["blocked_clients"]
        clients = probe.info("clients")["connected_clients"]
        api.worker.paused = False
        api.worker.ring("paper", 1)
        assert [answer.result() for answer in answers] == [str(number) for number in range(100)]

    assert blocked == 1
    assert clients < 100
