"""/v1/responses as the OpenAI SDK, unchanged, uses it: at once, streamed, in the background."""

import json
from collections.abc import Iterator

import httpx2
import openai
import pytest
from fleet import until
from live_api import LiveApi, running_api, serving

from inferfleet.tasks import names

URL = "/v1/responses"


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url, served=("paper", "flux")) as api:
        yield api


def refusal(answer: httpx2.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


# At once -------------------------------------------------------------------------------------------------------------


def test_an_input_is_answered_with_all_that_the_sdk_reads(api):
    done = api.sdk().responses.create(
        model="paper", input="say hello there", instructions="Be brief.", metadata={"team": "a"}, temperature=0.5
    )

    assert (done.status, done.output_text, done.object) == ("completed", "hello there", "response")
    assert done.id.startswith("resp_")
    assert (done.output[0].type, done.output[0].role, done.output[0].status) == ("message", "assistant", "completed")
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (3, 2, 5)
    assert (done.instructions, done.metadata, done.temperature) == ("Be brief.", {"team": "a"}, 0.5)
    assert (done.background, done.error, done.incomplete_details) == (False, None, None)
    assert done.completed_at >= done.created_at
    assert api.sdk().responses.retrieve(done.id) == done


def test_a_dialogue_goes_on_with_the_output_of_the_response_before(api):
    first = api.sdk().responses.create(model="paper", input="say one")
    dialogue = [{"role": "user", "content": "say one"}, *first.output, {"role": "user", "content": "say two"}]

    second = api.sdk().responses.create(model="paper", input=dialogue)
    items = api.sdk().responses.input_items.list(second.id, order="asc").data

    assert second.output_text == "two"
    assert [(item.role, item.content[0].type, item.content[0].text) for item in items] == [
        ("user", "input_text", "say one"),
        ("assistant", "output_text", "one"),
        ("user", "input_text", "say two"),
    ]
    assert items[1].id == first.output[0].id


def test_an_answer_that_was_cut_is_incomplete_and_says_why(api, http):
    done = api.sdk().responses.create(model="paper", input="say one two", max_output_tokens=2)

    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (done.output_text, done.output[0].status) == ("one two", "incomplete")
    assert http.get(f"/v1/jobs/{names.job_of_response(done.id)}").json()["status"] == "incomplete"


def test_a_response_that_fails_is_the_error_of_its_code(api):
    with pytest.raises(openai.InternalServerError) as caught:
        api.sdk().responses.create(model="paper", input="fail engine_error")

    assert caught.value.code == "engine_error"


def test_a_client_that_leaves_cancels_its_response(api):
    with pytest.raises(openai.APITimeoutError):
        api.sdk().with_options(timeout=0.5).responses.create(model="paper", input="hold on")

    assert api.worker.cancel_seen.wait(10)


def test_what_was_not_to_be_stored_is_gone_once_it_was_answered(api):
    whole = api.sdk().responses.create(model="paper", input="say hi", store=False)
    streamed = list(api.sdk().responses.create(model="paper", input="say hi", store=False, stream=True))

    assert (whole.output_text, streamed[-1].response.output_text) == ("hi", "hi")
    for response_id in (whole.id, streamed[-1].response.id):
        with pytest.raises(openai.NotFoundError) as caught:
            api.sdk().responses.retrieve(response_id)
        assert caught.value.code == "response_not_found"


# Streams -------------------------------------------------------------------------------------------------------------

WHOLE = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def test_a_stream_tells_the_whole_story_with_growing_numbers(api):
    events = list(api.sdk().responses.create(model="paper", input="say one two", stream=True))

    assert [event.type for event in events] == WHOLE
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "one two"
    assert events[6].text == events[7].part.text == events[8].item.content[0].text == "one two"
    assert events[-1].response.output_text == "one two"
    assert {event.response.id for event in (events[0], events[-1])} == {events[0].response.id}


def test_the_sdks_own_stream_helper_ends_with_the_response(api):
    with api.sdk().responses.stream(model="paper", input="say one two") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()

    assert (text, final.output_text, final.status) == ("one two", "one two", "completed")


def test_a_stream_that_fails_says_so_as_its_last_event(api):
    events = list(api.sdk().responses.create(model="paper", input="fail engine_error", stream=True))

    assert [event.type for event in events][-1] == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.code) == ("failed", "server_error")
    assert events[-1].response.error.type == "engine_error"


def test_a_client_that_leaves_a_stream_cancels_its_response(api):
    stream = api.sdk().responses.create(model="paper", input="hold on", stream=True)
    assert [next(stream).type, next(stream).type] == ["response.created", "response.in_progress"]

    stream.close()

    assert api.worker.cancel_seen.wait(10)


# Background ----------------------------------------------------------------------------------------------------------


def test_in_the_background_it_is_queued_and_then_there(api):
    api.worker.paused = True
    queued = api.sdk().responses.create(model="paper", input="say hello", background=True)
    waiting = api.sdk().responses.retrieve(queued.id)
    api.worker.paused = False
    api.worker.ring("paper", 1)
    done = until(lambda: (one := api.sdk().responses.retrieve(queued.id)).status == "completed" and one)

    assert (queued.status, queued.output, queued.background) == ("queued", [], True)
    assert waiting.status == "queued"
    assert done.output_text == "hello"
    assert done.created_at == queued.created_at


def test_a_stream_in_the_background_goes_on_behind_any_of_its_numbers(api):
    first = api.sdk().responses.create(model="paper", input="say one two", background=True, stream=True)
    seen = [next(first) for _ in range(3)]
    first.close()
    events = seen + list(first_again(api, seen[0].response.id, seen[-1].sequence_number))

    assert [event.type for event in events] == [WHOLE[0], "response.queued", *WHOLE[1:]]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert not api.worker.cancelled
    whole = list(first_again(api, seen[0].response.id, -1))
    for place in range(len(whole)):
        assert list(first_again(api, seen[0].response.id, place)) == whole[place + 1 :]


def first_again(api: LiveApi, response_id: str, after: int):
    options = {} if after < 0 else {"starting_after": after}
    return api.sdk().responses.retrieve(response_id, stream=True, **options)


def test_two_readers_and_another_api_process_see_the_same_numbers(api, http):
    response = api.sdk().responses.create(model="paper", input="hold one two", background=True)
    until(lambda: len(api.worker.ledger.events(names.job_of_response(response.id))) >= 4)
    with serving(api.settings, api.worker.ring) as (second, clients, _):
        other = clients.enter_context(openai.OpenAI(base_url=f"{second}/v1", api_key="none"))
        streams = [first_again(api, response.id, -1), other.responses.retrieve(response.id, stream=True)]
        heads = [[next(stream) for _ in range(6)] for stream in streams]
        api.sdk().responses.cancel(response.id)
        tails = [list(stream) for stream in streams]

    assert heads[0] == heads[1]
    assert tails[0] == tails[1]
    assert tails[0][-1].type == "response.cancelled"


def test_a_running_response_is_cancelled_and_cancelling_again_changes_nothing(api):
    response = api.sdk().responses.create(model="paper", input="hold one", background=True)
    until(lambda: len(api.worker.ledger.events(names.job_of_response(response.id))) >= 3)

    cancelled = api.sdk().responses.cancel(response.id)
    again = api.sdk().responses.cancel(response.id)

    assert (cancelled.status, cancelled.error, cancelled.output) == ("cancelled", None, [])
    assert again == cancelled
    assert api.worker.cancel_seen.wait(10)


def test_a_failed_response_in_the_background_holds_its_error(api):
    response = api.sdk().responses.create(model="paper", input="fail out_of_memory", background=True)
    failed = until(lambda: (one := api.sdk().responses.retrieve(response.id)).status == "failed" and one)

    assert (failed.error.code, failed.error.type, failed.error.message) == ("server_error", "out_of_memory", "it broke")


def test_only_what_is_in_the_background_can_be_cancelled_and_only_what_has_ended_deleted(api, http):
    done = api.sdk().responses.create(model="paper", input="say hi")
    api.worker.paused = True
    waiting = api.sdk().responses.create(model="paper", input="say hi", background=True)

    assert refusal(http.post(f"{URL}/{done.id}/cancel")) == (422, "invalid_request", "response_id")
    assert refusal(http.delete(f"{URL}/{waiting.id}"))[:2] == (409, "not_terminal")
    api.sdk().responses.delete(done.id)
    assert refusal(http.get(f"{URL}/{done.id}")) == (404, "response_not_found", "response_id")


def test_a_repeat_of_the_sdk_finds_the_response_of_its_first_try(api, http):
    api.worker.paused = True
    body = {"model": "paper", "input": f"say {names.new_job_id()}", "background": True}

    first = http.post(URL, json=body, headers={"x-stainless-retry-count": "0"})
    again = http.post(URL, json=body, headers={"x-stainless-retry-count": "1"})

    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"


def test_a_response_is_a_job_and_a_job_of_another_route_is_no_response(api, http):
    response = api.sdk().responses.create(model="paper", input="say hi", background=True)
    job = http.get(f"/v1/jobs/{names.job_of_response(response.id)}", params={"wait": 20}).json()
    chat = {"model": "paper", "messages": [{"role": "user", "content": "say hi"}]}
    other = http.post("/v1/jobs", json={"body": chat}).json()["id"]

    assert (job["endpoint"], job["response"]["body"]["output"][0]["content"][0]["text"]) == (URL, "hi")
    assert refusal(http.get(f"{URL}/{names.response_id(other)}"))[0] == 404
    line = {"url": URL, "body": {"model": "paper", "input": "say ho"}}
    made = http.post("/v1/jobs", json=line, headers={"prefer": "wait=20"}).json()
    assert http.get(made["urls"]["result"]).json()["object"] == "response"


def test_input_items_come_in_pages_from_the_last(api):
    dialogue = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"say {n}"} for n in range(5)]
    done = api.sdk().responses.create(model="paper", input=dialogue)

    pages = api.sdk().responses.input_items.list(done.id, limit=2)
    texts = [item.content[0].text for item in pages]

    assert texts == [f"say {n}" for n in (4, 3, 2, 1, 0)]
    assert [item.content[0].text for item in api.sdk().responses.input_items.list(done.id, limit=2).data] == [
        "say 4",
        "say 3",
    ]


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": ""}, "invalid_request", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": 3}, "invalid_request", "input"),
        ({"input": [{"role": "pope", "content": "x"}]}, "invalid_request", "input.0.role"),
        ({"input": [{"role": "user"}]}, "invalid_request", "input.0.content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "unsupported_feature", "input.0"),
        ({"input": [{"type": 5, "role": "user", "content": "x"}]}, "invalid_request", "input.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "unsupported_feature",
            "input.0.content.0",
        ),
        ({"input": "x" * 4096 * 8}, "context_length_exceeded", "input"),
        ({"max_output_tokens": 4096}, "context_length_exceeded", "max_output_tokens"),
        ({"max_output_tokens": 0}, "invalid_request", "max_output_tokens"),
        ({"max_output_tokens": 2, "min_tokens": 3}, "invalid_request", "min_tokens"),
        ({"logit_bias": {"x": 1}}, "invalid_request", "logit_bias"),
        ({"stop_token_ids": [1000]}, "invalid_request", "stop_token_ids"),
        ({"temperature": 3}, "invalid_request", "temperature"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_feature", "tools"),
        ({"tool_choice": "required"}, "unsupported_feature", "tool_choice"),
        ({"reasoning": {"effort": "low"}}, "unsupported_feature", "reasoning"),
        ({"previous_response_id": "resp_1"}, "unsupported_feature", "previous_response_id"),
        ({"include": ["message.output_text.logprobs"]}, "unsupported_feature", "include"),
        ({"text": {"format": {"type": "json_object"}}}, "unsupported_feature", "text.format"),
        ({"truncation": "auto"}, "unsupported_feature", "truncation"),
        ({"background": True, "store": False}, "invalid_request", "store"),
        ({"stream_options": {"include_obfuscation": False}}, "invalid_request", "stream_options"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"model": "nobody"}, "model_not_found", "model"),
        ({"model": "flux"}, "invalid_request", "model"),
    ],
)
def test_a_wrong_field_is_refused_by_its_own_name(http, fields, code, param):
    answer = http.post(URL, json={"model": "paper", "input": "say hi", **fields})

    status, found_code, found = refusal(answer)
    assert (status, found_code, found) == (404 if code == "model_not_found" else 422, code, param), answer.text


@pytest.mark.parametrize("name", ["resp_1", "resp_" + "0" * 32, "job_" + "0" * 32, "..%2f..%2fetc"])
def test_an_unknown_response_is_not_found_whatever_its_name(http, name):
    for answer in (
        http.get(f"{URL}/{name}"),
        http.get(f"{URL}/{name}", params={"stream": "true"}),
        http.get(f"{URL}/{name}/input_items"),
        http.post(f"{URL}/{name}/cancel"),
        http.delete(f"{URL}/{name}"),
    ):
        assert answer.status_code == 404


@pytest.mark.parametrize("query", ["order=up", "limit=0", "limit=101", "after=nothing"])
def test_a_wrong_page_is_refused_by_name(api, http, query):
    done = api.sdk().responses.create(model="paper", input="say hi")

    assert refusal(http.get(f"{URL}/{done.id}/input_items?{query}"))[::2] == (422, query.partition("=")[0])


def test_harmless_fields_of_the_sdk_pass(http):
    harmless = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "include": [], "reasoning": None,
                "truncation": "disabled", "top_logprobs": 0, "prompt_cache_key": "x", "safety_identifier": "y",
                "text": {"format": {"type": "text"}}, "service_tier": "flex"}  # fmt: skip
    answer = http.post(URL, json={"model": "paper", "input": "say hi", **harmless})

    assert answer.status_code == 200, answer.text
    assert answer.json()["service_tier"] == "flex"
    job = http.get(f"/v1/jobs/{names.job_of_response(answer.json()['id'])}").json()
    assert job["priority"] == 50


def test_the_events_on_the_wire_are_named(http):
    with http.stream("POST", URL, json={"model": "paper", "input": "say hi", "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]

    assert lines[0] == "event: response.created"
    assert json.loads(lines[-1].removeprefix("data: "))["type"] == "response.completed"
