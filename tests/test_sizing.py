import pytest
import torch

from inferfleet.engine.blocks import BlockManager
from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Latent, Recurrent, StatePart
from inferfleet.engine.errors import LoadError
from inferfleet.engine.sight import Sight
from inferfleet.engine.sizing import cache_bytes, group_sizes, sizes_within

WINDOWED = KeyValues(1, 16, Sight(window=64))
SPEC = CacheSpec((KeyValues(2, 8), WINDOWED, KeyValues(2, 8), WINDOWED))


def sizes(tokens, block_size=16, max_num_seqs=4, max_num_batched_tokens=128, spec=SPEC):
    return group_sizes(
        spec, tokens, block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
    )


def within(budget, wanted, block_size=16):
    return sizes_within(SPEC, budget, wanted, block_size, itemsize=4, max_num_seqs=4, max_batched=128)


def test_layers_with_the_same_window_share_a_group():
    assert SPEC.sights == (Sight(), Sight(window=64))
    assert [SPEC.group_of(layer) for layer in SPEC.layers] == [0, 1, 0, 1]
    assert SPEC.elements_per_token(0) == 2 * 2 * 2 * 8


def test_a_windowed_group_gets_what_all_seats_can_see_and_not_the_whole_context():
    full, windowed = sizes(16_000)
    assert full.num_blocks == 1001
    assert windowed.num_blocks == 4 * (4 + 2) + 8 + 1


def test_a_windowed_group_is_never_larger_than_the_full_one():
    full, windowed = sizes(100)
    assert full.num_blocks == windowed.num_blocks == 8


@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 64])
@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_the_windows_of_all_seats_and_a_full_step_always_fit(block_size, chunk):
    # Given seats whose windows and chunks begin and end badly in their blocks.
    group = sizes(100_000, block_size, 4, chunk)[1]
    blocks = BlockManager([group], block_size, max_num_seqs=4, max_model_len=100_000, hasher=None)
    spans = [64 - 1 + tokens for tokens in (chunk, 1, 1, 1)]
    worst = sum((span - 2) // block_size + 2 for span in spans)
    assert blocks.pools[0].num_usable >= worst
    assert blocks.max_chunk(chunk) == chunk


def test_the_largest_cache_within_a_budget_is_found():
    found = within(1 << 20, wanted=1 << 20)
    assert cache_bytes(SPEC, found, 16, 4) <= 1 << 20
    one_more = sizes(found[0].num_blocks * 16)
    assert cache_bytes(SPEC, one_more, 16, 4) > 1 << 20


def test_no_more_is_taken_than_wanted():
    assert within(1 << 40, wanted=500)[0].num_blocks == 32 + 1


def test_no_memory_for_a_single_block_is_an_error_with_the_figures():
    with pytest.raises(LoadError, match="less than 16 tokens take"):
        within(1000, wanted=500)


def test_a_layer_without_heads_is_a_bug_of_its_family():
    with pytest.raises(ValueError, match="at least 1"):
        KeyValues(0, 8)
    with pytest.raises(ValueError, match="at least one layer"):
        CacheSpec(())


def test_kinds_of_layers_cost_what_they_store():
    # Given a latent beside a chunked layer and one with a state,
    state = Recurrent((StatePart((6, 3)), StatePart((2, 4, 4), torch.float32)))
    spec = CacheSpec((Latent(16, 4), KeyValues(2, 8, Sight(chunk=32)), state, state, Latent(16, 4)))
    # then each group's tokens cost its own layers' numbers, and a sequence its states in their own number formats.
    assert spec.sights == (Sight(), Sight(chunk=32))
    assert (spec.elements_per_token(0), spec.elements_per_token(1)) == (40, 32)
    assert spec.has_states and spec.state_bytes(torch.bfloat16) == 2 * (18 * 2 + 32 * 4)
    with pytest.raises(ValueError, match="at least one layer"):
        CacheSpec((state,))
