"""A model with a carried state behind the whole engine: no schedule, hit, failure or neighbour may show in a state.

The model's state is a number that depends on every token so far, and the last three tokens; its next token is a
function of both and of the sum that attention gives. So a state that was stale, foreign, cleared too late or copied
at the wrong place changes the text.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import VOCAB, gather, greedy, run, tiny_engine
from torch import Tensor

from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Recurrent, StatePart
from inferfleet.engine.errors import EngineError, NumericalError

MODULUS = 10_007
#: Token whose logits are NaN.
SPOILED = 9


def after(number: int, recent: list[int], token: int) -> tuple[int, list[int]]:
    """The state after one token more."""
    return (number * 31 + token + 1) % MODULUS, [*recent[1:], token]


def choose(number: int, recent: list[int], total: int) -> int:
    return (number + 7 * recent[0] + 5 * recent[1] + 3 * recent[2] + total) % 8


def cold(prompt: list[int], count: int) -> list[int]:
    """What the model writes after a prompt, computed without an engine."""
    tokens = list(prompt)
    for _ in range(count):
        number, recent = 0, [0, 0, 0]
        for token in tokens:
            number, recent = after(number, recent, token)
        tokens.append(choose(number, recent, sum(tokens)))
    return tokens[len(prompt) :]


class Carrying:
    """A state of two parts in layer 0, attention over the token ids in layer 1."""

    border = None
    cache_spec = CacheSpec((Recurrent((StatePart((1,), torch.int64), StatePart((3,)))), KeyValues(1, 1)))

    def __init__(self) -> None:
        #: Raised by the next forward passes, one each, when the states have been updated already.
        self.errors: list[Exception] = []

    def forward(self, input_ids: Tensor, positions: Tensor, batch) -> Tensor:
        numbers, recents = batch.states(0)
        chosen = []
        starts = batch.query_start.tolist()
        for slot, begin, end in zip(batch.state_slots.tolist(), starts[:-1], starts[1:], strict=True):
            number, recent = int(numbers[slot]), recents[slot].to(torch.int64).tolist()
            for token in input_ids[begin:end].tolist():
                number, recent = after(number, recent, token)
                chosen.append(choose(number, recent, 0))
            numbers[slot], recents[slot] = number, torch.tensor(recent, dtype=torch.float32)
        if self.errors:
            raise self.errors.pop(0)
        values = input_ids.view(-1, 1, 1).float()
        mean = batch.attend(1, torch.zeros_like(values), torch.zeros_like(values), values, scale=1.0).view(-1)
        totals = (mean * (positions + 1)).round().to(torch.int64)
        spoiled = torch.where(input_ids == SPOILED, float("nan"), 1.0)
        return torch.stack(((torch.tensor(chosen) + totals).remainder(8).float(), spoiled), dim=1)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden[:, 0].to(torch.int64), VOCAB).float() * hidden[:, 1:]


@pytest.fixture
def make(tmp_path):
    """make(**settings): an engine whose states are rubbish where nothing was cleared or copied."""
    return lambda **fields: carrying_engine(tmp_path, **fields)


def carrying_engine(folder, **fields):
    engine = tiny_engine(folder, model=Carrying(), **fields)
    numbers, recents = engine.builder.cache.states(0)
    numbers.fill_(-1)
    recents.fill_(77.0)
    return engine


def ask(engine, prompt: list[int], count: int = 6) -> tuple[int, list[int]]:
    """(tokens found in the cache, the answer)."""
    engine.add("one", prompt, greedy(count))
    told = run(engine)["one"]
    return told[-1]["usage"].cached_tokens, told[0]["token_ids"]


def test_a_slot_is_cleared_before_another_sequence_begins_in_it(make):
    engine = make(max_num_seqs=1)
    for prompt in ([1, 2, 3], [4, 5, 6, 7, 1], [2]):
        assert ask(engine, prompt) == (0, cold(prompt, 6))


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 7, 2048])
def test_chunks_of_any_size_carry_the_state_on(make, budget):
    prompt = [i % 7 for i in range(41)]
    assert ask(make(max_num_batched_tokens=budget), prompt)[1] == cold(prompt, 6)


def test_a_prompt_that_begins_like_an_earlier_one_goes_on_from_the_last_state_kept_there(make):
    # Given blocks of four and steps of eight tokens, so that states are kept at 8, 16 and 20 of 22,
    engine = make(max_num_batched_tokens=8)
    prompt = [i % 7 for i in range(22)]
    ask(engine, prompt)
    # when another prompt begins with 19 of those tokens, then it goes on from 16; with all of them, from 20.
    for common, found in ((19, 16), (22, 20), (7, 0)):
        other = [*prompt[:common], 6, 6, 6]
        assert ask(engine, other) == (found, cold(other, 6))


def test_the_text_that_two_prompts_begin_with_is_found_by_the_third_wherever_they_part(make):
    # Given a step large enough for a whole prompt, so that the first keeps a state at its end alone,
    engine = make()
    shared = [i % 7 for i in range(22)]
    # when others begin like it, then the second is computed whole, and leaves a state where the two part.
    for last, found in ((1, 0), (2, 0), (3, 20), (4, 20)):
        prompt = shared + [last] * 20
        assert ask(engine, prompt) == (found, cold(prompt, 6))


def test_an_equal_prompt_of_whole_blocks_goes_on_from_the_border_before_its_last_token(make):
    engine = make()
    prompt = [i % 7 for i in range(24)]
    assert [ask(engine, prompt) for _ in range(2)] == [(0, cold(prompt, 6)), (20, cold(prompt, 6))]


def test_of_two_states_kept_in_one_step_where_one_has_room_the_later_is_the_one_found(make):
    # Given room for one state, and two prompts whose first ten tokens are computed in the same step,
    engine = make(state_snapshots=1)
    prompts = {"one": [1] * 10, "two": [2] * 10}
    for name, prompt in prompts.items():
        engine.add(name, prompt, greedy(2))
    run(engine)
    # when the second comes again, then what is found under its name is its own.
    assert ask(engine, [2] * 10) == (8, cold([2] * 10, 6))


def test_one_snapshot_serves_whoever_comes_last(make):
    # Given room for one state alone, when prompts take turns, then only an equal one after an equal one is found.
    engine = make(state_snapshots=1)
    first, second = [1] * 10, [2] * 10
    found = [ask(engine, prompt) for prompt in (first, first, second, first)]
    assert found == [(0, cold(first, 6)), (8, cold(first, 6)), (0, cold(second, 6)), (0, cold(first, 6))]


def test_states_of_a_failed_step_are_not_found_again(make):
    # Given a prompt that is half computed when a step fails after its states were changed,
    engine = make(max_num_batched_tokens=8)
    prompt = [i % 7 for i in range(30)]
    engine.add("bad", prompt, greedy(4))
    engine.step()
    engine.model.errors.append(RuntimeError("a step that fails"))
    answers = run(engine)
    assert isinstance(answers["bad"][-1]["error"], EngineError)
    # when it is asked again, then nothing is kept of it, and it is computed from its beginning.
    assert not engine.scheduler.blocks.snapshots._pool._block_of
    assert ask(engine, prompt) == (0, cold(prompt, 6))


def test_tenants_share_no_state(make):
    engine = make()
    for salt in ("one", "two"):
        engine.add("job", [3] * 20, greedy(4), cache_salt=salt)
        told = run(engine)["job"]
        assert (told[-1]["usage"].cached_tokens, told[0]["token_ids"]) == (0, cold([3] * 20, 4))


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.lists(st.integers(0, 1), min_size=3, max_size=20),
            st.integers(1, 20),
            st.integers(1, 3),
            st.integers(0, 2),
        ),
        st.tuples(st.just("spoil"), st.lists(st.integers(0, 1), min_size=3, max_size=16), st.integers(0, 16)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("fail")),
    ),
    min_size=4,
    max_size=25,
)


@settings(max_examples=120, deadline=None)
@given(
    actions=ACTIONS,
    budget=st.sampled_from([3, 7, 16, 64]),
    snapshots=st.sampled_from([1, 2, 5, 30]),
    room=st.sampled_from([44, 64, 400]),
    prefix=st.booleans(),
)
def test_no_sequence_of_events_shows_in_any_text_or_leaks_a_state(
    actions, budget, snapshots, room, prefix, tmp_path_factory
):
    # Given an engine with little room for blocks and states,
    folder = tmp_path_factory.getbasetemp()
    sizes = {"max_num_batched_tokens": budget, "kv_cache_tokens": room, "max_num_seqs": 4, "max_model_len": 44}
    engine = carrying_engine(folder, **sizes, state_snapshots=snapshots, prefix_caching=prefix)
    expected, answers = {}, {}
    # when prompts come that mostly begin alike, some with a token that spoils their row, and steps fail, and some are
    # cancelled, in any order,
    for number, (action, *rest) in enumerate(actions):
        name = str(number)
        if action == "add":
            prompt, count, n, priority = rest
            engine.add(name, prompt, greedy(count, n=n), priority=priority)
            expected[name] = (prompt, cold(prompt, count), n)
        elif action == "spoil":
            prompt, place = rest
            prompt = [*prompt[:place], SPOILED, *prompt[place:], SPOILED]
            engine.add(name, prompt, greedy(4))
            expected[name] = (prompt, [], 1)
        elif action == "step":
            for _ in range(rest[0]):
                gather(answers, engine.step())
        elif action == "cancel" and expected:
            engine.cancel(list(expected)[rest[0] % len(expected)])
        elif action == "fail":
            engine.model.errors.append(RuntimeError("a step that fails"))
    for name, told in run(engine).items():
        merge(answers.setdefault(name, {}), told)
    # then whatever was told is what the model would have written alone,
    for name, (_, text, n) in expected.items():
        told = answers[name]
        whole = "error" not in told[-1]
        assert whole or isinstance(told[-1]["error"], NumericalError | EngineError)
        for index in range(n):
            answer = told.get(index, {"token_ids": [], "finish_reason": None})
            assert answer["token_ids"] == text[: len(answer["token_ids"])]
            assert not whole or answer["finish_reason"] == "cancelled" or answer["token_ids"] == text
    # every seat and block is free again, and every state kept is the one of the text that it is kept under.
    blocks = engine.scheduler.blocks
    assert sorted(blocks._free_slots) == list(range(4))
    assert all(pool.num_free == pool.num_usable for pool in blocks.pools)
    if blocks.snapshots is not None:
        check_kept_states(engine, [prompt + text for prompt, text, _ in expected.values()])


def check_kept_states(engine, texts: list[list[int]]) -> None:
    blocks, cache = engine.scheduler.blocks, engine.builder.cache
    cache.copy_states(blocks.snapshots.take_moves())
    states = {}
    for tokens in texts:
        names: list[bytes] = []
        blocks._hasher.extend(names, ("", ""), tokens, len(tokens) // blocks.block_size)
        number, recent = 0, [0, 0, 0]
        for place, token in enumerate(tokens, 1):
            number, recent = after(number, recent, token)
            if place % blocks.block_size == 0:
                states[names[place // blocks.block_size - 1]] = (number, recent)
    pool = blocks.snapshots._pool
    assert pool.num_free == pool.num_usable
    for name, block in pool._block_of.items():
        numbers, recents = (part[blocks.snapshots._first + block] for part in cache.states(0))
        assert (int(numbers), recents.tolist()) == states[name]


def merge(answers, told):
    for index, answer in told.items():
        if index in answers and "token_ids" in answer:
            answers[index]["token_ids"] += answer["token_ids"]
            answers[index]["finish_reason"] = answer["finish_reason"]
        else:
            answers[index] = answer
