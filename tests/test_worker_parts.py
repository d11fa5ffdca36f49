"""The parts of a worker by themselves: gate, flight, publisher, child, checks, logs, metrics. No Celery runs here."""

import io
import json
import logging
import threading
import time

import pytest
from fake_worker import SCRIPTED
from fleet import until
from ledger_moves import claim, submit
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from inferfleet.tasks import errors
from inferfleet.tasks.contracts import parse_job
from inferfleet.tasks.doorbell import broker_url
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import Settings
from inferfleet.workers import checks, logs
from inferfleet.workers.app import FleetRequest, make_app
from inferfleet.workers.cards import card_of
from inferfleet.workers.chat_flight import ChatFlight
from inferfleet.workers.checks import Standing, accept_redis, check_redis, complaints_about
from inferfleet.workers.child import EngineChild, EngineGone, LoadRefused, pinned
from inferfleet.workers.flight import Ending, seed_of
from inferfleet.workers.gate import Gate
from inferfleet.workers.loading import Loading
from inferfleet.workers.metrics import Meter, fleet_families, put_snapshot
from inferfleet.workers.patience import until_answered
from inferfleet.workers.publisher import Publisher
from inferfleet.workers.requests import ChatErrand, usage_of
from inferfleet.workers.resident import Resident, State

OPEN = threading.Event()


def delta(text="a", *, index=0, token_ids=(1,), logprobs=None, finish_reason=None):
    return {"id": "x", "index": index, "token_ids": list(token_ids), "text": text, "logprobs": logprobs,
            "finish_reason": finish_reason}  # fmt: skip


# What the engine is asked for ----------------------------------------------------------------------------------------


def test_the_engine_hears_the_priority_that_the_job_has_in_the_queue(ledger):
    # given a job that named one priority, was submitted with another, as a batch's line is, and got a third
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    job = parse_job(json.dumps({"url": "/v1/chat/completions", "body": body, "priority": -5}).encode())
    submit(ledger, priority=50)
    ledger.update("job_1", priority=70)

    errand = ChatErrand(claim(ledger), job, {"max_model_len": 100}, job.body)

    assert errand.request()["priority"] == 70


# Gate ----------------------------------------------------------------------------------------------------------------


def test_one_who_must_be_alone_waits_for_all_inside_and_keeps_newcomers_out():
    gate = Gate()
    assert gate.enter(False, OPEN, 1) and gate.enter(False, OPEN, 1)
    alone = threading.Thread(target=gate.enter, args=(True, OPEN, 10))
    alone.start()
    while not gate._alone_waiting:
        time.sleep(0.001)

    assert not gate.enter(False, OPEN, 0.01)
    gate.leave()
    assert alone.is_alive()
    gate.leave()
    alone.join(5)

    assert not alone.is_alive()
    assert not gate.enter(False, OPEN, 0.01) and not gate.enter(True, OPEN, 0.01)
    gate.leave()
    assert gate.enter(False, OPEN, 1)


def test_who_is_turned_away_at_the_gate_leaves_no_trace():
    gate, turned_away = Gate(), threading.Event()
    gate.enter(False, OPEN, 1)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(gate.enter(True, turned_away, 10)))
    waiting.start()

    turned_away.set()
    gate.recheck()
    waiting.join(5)

    assert answers == [False]
    assert gate.enter(False, OPEN, 0.01)


# Flight and publisher ------------------------------------------------------------------------------------------------


def test_a_flight_merges_what_is_said_between_two_flushes_by_choice():
    flight = ChatFlight("job_1", 3, "m")

    first = flight.absorb(delta("a", token_ids=[1]))
    flight.absorb(delta("x", index=1, token_ids=[7]))
    flight.absorb(delta("b", token_ids=[2, 3], finish_reason="stop"))

    assert first
    events = flight.outgoing().events
    assert [(e["index"], e["delta"], e["token_ids"], e["finish_reason"]) for e in events] == [
        (0, "ab", [1, 2, 3], "stop"),
        (1, "x", [7], None),
    ]


def test_a_batch_in_doubt_is_sent_again_as_it_was():
    flight = ChatFlight("job_1", 3, "m")
    flight.absorb(delta("a"))

    in_doubt = flight.outgoing()
    flight.absorb(delta("b"))

    assert flight.outgoing() == in_doubt
    flight.published()
    assert flight.outgoing().token != in_doubt.token
    assert [event["delta"] for event in flight.outgoing().events] == ["b"]


def test_a_flight_starts_from_what_was_published():
    published = [
        {"type": "job.in_progress"},
        {"type": "response.output_text.delta", "index": 0, "delta": "ab", "token_ids": [1, 2], "logprobs": None},
    ]

    flight = ChatFlight("job_1", 4, "m", published=published)
    flight.absorb(delta("c", token_ids=[3]))

    assert flight.resume()["0"]["text"] == "abc" and flight.num_new_tokens == 1


def test_the_first_ending_of_a_flight_counts():
    flight = ChatFlight("job_1", 1, "m")

    assert flight.end(Ending.STALE) and not flight.end(Ending.FINISHED)
    assert flight.ending is Ending.STALE


def test_a_seed_fits_the_contract_and_is_the_same_for_ever():
    assert seed_of("job_" + "0" * 32) == 1035841574406073704
    assert 0 <= seed_of("job_x") < 2**63


def test_the_publisher_repeats_until_the_ledger_answers_and_then_ends_the_flight():
    sent = []

    def publish(batch):
        sent.append([out for _, out in batch])
        if len(sent) < 3:
            raise errors.LedgerUnavailable("away")
        return ["ok"] * len(batch)

    flight = ChatFlight("job_1", 1, "m")
    publisher = Publisher(publish, cancel=lambda flight: None)
    flight.absorb(delta("a"))
    flight.finish({"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0})
    publisher.touch([flight], urgent=True)

    assert flight.ended.wait(10) and flight.ending is Ending.FINISHED
    assert sent[0] == sent[1] == sent[2]
    publisher.stop()


@pytest.mark.parametrize(("word", "ending"), [("stale", Ending.STALE), ("full", Ending.FAILED)])
def test_a_flight_that_may_not_publish_ends_and_is_cancelled_in_the_engine(word, ending):
    cancelled = []
    publisher = Publisher(lambda batch: [word], cancelled.append)
    flight = ChatFlight("job_1", 1, "m")
    flight.absorb(delta("a"))
    publisher.touch([flight], urgent=True)

    assert flight.ended.wait(10) and flight.ending is ending
    publisher.stop()
    assert cancelled == [flight]


def test_a_flight_that_cannot_be_published_takes_no_other_with_it():
    def publish(batch):
        if any("bad" in event["delta"] for _, out in batch for event in out.events):
            raise UnicodeEncodeError("utf-8", "bad", 0, 1, "surrogates not allowed")
        return ["ok"] * len(batch)

    good, bad = ChatFlight("job_1", 1, "m"), ChatFlight("job_2", 1, "m")
    publisher = Publisher(publish, cancel=lambda flight: None)
    for flight, words in ((good, "good"), (bad, "bad")):
        flight.absorb(delta(words))
        flight.finish({"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0})
    publisher.touch([good, bad], urgent=True)

    assert good.ended.wait(10) and bad.ended.wait(10)
    assert (good.ending, bad.ending) == (Ending.FINISHED, Ending.FAILED)
    publisher.stop()


def test_a_resumed_flight_that_is_stopped_before_the_engine_still_counts_what_was_published():
    event = {"type": "response.output_text.delta", "index": 0, "delta": "ab", "token_ids": [1, 2], "logprobs": None}
    flight = ChatFlight("job_1", 2, "m", published=[event])
    flight.finish({})

    usage = usage_of(flight)

    assert (usage["completion_tokens"], usage["total_tokens"]) == (2, 2)


# Child ---------------------------------------------------------------------------------------------------------------


def test_a_child_that_dies_while_loading_says_how():
    child, _ = EngineChild.start(("/bin/sh", "-c", "exit 3"), "cpu")

    with pytest.raises(EngineGone, match="status 3"):
        child.load("m", {}, 60)


@pytest.mark.parametrize(
    ("device", "count", "visible", "pinned_to", "inner"),
    [
        ("cpu", 1, None, None, "cpu"),
        ("cpu", 2, None, None, "cpu"),
        ("cuda", 1, "2,3", "2,3", "cuda"),
        ("cuda", 2, "2,3", "2,3", "cuda"),
        ("cuda:1", 1, None, "1", "cuda:0"),
        ("cuda:1", 1, "4,6", "6", "cuda:0"),
        ("cuda:2", 2, None, "2,3", "cuda:0"),
        ("cuda:1", 2, "4,6,5,7", "6,5", "cuda:0"),
    ],
)
def test_a_child_is_pinned_to_its_devices(device, count, visible, pinned_to, inner):
    env, name = pinned(device, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, count)

    assert (env.get("CUDA_VISIBLE_DEVICES"), name) == (pinned_to, inner)


@pytest.mark.parametrize("visible", ["4,6", ""])
def test_a_device_that_is_hidden_is_refused_by_name(visible):
    with pytest.raises(LoadRefused, match="no cuda:2"):
        pinned("cuda:2", {"CUDA_VISIBLE_DEVICES": visible})


def test_the_second_device_of_a_split_model_is_refused_by_name_too():
    with pytest.raises(LoadRefused, match="no cuda:2"):
        pinned("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,6"}, 2)


def test_an_engine_that_cannot_be_started_is_refused():
    with pytest.raises(LoadRefused, match="cannot be started"):
        EngineChild.start(("/nowhere/python",), "cpu")


# Resident ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def resident(monkeypatch):
    """resident(path, on_change=..., load_seconds=...) starts one with a scripted engine."""
    monkeypatch.setattr("inferfleet.workers.resident.BACKOFF", (0.0, 0.01))
    publisher = Publisher(lambda batch: ["ok"] * len(batch), cancel=lambda flight: None)
    started = []

    def start(path="fake", on_change=lambda resident: None, **options):
        spec = {"path": path, "device": "cpu", "max_num_seqs": 1}
        started.append(Resident("m", spec, command=SCRIPTED, publisher=publisher, on_change=on_change, **options))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()
    publisher.stop()


def test_an_engine_that_hangs_while_loading_is_killed_and_after_three_times_the_model_has_failed(resident):
    hanging = resident("load=3600", load_seconds=0.2)

    until(lambda: hanging.state is State.FAILED)

    assert "had not loaded within 0.2 s (load_seconds), 3 times" in hanging.failure["message"]


def test_an_engine_that_moves_when_its_time_is_over_is_ended_with_the_place_it_had_reached(resident):
    moving = resident("parts=8 load=3600", load_seconds=0.5)

    until(lambda: moving.state is State.FAILED)

    assert "within 0.5 s (load_seconds), at read 7 MiB of 8 MiB (87%), 3 times" in moving.failure["message"]


def test_how_far_a_model_is_stands_in_its_card_until_it_is_there(resident):
    told = []
    loading = resident("parts=4", on_progress=lambda resident: told.append(card_of(resident, "w")))

    until(lambda: loading.state is State.READY)

    assert [card["loading"] for card in told] == [
        {"phase": "read", "done": part << 20, "total": 4 << 20, "percent": 25 * part} for part in range(4)
    ]
    assert {card["state"] for card in told} == {"loading"}
    assert "loading" not in card_of(loading, "w")


def test_a_process_that_tells_nonsense_about_its_progress_is_ended(resident, monkeypatch):
    kept = Loading.of
    monkeypatch.setattr(Loading, "of", lambda message: kept({"phase": "read", "done": "much"}))
    odd = resident("parts=1")

    until(lambda: odd._child is None and odd.state is State.LOADING)


def test_whatever_breaks_around_an_engine_it_is_started_again(resident, monkeypatch):
    start, trouble = EngineChild.start, [OSError(24, "Too many open files")]

    def start_or_break(*args):
        if trouble:
            raise trouble.pop()
        return start(*args)

    def on_change(resident):
        if resident.state is State.READY and resident.num_restarts == 0:
            raise RuntimeError("the listener fails")

    monkeypatch.setattr(EngineChild, "start", start_or_break)
    survivor = resident(on_change=on_change)

    until(lambda: survivor.state is State.READY and survivor.num_restarts == 1)
    assert not trouble


# Checks --------------------------------------------------------------------------------------------------------------


def test_a_fit_redis_passes_and_says_what_a_power_cut_costs(ledger):
    standing, complaints = check_redis(ledger, allow_unsafe=False)

    assert complaints == [] and standing.fsync == "everysec"
    assert standing.durability == "at most the last second is lost"


def test_an_unfit_redis_is_refused_with_the_command_that_mends_it(own_redis):
    ledger = Ledger.from_url(own_redis.url)
    ledger.redis.config_set("maxmemory-policy", "allkeys-lru")
    ledger.redis.config_set("appendonly", "no")

    with pytest.raises(errors.RedisMisconfigured) as refusal:
        check_redis(ledger, allow_unsafe=False)
    _, complaints = check_redis(ledger, allow_unsafe=True)

    for fix in ("redis-cli CONFIG SET maxmemory-policy noeviction", "redis-cli CONFIG SET appendonly yes"):
        assert fix in refusal.value.message and any(fix in complaint for complaint in complaints)
    assert "allow_unsafe_redis" in refusal.value.message
    ledger.close()


def test_an_unfit_redis_that_is_let_pass_is_complained_of_in_the_log(own_redis, monkeypatch):
    settings = Settings(redis_url=own_redis.url, allow_unsafe_redis=True)
    ledger = Ledger.from_url(settings.redis_url)
    ledger.redis.config_set("maxmemory-policy", "allkeys-lru")
    said = []
    monkeypatch.setattr(checks.log, "warning", lambda event, complaint: said.append((event, complaint)))

    assert accept_redis(ledger, settings).eviction == "allkeys-lru"

    [(event, complaint)] = said
    assert event == "redis_unsafe" and "maxmemory-policy noeviction" in complaint
    with pytest.raises(errors.RedisMisconfigured):
        accept_redis(ledger, Settings(redis_url=own_redis.url))
    ledger.close()


def test_a_redis_that_is_too_old_is_refused_even_for_throw_away_use(ledger, monkeypatch):
    old = Standing(version="6.0.16", eviction="noeviction", append_only=True, fsync="always")
    monkeypatch.setattr("inferfleet.workers.checks.ask", lambda client: old)

    with pytest.raises(errors.RedisMisconfigured, match=r"6\.0\.16 is too old: 6\.2"):
        check_redis(ledger, allow_unsafe=True)


def test_a_redis_that_still_reads_its_data_is_not_called_unfit(ledger, monkeypatch):
    info = {"redis_version": "7.0.15", "loading": 1, "aof_enabled": 0}
    monkeypatch.setattr(ledger.redis, "info", lambda: info)

    with pytest.raises(errors.LedgerUnavailable, match="still loading its data"):
        check_redis(ledger, allow_unsafe=False)


def test_a_service_that_hides_its_policy_is_believed():
    assert complaints_about(Standing("7.2.4", eviction=None, append_only=True, fsync=None)) == []


# Patience, Celery, logs, metrics -------------------------------------------------------------------------------------


def test_patience_ends_when_it_is_told_to_give_up():
    give_up = threading.Event()
    give_up.set()

    def away():
        raise errors.LedgerUnavailable("away")

    with pytest.raises(errors.LedgerUnavailable):
        until_answered(away, give_up)


def test_the_celery_app_speaks_json_only_and_acknowledges_nothing():
    app = make_app(Settings(), ["q"])

    assert app.conf.accept_content == ["json"] and app.conf.result_accept_content == ["json"]
    assert app.conf.worker_disable_prefetch and not app.conf.task_acks_late
    assert app.conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert all(queue.no_ack for queue in app.conf.task_queues)
    assert app.Task.Request is FleetRequest
    app.intake.shut()


@pytest.mark.parametrize(
    ("redis_url", "in_kombu_s_words"),
    [
        ("redis://:secret@host:1/2", "redis://:secret@host:1/2"),
        ("unix:///run/redis.sock?db=3", "redis+socket:///run/redis.sock?virtual_host=3"),
        ("rediss://host:1/2", "rediss://host:1/2?ssl_cert_reqs=required"),
        ("rediss://host:1/2?ssl_cert_reqs=none", "rediss://host:1/2?ssl_cert_reqs=none"),
    ],
)
def test_celery_reaches_the_server_that_the_ledger_reaches(redis_url, in_kombu_s_words):
    assert broker_url(redis_url) == in_kombu_s_words


def test_logs_are_json_off_a_terminal_and_never_show_what_a_user_wrote(request):
    stream = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    request.addfinalizer(lambda: (root.handlers.__setitem__(slice(None), before[0]), root.setLevel(before[1])))
    logs.configure("info", "auto", stream)

    with logs.bound(job_id="job_7"):
        logs.get("test").info("heard", prompt="my secret", tokens=3)
        logging.getLogger("celery.worker").warning("gone")
        logging.getLogger("celery.app.trace").info("a line for every turn")

    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["event"], first["job_id"], first["tokens"], first["part"]) == ("heard", "job_7", 3, "test")
    assert "my secret" not in stream.getvalue()
    assert (second["event"], second["job_id"], second["part"]) == ("gone", "job_7", "celery.worker")


def test_a_worker_s_figures_reach_the_scrape_through_redis(ledger):
    meter = Meter()
    meter.lease_lost("m")
    for worker in ("w1", "w2"):
        ledger.run(put_snapshot(worker, meter.snapshot(), 60))
    ledger.run(put_snapshot("gone", meter.snapshot(), 0))

    class Families:
        def collect(self):
            return ledger.run(fleet_families())

    registry = CollectorRegistry()
    registry.register(Families())
    page = generate_latest(registry).decode()

    assert 'inferfleet_leases_lost_total{model_name="m",worker="w1"} 1.0' in page
    assert 'inferfleet_leases_lost_total{model_name="m",worker="w2"} 1.0' in page
    assert "gone" not in page and "_created" not in page
