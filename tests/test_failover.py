"""Another Redis takes over, a replica that lagged: what was accepted last is gone, and all that is left still fits.

The replica hears its primary through a proxy that falls silent; the fleet speaks to Redis through another, which leads
to the replica once the primary was killed.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import redis
from chaosproxy import ChaosProxy
from conftest import RedisServer
from fleet import Fleet, assert_published_once, deltas, until
from ledger_moves import claim, delta, submit, types
from live_api import api_of_workers, running_api
from live_batches import NullWorker, jsonl, line, read_lines, running_batches, start, wait_for_end
from outbox_moves import record, take

from inferfleet.tasks import batches, files, names
from inferfleet.tasks.batches import Line
from inferfleet.tasks.client import Client
from inferfleet.tasks.errors import Conflict
from inferfleet.tasks.files import Part
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.shelf import marked
from inferfleet.tasks.stores import RedisStore

HOOK = "https://receiver.example/hook"


class Pair:
    """A primary and its replica; `url` leads to whichever of them is the primary."""

    def __init__(self, binary, folder, stack):
        self.servers = []
        for name in ("primary", "replica"):
            (folder / name).mkdir()
            self.servers.append(stack.enter_context(RedisServer(binary, folder / name, fsync="always")))
        self.primary, self.replica = self.servers
        self.link = stack.enter_context(ChaosProxy(self.primary.port))
        self.front = stack.enter_context(ChaosProxy(self.primary.port))
        self.url = self.front.url
        with redis.Redis(port=self.primary.port) as client:
            client.config_set("repl-diskless-sync-delay", 0)
        with redis.Redis(port=self.replica.port) as client:
            client.replicaof("127.0.0.1", self.link.port)
            until(lambda: client.info("replication")["master_link_status"] == "up")

    def grow_old(self):
        """Until the replica has run for so long that this can be seen: Redis tells whole seconds."""
        with redis.Redis(port=self.replica.port) as client:
            until(lambda: client.info("server")["uptime_in_seconds"] >= 2)

    def lag(self):
        """From here on the replica hears nothing more."""
        with redis.Redis(port=self.primary.port) as client:
            client.incr("mark")  # WAIT is about the writes of its own connection, and all before them
            assert client.wait(1, 10_000) == 1
        self.link.faults.mute = True

    def fail_over(self):
        self.primary.kill()
        with redis.Redis(port=self.replica.port) as client:
            client.replicaof("NO", "ONE")
        self.front.target_port = self.replica.port
        self.front.reset_all()


@pytest.fixture
def pair(redis_binary_path, tmp_path):
    with ExitStack() as stack:
        yield Pair(redis_binary_path, tmp_path, stack)


@pytest.fixture
def ledger(pair):
    ledger = Ledger.from_url(pair.url, "test")
    yield ledger
    ledger.close()


def a_batch(ledger):
    """One of three lines that waits for a runner."""
    file_id, data = files.new_file_id(), jsonl([line(name) for name in "abc"])
    ledger.run(files.open_file(file_id, "default", "in.jsonl", "batch"))
    stored = RedisStore(ledger, 60).put(files.part_key(file_id, 0, 0), data, "x")
    ledger.run(files.add_part(file_id, 0, Part(stored.key, stored.size_bytes, stored.sha256), in_ledger=True))
    ledger.run(files.close_file(file_id, len(data), 3600, body_hash="h"))
    options = {"window": "1h", "window_seconds": 3600, "endpoint": names.CHAT_URL, "keep_seconds": 3600}
    made = batches.create(batches.new_batch_id(), "default", body_hash="h", input_file_id=file_id, **options)
    return ledger.run(made)[0]


def ended(number):
    return [Line(number, marked(b'{"n": %d}' % number, output=True), failed=False)]


# The ledger ----------------------------------------------------------------------------------------------------------


def test_a_claim_that_the_replica_never_saw_bears_another_fence_than_the_next(pair, ledger):
    submit(ledger, webhook=HOOK)
    pair.lag()
    lost = claim(ledger, "t1")
    pair.fail_over()
    # when the job is claimed again, the first claim can change nothing
    found = claim(ledger, "t2")
    assert found.fence > lost.fence
    assert ledger.publish("job_1", lost.fence, [delta("x")], "p1") == "stale"
    assert ledger.beat("w", [("job_1", lost.fence)], 60_000) == {"job_1": "stale"}
    assert ledger.complete("job_1", lost.fence, state="completed", response=b"{}") == "stale"
    assert names.output_id("job_1", found.fence, 0) != names.output_id("job_1", lost.fence, 0)
    assert ledger.complete("job_1", found.fence, state="completed", response=b"{}") == "done"


def test_a_batch_and_a_delivery_that_were_taken_unseen_are_taken_under_another_fence(pair, ledger):
    made = a_batch(ledger)
    submit(ledger, webhook=HOOK)
    ledger.cancel("job_1")
    pair.lag()
    lost_run, lost_delivery = ledger.run(batches.claim("first", 10_000)), take(ledger)
    pair.fail_over()
    run, delivery = ledger.run(batches.claim("second", 10_000)), take(ledger)
    assert run.id == lost_run.id == made
    assert run.fence > lost_run.fence
    assert ledger.run(batches.beat(made, lost_run.fence, 10_000)) is None
    # the same event, so that the receiver knows it again
    assert (delivery.id, delivery.event) == (lost_delivery.id, lost_delivery.event)
    assert delivery.fence > lost_delivery.fence
    assert record(ledger, lost_delivery).word == "stale"
    assert record(ledger, delivery).word == "delivered"


def test_a_job_whose_last_words_were_lost_goes_on_from_the_log_without_a_death(pair, ledger):
    submit(ledger)
    found = claim(ledger, "t1")
    assert ledger.publish("job_1", found.fence, [delta("a")], "1", behind="") == "ok"
    pair.lag()
    assert ledger.publish("job_1", found.fence, [delta("b")], "2", behind="1") == "ok"
    pair.fail_over()
    # when its holder goes on, its words would leave a hole
    assert ledger.publish("job_1", found.fence, [delta("c")], "3", behind="2") == "stale"
    kept = ledger.get("job_1")
    assert (kept.state, kept.deaths, kept.attempts) == ("queued", 0, 0)
    again = claim(ledger, "t2")
    assert [event["delta"] for event in again.published] == ["a"]
    assert again.attempt == 1


def test_an_end_whose_last_words_were_lost_is_no_end(pair, ledger):
    submit(ledger)
    found = claim(ledger, "t1")
    pair.lag()
    assert ledger.publish("job_1", found.fence, [delta("all")], "1", behind="") == "ok"
    pair.fail_over()
    assert ledger.complete("job_1", found.fence, state="completed", response=b"{}", behind="1") == "stale"
    assert (ledger.get("job_1").state, types(ledger)) == ("queued", ["job.queued", "job.in_progress", "job.queued"])


def test_a_job_that_was_cancelled_ends_so_though_its_last_words_were_lost(pair, ledger):
    submit(ledger)
    found = claim(ledger, "t1")
    ledger.cancel("job_1")
    pair.lag()
    ledger.publish("job_1", found.fence, [delta("x")], "1", behind="")
    pair.fail_over()
    assert ledger.complete("job_1", found.fence, state="cancelled", behind="1") == "stale"
    assert ledger.get("job_1").state == "cancelled"


def test_lines_of_a_batch_whose_ends_were_lost_are_not_taken_for_written(pair, ledger):
    made = a_batch(ledger)
    held = ledger.run(batches.claim("first", 10_000))
    ledger.run(batches.start(made, held.fence, 3, None))
    assert ledger.run(batches.commit(made, held.fence, 0, ended(0))) > 0
    pair.lag()
    assert ledger.run(batches.commit(made, held.fence, 1, ended(1))) > 0
    pair.fail_over()
    assert ledger.run(batches.commit(made, held.fence, 2, ended(2))) is None
    # nor is a part that comes behind one which is lost
    assert ledger.run(batches.seal(made, held.fence, 1, Part("part", 1, "0"), in_ledger=True)) == "stale"
    assert ledger.run(batches.get(made)).lines == 1


def test_another_event_of_a_job_has_another_id_though_it_has_the_same_number(pair, ledger):
    submit(ledger, webhook=HOOK, webhook_words=("progress", *names.WEBHOOK_ENDS))
    found = claim(ledger, "t1")
    pair.lag()
    told = {"type": names.PROGRESS, "step": 1, "steps": 2}
    ledger.publish("job_1", found.fence, [told], "1")
    lost = take(ledger)
    pair.fail_over()
    ledger.complete("job_1", found.fence, state="completed", response=b"{}")
    ends = take(ledger)
    assert (lost.type, ends.type) == ("job.progress", "job.completed")
    assert lost.body.split(b'"seq":')[1][:1] == ends.body.split(b'"seq":')[1][:1]
    assert lost.event != ends.event


def test_a_failover_is_noted_once_and_a_restart_is_none(pair, ledger):
    pair.grow_old()
    assert [ledger.note_server(), ledger.note_server(), ledger.failovers()] == [False, False, 0]
    pair.lag()
    pair.fail_over()
    assert [ledger.note_server(), ledger.note_server(), ledger.failovers()] == [True, False, 1]
    pair.replica.kill()
    pair.replica.start()
    assert [ledger.note_server(), ledger.failovers()] == [False, 1]


# A fleet -------------------------------------------------------------------------------------------------------------


def test_a_fleet_goes_on_behind_a_failover_and_a_producer_finds_what_was_lost(pair, tmp_path):
    fleet = Fleet(pair.url, tmp_path)
    body = {"model": "m", "messages": [{"role": "user", "content": "tokens=120 step=0.02"}]}
    keys = [f"order {number}" for number in range(12)]
    with Client(pair.url, "test") as client, ExitStack() as stack:
        stack.callback(fleet.close)
        workers = [fleet.start_worker() for _ in range(2)]
        api = stack.enter_context(api_of_workers(pair.url, "test"))
        http = stack.enter_context(api.http())
        until(lambda: client.models())
        pair.grow_old()
        # given jobs that run, and words and jobs that the replica has not seen
        ids = {key: client.submit(body, idempotency_key=key).id for key in keys[:6]}
        for job_id in ids.values():
            fleet.wait_for_words(job_id)
        pair.lag()
        said = {job_id: len(deltas(fleet.ledger.events(job_id))) for job_id in ids.values()}
        followed = Follower(http, ids[keys[0]])
        ids |= {key: client.submit(body, idempotency_key=key).id for key in keys[6:]}
        for job_id, count in said.items():
            fleet.wait_for_words(job_id, count + 3)
        followed.wait_for(said[ids[keys[0]]] + 3)
        # when the replica takes over
        pair.fail_over()
        # then nothing but what it had not seen is unknown, and submitting all of it again makes each job once
        lost = [key for key, job_id in client.lookup(keys).items() if job_id is None]
        assert lost == keys[6:]
        again = {key: client.submit(body, idempotency_key=key).id for key in keys}
        assert [key for key in keys if again[key] == ids[key]] == keys[:6]
        records = [fleet.wait(job_id) for job_id in again.values()]
        assert {record.state for record in records} == {"completed"}
        for record in records:
            assert_published_once(fleet.ledger, record, 120)
        # whoever had read words that are lost is told, and not given others that do not follow
        assert "conflict" in followed.end()
        # and it is known that it happened
        assert sum(len(worker.lines("redis_failed_over")) for worker in workers) == 1
        assert "inferfleet_ledger_failovers_total 1.0" in http.get("/metrics").text


def test_a_batch_goes_on_behind_a_failover_and_every_line_is_in_one_file(pair):
    with (
        running_api(pair.url) as api,
        NullWorker(pair.url, api.settings.namespace) as worker,
        running_batches(api.settings, api.worker.ring, lease_seconds=1, heartbeat_seconds=0.3),
    ):
        client, lines = api.sdk(max_retries=5), [line(f"n-{number}", "hi", model="null") for number in range(1200)]
        made = start(client, lines)
        ended_lines = lambda: client.batches.retrieve(made.id).request_counts.completed  # noqa: E731
        until(lambda: ended_lines() >= 100)
        pair.lag()
        seen = ended_lines()
        until(lambda: ended_lines() >= seen + 200)
        with redis.Redis(port=pair.replica.port) as replica:
            assert int(replica.hget(f"{worker.ledger.prefix}batch:{made.id}", "lines")) < seen + 200
        pair.fail_over()
        # and when the lease is over of the job whose end was lost, as the janitor of a worker would see
        until(lambda: ended_lines() >= 1100)
        end_leases(worker.ledger)
        batch = wait_for_end(client, made.id)
        assert batch.request_counts.model_dump() == {"total": 1200, "completed": 1200, "failed": 0}
        output = read_lines(client, batch.output_file_id)
        assert sorted(entry["custom_id"] for entry in output) == sorted(entry["custom_id"] for entry in lines)
    # what was lost ran again
    assert max(worker.answers.values()) == 2


def test_a_reader_through_redis_is_told_of_words_that_are_lost(pair, ledger):
    submit(ledger, tenant="default")
    found = claim(ledger, "t1")
    pair.lag()
    ledger.publish("job_1", found.fence, [delta("a")], "1")
    with Client(pair.url, "test") as client:
        events = client.stream("job_1")
        for _ in range(2):
            next(events)
        next(events).clear()  # what it does with them is its own business
        pair.fail_over()
        ledger.publish("job_1", found.fence, [delta("other"), delta("words")], "2")
        with pytest.raises(Conflict, match="from their beginning"):
            next(events)


def test_a_client_that_waits_for_a_job_that_is_lost_sends_it_again_by_itself(pair, tmp_path):
    fleet = Fleet(pair.url, tmp_path)
    with ExitStack() as stack:
        stack.callback(fleet.close)
        fleet.start_worker(models={"m": "fake"})
        api = stack.enter_context(api_of_workers(pair.url, "test"))
        sdk = api.sdk(max_retries=4)
        until(lambda: [model.id for model in sdk.models.list()] == ["m"])
        pair.lag()
        message = {"role": "user", "content": "tokens=150 step=0.02"}
        with ThreadPoolExecutor(1) as waiter:
            answered = waiter.submit(sdk.chat.completions.create, model="m", messages=[message])
            (lost,) = until(lambda: fleet.ledger.list("default", "in_progress").jobs)
            pair.fail_over()
            answer = answered.result(60)
        # then it has the answer of the job that took the lost one's place
        (job,) = fleet.ledger.list("default").jobs
        assert (job.state, job.id == lost.id) == ("completed", False)
        assert (
            answer.choices[0].message.content
            == json.loads(fleet.ledger.get(job.id).response)["choices"][0]["message"]["content"]
        )


def test_a_reader_that_waits_when_another_redis_takes_over_is_told_of_words_that_are_lost(pair, ledger):
    submit(ledger, tenant="default")
    found = claim(ledger, "t1")
    pair.lag()
    ledger.publish("job_1", found.fence, [delta("a")], "1")
    with Client(pair.url, "test") as client, ThreadPoolExecutor(1) as waiter:
        events = client.stream("job_1")
        for _ in range(3):
            next(events)
        waiting = waiter.submit(next, events)
        until(lambda: ledger.redis.info("clients")["blocked_clients"] == 1)
        pair.fail_over()
        # when the log has grown past what was read by the time it is read again
        ledger.publish("job_1", found.fence, [delta("other"), delta("words")], "2")
        with pytest.raises(Conflict):
            waiting.result(30)


def end_leases(ledger):
    leases = f"{ledger.prefix}leases"
    for job_id in ledger.redis.zrange(leases, 0, -1):
        ledger.redis.zadd(leases, {job_id: 0}, xx=True)
    ledger.reap()


class Follower:
    """Reads a job's events over HTTP in a thread."""

    def __init__(self, http, job_id):
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(http, job_id), daemon=True)
        self._thread.start()

    def _read(self, http, job_id):
        with http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
            for piece in answer.iter_text():
                self.text += piece

    def wait_for(self, count):
        until(lambda: self.text.count(f"event: {names.DELTA}") >= count)

    def end(self):
        """The last event."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "the stream does not end"
        return self.text.strip().split("\n\n")[-1]
