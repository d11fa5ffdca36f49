"""The engine: requests go in, each step computes one batch and tells what is new. Knows no queue and no HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inferfleet.engine.admission import NOTHING_PUBLISHED, Admission, Published
from inferfleet.engine.answer import Answer
from inferfleet.engine.batch import Batch, BatchBuilder
from inferfleet.engine.cache import Cache
from inferfleet.engine.errors import EngineError, InvalidRequest, NumericalError
from inferfleet.engine.failures import explain
from inferfleet.engine.logprobs import openai_entry
from inferfleet.engine.output import Delta, StepOutput, Usage
from inferfleet.engine.replay import Replay
from inferfleet.engine.request import Request, Status
from inferfleet.engine.sampler import RowState, SampledRows, Sampler
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.scheduler import Plan, Scheduler
from inferfleet.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from inferfleet.engine.families import Computes


NOT_FINITE = "the model's logits were not finite for this request"


class Engine:
    """Continuous batching over one model. One thread adds, steps and cancels."""

    def __init__(
        self,
        model: Computes,
        cache: Cache,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: Tokenizer,
        admission: Admission,
        device: torch.device,
        replay: Replay | None = None,
    ) -> None:
        """replay: for a model whose decoding steps can be recorded."""
        self.model = model
        self.replay = replay
        self.scheduler = scheduler
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.admission = admission
        self.device = device
        self.builder = BatchBuilder(
            cache, scheduler.blocks.tables, max_num_batched_tokens=scheduler.max_num_batched_tokens, device=device
        )
        self.num_steps = 0
        self._num_added = 0
        #: All answers of every id that has not ended.
        self._open: dict[str, list[Answer]] = {}
        self._answer_of: dict[Request, Answer] = {}
        #: What happened between steps.
        self._news = StepOutput()

    @property
    def has_work(self) -> bool:
        """True if `step` would compute or tell something."""
        return self.scheduler.has_work or bool(self._news)

    def step(self) -> StepOutput:
        """Compute one batch and return what is new. A spoiled row fails its id, a failing batch the ids of its rows."""
        out, self._news = self._news, StepOutput()
        if not self.scheduler.has_work:
            return out
        plan = self.scheduler.plan()
        out.batch_tokens, self.num_steps = sum(plan.num_tokens), self.num_steps + 1
        try:
            batch = self._build(plan)
            sampled = self._run(batch)
        except Exception as error:
            self._fail(plan.rows, explain(error, self.device), out)
            return out
        self._fail([batch.sample_rows[row] for row in sampled.failed], NumericalError(NOT_FINITE), out)
        self.scheduler.record(plan, sampled.token_ids)
        self._tell(batch.sample_rows, sampled, out)
        return out

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
        matformer_slice: str | None = None,
        published: Mapping[int, Published] | None = None,
    ) -> None:
        """Take a prompt; sampling.n answers will be written to it. InvalidRequest or its ContextLengthExceeded.

        matformer_slice: what of the model shall answer; None = what the engine's settings say.
        published: by answer, what an earlier run has told; the answers go on after it and none of it is told again.
        """
        if request_id in self._open:
            raise InvalidRequest(f"a request with the id {request_id} is running", param="id")
        published = published or {}
        requests = self.admission.requests(
            request_id,
            prompt_token_ids,
            sampling,
            cache_salt=cache_salt,
            priority=priority,
            arrival=self._num_added,
            matformer_slice=matformer_slice,
            published=published,
        )
        answers = [self._answer(request, published.get(request.index, NOTHING_PUBLISHED)) for request in requests]
        for answer in answers:
            if reason := answer.reason_to_end():
                answer.request.end(reason)
        unfinished = [request for request in requests if request.status is not Status.FINISHED]
        if unfinished:
            self.scheduler.add(unfinished)
        self._num_added += 1
        self._open[request_id] = answers
        self._answer_of.update(zip(requests, answers, strict=True))
        self._news.deltas += [answer.last_delta() for answer in answers if answer.request.finish_reason]
        self._close_if_ended(request_id, self._news)

    def cancel(self, request_id: str) -> bool:
        """End an id at once; the next step tells its usage. False if no such id is open."""
        if request_id not in self._open:
            return False
        for answer in self._open[request_id]:
            if answer.request.status is not Status.FINISHED:
                self.scheduler.finish(answer.request, "cancelled")
                self._news.deltas.append(answer.last_delta())
        self._close_if_ended(request_id, self._news)
        return True

    def score(self, token_ids: Sequence[int], *, num_decoded: int = 0, matformer_slice: str | None = None) -> Tensor:
        """Float32 logits [T + num_decoded, V] on the CPU: after each of the T tokens, computed in chunks like any
        prompt, and after each of the likeliest that follow.

        Only while nothing else is open. InvalidRequest for ids outside the vocabulary, or more than the context holds.
        """
        if self._open:
            raise RuntimeError("score needs an engine without open requests")
        self.admission.check_prompt(token_ids, self.admission.max_model_len - num_decoded)
        # One token more than it will decode: it ends when we say so.
        request = Request("score", list(token_ids), SamplingParams(), max_tokens=num_decoded + 1, shares_prefix=False)
        request.variant = self.admission.variant(matformer_slice)
        logits, total = torch.empty(0), len(token_ids) + num_decoded
        self.scheduler.add([request])
        try:
            while (done := request.num_computed_tokens) < total:
                plan = self.scheduler.plan()
                part = self._logits(self._build(plan, scoring=True))
                logits = logits if done else torch.empty(total, part.shape[-1])
                logits[done : done + len(part)] = part
                self.scheduler.record(plan, [int(part[-1].argmax()) if done + len(part) < total else None])
        finally:
            self.scheduler.finish(request, "stop")
        return logits

    def stats(self) -> dict[str, Any]:
        """What is going on now, and counts since the start."""
        blocks = self.scheduler.blocks
        return {
            "running": len(self.scheduler.running),
            "waiting": self.scheduler.num_waiting,
            "kv_usage": round(blocks.usage, 4),
            "preemptions": self.scheduler.num_preemptions,
            "prefix_queries": blocks.prefix_queries,
            "prefix_hits": blocks.prefix_hits,
        }

    def _answer(self, request: Request, published: Published) -> Answer:
        return Answer(request, RowState(request), self.tokenizer, published.text)

    def _build(self, plan: Plan, *, scoring: bool = False) -> Batch:
        if self.scheduler.blocks.snapshots is not None:
            self.builder.copy_states(self.scheduler.blocks.snapshots.take_moves())
        recordable = None if self.replay is None or scoring else self.replay.build(plan, self.builder)
        return recordable or self.builder.build(plan, scoring=scoring)

    def _run(self, batch: Batch) -> SampledRows:
        if not batch.sample_rows:
            self._hidden(batch)
            return SampledRows(token_ids=[], logprobs=None, failed=[])
        return self.sampler.sample(self._logits(batch), [self._answer_of[row].state for row in batch.sample_rows])

    @torch.inference_mode()
    def _hidden(self, batch: Batch) -> Tensor:
        return self.model.forward(batch.input_ids, batch.positions, batch)

    @torch.inference_mode()
    def _logits(self, batch: Batch) -> Tensor:
        if self.replay is not None and batch.is_filled_up:
            return self.model.compute_logits(self.replay.hidden(batch)[: len(batch.rows)])
        return self.model.compute_logits(self._hidden(batch)[batch.logits_index])

    def _tell(self, rows: list[Request], sampled: SampledRows, out: StepOutput) -> None:
        """News of the rows that got a token; a stop string ends an answer here, because only text shows it."""
        for number, (request, token) in enumerate(zip(rows, sampled.token_ids, strict=True)):
            if request.id not in self._open:
                continue
            answer = self._answer_of[request]
            text = answer.add(token)
            if answer.stopped and request.status is not Status.FINISHED:
                self.scheduler.finish(request, "stop")
            delta = Delta(request.id, request.index, [token], text, self._logprobs(sampled, number))
            out.deltas.append(delta)
            if request.status is Status.FINISHED:
                answer.conclude(delta)
        # Only now: the scheduler may have ended several answers of one id in this step, and each has its words to say.
        for request_id in dict.fromkeys(row.id for row in rows if row.status is Status.FINISHED):
            if request_id in self._open:
                self._close_if_ended(request_id, out)

    def _logprobs(self, sampled: SampledRows, number: int) -> list[dict[str, Any]] | None:
        found = sampled.logprobs and sampled.logprobs[number]
        return [openai_entry(self.tokenizer, sampled.token_ids[number], found)] if found else None

    def _close_if_ended(self, request_id: str, out: StepOutput) -> None:
        answers = self._open[request_id]
        if all(answer.request.status is Status.FINISHED for answer in answers):
            self._forget(request_id)
            out.finished.append((request_id, Usage.of([answer.request for answer in answers])))

    def _forget(self, request_id: str) -> None:
        for answer in self._open.pop(request_id):
            del self._answer_of[answer.request]

    def _fail(self, rows: Iterable[Request], error: EngineError, out: StepOutput) -> None:
        """End the ids of these rows; what they computed is suspect, so nobody shall find it."""
        for request_id in dict.fromkeys(row.id for row in rows):
            for answer in self._open[request_id]:
                request = answer.request
                if request.status is Status.RUNNING:
                    self.scheduler.blocks.disown(request)
                if request.status is not Status.FINISHED:
                    self.scheduler.finish(request, "error")
            self._forget(request_id)
            out.errors.append((request_id, error))
