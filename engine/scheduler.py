"""Which tokens of which requests the next step computes. No torch, no model, no text.

A step first continues those who write (one token each), then the prompts in chunks, newcomers in their place, within
a budget of tokens. When blocks run out, the last in order (lowest priority, then latest) gives up its blocks and
is computed again later; it keeps its tokens. Whoever is last itself waits for those before it.

A model may have a border: a request whose tokens grow beyond it starts again in the model's other variant, from its
first token, as nothing computed so far holds there. It crosses only once, because tokens never become fewer.

Why there is no livelock: the first in order can take the blocks of all others, alone it always fits (`add` refuses
what does not), so every plan computes at least one token or `plan` raises.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from inferfleet.engine.blocks import BlockManager
from inferfleet.engine.border import Border
from inferfleet.engine.errors import ContextLengthExceeded, SchedulerStuck
from inferfleet.engine.request import Request, Status


@dataclass(slots=True)
class Plan:
    """One step: row r computes num_tokens[r] tokens of rows[r]; samples[r] if its next token can be picked then."""

    rows: list[Request]
    num_tokens: list[int]
    samples: list[bool]

    @classmethod
    def of(cls, chosen: dict[Request, int]) -> Plan:
        samples = [row.num_computed_tokens + count == row.num_tokens for row, count in chosen.items()]
        return cls(list(chosen), list(chosen.values()), samples)


class Scheduler:
    """Requests that wait, run and end; `running` and `waiting` are kept in order, first first."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        border: Border | None = None,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.border = border
        self.max_chunk = blocks.max_chunk(max_num_batched_tokens)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        #: By request id, the answers that wait for the first one to fill the prefix cache.
        self._held: dict[str, list[Request]] = {}
        self._chosen: dict[Request, int] = {}
        self._budget = 0
        self._preempted = False

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + sum(map(len, self._held.values()))

    def add(self, requests: Sequence[Request]) -> None:
        """Take the answers of one id; those after the first wait until its prompt is in the cache.

        ContextLengthExceeded for what can never fit; then none is taken.
        """
        for request in requests:
            if request.max_num_tokens > self.blocks.max_request_tokens:
                raise ContextLengthExceeded(
                    f"prompt and answer need {request.max_num_tokens} tokens; the KV cache of this engine"
                    f" holds at most {self.blocks.max_request_tokens} for one request",
                    param="max_tokens",
                )
        for request in requests:
            self._cross(request)
        first, *others = requests
        insort(self.waiting, first, key=_key)
        if others:
            self._held[first.id] = others
        for request in others:
            request.status = Status.HELD

    def plan(self) -> Plan:
        """The next step. SchedulerStuck if there is work and none of it would advance."""
        self._budget, self._chosen, self._preempted = self.max_num_batched_tokens, {}, False
        prefills = []
        for request in tuple(self.running):
            if request.num_tokens - request.num_computed_tokens > 1:
                prefills.append(request)
            elif request.status is Status.RUNNING:
                self._place(request)
        for request in prefills:
            self._admit(before=request)
            if request.status is Status.RUNNING:
                self._place(request)
        self._admit(before=None)
        if not self._chosen and self.has_work:
            raise SchedulerStuck(f"{len(self.running)} running and {len(self.waiting)} waiting, none can advance")
        return Plan.of(self._chosen)

    def record(self, plan: Plan, token_ids: Sequence[int | None]) -> None:
        """The step is done: token_ids has the token of each row that sampled, in order; None for one that failed.

        Rows that reached their end by tokens get their finish_reason and give up their blocks.
        """
        tokens = iter(token_ids)
        for request, count, samples in zip(plan.rows, plan.num_tokens, plan.samples, strict=True):
            token = next(tokens) if samples else None
            if request.status is not Status.RUNNING:
                continue
            request.num_computed_tokens += count
            self.blocks.remember(request)
            if token is not None:
                self._release(request.id)
                request.append(token)
                reason = request.end_by_tokens()
                if reason is not None:
                    self.finish(request, reason)
                elif self._cross(request):
                    self._take_back(request)

    def finish(self, request: Request, reason: str) -> None:
        """End one answer, wherever it is; its blocks are free at once."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.blocks.close(request)
        elif request.status is Status.WAITING:
            del self.waiting[bisect_left(self.waiting, request.key, key=_key)]
        elif request.status is Status.HELD:
            self._held[request.id].remove(request)
        if request.status is not Status.HELD:
            self._release(request.id)
        request.end(reason)

    def _admit(self, before: Request | None) -> None:
        """Let newcomers run, in order, up to the place of `before`."""
        while self.waiting and self._budget and not self._preempted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if before is not None and request.key > before.key:
                return
            # A block for each who runs: or the newcomer would lose its own again at the next step.
            if not self.blocks.open(request, reserve=len(self.running)):
                return
            del self.waiting[0]
            request.status = Status.RUNNING
            insort(self.running, request, key=_key)
            self._place(request)

    def _place(self, request: Request) -> None:
        """Plan as many tokens of the request as budget and blocks allow, taking blocks from those after it."""
        computed = request.num_computed_tokens
        wanted = self.blocks.cut(request, computed + min(request.num_tokens - computed, self._budget, self.max_chunk))
        covered = self.blocks.grow(request, wanted)
        while covered <= computed < wanted and self.running[-1] is not request:
            self._preempt(self.running[-1])
            covered = self.blocks.grow(request, wanted)
        if covered > computed:
            self._chosen[request] = covered - computed
            self._budget -= covered - computed

    def _preempt(self, request: Request) -> None:
        self._budget += self._chosen.pop(request, 0)
        self._preempted = True
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._take_back(request)

    def _take_back(self, request: Request) -> None:
        """From running to waiting: it will be computed again from its first token, or from what is cached of it."""
        self.running.remove(request)
        self.blocks.close(request)
        request.status = Status.WAITING
        insort(self.waiting, request, key=_key)

    def _cross(self, request: Request) -> bool:
        """Put the request on its side of the border; True if it was on the other."""
        variant = self.border.variant(request.num_tokens) if self.border else request.variant
        if variant == request.variant:
            return False
        request.variant = variant
        request.block_hashes.clear()  # the names of its prefixes in the other variant
        return True

    def _release(self, request_id: str) -> None:
        """The first answer of an id has its prompt in the cache, or has ended: the others may run."""
        for request in self._held.pop(request_id, ()):
            request.status = Status.WAITING
            insort(self.waiting, request, key=_key)


def _key(request: Request) -> tuple[int, int, int]:
    return request.key
