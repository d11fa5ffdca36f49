"""`inferfleet.run` as an ordinary Celery task: chains, groups and chords of jobs, from a stranger's Celery app."""

import signal

import pytest
from celery import Celery, chain, chord, group
from fake_engine import answer
from fake_pictures import picture
from fleet import until

from inferfleet.tasks import errors
from inferfleet.workers.runs.run import job_id_of


@pytest.fixture
def producer(redis_url):
    """Plain Celery: no import of ours, only the task's name and queue."""
    app = Celery("producer", broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.update(task_routes={"inferfleet.run": {"queue": "test.run"}})
    yield app
    app.close()


def run(app, words, **body):
    chat = {"model": "m", "messages": [{"role": "user", "content": words}], "seed": 5, **body}
    return app.signature("inferfleet.run", args=[chat], immutable=True)


def content(completion):
    return completion["choices"][0]["message"]["content"]


def test_chain_group_and_chord_work_on_runs_even_with_one_slot_for_each(fleet, producer):
    # One slot for turns and two for runs: if a waiting run held what a turn needs, nothing would ever end.
    fleet.start_worker(slots=1, run_slots=2)

    chained = chain(run(producer, "tokens=2"), run(producer, "tokens=3")).apply_async()
    grouped = group(run(producer, f"tokens={n}") for n in (1, 2, 3, 4)).apply_async()
    chorded = chord([run(producer, "tokens=1"), run(producer, "tokens=2")], run(producer, "tokens=4")).apply_async()

    assert content(chained.get(timeout=60)) == answer(5, 3)
    assert [content(completion) for completion in grouped.get(timeout=60)] == [answer(5, n) for n in (1, 2, 3, 4)]
    assert content(chorded.get(timeout=60)) == answer(5, 4)


def test_a_run_that_fails_raises_the_job_s_own_error(fleet, producer):
    fleet.start_worker(run_slots=2)

    failed = run(producer, "fail").apply_async()
    refused = run(producer, "tokens=1", temperature=9).apply_async()
    unknown = run(producer, "tokens=1", model="nobody").apply_async()

    with pytest.raises(errors.NumericalError, match="scripted"):
        failed.get(timeout=60)
    with pytest.raises(errors.InvalidRequest, match="temperature"):
        refused.get(timeout=60)
    with pytest.raises(errors.ModelNotFound, match="nobody"):
        unknown.get(timeout=60)


def test_an_image_job_is_a_run_that_answers_with_the_outputs_of_its_job(fleet, producer):
    fleet.start_worker({"p": "image"}, run_slots=2)
    job = {"url": "/v1/images/generations", "body": {"model": "p", "prompt": "x", "seed": 3, "n": 2}}
    paint = {name: producer.signature("inferfleet.run", args=[job | {"body": job["body"] | more}], immutable=True)
             for name, more in {"painted": {}, "refused": {"response_format": "b64_json"}}.items()}  # fmt: skip

    painted = paint["painted"].apply_async()
    answer = painted.get(timeout=60)

    assert answer["job_id"] == job_id_of(painted.id)
    assert [output["index"] for output in answer["outputs"]] == [0, 1]
    with fleet.client() as client:
        assert [client.output(answer["job_id"], index) for index in (0, 1)] == [picture(3), picture(4)]
    with pytest.raises(errors.InvalidRequest, match="response_format"):
        paint["refused"].apply_async().get(timeout=60)


def test_a_run_of_a_draining_worker_goes_on_in_another_with_the_same_job(fleet, producer):
    first = fleet.start_worker(run_slots=2, drain_grace_seconds=0.2)
    result = run(producer, "tokens=150 step=0.01").apply_async()
    job_id = job_id_of(result.id)
    until(lambda: fleet.ledger.redis.exists("{test}:job:" + job_id))
    fleet.wait_for_words(job_id)

    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    fleet.start_worker(run_slots=2)

    assert content(result.get(timeout=60)) == answer(5, 150)
    assert fleet.ledger.list("default").jobs == [] or len(fleet.ledger.list("default").jobs) == 1
    assert fleet.ledger.get(job_id).attempts == 1
