from paper_engine import PaperEngine, cold_tokens, make_blocks, make_request

from inferfleet.engine.prefix import PrefixHasher, longest_prefix
from inferfleet.engine.sight import Sight


def longest(cached, windows):
    return longest_prefix(cached, [Sight(window) for window in windows], [True] * len(cached[0]), 4)


def chain(tokens, salt="", identity="model", block_size=4, variant=""):
    hashes: list[bytes] = []
    PrefixHasher(identity, block_size).extend(hashes, (salt, variant), tokens, len(tokens) // block_size)
    return hashes


def test_equal_prefixes_have_equal_hashes_and_differ_from_the_first_unequal_block_on():
    # Given two texts that differ in their second block only, then the third block's hash differs too.
    a, b = chain([1] * 12), chain([1] * 4 + [2] + [1] * 7)
    assert a[0] == b[0]
    assert a[1] != b[1] and a[2] != b[2]


def test_salt_model_and_block_size_separate_equal_tokens():
    tokens = list(range(8))
    names = [chain(tokens), chain(tokens, salt="x"), chain(tokens, identity="other"), chain(tokens, block_size=8)]
    names.append(chain(tokens, variant="small"))
    assert len({hashes[0] for hashes in names}) == 5


def test_identity_and_salt_do_not_run_together():
    assert chain([1] * 4, salt="bc", identity="a")[0] != chain([1] * 4, salt="c", identity="ab")[0]


def test_a_chain_is_extended_in_place_without_changing_what_is_there():
    hasher, tokens = PrefixHasher("m", 4), list(range(12))
    hashes: list[bytes] = []
    hasher.extend(hashes, ("s", ""), tokens, 1)
    first = hashes[0]
    hasher.extend(hashes, ("s", ""), tokens, 3)
    assert hashes[0] == first and hashes == chain(tokens, "s", "m")


def test_a_window_sees_back_to_the_block_of_its_first_key():
    assert Sight(None).first_block(16, 4) == 0
    assert Sight(4).first_block(16, 4) == 3  # keys 13..15, and 16 itself
    assert Sight(5).first_block(16, 4) == 3  # keys 12..15
    assert Sight(6).first_block(16, 4) == 2  # keys 11..15


def test_a_full_group_needs_every_block_before_the_boundary():
    assert longest([[True, True, False, True]], [None]) == 2


def test_a_windowed_group_needs_only_the_blocks_that_the_next_token_sees():
    # Given a window of 5, so that one block before the boundary is enough.
    assert longest([[True] * 4, [False, False, False, True]], [None, 5]) == 4
    # And where the last block is gone, the boundary moves back to where a block is left.
    assert longest([[True] * 4, [False, True, False, False]], [None, 5]) == 2
    assert longest([[True] * 4, [False] * 4], [None, 5]) == 0


def test_a_window_of_one_token_needs_nothing_behind_the_boundary():
    assert longest([[True] * 3, [False] * 3], [None, 1]) == 3


def test_the_second_of_two_equal_prompts_takes_all_blocks_but_leaves_a_token_to_compute():
    engine = PaperEngine(make_blocks((None, 40)))
    engine.add(make_request("a", list(range(12))))
    engine.run()
    # When the same prompt of exactly three blocks comes again, then two blocks are taken: one token must be computed.
    again = make_request("b", list(range(12)), arrival=1)
    engine.add(again)
    engine.run()
    assert again.num_cached_tokens == 8
    assert again.output_token_ids == cold_tokens(again, [None])
    assert (engine.blocks.prefix_queries, engine.blocks.prefix_hits) == (24, 8)


def test_the_output_of_one_request_is_the_prefix_of_the_next():
    engine = PaperEngine(make_blocks((None, 40)))
    first = make_request("a", [1, 2, 3], max_tokens=8)
    engine.add(first)
    engine.run()
    turn = make_request("b", [*first.token_ids, 4, 4], arrival=1)
    engine.add(turn)
    engine.run()
    assert turn.num_cached_tokens == 8


def test_tenants_do_not_share_prefixes():
    engine = PaperEngine(make_blocks((None, 40)))
    engine.add(make_request("a", list(range(12)), cache_salt="one"))
    engine.run()
    other = make_request("b", list(range(12)), cache_salt="two", arrival=1)
    engine.add(other)
    engine.run()
    assert other.num_cached_tokens == 0


def test_a_prefix_is_found_again_in_full_and_windowed_groups_together():
    engine = PaperEngine(make_blocks((None, 40), (6, 40)))
    prompt = [token % 5 for token in range(30)]
    engine.add(make_request("a", prompt))
    engine.run()
    again = make_request("b", prompt, arrival=1)
    engine.add(again)
    engine.run()
    assert again.num_cached_tokens == 28
    assert again.output_token_ids == cold_tokens(again, [None, 6])


def test_the_least_recently_used_prefix_is_reused_first():
    # Given a pool of nine blocks and two finished prompts of three blocks, the first used again since.
    engine = PaperEngine(make_blocks((None, 10)))
    old, fresh = [1] * 12, [2] * 12
    for index, prompt in enumerate((old, fresh, old)):
        engine.add(make_request(str(index), prompt, max_tokens=1, arrival=index))
        engine.run()
    # When a third prompt needs six blocks, then the prompt not used since loses its own.
    engine.add(make_request("big", [3] * 24, max_tokens=1, arrival=4))
    engine.run()
    for index, (prompt, cached) in enumerate(((old, 8), (fresh, 0))):
        probe = make_request(f"probe{index}", prompt, max_tokens=1, arrival=5 + index)
        engine.add(probe)
        engine.run()
        assert probe.num_cached_tokens == cached
