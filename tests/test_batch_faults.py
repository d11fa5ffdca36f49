"""Batches under faults: a runner that is killed, two that believe they have the same batch, a wire that loses replies,
a store that is away; and how much memory a runner needs. In all of them every line ends once.
"""

import json
import signal
import threading
import time
from itertools import pairwise

import psutil
import pytest
from chaosproxy import ChaosProxy
from fleet import until
from live_api import running_api
from live_batches import NullWorker, RunnerProcess, jsonl, line, read_lines, running_batches, start, wait_for_end
from swift_s3 import SwiftServer

from inferfleet.tasks import batches, files
from inferfleet.tasks.batches import Line
from inferfleet.tasks.errors import BatchState, FileInUse
from inferfleet.tasks.files import Part
from inferfleet.tasks.shelf import marked, selected, unmarked
from inferfleet.tasks.stores import RedisStore
from inferfleet.workers.batches.plan import Rules, make_plan
from inferfleet.workers.batches.spool import Spool

FAST = {"lease_seconds": 1, "heartbeat_seconds": 0.3}


def check_once(client, batch, lines):
    """Every line stands in one file, and the counts say so."""
    output, errors = (read_lines(client, file_id) for file_id in (batch.output_file_id, batch.error_file_id))
    assert sorted(entry["custom_id"] for entry in output + errors) == sorted(entry["custom_id"] for entry in lines)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (len(lines), len(output), len(errors))


def null_lines(count, **body):
    return [line(f"n-{number}", f"question {number}", model="null", **body) for number in range(count)]


@pytest.fixture
def api(redis_url):
    with running_api(redis_url) as api:
        yield api


# Processes -----------------------------------------------------------------------------------------------------


def test_a_runner_that_is_killed_again_and_again_loses_no_line_and_runs_none_twice(api, tmp_path):
    client, lines = api.sdk(), null_lines(900)
    with NullWorker(api.settings.redis_url, api.settings.namespace) as worker:
        made = start(client, lines)
        runners = [RunnerProcess(api.settings, tmp_path, **FAST)]
        # When its runner is killed at three places, the first of them as soon as a line has its answer
        for ended in (1, 300, 600):
            until(lambda ended=ended: client.batches.retrieve(made.id).request_counts.completed >= ended)
            runners[-1].kill()
            runners.append(RunnerProcess(api.settings, tmp_path, **FAST))
        batch = wait_for_end(client, made.id)
        runners[-1].kill()
    # Then
    assert batch.status == "completed"
    check_once(client, batch, lines)
    assert set(worker.answers.values()) == {1}
    assert len(worker.answers) == 900


def test_a_runner_that_is_asked_to_stop_hands_its_batch_back_at_once(api, tmp_path):
    client, lines = api.sdk(), [line("held", "hold on"), line("quick", "say hi")]
    first = RunnerProcess(api.settings, tmp_path, lease_seconds=600, heartbeat_seconds=5)
    made = start(client, lines)
    until(lambda: client.batches.retrieve(made.id).status == "in_progress")
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(15) == 0
    # Then another takes it, long before the lease is over
    api.worker.ring("paper", 2)  # by hand, since the first runner rang for workers of another kind
    with running_batches(api.settings, api.worker.ring):
        until(lambda: client.batches.retrieve(made.id).request_counts.completed == 1, 20)
        client.batches.cancel(made.id)
        check_once(client, wait_for_end(client, made.id), lines)


def test_two_runners_share_the_batches_and_each_batch_runs_once(api):
    client, lines = api.sdk(), null_lines(200)
    settings, ring = api.settings, api.worker.ring
    with (
        NullWorker(settings.redis_url, settings.namespace) as worker,
        running_batches(settings, ring, batch_slots=1),
        running_batches(settings, ring, batch_slots=1),
    ):
        made = [start(client, lines).id for _ in range(4)]
        for batch_id in made:
            check_once(client, wait_for_end(client, batch_id), lines)
    assert set(worker.answers.values()) == {1}


# The wire and the store ------------------------------------------------------------------------------------------


def test_lost_replies_double_nothing(api, redis_server):
    client, lines = api.sdk(), null_lines(150)
    with ChaosProxy(redis_server.port) as proxy, NullWorker(api.settings.redis_url, api.settings.namespace) as worker:
        made = start(client, lines)
        proxy.faults.lose_chance = 0.05
        with running_batches(api.settings, api.worker.ring, redis_url=proxy.url):
            batch = wait_for_end(client, made.id)
            proxy.faults.lose_chance = 0
        assert proxy.lost > 5
    assert batch.status == "completed"
    check_once(client, batch, lines)
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (300, 150)
    assert set(worker.answers.values()) == {1}


def test_a_store_that_is_away_is_waited_for(session_swift, redis_url, tmp_path):
    # Given answers large enough to be written while the batch runs
    lines = null_lines(400)
    with (
        SwiftServer(session_swift.python, tmp_path / "swift") as swift,
        running_api(redis_url, **swift.settings("batches", deadline_seconds=1)) as api,
        NullWorker(api.settings.redis_url, api.settings.namespace, size=20_000),
    ):
        client = api.sdk()
        made = start(client, lines)
        swift.kill("object")
        with running_batches(api.settings, api.worker.ring):
            time.sleep(1)
            assert client.batches.retrieve(made.id).status == "validating"
            swift.start("object")
            until(lambda: client.batches.retrieve(made.id).request_counts.completed >= 20)
            swift.kill("object")
            time.sleep(1)
            swift.start("object")
            batch = wait_for_end(client, made.id)
        assert batch.status == "completed"
        check_once(client, batch, lines)


# Fences ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(ledger):
    """A batch of one file that a runner holds, with two lines begun."""
    store = RedisStore(ledger, 60)
    file_id = files.new_file_id()
    data = jsonl([line("a"), line("b")])
    ledger.run(files.open_file(file_id, "default", "in.jsonl", "batch"))
    stored = store.put(files.part_key(file_id, 0, 0), data, "x")
    part = Part(stored.key, stored.size_bytes, stored.sha256)
    for _ in range(2):
        ledger.run(files.add_part(file_id, 0, part, in_ledger=True))
        ledger.run(files.close_file(file_id, len(data), 3600, body_hash="h"))
    made, _ = ledger.run(
        batches.create(
            batches.new_batch_id(), "default", body_hash="h", window="1h", window_seconds=3600,
            endpoint="/v1/chat/completions", keep_seconds=3600, input_file_id=file_id,
        )
    )  # fmt: skip
    batch = ledger.run(batches.claim("first", 10_000))
    assert batch.id == made
    assert ledger.run(batches.claim("second", 10_000)) is None
    assert ledger.run(batches.start(batch.id, batch.fence, 2, "paper")) == "in_progress"
    return batch


def ends(*numbers):
    return [Line(number, marked(b'{"n": %d}' % number, output=number == 0), failed=number == 1) for number in numbers]


def test_what_a_runner_says_twice_counts_once(ledger, held):
    store, ident = RedisStore(ledger, 60), (held.id, held.fence)
    assert ledger.run(batches.commit(*ident, 0, ends(0))) > 0
    assert ledger.run(batches.commit(*ident, 0, ends(0))) == 0
    assert ledger.run(batches.finish(*ident, "end", 3600)) == "open"
    assert ledger.run(batches.commit(*ident, 1, ends(1))) > 0
    record = ledger.run(batches.get(held.id))
    assert (record.completed, record.failed, record.lines) == (1, 1, 2)
    tail = ledger.run(batches.read_tail(held.id))
    stored = store.put(files.part_key(held.id, held.fence, 0), tail, "x")
    part = Part(stored.key, stored.size_bytes, stored.sha256, 2)
    assert [ledger.run(batches.seal(*ident, 0, part, in_ledger=True)) for _ in range(2)] == ["ok", "same"]
    assert [ledger.run(batches.finish(*ident, "finalizing", 3600)) for _ in range(2)] == ["finalizing"] * 2
    with pytest.raises(BatchState):
        ledger.run(batches.cancel(held.id))
    assert [ledger.run(batches.finish(*ident, "end", 3600)) for _ in range(2)] == ["completed"] * 2
    record = ledger.run(batches.get(held.id))
    shown = [ledger.run(files.get_file(file_id)) for file_id in (record.output_file_id, record.error_file_id)]
    assert [(file.size, file.kind) for file in shown] == [(9, "output"), (9, "error")]
    # one file's deletion leaves the other's lines, the second takes them along
    assert ledger.run(files.delete_file(shown[0].id)) == []
    assert store.get(stored.key, stored.sha256) == tail
    assert ledger.run(files.delete_file(shown[1].id)) == [stored.key]
    assert [key for key in ledger.redis.keys(f"{ledger.prefix}output:*") if held.id.encode() in key] == []


def test_a_runner_that_lost_its_batch_can_change_nothing(ledger, held):
    ledger.redis.zadd(f"{ledger.prefix}batches:open", {held.id: 0})
    second = ledger.run(batches.claim("second", 10_000))
    assert second.id == held.id
    assert second.fence > held.fence
    old = (held.id, held.fence)
    assert ledger.run(batches.beat(*old, 10_000)) is None
    assert ledger.run(batches.start(*old, 5, None)) is None
    assert ledger.run(batches.commit(*old, 0, ends(0))) is None
    assert ledger.run(batches.reject(*old, [])) is None
    assert ledger.run(batches.seal(*old, 0, Part("k", 1, "0"), in_ledger=True)) == "stale"
    assert ledger.run(batches.finish(*old, "end", 60)) == "stale"
    record = ledger.run(batches.get(held.id))
    assert (record.status, record.total, record.lines) == ("in_progress", 2, 0)
    assert ledger.run(batches.beat(second.id, second.fence, 10_000)).status == "in_progress"


def test_a_part_that_is_gone_is_not_put_on_a_shelf(ledger, held):
    ledger.run(batches.commit(held.id, held.fence, 0, ends(0, 1)))
    part = Part("never", len(ledger.run(batches.read_tail(held.id))), "0", 2)
    with pytest.raises(Exception, match="not in the store"):
        ledger.run(batches.seal(held.id, held.fence, 0, part, in_ledger=True))
    assert len(ledger.run(batches.read_tail(held.id))) == part.size


def test_an_ended_batch_is_forgotten_and_frees_its_input(ledger, held):
    with pytest.raises(FileInUse):
        ledger.run(files.delete_file(held.input_file_id))
    ledger.redis.zadd(f"{ledger.prefix}expiring", {held.input_file_id: 1})
    assert ledger.run(files.sweep_files()) == (0, [])
    assert ledger.run(batches.reject(held.id, held.fence, [{"code": "x"}])) == "failed"
    ledger.run(files.delete_file(held.input_file_id))
    assert ledger.run(batches.sweep()) == 0
    ledger.redis.zadd(f"{ledger.prefix}batches:ended", {held.id: 1})
    assert ledger.run(batches.sweep()) == 1
    left = [key for key in ledger.redis.keys(f"{ledger.prefix}*") if held.id.encode() in key]
    assert left == []


# Order and memory --------------------------------------------------------------------------------------------------


def test_lines_that_share_a_prompt_follow_each_other_in_each_model():
    rules = Rules("/v1/chat/completions", {"a", "b"}, 1 << 20)
    system = ["You are a bird. " * 40, "You are a fish. " * 40]
    with Spool() as spool:
        for number in range(40):
            entry = line(f"{number}", model="ab"[number % 2])
            entry["body"]["messages"].insert(0, {"role": "system", "content": system[number // 2 % 2]})
            entry["body"]["messages"][-1]["content"] = f"question {number}"
            spool.write(jsonl([entry]))
        plan = make_plan(spool, rules)
        groups = {
            model: [json.loads(spool.line(place))["body"]["messages"][0]["content"] for place in order]
            for model, order in plan.order.items()
        }
    assert (sorted(groups), plan.total, plan.model) == (["a", "b"], 40, None)
    for texts in groups.values():
        assert sum(before != after for before, after in pairwise(texts)) == 1


def test_more_lines_than_a_batch_may_have_are_refused():
    with Spool() as spool:
        for number in range(50_001):
            spool.write(b'{"custom_id":"%d","method":"POST","url":"/u","body":{"model":"m"}}\n' % number)
        plan = make_plan(spool, Rules("/u", {"m"}, 1000))
    assert [(error["code"], error["line"]) for error in plan.errors] == [("too_many_lines", 50_001)]


def test_a_shelf_shows_both_files_and_any_stretch_of_lines():
    data = marked(b"1", output=True) + marked(b"2", output=False) + marked(b"3", output=True)
    assert (selected(data, "output"), selected(data, "error"), selected(b"raw", "")) == (b"1\n3\n", b"2\n", b"raw")
    assert [unmarked(data), unmarked(data, 1), unmarked(data, 0, 2), unmarked(data, -5, 1), unmarked(data, 0, 0)] == [
        b"1\n2\n3\n", b"2\n3\n", b"1\n2\n", b"1\n", b""
    ]  # fmt: skip


def run_and_watch(api, tmp_path, count, padding, answer):
    """Seconds, and the most MiB that a runner of its own process had beyond what it began with."""
    client, peaks, done = api.sdk(), [], threading.Event()
    with NullWorker(api.settings.redis_url, api.settings.namespace, size=answer) as worker:
        runner = RunnerProcess(api.settings, tmp_path)
        until(lambda: b"batches_ready" in runner.log.read_bytes())
        process = psutil.Process(runner.process.pid)
        wait_for_end(client, start(client, null_lines(20)).id)  # loads what is loaded at the first batch
        worker.answers.clear()
        before = process.memory_info().rss

        def watch():
            while not done.wait(0.02):
                peaks.append(process.memory_info().rss - before)

        watcher = threading.Thread(target=watch)
        file = client.files.create(file=("in.jsonl", jsonl(null_lines(count, user="u" * padding))), purpose="batch")
        watcher.start()
        started = time.monotonic()
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        batch = wait_for_end(client, made.id, 800)
        seconds = time.monotonic() - started
        done.set()
        watcher.join()
        runner.kill()
    assert batch.request_counts.model_dump() == {"total": count, "completed": count, "failed": 0}
    assert len(worker.answers) == count
    assert set(worker.answers.values()) == {1}
    return seconds, max(peaks) / 2**20, file.bytes


def test_a_runner_holds_a_window_of_lines_and_not_the_file(api, tmp_path):
    # Given answers of together 24 MB
    _, peak, _ = run_and_watch(api, tmp_path, 1200, 500, 20_000)
    # Then the runner never had as much
    assert peak < 16


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_thousand_lines_run_in_the_same_memory(api, tmp_path, record_property):
    seconds, peak, size = run_and_watch(api, tmp_path, 50_000, 500, 2000)
    print(f"50,000 lines, {size / 1e6:.0f} MB in: {seconds:.1f} s, {peak:.1f} MiB beyond the idle runner")
    assert peak < 64
