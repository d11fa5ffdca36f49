"""The API before real Celery workers with scripted engines: what a user sees while workers come and die."""

import signal
from collections.abc import Iterator

import openai
import pytest
from fake_engine import answer
from fleet import Fleet, until
from live_api import LiveApi, api_of_workers

from inferfleet.workers.flight import seed_of


@pytest.fixture
def fleet(redis_url, tmp_path) -> Iterator[Fleet]:
    fleet = Fleet(redis_url, tmp_path)
    yield fleet
    fleet.close()


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
