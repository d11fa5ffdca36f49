"""What callers of `inferfleet.run` may ask of Celery: revoke, limits, ETA, priority, ids; and processes that die."""

import contextlib
import json
import subprocess
import sys
import time

import psutil
import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded
from fake_engine import answer
from fleet import Fleet, until

from inferfleet.tasks.names import new_job_id
from inferfleet.workers.runs.run import job_id_of

LONG = "tokens=3000 step=0.01"
RUN = "inferfleet.run"


@pytest.fixture(scope="module")
def shared(module_redis, tmp_path_factory):
    """A fleet of one worker, on a Redis of its own, for the tests that need nothing special."""
    with contextlib.closing(Fleet(module_redis.url, tmp_path_factory.mktemp("logs"))) as fleet:
        fleet.start_worker({"m": "fake", "p": "image"}, run_slots=8)
        yield fleet


@contextlib.contextmanager
def plain_celery(url):
    """No import of ours, only the task's name and queue."""
    app = Celery("producer", broker=url, backend=url, set_as_current=False)
    app.conf.update(task_routes={RUN: {"queue": "test.run"}})
    yield app
    app.close()


@pytest.fixture
def producer(redis_url):
    with plain_celery(redis_url) as app:
        yield app


@pytest.fixture
def caller(shared):
    with plain_celery(shared.redis_url) as app:
        yield app


def run(app, words, **body):
    chat = {"model": "m", "messages": [{"role": "user", "content": words}], "seed": 5, **body}
    return app.signature(RUN, args=[chat], immutable=True)


def paint(app, seed):
    body = {"model": "p", "prompt": "x", "seed": seed}
    return app.signature(RUN, args=[{"url": "/v1/images/generations", "body": body}], immutable=True)


def content(completion):
    return completion["choices"][0]["message"]["content"]


def runs_process(worker):
    program = "inferfleet.workers.runs.process"
    return until(lambda: [child for child in worker.children() if program in child.cmdline()])[0]


def test_chat_and_images_work_together_in_chains_groups_and_chords(shared, caller):

    chained = chain(run(caller, "tokens=2"), paint(caller, 1)).apply_async()
    grouped = group(paint(caller, 2), run(caller, "tokens=3")).apply_async()
    chorded = chord([run(caller, "tokens=1"), paint(caller, 3)], run(caller, "tokens=4")).apply_async()

    assert chained.get(timeout=60)["job_id"] == job_id_of(chained.id)
    picture, text = grouped.get(timeout=60)
    assert (len(picture["outputs"]), content(text)) == (1, answer(5, 3))
    assert content(chorded.get(timeout=60)) == answer(5, 4)


def test_a_caller_who_has_nothing_of_ours_gets_answers_and_named_errors(shared):
    program = f"""
import json, sys
sys.modules["inferfleet"] = None
from celery import Celery
app = Celery(broker={shared.redis_url!r}, backend={shared.redis_url!r})
def ask(words):
    chat = {{"model": "m", "messages": [{{"role": "user", "content": words}}], "seed": 5}}
    return app.send_task("inferfleet.run", args=[chat], queue="test.run")
good, bad = ask("tokens=2"), ask("fail")
try:
    bad.get(timeout=60)
except Exception as error:
    print(json.dumps([good.get(timeout=60)["choices"][0]["message"]["content"], type(error).__name__, str(error)]))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    words, name, message = json.loads(printed)
    assert (words, name) == (answer(5, 2), "NumericalError")
    assert "scripted" in message


def test_revoke_cancels_what_waits_and_only_with_terminate_what_runs(fleet, producer):
    fleet.start_worker(slots=1, run_slots=4)
    running = run(producer, LONG).apply_async()
    fleet.wait_for_words(until(lambda: fleet.state_if_any(job_id_of(running.id)) and job_id_of(running.id)))
    waiting = run(producer, "tokens=1").apply_async()
    until(lambda: fleet.state_if_any(job_id_of(waiting.id)) == "queued")

    producer.control.revoke([waiting.id, running.id])
    with pytest.raises(TaskRevokedError):
        waiting.get(timeout=60)

    assert fleet.wait(job_id_of(waiting.id)).state == "cancelled"
    assert (fleet.state(job_id_of(running.id)), running.state) == ("in_progress", "STARTED")
    running.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        running.get(timeout=60)
    assert fleet.wait(job_id_of(running.id)).state == "cancelled"


def test_remote_control_revokes_any_job_by_its_id(shared, caller):
    job_id = shared.submit(LONG)  # as from the API, and with Flower's button
    shared.wait_for_words(job_id)

    caller.control.revoke(job_id, terminate=True)

    assert shared.wait(job_id).state == "cancelled"


def test_a_chord_hears_of_a_member_that_was_revoked_before_its_time(shared, caller):
    member = run(caller, "tokens=1").set(countdown=3000, task_id="to-be-revoked")
    result = chord([run(caller, "tokens=1"), member], run(caller, "tokens=2")).apply_async()
    until(lambda: shared.ledger.redis.hexists("{test}:runs", "to-be-revoked"))

    caller.control.revoke("to-be-revoked")

    with pytest.raises(Exception, match="revoked"):
        result.get(timeout=30)
    until(lambda: shared.ledger.redis.hlen("{test}:runs") == 0)


@pytest.mark.parametrize(
    ("limits", "error"),
    [({"soft_time_limit": 0.5, "time_limit": 60}, SoftTimeLimitExceeded), ({"time_limit": 0.5}, TimeLimitExceeded)],
)
def test_a_time_limit_cancels_the_job_and_raises_celery_s_own_error(shared, caller, limits, error):

    late = run(caller, LONG).apply_async(**limits)
    in_time = run(caller, "tokens=2").apply_async(time_limit=60, soft_time_limit=30)

    with pytest.raises(error):
        late.get(timeout=60)
    assert shared.wait(job_id_of(late.id)).state == "cancelled"
    assert content(in_time.get(timeout=60)) == answer(5, 2)


def test_a_countdown_is_kept_by_the_ledger_and_not_by_the_worker_that_heard_of_it(fleet, producer):
    first = fleet.start_worker(run_slots=1)
    sent = time.time()
    result = run(producer, "tokens=2").apply_async(countdown=4)
    until(lambda: fleet.ledger.redis.zcard("{test}:run_due") == 1)

    first.kill()
    fleet.start_worker(run_slots=1)

    assert content(result.get(timeout=60)) == answer(5, 2)
    assert fleet.ledger.get(job_id_of(result.id)).created_ms / 1000 >= sent + 3.9


def test_a_run_that_expired_before_a_worker_heard_of_it_is_revoked(fleet, producer):
    late = run(producer, "tokens=2").apply_async(expires=0.2)
    time.sleep(0.3)
    fleet.start_worker(run_slots=1)

    with pytest.raises(TaskRevokedError, match="expired"):
        late.get(timeout=60)
    assert fleet.state_if_any(job_id_of(late.id)) is None


def test_a_message_s_priority_is_the_job_s_unless_the_job_has_one(shared, caller):

    plain = run(caller, "tokens=1").apply_async(priority=7)
    own = run(caller, "tokens=1", priority=-3).apply_async(priority=7)
    tier = run(caller, "tokens=1", service_tier="flex").apply_async(priority=7)
    for result in (plain, own, tier):
        result.get(timeout=60)

    records = [shared.ledger.get(job_id_of(result.id)) for result in (plain, own, tier)]
    assert [record.priority for record in records] == [7, -3, 50]


def test_a_task_id_that_is_a_job_id_is_the_job_s(shared, caller):
    job_id = new_job_id()

    run(caller, "tokens=2").apply_async(task_id=job_id)

    assert content(caller.AsyncResult(job_id).get(timeout=60)) == answer(5, 2)
    with shared.client() as client:
        assert client.get(job_id).status == "completed"


def test_a_running_run_says_which_job_it_waits_for(shared, caller):
    result = run(caller, LONG).apply_async()

    until(lambda: result.state == "STARTED")

    assert result.info["job_id"] == job_id_of(result.id)
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=60)


def test_a_message_that_comes_twice_makes_one_job_and_one_answer(shared, caller):
    message = run(caller, "tokens=30 step=0.01").apply_async(task_id="twice")
    run(caller, "tokens=30 step=0.01").apply_async(task_id="twice")

    assert content(message.get(timeout=60)) == answer(5, 30)

    until(lambda: shared.ledger.redis.hlen("{test}:runs") == 0)
    assert shared.ledger.get(job_id_of("twice")).attempts == 1
    assert message.state == "SUCCESS"


def test_a_run_outlives_kill_9_of_the_process_that_waited_for_it(fleet, producer):
    worker = fleet.start_worker(run_slots=1)
    result = run(producer, "tokens=300 step=0.01").apply_async()
    chained = chain(run(producer, "tokens=300 step=0.01"), run(producer, "tokens=2")).apply_async()
    until(lambda: result.state == "STARTED")

    with contextlib.suppress(psutil.NoSuchProcess):
        runs_process(worker).kill()
    fleet.start_worker(run_slots=2)

    assert content(result.get(timeout=60)) == answer(5, 300)
    assert content(chained.get(timeout=60)) == answer(5, 2)
    assert fleet.ledger.get(job_id_of(result.id)).attempts == 1
    until(lambda: fleet.ledger.redis.hlen("{test}:runs") == 0)


def test_messages_with_broken_headers_do_no_harm(shared, caller):
    with caller.connection_for_write() as connection, caller.amqp.Producer(connection) as sender:
        for bad in ({"eta": "tomorrow"}, {"id": 5}, {"id": ""}, {"id": "x" * 513}):
            headers = {"id": "one", "task": RUN, "lang": "py"} | bad
            sender.publish([[{}], {}, {}], routing_key="test.run", exchange="", headers=headers, serializer="json")

    assert content(run(caller, "tokens=2").apply_async().get(timeout=60)) == answer(5, 2)
    until(lambda: shared.ledger.redis.hlen("{test}:runs") == 0)
    assert shared.workers[0].alive
    assert not shared.workers[0].lines("runs_process_died")
