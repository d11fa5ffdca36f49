"""Many mixed requests over an engine that is too small for them: arrivals at any time, cancels, failing steps, resumes.

`quiet` tells what each writes undisturbed, with room for all; `Soak` runs them through a crowd and checks that every
one ends, that nothing is left behind, and that nobody's text shows the crowd: neither in the logits of any pick nor
in what was picked from them.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

from tiny_engine import gather
from torch import Tensor

from inferfleet.engine.admission import Published
from inferfleet.engine.engine import Engine
from inferfleet.engine.errors import ContextLengthExceeded
from inferfleet.engine.request import Request
from inferfleet.engine.sampler import RowState, SampledRows, Sampler
from inferfleet.engine.sampling_params import SamplingParams

#: Tokens of prompt and answer of a job at most.
LONGEST = 128
#: What a cancelled answer ends with where the bytes of a character are not complete.
CUT = "\ufffd"


@dataclass
class Job:
    """A request, when it comes and what happens to it."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    salt: str
    priority: int
    arrival: int
    #: Steps after its arrival, or None.
    cancelled_after: int | None
    #: It has been told of by an earlier run: so many tokens of each answer, or None.
    published: int | None


@dataclass
class Told:
    """What one answer has told: its tokens, the text after each of them, the whole text and the end."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    #: What each of them was picked from.
    logits: list[Tensor] = field(default_factory=list)
    text: str = ""
    reason: str | None = None

    def after(self, count: int) -> Published:
        """The first tokens, with the text that was certain then."""
        count = min(count, len(self.token_ids))
        return Published(tuple(self.token_ids[:count]), self.texts[count - 1] if count else "")


def make_jobs(seed: int, vocab_size: int, count: int = 200) -> list[Job]:
    """Prompts that share beginnings, short and long, under every way of sampling; some close together, some apart."""
    chosen = random.Random(seed)
    stems = [[chosen.randrange(vocab_size) for _ in range(70)] for _ in range(5)]
    jobs, now = [], 0
    for number in range(count):
        now += chosen.choice([0, 0, 0, 1, 2, 5])
        shared = chosen.choice(stems)[: chosen.choice([0, 7, 16, 33, 60])]
        own = [chosen.randrange(vocab_size) for _ in range(chosen.randrange(1, 12))]
        job = Job(
            id=f"job-{number}",
            prompt=shared + own,
            sampling=_sampling(chosen, number),
            salt=chosen.choice(["", "", "another tenant"]),
            priority=chosen.choice([0, 0, 0, 1, -1]),
            arrival=now,
            cancelled_after=chosen.randrange(30) if chosen.random() < 0.15 else None,
            published=chosen.randrange(40) if chosen.random() < 0.1 else None,
        )
        jobs.append(job)
    return jobs


def _sampling(chosen: random.Random, number: int) -> SamplingParams:
    kinds = (
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 1.5, "top_k": 20, "min_p": 0.02, "frequency_penalty": 0.3},
    )
    others = {
        "n": chosen.choice([1, 1, 1, 1, 2, 3]),
        "max_tokens": chosen.choice([1, 5, 16, 30, 50]),
        "logprobs": chosen.choice([None, None, 0, 3]),
        "stop": chosen.choice([(), (), (), ("ex", "qu")]),
        "ignore_eos": chosen.random() < 0.8,
    }
    return SamplingParams(seed=number, **chosen.choice(kinds), **others)


def watch(engine: Engine) -> dict[tuple[int, int, int], Tensor]:
    """The logits of each pick that the engine makes from now on, by seed of its job, answer and tokens before it."""
    seen, sample = {}, engine.sampler.sample

    def watched(logits: Tensor, rows: list[RowState]) -> SampledRows:
        for row, own in zip(rows, logits, strict=True):
            seen[row.seed, row.index, row.num_output] = own.clone()
        return sample(logits, rows)

    engine.sampler.sample = watched
    return seen


def quiet(engine: Engine, jobs: list[Job]) -> dict[str, list[Told]]:
    """Each job from its beginning to its end, at once: the engine must have seats and blocks for all."""
    told = {job.id: [Told() for _ in range(job.sampling.n)] for job in jobs}
    seen = watch(engine)
    for job in jobs:
        engine.add(job.id, job.prompt, job.sampling)
    while engine.has_work:
        for delta in engine.step().deltas:
            answer = told[delta.id][delta.index]
            answer.token_ids += delta.token_ids
            answer.text += delta.text
            answer.texts += [answer.text] * len(delta.token_ids)
            answer.reason = delta.finish_reason
    assert engine.scheduler.num_preemptions == 0
    for job in jobs:
        for index, answer in enumerate(told[job.id]):
            answer.logits = [seen[job.sampling.seed, index, place] for place in range(len(answer.token_ids))]
    return told


@dataclass
class Soak:
    """One run of all jobs."""

    engine: Engine
    jobs: list[Job]
    alone: dict[str, list[Told]]
    #: Steps at which the model raises.
    faults: frozenset[int] = frozenset()
    #: How much a logit may differ from the quiet run's, whose steps have other shapes and round differently.
    noise: float = 3e-4
    #: Answers that went another way because a pick lay so close to the edge that rounding moved it over.
    tossed: list[str] = field(default_factory=list)
    answers: dict[str, dict[int, dict]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    def run(self) -> Counter:
        """Runs to the end and checks everything; how often each thing happened."""
        self._break_steps()
        seen = watch(self.engine)
        coming, step = sorted(self.jobs, key=lambda job: job.arrival), 0
        leaving: list[tuple[int, str]] = []
        while coming or self.engine.has_work:
            while coming and coming[0].arrival <= step:
                job = coming.pop(0)
                self._add(job)
                if job.cancelled_after is not None:
                    leaving.append((step + job.cancelled_after, job.id))
            for name in [name for when, name in leaving if when == step]:
                if self.engine.cancel(name):
                    self.cancelled.add(name)
            gather(self.answers, self.engine.step())
            step += 1
            assert step < 200 * len(self.jobs), "no end in sight"
        assert_nothing_is_left(self.engine)
        outcomes = Counter(self._outcome(job, seen) for job in self.jobs)
        assert len(self.tossed) <= len(self.jobs) // 100, self.tossed
        return outcomes

    def _add(self, job: Job) -> None:
        published = {}
        if job.published is not None:
            published = {index: told.after(job.published) for index, told in enumerate(self.alone[job.id])}
        # Beside each job one that can never run: it is refused and leaves no trace.
        endless = replace(job.sampling, max_tokens=self.engine.admission.max_model_len)
        try:
            self.engine.add(job.id, job.prompt, endless)
        except ContextLengthExceeded:
            pass
        else:
            raise AssertionError("a request longer than the context was taken")
        fields = {"cache_salt": job.salt, "priority": job.priority, "published": published}
        self.engine.add(job.id, job.prompt, job.sampling, **fields)

    def _break_steps(self) -> None:
        forward = self.engine.model.forward

        def faulty(*arguments):
            if self.engine.num_steps in self.faults:
                raise RuntimeError("a step that fails")
            return forward(*arguments)

        self.engine.model.forward = faulty

    def _outcome(self, job: Job, seen: dict[tuple[int, int, int], Tensor]) -> str:
        """How the job ended; its answers are those of the quiet run, or the beginnings of them."""
        told, last = self.answers[job.id], self.answers[job.id][-1]
        for index, alone in enumerate(self.alone[job.id]):
            before = alone.after(job.published) if job.published is not None else Published()
            new = told.get(index, {"token_ids": [], "text": "", "finish_reason": None, "logprobs": []})
            ids, text = [*before.token_ids, *new["token_ids"]], before.text + new["text"]
            whole = "error" not in last and new["finish_reason"] != "cancelled"
            same = self._same(job, index, ids, seen)
            if same < min(len(ids), len(alone.token_ids)):
                self.tossed.append(job.id)
                assert text.startswith(alone.after(same).text), job
            elif whole:
                assert (ids, text, new["finish_reason"]) == (alone.token_ids, alone.text, alone.reason), job
            else:
                assert alone.token_ids[: len(ids)] == ids and alone.text.startswith(text.rstrip(CUT)), job
            assert job.sampling.logprobs is None or len(new["logprobs"]) == len(new["token_ids"])
            assert whole or job.id in self.cancelled or "error" in last
        if "error" in last:
            return "failed"
        return "cancelled" if job.id in self.cancelled else "finished"

    def _same(self, job: Job, index: int, ids: list[int], seen: dict[tuple[int, int, int], Tensor]) -> int:
        """How many tokens the answer has in common with the quiet run's, every one picked from the same logits.

        Where another follows in both, each must be what a sampler picks alone from the logits of that run: then these
        differ by rounding, and nothing else has led to it.
        """
        alone = self.alone[job.id][index]
        for place, (token, expected) in enumerate(zip(ids, alone.token_ids, strict=False)):
            logits = seen.get((job.sampling.seed, index, place))  # none of what an earlier run has told
            if logits is not None:
                assert (logits - alone.logits[place]).abs().max() <= self.noise, (job, index, place)
            if token != expected:
                assert logits is not None, job
                picks = [_pick(job, index, ids[:place], each) for each in (logits, alone.logits[place])]
                assert picks == [token, expected], (job, index, place)
                return place
        return min(len(ids), len(alone.token_ids))


def _pick(job: Job, index: int, before: list[int], logits: Tensor) -> int:
    request = Request(job.id, job.prompt, job.sampling, index=index, output_token_ids=before)
    return Sampler().sample(logits[None], [RowState(request)]).token_ids[0]


def assert_nothing_is_left(engine: Engine) -> None:
    """No request, no seat, no block in use, no name without a block: the engine is as it was, its cache warmer."""
    scheduler, blocks = engine.scheduler, engine.scheduler.blocks
    assert not engine._open and not engine._answer_of
    assert not scheduler.running and not scheduler.waiting and not scheduler._held
    assert sorted(blocks._free_slots) == list(range(len(blocks._end)))
    assert not any(table.any() for table in blocks.tables)
    pools = [*blocks.pools, *([blocks.snapshots._pool] if blocks.snapshots is not None else [])]
    for pool in pools:
        assert pool.num_free == pool.num_usable and not any(pool._owners)
        assert {*pool._blank, *pool._cached} == set(range(1, pool.num_usable + 1))
        assert {pool._hash_of[block] for block in pool._cached} == set(pool._block_of)
    assert [engine.stats()[name] for name in ("running", "waiting", "kv_usage")] == [0, 0, 0]
