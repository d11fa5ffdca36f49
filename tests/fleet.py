"""Real workers as child processes for the tests of the worker, with scripted engines unless told otherwise."""

import contextlib
import json
import multiprocessing
import os
import time

import psutil
from fake_engine import answer
from fake_worker import main

from inferfleet.tasks import names
from inferfleet.tasks.client import Client
from inferfleet.tasks.contracts import body_hash, parse_job
from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.errors import JobNotFound
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.names import is_terminal_event, new_job_id
from inferfleet.tasks.settings import Settings
from inferfleet.workers.flight import seed_of

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["fake_worker"])
FAST = {"lease_seconds": 2, "heartbeat_seconds": 0.5, "sweep_seconds": 0.2, "drain_grace_seconds": 5, "run_slots": 0,
        "slots": 32, "namespace": "test"}  # fmt: skip


def whole_json(settings):
    """With the secret that a dump hides."""
    values = settings.model_dump(mode="json")
    if settings.s3.secret_access_key is not None:
        values["s3"]["secret_access_key"] = settings.s3.secret_access_key.get_secret_value()
    return json.dumps(values)


class WorkerProcess:
    """One worker; its log is a list of JSON lines."""

    def __init__(self, settings, log_path, real, clock_shift=0):
        self.settings, self.log_path = settings, log_path
        log_path.touch()
        arguments = (whole_json(settings), str(log_path), real, clock_shift)
        self.process = FORK_SERVER.Process(target=main, args=arguments)
        self.process.start()

    @property
    def pid(self):
        return self.process.pid

    @property
    def alive(self):
        return self.process.is_alive()

    def engines(self):
        """The engine processes."""
        return [child for child in self.children() if "--fd" in child.cmdline()]

    def children(self):
        return psutil.Process(self.pid).children()

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self, seconds=30):
        """Its exit status, once it ended by itself."""
        self.process.join(seconds)
        return self.process.exitcode

    def lines(self, event=None):
        whole = self.log_path.read_text().rpartition("\n")[0]  # the last line may be on its way
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return [line for line in lines if event in (None, line["event"])]

    def kill(self):
        """kill -9; the engines see the end of their wire."""
        self.process.kill()
        self.process.join()

    def close(self):
        """Nothing of it is left."""
        left = self.children() if self.alive else []
        self.kill()
        self.process.close()
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
                child.wait(10)  # until then Redis may hand a message of the next test to its dying socket


class Fleet:
    """Workers on one Redis, and a producer."""

    def __init__(self, redis_url, folder):
        self.redis_url, self.folder = redis_url, folder
        self.ledger = Ledger.from_url(redis_url, "test")
        self.doorbell = Doorbell(redis_url, "test")
        self.workers = []

    def start_worker(self, models=None, *, wait=True, real=False, clock_shift=0, **settings):
        """A worker of `models` (name -> path or whole spec), ready unless `wait` is false; `real` = with our engine;
        its wall clock is ahead by clock_shift seconds."""
        given = models or {"m": "fake"}
        specs = {name: {"path": spec} if isinstance(spec, str) else spec for name, spec in given.items()}
        chosen = Settings.model_validate({"redis_url": self.redis_url, **FAST, "models": specs, **settings})
        worker = WorkerProcess(chosen, self.folder / f"worker{len(self.workers)}.log", real, clock_shift)
        self.workers.append(worker)
        if wait:
            until(lambda: len(worker.lines("engine_ready")) == len(specs))
        return worker

    def client(self):
        return Client(self.redis_url, namespace="test")

    def submit(self, words, *, model="m", ring=True, job_id=None, tenant="default", batch_id=None, **options):
        """Submit one message; `options` go into the job, `body` among them into the chat body."""
        body = {"model": model, "messages": [{"role": "user", "content": words}], **options.pop("body", {})}
        values = {"body": body, **options}
        return self.submit_job(values, ring=ring, job_id=job_id, tenant=tenant, batch_id=batch_id)

    def paint(self, words, *, model="p", url=names.IMAGES_URL, ring=True, **options):
        """Submit an image job; `options` go into the job, `body` among them into its body."""
        body = {"model": model, "prompt": words or "x", **options.pop("body", {})}
        return self.submit_job({"url": url, "body": body, **options}, ring=ring)

    def submit_job(self, values, *, ring=True, job_id=None, tenant="default", batch_id=None):
        """Submit a job given as JSON values."""
        job = parse_job(json.dumps(values).encode())
        model = job.body.model
        envelope = job.envelope()
        job_id = job_id or new_job_id()
        self.ledger.submit(
            job_id, envelope, model=model, tenant=tenant, body_hash=body_hash(envelope),
            priority=job.effective_priority, deadline_ms=job.deadline_ms, start_timeout_ms=job.start_timeout_ms,
            endpoint=job.url, batch_id=batch_id, work=job.work,
        )  # fmt: skip
        if ring:
            self.doorbell.ring(model)
        return job_id

    def wait(self, job_id, seconds=60):
        """The record of an ended job."""
        return until(lambda: (record := self.ledger.get(job_id)).terminal and record, seconds)

    def state(self, job_id):
        return self.ledger.get(job_id).state

    def state_if_any(self, job_id):
        """None for a job that is not there."""
        try:
            return self.state(job_id)
        except JobNotFound:
            return None

    def wait_for_words(self, job_id, count=1):
        """Until the job has published something."""
        return until(lambda: len(deltas(self.ledger.events(job_id))) >= count)

    def close(self):
        for worker in self.workers:
            worker.close()
        self.ledger.close()
        self.doorbell.close()


def until(condition, seconds=60):
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
    return value


def deltas(events):
    return [event for event in events if event["type"] == "response.output_text.delta"]


def assert_published_once(ledger, record, tokens):
    """Exactly the scripted answer, token for token, in the log and in the body, and one terminal event at the end."""
    events = ledger.events(record.id)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [is_terminal_event(event["type"]) for event in events].index(True) == len(events) - 1
    expected = answer(seed_of(record.id), tokens)
    assert "".join(event["delta"] for event in deltas(events)) == expected
    assert sum(len(event["token_ids"]) for event in deltas(events)) == tokens
    assert json.loads(record.response)["choices"][0]["message"]["content"] == expected
