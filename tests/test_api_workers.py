"""The API before real Celery workers with scripted engines: what a user sees while workers come and die."""

import base64
import json
import signal
from collections.abc import Iterator

import httpx2
import openai
import pytest
from fake_engine import answer
from fake_pictures import picture
from fleet import Fleet, until
from live_api import LiveApi, api_of_workers

from inferfleet.workers.flight import seed_of


@pytest.fixture
def api(fleet) -> Iterator[LiveApi]:
    with api_of_workers(fleet.redis_url, "test") as api:
        yield api


def said_by_engine(chunk_or_completion, tokens: int, index: int = 0) -> str:
    job_id = "job_" + chunk_or_completion.id.removeprefix("chatcmpl-")
    return answer(seed_of(job_id), tokens, index)


def ask(api: LiveApi, words: str, *, model: str = "m", **options):
    return api.sdk().chat.completions.create(model=model, messages=[{"role": "user", "content": words}], **options)


def test_whole_streamed_and_doubled_answers_are_what_the_engine_said(fleet, api):
    fleet.start_worker()

    whole = ask(api, "tokens=20")
    chunks = list(ask(api, "tokens=20", n=2, stream=True, stream_options={"include_usage": True}))

    assert whole.choices[0].message.content == said_by_engine(whole, 20)
    for index in range(2):
        parts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(part or "" for part in parts) == said_by_engine(chunks[0], 20, index)
    assert chunks[-1].usage.completion_tokens == 40


def test_a_job_may_choose_a_slice_and_none_that_the_model_lacks(fleet, api):
    fleet.start_worker({"m": "slices=small,large", "plain": "fake"})

    small = ask(api, "tokens=9", extra_body={"matformer_slice": "small"})
    whole = ask(api, "tokens=9")

    seed = seed_of("job_" + small.id.removeprefix("chatcmpl-"))
    assert small.choices[0].message.content == answer(f"small:{seed}", 9)
    assert whole.choices[0].message.content == said_by_engine(whole, 9)
    for model, said in (("m", "its slices are 'small', 'large'"), ("plain", "it has none")):
        with pytest.raises(openai.UnprocessableEntityError, match=said) as caught:
            ask(api, "tokens=9", model=model, extra_body={"matformer_slice": "tiny"})
        assert (caught.value.code, caught.value.param) == ("invalid_request", "matformer_slice")
    card = api.sdk().models.retrieve("m")
    assert card.matformer_slices == ["small", "large"]


def test_a_stream_goes_on_word_for_word_when_its_worker_is_killed(fleet, api):
    first = fleet.start_worker()
    stream = ask(api, "tokens=60 step=0.02", stream=True)
    chunks = [next(stream) for _ in range(5)]

    first.kill()
    fleet.start_worker()
    chunks += list(stream)

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said_by_engine(chunks[0], 60)
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("stop") == 1


def test_a_client_that_leaves_frees_the_engine(fleet, api):
    fleet.start_worker()
    stream = ask(api, "tokens=4000 step=0.02", stream=True)
    job_id = "job_" + next(stream).id.removeprefix("chatcmpl-")

    stream.close()

    record = fleet.wait(job_id)
    assert record.state == "cancelled"
    assert 0 < record.usage["completion_tokens"] < 4000


def test_jobs_that_wait_for_a_worker_are_answered_once_one_comes(fleet, api):
    worker = fleet.start_worker()
    worker.signal(signal.SIGTERM)
    until(lambda: worker.lines("worker_stopped"))
    fleet.ledger.put_card("m", {"id": "m", "state": "ready"}, "gone", 60)

    with api.http() as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "tokens=3"}]}
        job = http.post("/v1/jobs", json={"body": body}).json()
        assert job["status"] == "queued"
        fleet.start_worker()
        done = http.get(f"/v1/jobs/{job['id']}", params={"wait": 30}).json()

    assert done["status"] == "completed"


def test_the_scrape_shows_what_workers_counted(fleet, api):
    fleet.start_worker()
    ask(api, "tokens=7")

    with api.http() as http:
        page = until(
            lambda: (text := http.get("/metrics").text) and 'generation_tokens_total{model_name="m"' in text and text
        )

    line = next(line for line in page.splitlines() if line.startswith("inferfleet_generation_tokens_total{"))
    assert 'worker="' in line
    assert line.endswith(" 7.0")


# Responses -----------------------------------------------------------------------------------------------------------


def test_a_response_in_the_background_survives_its_worker_its_api_and_redis_word_for_word(own_redis, tmp_path):
    # Given a response that is being written,
    fleet = Fleet(own_redis.url, tmp_path)
    first = fleet.start_worker()
    with api_of_workers(own_redis.url, "test") as api:
        words = "tokens=80 step=0.03"
        stream = api.sdk().responses.create(model="m", input=words, background=True, stream=True)
        seen = [next(stream) for _ in range(8)]
        response_id, place = seen[0].response.id, seen[-1].sequence_number

    # when the API is gone, the worker is killed and so is Redis,
    first.kill()
    own_redis.kill()
    own_redis.start()
    fleet.start_worker()

    # then another API gives the rest, behind the last number that was seen.
    with api_of_workers(own_redis.url, "test") as api:
        rest = list(api.sdk().responses.retrieve(response_id, stream=True, starting_after=place))
        done = api.sdk().responses.retrieve(response_id)
    fleet.close()
    events = seen + rest
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == done.output_text == answer(seed_of("job_" + response_id.removeprefix("resp_")), 80)
    assert rest[-1].type == "response.completed"
    assert done.usage.output_tokens == 80


def test_a_response_cut_at_its_limit_is_incomplete(fleet, api):
    fleet.start_worker()

    done = api.sdk().responses.create(model="m", input="tokens=20 cut", max_output_tokens=20)
    whole = api.sdk().responses.create(model="m", input="tokens=20", instructions="x", max_output_tokens=50)

    assert (whole.status, whole.usage.output_tokens) == ("completed", 20)
    assert done.output_text == answer(seed_of("job_" + done.id.removeprefix("resp_")), 20)
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def counters(http: httpx2.Client, model: str) -> dict[str, float]:
    """Samples of one model on the page of metrics, by name."""
    lines = [line for line in http.get("/metrics").text.splitlines() if f'model_name="{model}"' in line]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


# Pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_of_a_worker_are_answered_as_urls_and_in_base64_and_counted(fleet, api):
    fleet.start_worker({"painter": "image"})
    asked = {"model": "painter", "prompt": "x", "n": 2, "size": "64x32", "extra_body": {"seed": 7}}

    urls = api.sdk().images.generate(**asked)
    whole = api.sdk().images.generate(**asked, response_format="b64_json")

    expected = [picture(seed, 64, 32) for seed in (7, 8)]
    with api.http() as http:
        assert [http.get(one.url).content for one in urls.data] == expected
        counted = until(lambda: (found := counters(http, "painter")).get("inferfleet_pictures_total") == 4 and found)
    assert [base64.b64decode(one.b64_json) for one in whole.data] == expected
    assert (whole.licence, whole.usage.input_tokens_details.text_tokens) == ("apache-2.0", 1)
    assert counted["inferfleet_denoising_steps_total"] == 16


def test_a_picture_is_the_same_and_its_events_begin_anew_when_its_worker_is_killed(fleet, api):
    first = fleet.start_worker({"painter": "image"})
    with api.http() as http:
        body = {"model": "painter", "prompt": "step=0.05", "num_inference_steps": 30, "seed": 3}
        job_id = http.post("/v1/jobs", json={"url": "/v1/images/generations", "body": body}).json()["id"]
        until(lambda: (http.get(f"/v1/jobs/{job_id}").json()["progress_detail"] or {"step": 0})["step"] > 2)
        first.kill()
        fleet.start_worker({"painter": "image"})
        with http.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
        (output,) = http.get(f"/v1/jobs/{job_id}").json()["outputs"]
        assert http.get(output["url"]).content == picture(3)

    steps = [event["step"] for event in events if event["type"] == "job.progress"]
    assert steps != sorted(steps)
    assert steps[-1] == 30
    assert [event["type"] for event in events].count("job.output") == 1


def test_a_client_that_leaves_its_picture_frees_the_engine(fleet, api):
    fleet.start_worker({"painter": "image"})
    with pytest.raises(openai.APITimeoutError):
        api.sdk().with_options(timeout=1).images.generate(model="painter", prompt="step=5")

    (record,) = fleet.ledger.list("default", model="painter").jobs
    assert fleet.wait(record.id).state == "cancelled"
