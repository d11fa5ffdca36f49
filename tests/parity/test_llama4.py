"""Llama 4's own: chunks of attention across steps, blocks and prefix hits, all against transformers."""

from __future__ import annotations

import pytest
from parity.test_parity_generate import GREEDY, assert_greedy, generate, llm, prompts

from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.sight import Sight

#: (architecture, seed, its chunk size, tokens of a block, tokens that the cache holds)
HITS = [
    pytest.param("llama4-scout", 0, 16, 8, 64, id="at a border"),
    pytest.param("llama4-maverick", 1, 33, 8, 32, id="one token before a border"),
    pytest.param("llama4-scout", 1, 21, 8, 64, id="one token after a border"),
    pytest.param("llama4-maverick", 1, 33, 32, 96, id="three tokens before a border"),
]


@pytest.mark.parametrize(("name", "seed", "chunk", "block_size", "hit"), HITS)
def test_text_after_a_hit_near_a_chunks_border_is_the_references(name, seed, chunk, block_size, hit, reference):
    # Given a prompt whose first `hit` tokens are in the cache and end close to the border of a chunk,
    judge = reference(name, seed)
    shared, first, second = prompts(judge, 3, [hit + 1, 40, 2])
    engine = llm(judge, block_size=block_size)
    assert Sight(chunk=chunk) in engine.engine.model.cache_spec.sights
    generate(engine, [shared + first])
    # when it is continued in another way,
    output = engine.generate([{"prompt_token_ids": shared + second}], GREEDY)[0]
    # then nothing of those is computed again, and the text is the reference's.
    assert output.num_cached_tokens == hit
    assert_greedy(judge, shared + second, output.outputs[0].token_ids)


@pytest.mark.parametrize(("name", "seed", "chunk"), [("llama4-scout", 1, 21), ("llama4-maverick", 0, 8)])
def test_decoding_across_borders_of_chunks_writes_the_references_text(name, seed, chunk, reference):
    # Given prompts that end before, at and after the border of a chunk, the longest over three chunks,
    judge = reference(name, seed)
    tokens = prompts(judge, 19, [chunk - 2, chunk - 1, chunk, chunk + 1, 3 * chunk + 5])
    # when 64 tokens are written after each, which crosses at least one border more,
    written = generate(llm(judge, block_size=8, prefix_caching=False), tokens)
    # then all are the reference's.
    for ids, answer in zip(tokens, written, strict=True):
        assert_greedy(judge, ids, answer)


@pytest.mark.parametrize(("name", "seed", "chunk"), [("llama4-scout", 0, 16), ("llama4-scout", 1, 21)])
def test_a_chunked_layer_holds_the_blocks_of_one_chunk_and_lets_go_at_its_border(name, seed, chunk, reference):
    # Given a request alone in an engine with blocks of 4,
    judge = reference(name, seed)
    engine = llm(judge, block_size=4, prefix_caching=False).engine
    near, full = (engine.model.cache_spec.sights.index(sight) for sight in (Sight(chunk=chunk), Sight()))
    engine.add("one", prompts(judge, 23, [5])[0], SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True))
    engine.step()
    # when it writes token after token,
    held = []
    while engine.has_work and engine.scheduler.running:
        request = engine.scheduler.running[0]
        # A block given back turns to zero in the table; it is given back when the next one is taken.
        tables = [engine.scheduler.blocks.tables[group][request.slot] for group in (near, full)]
        held.append((request.num_computed_tokens, *(int((table > 0).sum()) for table in tables)))
        engine.step()
    # then the full layers hold every block, the chunked ones those from the last token's chunk on.
    assert len(held) == 69
    for computed, in_chunk, in_all in held:
        last = computed - 1
        assert in_all == last // 4 + 1
        first_of_block = last - last % 4
        assert in_chunk == last // 4 + 1 - first_of_block // chunk * chunk // 4
