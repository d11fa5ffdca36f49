"""A real worker on a real Redis with scripted engines: turns, limits, cancels, drains. Faults are tested elsewhere."""

import contextlib
import json
import signal
import threading
import time
import urllib.request

import pytest
from celery import Celery
from fake_engine import answer
from fleet import Fleet, assert_published_once, deltas, until

from inferfleet.workers.flight import seed_of
from inferfleet.workers.metrics import fleet_families


@pytest.fixture(scope="module")
def shared(module_redis, tmp_path_factory):
    """A fleet of one ordinary worker, on a Redis of its own, for the tests that need nothing special."""
    with contextlib.closing(Fleet(module_redis.url, tmp_path_factory.mktemp("logs"))) as fleet:
        fleet.start_worker()
        yield fleet


@pytest.fixture
def plain_celery(shared):
    """Celery without anything of ours."""
    app = Celery(broker=shared.redis_url, set_as_current=False)
    yield app
    app.close()


def test_a_turn_carries_a_job_to_its_end(shared):
    job_id = shared.submit("tokens=5")
    record = shared.wait(job_id)

    assert record.state == "completed"
    assert_published_once(shared.ledger, record, 5)
    body = json.loads(record.response)
    assert body["object"] == "chat.completion" and body["id"] == "chatcmpl-" + job_id.removeprefix("job_")
    assert body["choices"][0]["finish_reason"] == "stop" and body["choices"][0]["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert record.usage == body["usage"]
    assert record.metrics["ttft_ms"] > 0 and record.metrics["execution_ms"] > 0


def test_n_answers_and_logprobs_come_back_in_openai_shape(shared):
    record = shared.wait(shared.submit("tokens=3", body={"n": 2, "logprobs": True, "seed": 7}))

    choices = json.loads(record.response)["choices"]
    assert [choice["message"]["content"] for choice in choices] == [answer(7, 3, 0), answer(7, 3, 1)]
    assert [len(choice["logprobs"]["content"]) for choice in choices] == [3, 3]
    assert record.usage["completion_tokens"] == 6


def test_a_job_whose_ring_was_lost_is_rung_for_again(shared):
    job_id = shared.submit("tokens=3", ring=False)

    assert shared.wait(job_id).state == "completed"


def test_doubled_turns_do_no_harm(shared):
    shared.doorbell.ring("m", times=10)

    job_id = shared.submit("tokens=3")
    shared.doorbell.ring("m", times=10)
    record = shared.wait(job_id)

    assert_published_once(shared.ledger, record, 3)
    assert record.attempts == 1


def test_several_models_in_one_worker_each_have_their_engine(fleet):
    worker = fleet.start_worker(models={"a": "fake", "b": "fake"})

    jobs = [fleet.submit("tokens=4", model=model) for model in "abab"]
    records = [fleet.wait(job_id) for job_id in jobs]

    assert [json.loads(record.response)["model"] for record in records] == ["a", "b", "a", "b"]
    assert len(worker.engines()) == 2


def test_a_lazy_model_is_loaded_by_its_first_job(fleet):
    worker = fleet.start_worker(models={"m": {"path": "fake", "eager": False}}, wait=False)
    until(lambda: fleet.ledger.cards().get("m", {}).get("state") == "idle")
    assert worker.engines() == []

    job_id = fleet.submit("tokens=3")

    assert fleet.wait(job_id).state == "completed"
    assert len(worker.engines()) == 1


def test_a_worker_takes_no_more_turns_than_it_has_slots(fleet):
    # No round of the janitor meanwhile: it may count a job as waiting whose turn was taken that moment, and ring.
    fleet.start_worker(slots=2, sweep_seconds=60)
    fleet.wait(fleet.submit("tokens=1"))  # by its end the round that a ready engine asks for is over

    jobs = [fleet.submit("tokens=30 step=0.02") for _ in range(6)]
    for running in jobs[:2]:
        fleet.wait_for_words(running)

    # What it does not run is left in the queue, where another worker can hear it.
    assert fleet.ledger.redis.llen("test.turn.m") == 4
    assert fleet.ledger.redis.hlen("unacked") == 0
    assert fleet.ledger.stats()["m"]["running"] == 2
    assert {fleet.wait(job_id).state for job_id in jobs} == {"completed"}


def test_an_engine_error_fails_its_job_alone(shared):
    good, bad = shared.submit("tokens=30 step=0.01"), shared.submit("fail")

    assert shared.wait(bad).error["code"] == "nan_logits"
    assert shared.wait(bad).state == "failed"
    assert_published_once(shared.ledger, shared.wait(good), 30)


def test_cancelling_a_running_job_stops_it_at_the_next_step_with_partial_usage(shared):
    job_id = shared.submit("tokens=4000 step=0.01")
    shared.wait_for_words(job_id)

    assert shared.ledger.cancel(job_id) == "cancelling"
    record = shared.wait(job_id)

    assert record.state == "cancelled" and record.response is None
    assert 0 < record.usage["completion_tokens"] < 4000
    assert deltas(shared.ledger.events(job_id)[-1:]) == []


def test_a_job_that_says_nothing_yet_is_cancelled_without_waiting_for_a_heartbeat(fleet):
    fleet.start_worker(heartbeat_seconds=60, lease_seconds=200)
    silent = fleet.submit("tokens=1 step=1")
    until(lambda: fleet.state(silent) == "in_progress")

    fleet.ledger.cancel(silent)

    assert fleet.wait(silent, seconds=20).state == "cancelled"


def test_execution_timeout_ends_a_run_with_partial_usage(shared):
    record = shared.wait(shared.submit("tokens=4000 step=0.01", execution_timeout=0.3))

    assert record.state == "failed" and record.error["code"] == "execution_timeout"
    assert "0.3" in record.error["message"]
    assert 0 < record.usage["completion_tokens"] < 4000


def test_a_deadline_that_passes_while_running_expires_the_job(shared):
    record = shared.wait(shared.submit("tokens=4000 step=0.01", deadline=time.time() + 0.7))

    assert record.state == "expired" and record.error["code"] == "deadline_exceeded"
    assert record.response is None


def test_start_timeout_expires_a_job_that_nobody_started(fleet):
    fleet.start_worker(slots=1)
    fleet.wait_for_words(fleet.submit("tokens=100 step=0.02"))

    record = fleet.wait(fleet.submit("tokens=1", start_timeout=0.3))

    assert record.state == "expired" and record.error["code"] == "start_timeout"


def test_a_lower_priority_runs_first(fleet):
    fleet.start_worker(slots=1)
    first = fleet.submit("tokens=30 step=0.02")
    fleet.wait_for_words(first)

    late, early = fleet.submit("tokens=1", priority=50), fleet.submit("tokens=1", priority=-50)

    assert fleet.wait(early).finished_ms <= fleet.wait(late).started_ms


def test_a_model_that_refuses_to_load_fails_its_jobs_with_a_typed_error(fleet):
    fleet.start_worker(models={"broken": "refuse", "m": "fake"}, wait=False)

    record = fleet.wait(fleet.submit("tokens=1", model="broken"))

    assert record.state == "failed" and record.error["code"] == "load_failed"
    assert record.error["message"] == "the model broken cannot be loaded: the scripted model refuses"
    # The card says so too, from the worker's next word about itself on.
    card = until(lambda: (one := fleet.ledger.cards()["broken"])["state"] == "failed" and one)
    assert card["error"] == record.error | {"message": "the scripted model refuses"}
    # No turn is left behind, however many come.
    until(lambda: fleet.ledger.redis.llen("test.turn.broken") == 0)
    assert fleet.wait(fleet.submit("tokens=1")).state == "completed"


def test_a_model_that_one_worker_cannot_load_is_left_to_one_that_can(fleet):
    able = fleet.start_worker(models={"m": "load=1"}, wait=False)
    until(lambda: able.lines("worker_started"))
    unlucky = fleet.start_worker(models={"m": "refuse"}, wait=False)
    until(lambda: unlucky.lines("model_failed"))

    jobs = [fleet.submit("tokens=2") for _ in range(10)]

    assert {fleet.wait(job_id).state for job_id in jobs} == {"completed"}


def test_an_engine_that_dies_while_loading_is_given_up_after_three_times(fleet):
    worker = fleet.start_worker(models={"m": "die"}, wait=False)

    record = fleet.wait(fleet.submit("tokens=1"))

    assert record.state == "failed" and "3 times in a row" in record.error["message"]
    assert len(worker.lines("engine_died_loading")) == 3


def test_sigterm_finishes_what_runs_and_leaves_the_rest(fleet):
    worker = fleet.start_worker(slots=2)
    jobs = [fleet.submit("tokens=40 step=0.02") for _ in range(4)]
    for running in jobs[:2]:
        fleet.wait_for_words(running)

    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0

    records = [fleet.ledger.get(job_id) for job_id in jobs]
    assert sorted(record.state for record in records) == ["completed", "completed", "queued", "queued"]
    assert {record.deaths for record in records} == {0}
    assert fleet.ledger.cards() == {} and fleet.ledger.workers() == {}


def test_what_outlives_the_grace_is_handed_back_and_goes_on_where_it_was(fleet):
    worker = fleet.start_worker(drain_grace_seconds=0.3)
    job_id = fleet.submit("tokens=100 step=0.01")
    fleet.wait_for_words(job_id, 3)

    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    handed_back = fleet.ledger.get(job_id)
    fleet.start_worker()
    record = fleet.wait(job_id)

    assert (handed_back.state, handed_back.deaths, handed_back.attempts) == ("queued", 0, 0)
    assert (record.state, record.deaths, record.attempts) == ("completed", 0, 1)
    assert_published_once(fleet.ledger, record, 100)


def test_a_second_sigterm_hands_back_at_once(fleet):
    worker = fleet.start_worker(drain_grace_seconds=600)
    job_id = fleet.submit("tokens=4000 step=0.01")
    fleet.wait_for_words(job_id)

    worker.signal(signal.SIGTERM)
    until(lambda: worker.lines("draining"))
    worker.signal(signal.SIGTERM)

    assert worker.wait() == 0
    assert (fleet.state(job_id), fleet.ledger.get(job_id).deaths) == ("queued", 0)


def test_the_celery_process_imports_no_torch_and_logs_no_prompt(shared):
    worker = shared.workers[0]
    shared.wait(shared.submit("tokens=2 a-secret-word"))

    with open(f"/proc/{worker.pid}/maps") as maps:
        assert "libtorch" not in maps.read()
    log = worker.log_path.read_text()
    assert "a-secret-word" not in log


def test_lines_about_a_job_carry_its_id(shared):
    worker = shared.workers[0]

    job_id = shared.submit("tokens=2")
    shared.wait(job_id)

    mine = until(lambda: [line for line in worker.lines("job_ended") if line["job_id"] == job_id])
    assert [line["state"] for line in mine] == ["completed"]


def test_a_job_without_a_seed_gets_one_that_its_id_decides(shared):
    record = shared.wait(shared.submit("tokens=3"))

    assert json.loads(record.response)["choices"][0]["message"]["content"] == answer(seed_of(record.id), 3)


def test_celery_s_own_tools_see_each_running_job_as_a_task(shared, plain_celery):
    job_id = shared.submit("tokens=300 step=0.01")
    shared.wait_for_words(job_id)

    active = plain_celery.control.inspect(timeout=2).active()

    tasks = [task for tasks in active.values() for task in tasks]
    assert [(task["name"], task["args"], task["job_id"]) for task in tasks] == [("inferfleet.turn", ["m"], job_id)]
    assert list(active) == list(shared.ledger.workers())
    shared.ledger.cancel(job_id)
    shared.wait(job_id)


@contextlib.contextmanager
def watching(app):
    """What Flower sees: its own picture of all tasks, made from events."""
    picture = app.events.State()
    stopping = threading.Event()

    def watch():
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": picture.event})
            ready.set()
            while not stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    receiver.capture(limit=None, timeout=0.2, wakeup=False)

    ready = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    ready.wait()
    app.control.enable_events()
    try:
        yield picture
    finally:
        app.control.disable_events()
        stopping.set()
        thread.join()


def test_what_watches_celery_shows_each_job_by_its_id_and_says_how_it_ended(shared, plain_celery):
    with watching(plain_celery) as picture:
        # given: somebody listens, and the workers know it
        until(lambda: shared.wait(shared.submit("tokens=1")) and picture.tasks)
        good, bad, stopped = shared.submit("tokens=2"), shared.submit("fail"), shared.submit("tokens=3000 step=0.01")
        until(lambda: (task := picture.tasks.get(stopped)) and task.state == "STARTED")
        shared.ledger.cancel(stopped)

        seen = [until(lambda job=job: (task := picture.tasks.get(job)) and task.ready and task) for job in (good, bad)]
        revoked = until(lambda: (task := picture.tasks[stopped]).ready and task)

    assert [(task.name, task.state) for task in (*seen, revoked)] == [
        ("inferfleet.job", "SUCCESS"), ("inferfleet.job", "FAILURE"), ("inferfleet.job", "REVOKED")
    ]  # fmt: skip
    assert (seen[0].result, seen[1].exception) == ("completed", "nan_logits")
    assert seen[0].hostname in shared.ledger.workers() and seen[0].runtime > 0


def test_remote_control_s_shutdown_drains(fleet):
    worker = fleet.start_worker()
    job_id = fleet.submit("tokens=60 step=0.02")
    fleet.wait_for_words(job_id)

    with Celery(broker=fleet.redis_url, set_as_current=False) as app:
        app.control.shutdown()
    assert worker.wait() == 0

    assert fleet.state(job_id) == "completed"
    assert worker.lines("draining")


def test_a_worker_s_figures_are_on_the_fleet_s_page_and_on_its_own(fleet):
    worker = fleet.start_worker(metrics_port=0)
    fleet.wait(fleet.submit("tokens=5"))

    def figures():
        families = fleet.ledger.run(fleet_families())
        return {sample.name: sample.value for family in families for sample in family.samples}

    seen = until(lambda: (found := figures()).get("inferfleet_generation_tokens_total") and found)
    assert seen["inferfleet_generation_tokens_total"] == 5
    assert seen["inferfleet_jobs_total"] == seen["inferfleet_request_success_total"] == 1
    assert seen["inferfleet_time_to_first_token_seconds_count"] == 1
    assert {"inferfleet_num_requests_running", "inferfleet_kv_cache_usage_perc"} <= set(seen)
    port = worker.lines("metrics_served")[0]["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        assert 'inferfleet_jobs_total{model_name="m",status="completed"} 1.0' in page.read().decode()
