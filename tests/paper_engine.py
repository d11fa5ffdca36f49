"""A scheduler and a block manager around a model on paper: a cell of the cache holds the name of a prefix.

What a token stores is the hash of (salt, all tokens up to it), so reading a wrong, stale or foreign cell is noticed at
once, and the next token is a function of what is read: equal tokens mean equal contexts. With snapshots the model also
has a recurrent state: the name of the last prefix that the row's slot has seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from inferfleet.engine.blocks import BlockManager, GroupSize
from inferfleet.engine.border import Border
from inferfleet.engine.prefix import PrefixHasher
from inferfleet.engine.request import Request, Status
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.scheduler import Plan, Scheduler
from inferfleet.engine.sight import Sight

VOCAB = 5


def make_request(name: str, prompt: list[int], *, max_tokens: int = 4, output=(), **fields) -> Request:
    sampling = fields.pop("sampling", SamplingParams())
    return Request(name, prompt, sampling, max_tokens=max_tokens, output_token_ids=list(output), **fields)


def sight(bound: int | Sight | None) -> Sight:
    """A number is a window."""
    return bound if isinstance(bound, Sight) else Sight(window=bound)


def make_blocks(
    *groups: tuple[int | Sight | None, int],
    block_size=4,
    max_num_seqs=8,
    max_model_len=64,
    prefix=True,
    num_snapshots=None,
):
    hasher = PrefixHasher("paper", block_size) if prefix else None
    sizes = [GroupSize(sight(bound), count) for bound, count in groups]
    return BlockManager(
        sizes,
        block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        hasher=hasher,
        num_snapshots=num_snapshots,
    )


def names_of(request: Request) -> list[int]:
    """What each token of the request stores."""
    name, names = hash((request.cache_salt, request.variant)), []
    for token in request.token_ids:
        name = hash((name, token))
        names.append(name)
    return names


def cold_tokens(request: Request, bounds: list[int | Sight | None], border: Border | None = None) -> list[int]:
    """What the request would write without cache, schedule or neighbours, each token over the whole text so far."""
    same = {"cache_salt": request.cache_salt, "variant": request.variant}
    probe = make_request("cold", list(request.prompt_token_ids), **same)
    for _ in range(request.max_tokens):
        if border is not None:
            probe.variant = border.variant(probe.num_tokens)
        probe.append(next_token(names_of(probe), [sight(bound) for bound in bounds]))
    return probe.output_token_ids


def next_token(names: list[int], sights: list[Sight]) -> int:
    seen = tuple(tuple(names[sight.first_key(len(names) - 1) :]) for sight in sights)
    return hash(seen) % VOCAB


@dataclass
class PaperEngine:
    """Runs plans on paper and checks every cell that a token reads."""

    blocks: BlockManager
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    border: Border | None = None
    steps: int = 0
    batches: list[Plan] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            border=self.border,
        )
        self.cells: list[dict[int, int]] = [{} for _ in self.blocks.pools]
        self.most_blocks = [0] * len(self.blocks.pools)
        #: Of a recurrent model, the name of the prefix in every slot, snapshots included.
        self.states: dict[int, int] = {}

    def add(self, *requests: Request) -> None:
        self.scheduler.add(requests)

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        assert sum(plan.num_tokens) <= self.max_num_batched_tokens
        assert len(plan.rows) <= self.max_num_seqs and len(set(plan.rows)) == len(plan.rows)
        if self.blocks.snapshots is not None:
            for source, target in self.blocks.snapshots.take_moves():
                self.states[target] = self.states[source]
        for request, count in zip(plan.rows, plan.num_tokens, strict=True):
            self._write(request, count)
        tokens = []
        for request, count, samples in zip(plan.rows, plan.num_tokens, plan.samples, strict=True):
            self._check_reads(request, count)
            if samples:
                tokens.append(next_token(names_of(request), self.blocks.sights))
        self.check_blocks()
        self.scheduler.record(plan, tokens)
        self.check_blocks()
        self.finished += [row for row in plan.rows if row.status is Status.FINISHED]
        self.batches.append(plan)
        self.steps += 1
        return plan

    def run(self, limit: int = 500) -> list[Request]:
        """Steps until nothing is left; more than limit steps is a livelock."""
        while self.scheduler.has_work:
            assert self.steps < limit, "no end in sight"
            self.step()
        return self.finished

    def _cell(self, group: int, request: Request, position: int) -> int:
        block, offset = divmod(position, self.blocks.block_size)
        return int(self.blocks.tables[group][request.slot, block]) * self.blocks.block_size + offset

    def _write(self, request: Request, count: int) -> None:
        names, start = names_of(request), request.num_computed_tokens
        if start and self.blocks.snapshots is not None:
            assert self.states[request.slot] == names[start - 1], "the state of another prefix"
        self.states[request.slot] = names[start + count - 1]
        for group, cells in enumerate(self.cells):
            for position in range(start, start + count):
                cell = self._cell(group, request, position)
                assert cell >= self.blocks.block_size, "a write to the null block"
                cells[cell] = names[position]

    def _check_reads(self, request: Request, count: int) -> None:
        names, start = names_of(request), request.num_computed_tokens
        for group, sight in enumerate(self.blocks.sights):
            for position in range(start, start + count):
                for seen in range(sight.first_key(position), position + 1):
                    assert self.cells[group][self._cell(group, request, seen)] == names[seen]

    def check_blocks(self) -> None:
        """Every block is blank, cached or held by exactly the rows that it counts."""
        for group, pool in enumerate(self.blocks.pools):
            held = Counter(self.blocks.tables[group][self.blocks.tables[group] > 0].tolist())
            blank, cached = set(pool._blank), set(pool._cached)
            owned = {block: count for block, count in enumerate(pool._owners) if count}
            assert owned == held
            assert not blank & cached and not (blank | cached) & set(owned)
            assert len(pool._blank) + len(cached) + len(owned) == pool.num_usable
            assert {pool._hash_of[block] for block in pool._block_of.values()} == set(pool._block_of)
            assert all(pool._hash_of[block] for block in cached)
            self.most_blocks[group] = max(self.most_blocks[group], len(owned))
