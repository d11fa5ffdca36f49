"""The OpenAI SDK, unchanged, against a whole fleet as `inferfleet up --demo` starts it: API, worker with the shipped
models, batches and webhooks, each a process of its own."""

import asyncio
import base64

import httpx2
import openai
import pytest
from chaosproxy import ChaosProxy
from fleet import until
from live_batches import jsonl, line, read_lines, start, wait_for_end
from live_up import Up, running_up
from openai.types import webhooks as events
from receivers import Receiver

from inferfleet.tasks.picture_header import read_header

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
CIRCLE = {"model": "demo-image", "prompt": "a red circle on a blue background", "size": "128x128"}
CHAT, IMAGES, RESPONSES = "/v1/chat/completions", "/v1/images/generations", "/v1/responses"
#: Written on past its end, so that something can happen meanwhile.
LONG = {"model": "demo", "input": "Spell the word queue.", "max_output_tokens": 3000}
ON = {"ignore_eos": True}


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    with running_up(tmp_path_factory.mktemp("up"), "--demo", webhook_allow_loopback="true") as fleet:
        yield fleet


@pytest.fixture(scope="module")
def shared_client(up: Up):
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def client(shared_client):
    return shared_client


def upload(client, lines, **options):
    return client.files.create(file=("work.jsonl", jsonl(lines)), purpose="batch", **options)


def question(custom_id, a, b):
    return line(custom_id, f"What is {a} + {b}?", model="demo", temperature=0)


def painting(custom_id, **body):
    return {"custom_id": custom_id, "method": "POST", "url": IMAGES, "body": {**CIRCLE, **body}}


def ids(lines):
    return sorted(entry["custom_id"] for entry in lines)


def ids_of(page):
    return [each.id for each in page.data]


def fetched(url):
    """A picture that any client opens by its url alone."""
    answer = httpx2.get(url, trust_env=False)
    answer.raise_for_status()
    return answer.content


def size_of(data):
    header = read_header(data)
    return header.content_type, header.width, header.height


# Chat ----------------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_whole_and_in_pieces(client):
    done = client.chat.completions.create(model="demo", messages=SUM, temperature=0)
    chunks = list(client.chat.completions.create(
        model="demo", messages=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    with client.chat.completions.stream(model="demo", messages=SUM, temperature=0) as helper:
        final = helper.until_done().get_final_completion()

    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("42", "stop")
    assert done._request_id.startswith("req_")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "42"
    assert chunks[-1].usage.total_tokens == done.usage.total_tokens == 23
    assert final.choices[0].message.content == "42"


def test_what_the_sdk_may_send_without_a_wish_changes_nothing(client):
    plain = client.chat.completions.create(model="demo", messages=SUM, temperature=0)
    wordy = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": [{"type": "text", "text": SUM[0]["content"]}]}],
        temperature=0, n=1, top_p=1, presence_penalty=0, frequency_penalty=0, stop=None, store=False, tools=[],
        tool_choice="none", parallel_tool_calls=True, modalities=["text"], response_format={"type": "text"},
        service_tier="auto", metadata={"team": "a"}, user="u", safety_identifier="u", prompt_cache_key="k",
        max_completion_tokens=20,
    )  # fmt: skip
    assert wordy.choices == plain.choices


def test_the_async_client_asks_many_things_at_once(up):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0) as client:

            async def ask(a, b):
                words = [{"role": "user", "content": f"What is {a} + {b}?"}]
                chunks = await client.chat.completions.create(model="demo", messages=words, temperature=0, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            answers = asyncio.gather(*(ask(30, number) for number in range(20)))
            picture = client.images.generate(**CIRCLE, response_format="b64_json")
            response = client.responses.create(model="demo", input="What is 17 + 25?", temperature=0)
            file = await client.files.create(file=("work.jsonl", jsonl([question("1", 2, 3)])), purpose="batch")
            batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            listed = [each.id async for each in client.batches.list(limit=1)]
            content = await client.files.content(file.id)
            return await answers, await picture, await response, batch.id in listed, content.content

    answers, picture, response, listed, content = asyncio.run(ask_all())

    assert answers == [str(30 + number) for number in range(20)]
    assert size_of(base64.b64decode(picture.data[0].b64_json)) == ("image/png", 128, 128)
    assert (response.output_text, listed) == ("42", True)
    assert content == jsonl([question("1", 2, 3)])


def test_models_are_listed_and_shown(client):
    assert [model.id for model in client.models.list()] == ["demo", "demo-image"]
    assert [client.models.retrieve(name).kind for name in ("demo", "demo-image")] == ["text", "image"]


# Pictures ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_painted_and_changed_by_url_and_in_base64(client, tmp_path):
    # Given two pictures by url
    made = client.images.generate(**CIRCLE, n=2, extra_body={"seed": 7})
    assert [size_of(fetched(each.url)) for each in made.data] == [("image/png", 128, 128)] * 2
    # when one is saved and sent back, as an open file, as a path and as bytes
    start = tmp_path / "start.png"
    start.write_bytes(fetched(made.data[0].url))
    edits = {"model": "demo-image", "prompt": "a green square on a blue background", "size": "128x128"}
    with start.open("rb") as file:
        forms = (file, start, ("start.png", start.read_bytes(), "image/png"))
        changed = [
            client.images.edit(image=form, **edits, response_format="b64_json", extra_body={"seed": 3, "strength": 0.9})
            for form in forms
        ]
    # then the three are one picture, and another than the first
    pictures = {base64.b64decode(each.data[0].b64_json) for each in changed}
    assert [size_of(data) for data in pictures] == [("image/png", 128, 128)]
    assert pictures != {start.read_bytes()}
    assert changed[0].usage.total_tokens > 0


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_are_uploaded_listed_read_and_deleted(client, tmp_path):
    path = tmp_path / "größe.jsonl"
    path.write_bytes(jsonl([question("1", 2, 3)]))
    from_path = client.files.create(file=path, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    from_bytes = client.files.create(file=("other.jsonl", b"{}\n"), purpose="batch")

    assert (from_path.filename, from_path.bytes, from_path.status) == (path.name, path.stat().st_size, "processed")
    assert from_path.expires_at - from_path.created_at == 3600
    assert client.files.retrieve(from_path.id) == from_path == client.files.wait_for_processing(from_path.id)
    assert [each.id for each in client.files.list(limit=1, purpose="batch")][:2] == [from_bytes.id, from_path.id]
    with client.files.with_streaming_response.content(from_path.id) as answer:
        answer.stream_to_file(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == path.read_bytes() == client.files.content(from_path.id).content
    assert client.files.delete(from_path.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(from_path.id)


def test_a_large_file_comes_back_as_it_went(client):
    data = jsonl([line(f"{number}", "x" * 1000, model="demo") for number in range(12_000)])
    file = client.files.create(file=("large.jsonl", data), purpose="batch")

    assert file.bytes == len(data) > 12_000_000
    assert client.files.content(file.id).content == data
    client.files.delete(file.id)


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_of_questions_ends_with_every_line_in_one_file(client):
    lines = [question(f"sum-{number}", number, 20) for number in range(40)]
    made = start(client, [*lines, line("hot", model="demo", temperature=9)], metadata={"team": "a"})
    batch = wait_for_end(client, made.id)

    assert (batch.status, batch.request_counts.total, batch.model) == ("completed", 41, "demo")
    assert (batch.request_counts.completed, batch.request_counts.failed, batch.metadata) == (40, 1, {"team": "a"})
    output, errors = read_lines(client, batch.output_file_id), read_lines(client, batch.error_file_id)
    said = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in output}
    assert sum(said[f"sum-{number}"] == str(number + 20) for number in range(40)) >= 38
    assert (ids(errors), errors[0]["response"]["status_code"]) == (["hot"], 422)
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    assert batch.usage.total_tokens == sum(each["response"]["body"]["usage"]["total_tokens"] for each in output)


def test_a_batch_of_pictures_holds_urls_that_lead_to_them(client):
    batch = wait_for_end(client, start(client, [painting(f"{seed}", seed=seed) for seed in range(3)], IMAGES).id)

    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    for entry in read_lines(client, batch.output_file_id):
        (picture,) = entry["response"]["body"]["data"]
        assert (size_of(fetched(picture["url"])), picture["seed"]) == (("image/png", 128, 128), int(entry["custom_id"]))


def test_a_batch_of_responses_holds_what_the_responses_route_answers(client):
    body = {"model": "demo", "input": "What is 17 + 25?", "temperature": 0}
    lines = [{"custom_id": f"{number}", "method": "POST", "url": RESPONSES, "body": body} for number in range(3)]
    batch = wait_for_end(client, start(client, lines, RESPONSES).id)

    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    answers = [entry["response"]["body"] for entry in read_lines(client, batch.output_file_id)]
    assert [openai.types.responses.Response.model_validate(answer).output_text for answer in answers] == ["42"] * 3


def test_batches_are_listed_page_by_page(client):
    made = [start(client, [question("1", 2, number)]).id for number in range(3)]

    page = client.batches.list(limit=2)
    assert (ids_of(page), page.has_more) == ([made[2], made[1]], True)
    assert ids_of(page.get_next_page())[0] == made[0]
    assert ids_of(client.batches.list(limit=2, after=made[1]))[0] == made[0]


def test_a_cancelled_batch_accounts_for_every_line(client):
    made = start(client, [painting(f"{number}", num_inference_steps=100) for number in range(40)], IMAGES)
    until(lambda: client.batches.retrieve(made.id).status == "in_progress")
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    batch = wait_for_end(client, made.id)

    output, errors = read_lines(client, batch.output_file_id), read_lines(client, batch.error_file_id)
    assert (batch.status, len(output) + len(errors)) == ("cancelled", 40)
    assert ids(output + errors) == sorted(f"{number}" for number in range(40))
    assert {entry["error"]["code"] for entry in errors} == {"batch_cancelled"}


# Responses -----------------------------------------------------------------------------------------------------------


def test_a_response_is_answered_at_once_and_as_a_stream(client):
    done = client.responses.create(model="demo", input="What is 17 + 25?", temperature=0, instructions="Be brief.")
    events = list(client.responses.create(model="demo", input="What is 17 + 25?", temperature=0, stream=True))

    assert (done.status, done.output_text, events[-1].response.output_text) == ("completed", "42", "42")
    assert client.responses.retrieve(done.id) == done
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert client.responses.input_items.list(done.id).data[0].content[0].text == "What is 17 + 25?"
    client.responses.delete(done.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(done.id)


def test_a_response_in_the_background_is_polled_until_it_is_there(client):
    made = client.responses.create(model="demo", input="What is 17 + 25?", temperature=0, background=True)
    assert made.status in ("queued", "in_progress")

    done = until(lambda: (now := client.responses.retrieve(made.id)).status == "completed" and now)

    assert done.output_text == "42"


def test_a_stream_that_was_left_goes_on_behind_the_last_event_that_was_seen(client):
    # Given a response in the background whose reader leaves after a few events
    stream = client.responses.create(**LONG | {"max_output_tokens": 300}, background=True, stream=True, extra_body=ON)
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 10:
            break
    stream.close()
    # when it comes back, by the plain call and by the helper
    response_id, last = seen[0].response.id, seen[-1].sequence_number
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
    with client.responses.stream(response_id=response_id, starting_after=last) as helper:
        helped = [event.sequence_number for event in helper]
    # then nothing is missing, nothing came twice, and the pieces make the whole
    numbers = [event.sequence_number for event in seen + rest]
    assert numbers == list(range(len(numbers)))
    assert helped == [event.sequence_number for event in rest]
    text = "".join(event.delta for event in seen + rest if event.type == "response.output_text.delta")
    assert text == rest[-1].response.output_text == client.responses.retrieve(response_id).output_text
    assert rest[-1].response.status == "incomplete"


def test_a_response_in_the_background_is_cancelled(client):
    made = client.responses.create(**LONG, background=True, extra_body=ON)
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"


# Webhooks ------------------------------------------------------------------------------------------------------------


def test_an_endpoint_is_told_of_jobs_in_events_that_the_sdk_unwraps(client):
    with Receiver(200) as receiver:
        # Given an endpoint that was tried and found
        made = client.webhooks.create(name="ops", url=receiver.url, event_types=["job.completed", "job.failed"])
        assert client.webhooks.test(made.id, event_type="job.completed").status_code == 200
        receiver.requests.clear()
        # when a job ends
        answer = client.chat.completions.with_raw_response.create(model="demo", messages=SUM)
        until(lambda: receiver.requests)
        (told,) = receiver.requests
        # then its event is what the SDK takes for true, and a changed one is not
        event = client.webhooks.unwrap(told.body, told.headers, secret=made.signing_secret)
        assert (event.type, event.object, event.id) == ("job.completed", "event", told.headers["webhook-id"])
        assert (event.data.id, event.data.status) == (answer.headers["x-job-id"], "completed")
        with pytest.raises(openai.InvalidWebhookSignatureError):
            changed = told.body.replace(b"completed", b"cancelled")
            client.webhooks.unwrap(changed, told.headers, secret=made.signing_secret)
        # and with another secret both sign, as long as the old one lives
        renewed = client.webhooks.rotate_secret(made.id)
        receiver.requests.clear()
        client.chat.completions.create(model="demo", messages=SUM)
        until(lambda: receiver.requests)
        for secret in (made.signing_secret, renewed.signing_secret):
            told = receiver.requests[0]
            assert client.webhooks.unwrap(told.body, told.headers, secret=secret).type == "job.completed"
    assert made.id in [each.id for each in client.webhooks.list()]
    assert client.webhooks.delete(made.id).deleted


def test_a_call_names_a_webhook_of_its_own(client, up):
    secret = httpx2.post(f"{up.url}/v1/webhook_endpoints/default/rotate_secret", json={}, trust_env=False).json()
    with Receiver(200) as receiver:
        client.images.generate(**CIRCLE, extra_body={"webhook": receiver.url, "webhook_events_filter": ["completed"]})
        until(lambda: receiver.requests)
        (told,) = receiver.requests

    event = client.webhooks.unwrap(told.body, told.headers, secret=secret["signing_secret"])
    (output,) = event.data.outputs
    assert event.type == "job.completed"
    assert size_of(fetched(f"{up.url}/v1/outputs/{output['id']}")) == ("image/png", 128, 128)


def test_the_ends_of_batches_and_responses_are_events_of_the_sdks_own_classes(client):
    with Receiver(200) as receiver:
        types = ["batch.completed", "batch.failed", "response.completed", "response.cancelled"]
        made = client.webhooks.create(name="ends", url=receiver.url, event_types=types)
        good = start(client, [question("1", 2, 3)])
        bad = start(client, [question("1", 2, 3), question("1", 4, 5)])
        done = client.responses.create(model="demo", input="What is 17 + 25?", background=True)
        stopped = client.responses.create(**LONG, background=True, extra_body=ON)
        client.responses.cancel(stopped.id)
        until(lambda: len(receiver.requests) == 4)
        told = [
            client.webhooks.unwrap(each.body, each.headers, secret=made.signing_secret) for each in receiver.requests
        ]
    client.webhooks.delete(made.id)

    assert {(type(event), event.type, event.data.id) for event in told} == {
        (events.BatchCompletedWebhookEvent, "batch.completed", good.id),
        (events.BatchFailedWebhookEvent, "batch.failed", bad.id),
        (events.ResponseCompletedWebhookEvent, "response.completed", done.id),
        (events.ResponseCancelledWebhookEvent, "response.cancelled", stopped.id),
    }


# Errors and retries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "code", "param"),
    [
        (lambda c: c.chat.completions.create(model="nobody", messages=SUM), openai.NotFoundError, "model_not_found",
         "model"),
        (lambda c: c.models.retrieve("nobody"), openai.NotFoundError, "model_not_found", "model"),
        (lambda c: c.files.retrieve("file-x"), openai.NotFoundError, "file_not_found", "file_id"),
        (lambda c: c.batches.retrieve("batch_x"), openai.NotFoundError, "batch_not_found", "batch_id"),
        (lambda c: c.responses.retrieve("resp_x"), openai.NotFoundError, "response_not_found", "response_id"),
        (lambda c: c.webhooks.retrieve("we_x"), openai.NotFoundError, "webhook_endpoint_not_found",
         "webhook_endpoint_id"),
        (lambda c: c.embeddings.create(model="demo", input="x"), openai.NotFoundError, "not_found", None),
        (lambda c: c.chat.completions.create(model="demo", messages=SUM, temperature=7),
         openai.UnprocessableEntityError, "invalid_request", "temperature"),
        (lambda c: c.chat.completions.create(model="demo", messages=SUM, web_search_options={}),
         openai.UnprocessableEntityError, "unsupported_feature", "web_search_options"),
        (lambda c: c.chat.completions.create(model="demo", messages=[{"role": "user", "content": "long " * 5000}]),
         openai.UnprocessableEntityError, "context_length_exceeded", "messages"),
        (lambda c: c.images.generate(model="demo-image", prompt="x", size="100x100"), openai.UnprocessableEntityError,
         "invalid_request", "size"),
        (lambda c: c.files.create(file=("x", b"x"), purpose="fine-tune"), openai.UnprocessableEntityError,
         "invalid_request", "purpose"),
        (lambda c: c.with_options(api_key="ifk_unknown").models.list(), openai.AuthenticationError, "unauthorized",
         "Authorization"),
    ],
)  # fmt: skip
def test_a_refusal_is_the_sdks_exception_of_its_kind_with_code_and_param(client, call, kind, code, param):
    with pytest.raises(kind) as caught:
        call(client)

    assert (type(caught.value), caught.value.code, caught.value.param) == (kind, code, param)
    assert caught.value.request_id.startswith("req_")


def test_a_receiver_that_is_not_there_and_a_key_of_another_body_are_told_as_what_they_are(client):
    with Receiver(200) as gone:
        pass
    made = client.webhooks.create(name="gone", url=gone.url, event_types=["job.failed"])
    with pytest.raises(openai.InternalServerError) as caught:
        client.webhooks.test(made.id, event_type="job.failed")
    assert caught.value.code == "webhook_receiver_failed"
    client.webhooks.delete(made.id)

    named = {"Idempotency-Key": "one-question"}
    client.chat.completions.create(model="demo", messages=SUM, extra_headers=named)
    with pytest.raises(openai.ConflictError) as caught:
        client.chat.completions.create(model="demo", messages=[*SUM, *SUM], extra_headers=named)
    assert caught.value.code == "idempotency_key_reuse"


def test_time_outs_and_lost_servers_are_the_sdks_own_errors(client):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model="demo", messages=SUM, max_tokens=3000, extra_body=ON
        )
    with pytest.raises(openai.APIConnectionError):
        client.with_options(base_url="http://127.0.0.1:9/v1").models.list()


@pytest.mark.parametrize("what", ["file", "batch", "response", "chat"])
def test_what_the_sdk_sends_again_after_a_lost_answer_is_there_once(client, up, what):
    file = upload(client, [question("1", 2, 3)])
    mark = {"metadata": {"only": what}}
    calls = {
        "file": lambda c: c.files.create(file=("only.jsonl", b"{}\n"), purpose="batch"),
        "batch": lambda c: c.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **mark),
        "response": lambda c: c.responses.create(model="demo", input="What is 1 + 2?", background=True, **mark),
        "chat": lambda c: c.chat.completions.create(model="demo", messages=SUM, **mark),
    }
    with ChaosProxy(up.port) as proxy:
        again = client.with_options(base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=3)
        proxy.lose_next_reply()
        answer = calls[what](again)
        assert proxy.lost == 1
    # A chat whose client left was cancelled, unless it was answered already.
    jobs = httpx2.get(f"{up.url}/v1/jobs", params={"metadata[only]": what}, trust_env=False).json()["data"]
    there = {
        "file": [each.id for each in client.files.list() if each.filename == "only.jsonl"],
        "batch": [each.id for each in client.batches.list() if each.metadata == mark["metadata"]],
        "response": [job["id"].replace("job_", "resp_") for job in jobs],
        "chat": [job["id"].replace("job_", "chatcmpl-") for job in jobs if job["status"] != "cancelled"],
    }
    assert there[what] == [answer.id]
