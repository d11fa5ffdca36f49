"""The ledger against a small model of it in plain Python: any order of calls gives the answers that the model gives."""

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from ledger_moves import FAR, PAST, delta
from queue_twin import QueueTwin

from inferfleet.tasks.dead_letters import read_attempts
from inferfleet.tasks.errors import AlreadyTerminal, Conflict, JobNotFound, NotQueued, NotTerminal, QuotaExceeded
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.names import DELTA, PROGRESS, TERMINAL, output_id
from inferfleet.tasks.records import Work
from inferfleet.tasks.stores import RedisStore

MODELS = ("m", "n")
TENANTS = ("a", "b", "c")
AGEING = 3
WEIGHTS = {"a": 1, "b": 2, "c": 1}
#: Of tenant c.
QUEUED_JOBS, CONCURRENT_JOBS = 2, 3
MAX_DEATHS = 2
LONG = 600_000
HOOK = "https://receiver.example/hook"
numbers = itertools.count()


@dataclass
class Twin:
    """What the model knows of one job."""

    model: str
    tenant: str
    priority: int
    deadline: int | None
    seq: int
    batch: bool
    cost: int
    state: str = "queued"
    fence: int = 0
    #: The fence before; and whether the job has a new one by now, which the ledger tells.
    old_fence: int = -1
    moved: bool = False
    deaths: int = 0
    attempts: int = 0
    lease_over: bool = False
    token: str = ""
    deltas: list[str] = field(default_factory=list)
    progress: int | None = None
    dead: bool = False
    #: How attempts ended that took somebody down.
    tries: list[str] = field(default_factory=list)
    #: Files of a job that completed.
    files: list[str] = field(default_factory=list)
    #: Ends so far, those before a retry too.
    ends: int = 0

    @property
    def held(self):
        return self.state in ("in_progress", "cancelling")

    @property
    def place(self):
        return self.deadline or 10**13 - 1, self.seq

    def anew(self):
        """After a retry."""
        return replace(self, deadline=None, state="queued", moved=True, deaths=0, attempts=0, token="",
                       deltas=[], progress=None, dead=False, tries=[], files=[])  # fmt: skip

    def end(self, state):
        self.state = state
        self.ends += 1

    def move(self, fence):
        assert fence > self.fence
        self.old_fence, self.fence, self.moved = self.fence, fence, False

    def take_back(self, died):
        self.moved = True
        self.progress = None
        if died:
            self.deaths += 1
            self.tries.append("lost")
        else:
            self.attempts -= 1
        if self.state == "cancelling":
            self.end("cancelled")
            return "cancelled"
        if died and self.deaths >= MAX_DEATHS:
            self.end("failed")
            self.dead = True
            return "dead"
        self.state = "queued"
        return "requeued"


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self, url):
        super().__init__()
        self.ledger = Ledger.from_url(url, f"machine{next(numbers)}")
        self.ledger.redis.flushall()  # what earlier machines left would make every look at all keys slower
        limits = {"queued_jobs": QUEUED_JOBS, "concurrent_jobs": CONCURRENT_JOBS}
        self.ledger.put_tenants({"b": {"weight": WEIGHTS["b"]}, "c": limits})
        self.store = RedisStore(self.ledger, 60)
        self.twins: dict[str, Twin] = {}
        self.queues = {model: QueueTwin(AGEING) for model in MODELS}
        self.calls = 0

    def teardown(self):
        self.ledger.close()

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.twins)), label="job")

    def fresh(self):
        self.calls += 1
        return f"t{self.calls}"

    def wait(self, job_id):
        """A job of the model waits from now on."""
        twin = self.twins[job_id]
        self.queues[twin.model].put(
            job_id, tenant=twin.tenant, priority=twin.priority, batch=twin.batch, place=twin.place,
            cost=twin.cost * 100 / WEIGHTS[twin.tenant],
        )  # fmt: skip

    @rule(
        model=st.sampled_from(MODELS),
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from([0, 0, 1, -1]),
        deadline=st.sampled_from([None, None, FAR, PAST]),
        batch=st.sampled_from([False, False, True]),
        cost=st.integers(1, 4),
    )
    def submit(self, model, tenant, priority, deadline, batch, cost):
        job_id = f"job_{999 - len(self.twins)}"  # so that the order of ids is not that of ages
        options = {"model": model, "tenant": tenant, "body_hash": "h", "priority": priority, "deadline_ms": deadline,
                   "webhook": HOOK, "batch_id": "batch_1" if batch else None, "work": Work(cost=cost)}  # fmt: skip
        if self.over_quota(tenant, batch):
            with pytest.raises(QuotaExceeded):
                self.ledger.submit(job_id, b"{}", **options)
            return
        answers = [self.ledger.submit(job_id, b"{}", **options) for _ in range(2)]
        assert [answer.queued for answer in answers] == [True, False]
        self.twins[job_id] = Twin(model, tenant, priority, deadline, len(self.twins), batch, cost)
        self.wait(job_id)

    def over_quota(self, tenant, batch):
        states = [twin.state for twin in self.twins.values() if twin.tenant == tenant and twin.state not in TERMINAL]
        counts = ((states.count("queued"), QUEUED_JOBS), (len(states), CONCURRENT_JOBS))
        return tenant == "c" and any(count + 1 > (limit / 2 if batch else limit) and count for count, limit in counts)

    @rule(model=st.sampled_from(MODELS), lease_over=st.booleans(), online=st.sampled_from([False, False, True]))
    def claim(self, model, lease_over, online):
        token = self.fresh()
        lease_ms = 0 if lease_over else LONG
        claim = self.ledger.claim(model, worker="w", token=token, lease_ms=lease_ms, online=online, ageing=AGEING)
        queue = self.queues[model]
        while not queue.paused and (found := queue.first(online)) is not None:
            job_id = found[2]
            twin = self.twins[job_id]
            if twin.deadline == PAST:
                queue.drop(job_id)
                twin.end("expired")
                continue
            queue.give(*found)
            twin.state, twin.lease_over, twin.token = "in_progress", lease_over, token
            twin.attempts += 1
            assert (claim.job_id, claim.deaths) == (job_id, twin.deaths)
            twin.move(claim.fence)
            assert [event["delta"] for event in claim.published] == twin.deltas
            return
        assert claim is None

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def claim_again(self, data):
        job_id = self.pick(data)
        twin = self.twins[job_id]
        if not twin.token:
            return
        claim = self.ledger.claim(twin.model, worker="w", token=twin.token)
        assert (claim and (claim.job_id, claim.fence)) == ((job_id, twin.fence) if twin.held else None)

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), behind=st.sampled_from([False, False, True]), twice=st.booleans())
    def publish(self, data, behind, twice):
        job_id = self.pick(data)
        twin, token = self.twins[job_id], self.fresh()
        for _ in range(2 if twice else 1):
            told = {"type": PROGRESS, "step": self.calls, "steps": 1000}
            answer = self.ledger.publish(job_id, twin.old_fence if behind else twin.fence, [delta(token), told], token)
            good = twin.held and not behind
            assert answer == (("cancel" if twin.state == "cancelling" else "ok") if good else "stale")
        if good:
            twin.deltas.append(token)
            twin.progress = self.calls

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), behind=st.sampled_from([False, False, True]), long=st.booleans())
    def beat(self, data, behind, long):
        job_id = self.pick(data)
        twin = self.twins[job_id]
        answer = self.ledger.beat("w", [(job_id, twin.old_fence if behind else twin.fence)], LONG if long else 0)
        if twin.held and not behind:
            twin.lease_over = not long
            assert answer == {job_id: "cancel" if twin.state == "cancelling" else "ok"}
        else:
            assert answer == {job_id: "stale"}

    @precondition(lambda self: self.twins)
    @rule(
        data=st.data(),
        behind=st.sampled_from([False, False, True]),
        state=st.sampled_from([*sorted(TERMINAL), "completed"]),
        files=st.integers(0, 2),
        lost=st.sampled_from([False, False, True]),
    )
    def complete(self, data, behind, state, files, lost):
        job_id = self.pick(data)
        twin = self.twins[job_id]
        fence = twin.old_fence if behind else twin.fence
        keys = [output_id(job_id, fence, index) for index in range(files)]
        if not (twin.state in TERMINAL and not behind):  # a key is never written again
            for key in keys[: files - lost]:
                self.store.put(key, key.encode(), "image/png")
        end = {"state": state, "response": b"{}", "outputs": [{"id": key} for key in keys], "keep": keys}
        answer = self.ledger.complete(job_id, fence, **end)
        if twin.held and not behind:
            ends_as = "cancelled" if twin.state == "cancelling" else state
            if lost and files and ends_as == "completed":
                assert answer == "missing"
                self.store.forget(keys)
                return
            assert answer == "done"
            twin.end(ends_as)
            twin.files = keys if twin.state == "completed" else []
            assert self.ledger.complete(job_id, fence, **end) == "same"
        else:
            assert answer == ("same" if twin.state in TERMINAL and not behind else "stale")

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def cancel(self, data):
        job_id = self.pick(data)
        twin = self.twins[job_id]
        try:
            answer = self.ledger.cancel(job_id, twin.tenant)
        except AlreadyTerminal:
            assert twin.state in TERMINAL - {"cancelled"}
            return
        if twin.state == "queued":
            self.queues[twin.model].drop(job_id)
            twin.end("cancelled")
        elif twin.state == "in_progress":
            twin.state = "cancelling"
        assert answer == twin.state

    def take_back(self, job_id, died):
        twin = self.twins[job_id]
        how = twin.take_back(died)
        if twin.state == "queued":
            self.wait(job_id)
        return how

    @precondition(lambda self: any(twin.held for twin in self.twins.values()))
    @rule(data=st.data(), died=st.booleans())
    def give_up(self, data, died):
        job_id = data.draw(st.sampled_from(sorted(i for i, twin in self.twins.items() if twin.held)), label="job")
        twin = self.twins[job_id]
        fence = twin.fence
        how = self.take_back(job_id, died)
        for _ in range(2):
            if died:
                assert self.ledger.lose(job_id, fence, max_deaths=MAX_DEATHS) == how
            else:
                assert self.ledger.release(job_id, fence) == "released"

    @rule()
    def reap(self):
        over = {job_id for job_id, twin in self.twins.items() if twin.held and twin.lease_over}
        reaped = self.ledger.reap(max_deaths=MAX_DEATHS)
        assert {job_id for job_id, _ in reaped} == over
        for job_id, how in reaped:  # in its order, in which they wait again
            assert how == self.take_back(job_id, died=True)

    @rule()
    def sweep(self):
        overdue = {i for i, twin in self.twins.items() if twin.state == "queued" and twin.deadline == PAST}
        swept = self.ledger.sweep(result_ttl_ms=LONG)
        assert set(swept.expired) == overdue
        for job_id in swept.expired:
            self.queues[self.twins[job_id].model].drop(job_id)
            self.twins[job_id].end("expired")
        assert swept.ring == {model: len(queue) for model, queue in self.queues.items() if queue and not queue.paused}

    @rule(model=st.sampled_from(MODELS), paused=st.sampled_from([True, False, False]))
    def pause_or_resume(self, model, paused):
        queue = self.queues[model]
        assert (self.ledger.pause(model) if paused else self.ledger.resume(model)) == len(queue)
        queue.paused = paused

    @rule(model=st.sampled_from(MODELS), tenant=st.sampled_from([None, *TENANTS]))
    def purge(self, model, tenant):
        going = [
            job_id
            for job_id, twin in self.twins.items()
            if twin.state == "queued" and twin.model == model and tenant in (None, twin.tenant)
        ]
        purged = self.ledger.purge(model, confirm=model, tenant=tenant)
        assert (purged.cancelled, purged.more) == (len(going), False)
        # In the order in which the ledger takes them, which is that of age.
        for job_id in sorted(going, key=lambda job_id: self.twins[job_id].seq):
            self.queues[model].drop(job_id)
            self.twins[job_id].end("cancelled")

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), priority=st.integers(-2, 2))
    def update(self, data, priority):
        job_id = self.pick(data)
        twin = self.twins[job_id]
        try:
            self.ledger.update(job_id, twin.tenant, priority=priority)
        except NotQueued:
            assert twin.state != "queued"
        else:
            assert twin.state == "queued"
            self.queues[twin.model].drop(job_id)
            twin.priority = priority
            self.wait(job_id)

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def retry(self, data):
        job_id = self.pick(data)
        twin = self.twins[job_id]
        if twin.dead and data.draw(st.booleans(), label="as a dead letter"):
            assert self.ledger.replay(job_id, twin.tenant) == twin.model
            self.twins[job_id] = twin.anew()
            self.wait(job_id)
            return
        if not twin.dead:
            with pytest.raises(JobNotFound):
                self.ledger.replay(job_id, twin.tenant)
        try:
            self.ledger.retry(job_id, twin.tenant)
        except Conflict:
            assert twin.state == "completed" or twin.state not in TERMINAL
            return
        assert twin.state in TERMINAL - {"completed"}
        self.twins[job_id] = twin.anew()
        self.wait(job_id)

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def delete(self, data):
        # Only the refusal: a deleted job would leave the model's numbering with a hole.
        job_id = self.pick(data)
        if self.twins[job_id].state not in TERMINAL:
            try:
                self.ledger.delete(job_id, self.twins[job_id].tenant)
            except NotTerminal:
                return
            raise AssertionError("a job that has not ended was deleted")

    @invariant()
    def every_job_is_what_the_model_says(self):
        for job_id, twin in self.twins.items():
            record = self.ledger.get(job_id)
            if twin.moved:
                twin.move(record.fence)
            assert (record.state, record.fence, record.deaths) == (twin.state, twin.fence, twin.deaths)
            assert record.attempts == twin.attempts
            assert (record.progress and record.progress["step"]) == twin.progress
            assert [output["id"] for output in record.outputs or ()] == twin.files
            assert record.dead_letter == twin.dead
            tries = self.ledger.redis.lrange(f"{self.ledger.prefix}tries:{job_id}", 0, -1)
            assert [attempt.how for attempt in read_attempts(tries)] == twin.tries

    @invariant()
    def every_log_is_whole_and_ends_once(self):
        for job_id, twin in self.twins.items():
            log = self.ledger.events(job_id)
            first = log[0]["sequence_number"]
            assert [event["sequence_number"] for event in log] == list(range(first, first + len(log)))
            assert [event["delta"] for event in log if event["type"] == DELTA] == twin.deltas
            ends = [event["type"] for event in log if event["type"].removeprefix("job.") in TERMINAL]
            assert ends == ([f"job.{twin.state}"] if twin.state in TERMINAL else [])

    @invariant()
    def only_files_of_completed_jobs_are_there_and_they_stay(self):
        redis, prefix = self.ledger.redis, self.ledger.prefix + "output:"
        there = {key.decode().removeprefix(prefix) for key in redis.scan_iter(prefix + "*")}
        assert there == {key for twin in self.twins.values() for key in twin.files}
        assert all(redis.pttl(prefix + key) == -1 for key in there)

    @invariant()
    def every_end_is_in_the_outbox_once(self):
        pages = [self.ledger.list_deliveries(tenant, limit=100) for tenant in TENANTS]
        assert not any(more for _, more in pages)
        deliveries = [delivery for page, _ in pages for delivery in page]
        told = Counter(delivery.subject for delivery in deliveries)
        alone = {job_id: twin for job_id, twin in self.twins.items() if not twin.batch}  # lines tell nobody
        assert told == Counter({job_id: twin.ends for job_id, twin in alone.items() if twin.ends})
        last = {delivery.subject: delivery.type for delivery in reversed(deliveries)}
        for job_id, twin in alone.items():
            if twin.state in TERMINAL:
                assert last[job_id] == f"job.{twin.state}"

    @invariant()
    def indexes_agree_with_the_records(self):
        prefix, redis = self.ledger.prefix, self.ledger.redis
        members = {name: self.members(name) for name in ("leases", "deadlines", "finished", "dead")}
        assert members["leases"] == {i for i, twin in self.twins.items() if twin.held}
        ended = {i for i, twin in self.twins.items() if twin.state in TERMINAL}
        dead = {i for i, twin in self.twins.items() if twin.dead}
        assert members["finished"] == ended - dead
        assert members["dead"] == set().union(*(self.members(f"dead:{tenant}") for tenant in TENANTS)) == dead
        assert members["deadlines"] == {i for i, t in self.twins.items() if t.state == "queued" and t.deadline}
        for model in MODELS:
            mine = {i: twin for i, twin in self.twins.items() if twin.model == model}
            queued = {i for i, twin in mine.items() if twin.state == "queued"}
            assert len(self.queues[model]) == len(queued)
            assert sum(redis.zcard(key) for key in redis.scan_iter(f"{prefix}waiting:{model}\n*")) == len(queued)
            assert self.members(f"ages:{model}") == queued
            assert self.members(f"running:{model}") == {i for i, twin in mine.items() if twin.held}
        for state, tenant in {(twin.state, twin.tenant) for twin in self.twins.values()}:
            mine = {i for i, twin in self.twins.items() if (twin.state, twin.tenant) == (state, tenant)}
            assert self.members(f"in:{state}:{tenant}") == mine

    @invariant()
    def the_bytes_that_wait_are_counted(self):
        for tenant in TENANTS:
            counted = int(self.ledger.redis.hget(f"{self.ledger.prefix}bytes", tenant) or 0)
            waiting = [twin for twin in self.twins.values() if (twin.tenant, twin.state) == (tenant, "queued")]
            assert counted == len(b"{}") * len(waiting)

    @invariant()
    def the_queue_of_a_model_without_jobs_leaves_nothing_but_its_pause(self):
        prefix, redis = self.ledger.prefix, self.ledger.redis
        for model, queue in self.queues.items():
            told = {key.decode() for key in redis.hkeys(f"{prefix}order:{model}")} - {"paused_ms"}
            kept = {
                key for kind in ("turns", "rested", "costs") for key in redis.scan_iter(f"{prefix}{kind}:{model}\n*")
            }
            assert len(queue) > 0 or not (told or kept or redis.exists(f"{prefix}classes:{model}"))

    def members(self, name):
        return {member.decode() for member in self.ledger.redis.zrange(self.ledger.prefix + name, 0, -1)}


def test_any_order_of_calls_gives_the_answers_of_the_model(redis_server):
    run_state_machine_as_test(
        lambda: LedgerMachine(redis_server.url),
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
