import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_engine import PaperEngine, cold_tokens, make_blocks, make_request

from inferfleet.engine.blocks import BlockPool
from inferfleet.engine.request import Status
from inferfleet.engine.sight import Sight


def test_a_named_block_waits_to_be_found_and_forgets_its_name_when_reused():
    pool = BlockPool(3)
    block = pool.take()
    pool.name(block, b"prefix")
    pool.give_back(block)
    assert pool.find(b"prefix") == block
    # When every blank block is taken, then the named one is reused last and its name is gone.
    assert pool.take() != block
    assert pool.take() == block
    assert pool.find(b"prefix") is None
    assert pool.num_free == 0


def test_a_shared_block_is_free_when_its_last_owner_lets_go():
    pool = BlockPool(2)
    block = pool.take()
    pool.name(block, b"prefix")
    pool.share(block)
    pool.give_back(block)
    assert pool.num_free == 0
    pool.give_back(block)
    assert pool.num_free == 1


def test_two_blocks_with_the_same_prefix_keep_one_name():
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    pool.name(first, b"prefix")
    pool.name(second, b"prefix")
    assert pool.find(b"prefix") == first
    pool.give_back(second)
    assert pool.take() == second  # without a name it is the first to be reused


def test_a_pool_needs_a_block_beside_the_null_block():
    with pytest.raises(ValueError, match="null block"):
        BlockPool(1)


def test_a_windowed_group_holds_about_a_window_and_a_chunk_while_a_long_prompt_is_computed():
    # Given a prompt of 60 tokens, chunks of 8, blocks of 4 and a window of 10.
    engine = PaperEngine(make_blocks((None, 40), (10, 40), max_model_len=128), max_num_batched_tokens=8)
    request = make_request("a", list(range(60)), max_tokens=20)
    engine.add(request)
    engine.run()
    # Then the full group held every block, and the windowed one never more than window and chunk, badly aligned.
    full, windowed = engine.most_blocks
    assert full == 20
    assert windowed <= (10 - 1 + 8 - 2) // 4 + 2
    assert request.output_token_ids == cold_tokens(request, [None, 10])


def test_a_windowed_pool_much_smaller_than_the_context_serves_a_long_request():
    engine = PaperEngine(make_blocks((None, 40), (6, 5), max_model_len=128), max_num_batched_tokens=64)
    request = make_request("a", list(range(70)), max_tokens=20)
    engine.add(request)
    engine.run()
    assert request.output_token_ids == cold_tokens(request, [None, 6])


def test_a_spoiled_request_leaves_nothing_to_find():
    engine = PaperEngine(make_blocks((None, 40)))
    spoiled = make_request("a", list(range(12)))
    engine.add(spoiled)
    engine.step()
    # When its blocks are disowned, then the next equal prompt starts cold.
    engine.blocks.disown(spoiled)
    engine.scheduler.finish(spoiled, "error")
    engine.check_blocks()
    again = make_request("b", list(range(12)), arrival=1)
    engine.add(again)
    engine.run()
    assert again.num_cached_tokens == 0


GROUPS = st.sampled_from(
    [
        [(None, 11)],
        [(None, 11), (6, 11)],
        [(None, 13), (3, 6), (9, 8)],
        [(5, 6)],
        [(None, 11), (Sight(chunk=6), 11)],
        [(Sight(chunk=4), 6), (Sight(chunk=10), 8)],
    ]
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.lists(st.integers(0, 1), min_size=4, max_size=16),
            st.integers(1, 24),
            st.integers(0, 2),
            st.sampled_from(["", "tenant"]),
        ),
        st.tuples(st.just("group"), st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(2, 4)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    min_size=4,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(
    groups=GROUPS,
    actions=ACTIONS,
    budget=st.sampled_from([3, 7, 16]),
    prefix=st.booleans(),
    num_snapshots=st.sampled_from([None, 0, 1, 3, 20]),
)
def test_no_sequence_of_events_leaks_or_mixes_blocks_and_all_tokens_are_the_cold_ones(
    groups, actions, budget, prefix, num_snapshots
):
    # Given a pool so small that requests are preempted (most prompts share prefixes: two tokens, two tenants).
    engine = PaperEngine(
        make_blocks(*groups, prefix=prefix, num_snapshots=num_snapshots), max_num_seqs=8, max_num_batched_tokens=budget
    )
    requests = []
    # When requests come, run and are cancelled in any order (every step checks every cell and every block).
    for number, (action, *rest) in enumerate(actions):
        if action == "add":
            prompt, tokens, priority, salt = rest
            requests.append(
                make_request(str(number), prompt, max_tokens=tokens, priority=priority, cache_salt=salt, arrival=number)
            )
            engine.add(requests[-1])
        elif action == "group":
            answers = [make_request(str(number), rest[0], arrival=number, index=i) for i in range(rest[1])]
            requests += answers
            engine.add(*answers)
        elif action == "step":
            for _ in range(rest[0]):
                if engine.scheduler.has_work:
                    engine.step()
        elif requests:
            victim = requests[rest[0] % len(requests)]
            if victim.status is not Status.FINISHED:
                engine.scheduler.finish(victim, "cancelled")
            engine.check_blocks()
    # Then all end within a bound, nothing is left behind and each wrote what it would have written alone.
    total = sum(r.max_num_tokens for r in requests)
    engine.run(limit=engine.steps + 10 + 20 * total)
    assert all(pool.num_free == pool.num_usable for pool in engine.blocks.pools)
    for request in requests:
        assert request.status is Status.FINISHED
        expected = cold_tokens(request, engine.blocks.sights)
        if request.finish_reason != "cancelled":
            assert request.output_token_ids == expected
        else:
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
