import pytest
import torch
from tiny_engine import CONTEXT, HEAD_DIM, tiny_engine

from inferfleet.engine import sizing
from inferfleet.engine.blocks import BlockManager
from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Latent, Recurrent, StatePart
from inferfleet.engine.costs import CacheCosts, in_units, most
from inferfleet.engine.errors import LoadError
from inferfleet.engine.sight import Sight
from inferfleet.engine.sizing import cache_budget, cache_bytes, cache_costs, group_sizes, held_tokens, sizes_within

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


def test_a_context_costs_its_tokens_its_windows_and_its_state():
    # Given layers that keep every token, others that keep a window, and a state,
    costs = CacheCosts(48 << 10, ((512, 1 << 10), (8192, 2 << 10)), state=5 << 20)
    # then a short context pays for each of its tokens, a long one for its window only once.
    assert costs.context(100) == 100 * (51 << 10) + (5 << 20)
    assert costs.context(100_000) == 100_000 * (48 << 10) + (512 << 10) + (16 << 20) + (5 << 20)
    told = "48 KiB a token + 1 KiB for each of the last 512 tokens + 2 KiB for each of the last 8192 tokens"
    assert str(costs) == f"{told} + 5 MiB of state"


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (10, 10), (1000, 700)])
def test_the_most_is_the_last_that_fits_up_to_a_limit(limit, found):
    assert most(limit, lambda count: count <= 700) == found
    assert most(limit, lambda count: False) == 0


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (48 << 10, "48 KiB"), (1 << 50, "1024 TiB")]
)
def test_bytes_are_told_in_binary_units(size, text):
    assert in_units(size) == text


def test_the_costs_of_a_model_are_those_of_its_groups():
    # 2 layers of 2 heads of 8 for ever, 2 layers of 1 head of 16 within 64 tokens; keys and values of 4 bytes.
    assert cache_costs(SPEC, torch.float32) == CacheCosts(2 * 2 * 2 * 8 * 4, ((64, 2 * 2 * 16 * 4),))
    # A latent is one vector for keys and values; a state costs a sequence and not a token.
    state = Recurrent((StatePart((6, 3)), StatePart((2, 4, 4), torch.float32)))
    mixed = CacheSpec((Latent(16, 4), KeyValues(2, 8, Sight(chunk=32)), state))
    assert cache_costs(mixed, torch.bfloat16) == CacheCosts(20 * 2, ((32, 32 * 2),), state=18 * 2 + 32 * 4)


def test_a_cpu_gives_a_wish_more_of_its_memory_than_it_takes_unasked(monkeypatch):
    monkeypatch.setattr(sizing, "free_memory", lambda device, group=None: 10 << 30)
    cpu = torch.device("cpu")
    assert cache_budget(cpu) == 2 << 30
    assert cache_budget(cpu, wish=3 << 30) == 3 << 30
    assert cache_budget(cpu, wish=1 << 40) == 9 << 30


def test_only_layers_that_keep_every_token_limit_a_context():
    assert held_tokens(sizes(100), 16, 1000) == 112
    assert held_tokens(sizes(100), 16, 50) == 50
    windowed = CacheSpec((WINDOWED,))
    assert held_tokens(sizes(100, spec=windowed), 16, 1000) == 1000


#: What a token costs in TinyModel's unbounded layers: six heads, keys and values, float32.
TOKEN = 6 * HEAD_DIM * 2 * 4


def test_an_impossible_context_is_refused_with_what_it_needs_and_what_there_is(tmp_path, monkeypatch):
    # Given memory for half of the context of the model,
    monkeypatch.setattr(sizing, "free_memory", lambda device, group=None: CONTEXT // 2 * TOKEN)
    # when the whole is asked for, then the refusal names need, cost, room and the longest that fits.
    with pytest.raises(LoadError) as caught:
        tiny_engine(tmp_path, kv_cache_tokens=None, max_model_len=CONTEXT)
    assert caught.value.param == "max_model_len"
    message = str(caught.value)
    assert message.startswith(f"a context of {CONTEXT} tokens needs ")
    assert f"({in_units(TOKEN)} a token + 64 bytes for each of the last 11 tokens)" in message
    assert f"{in_units(int(CONTEXT // 2 * TOKEN * 0.9))} are free for it on cpu: the longest that fits is " in message
    # And what it calls the longest is served.
    longest = int(message.split("the longest that fits is ")[1].split(";")[0])
    engine = tiny_engine(tmp_path, kv_cache_tokens=None, max_model_len=longest)
    assert engine.admission.max_model_len == longest


def test_a_model_whose_own_context_does_not_fit_is_served_with_the_longest_that_does(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sizing, "free_memory", lambda device, group=None: CONTEXT // 2 * TOKEN)
    engine = tiny_engine(tmp_path, kv_cache_tokens=None)
    served = engine.admission.max_model_len
    assert 0 < served < CONTEXT // 2
    # The log says how much of it is served and why.
    (record,) = [r for r in caplog.records if "context does not fit" in r.getMessage()]
    assert record.fields["served"] == served
    assert f"a context of {CONTEXT} tokens needs" in record.fields["reason"]


def test_a_context_that_contradicts_the_cache_that_was_asked_for_is_refused(tmp_path):
    with pytest.raises(LoadError, match=r"holds 40 tokens \(kv_cache_tokens\): the longest that fits is 40"):
        tiny_engine(tmp_path, kv_cache_tokens=40, max_model_len=64)
