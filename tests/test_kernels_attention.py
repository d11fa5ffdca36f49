"""Paged attention and its cache writes: the C++ path against the plain reference, over ragged batches.

Tolerances: float32 to 2e-5 (softmax in another order of sums); bfloat16 to one unit in the last place of numbers of
the size of the values (2^-7).
"""

import itertools

import pytest
import torch

from inferfleet.kernels import paged_attention as paged

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ragged(rows, *, heads=4, kv_heads=2, width=64, block_size=16, dtype=torch.float32, seed=0):
    """A batch over a shuffled cache: rows is [(query tokens, context)]; stale blocks hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // block_size) for _, context in rows]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    caches = [torch.full((num_blocks, block_size, kv_heads, width), float("nan"), dtype=dtype) for _ in "kv"]
    tables = torch.full((len(rows), max([1, *needed])), order[-1], dtype=torch.int32)
    for row, (_, context) in enumerate(rows):
        blocks = [order.pop(0) for _ in range(needed[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots = torch.tensor([blocks[t // block_size] * block_size + t % block_size for t in range(context)])
        new = [torch.randn(context, kv_heads, width, generator=generator).to(dtype) for _ in "kv"]
        paged.write_reference(*new, *caches, slots.long())
    lengths = [0, *(tokens for tokens, _ in rows)]
    q = torch.randn(sum(lengths), heads, width, generator=generator).to(dtype)
    query_start = torch.tensor(lengths).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([context for _, context in rows], dtype=torch.int32)
    return q, *caches, tables, query_start, seq_lens


def assert_same(actual, expected):
    tolerance = 2e-5 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check(batch, window=None, chunk=None):
    scale = batch[0].shape[2] ** -0.5
    actual = paged.paged_attention(*batch, scale=scale, window=window, chunk=chunk)
    assert_same(actual, paged.reference(*batch, scale=scale, window=window, chunk=chunk))


MIXED = [(1, 1), (1, 37), (5, 5), (1, 200), (40, 40), (0, 12), (19, 83), (1, 16), (130, 150)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (8, 1), (6, 2), (14, 2), (16, 8)])
def test_a_mixed_batch_equals_the_reference_for_every_gqa_ratio(heads, kv_heads, dtype):
    check(ragged(MIXED, heads=heads, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 16, 24, 40, 64, 80, 128, 256, 512])
def test_a_mixed_batch_equals_the_reference_for_every_head_width(width, dtype):
    check(ragged(MIXED, width=width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 48])
@pytest.mark.parametrize("window", [None, 1, 16, 50])
def test_a_mixed_batch_equals_the_reference_for_every_block_size_and_window(block_size, window, dtype):
    check(ragged(MIXED, block_size=block_size, dtype=dtype), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 512, 700])
def test_long_contexts_are_cut_into_pieces_and_merged(window, dtype):
    check(ragged([(1, 512), (1, 513), (1, 1700), (3, 1300)], heads=8, kv_heads=1, dtype=dtype), window=window)


def test_the_reference_agrees_with_torch_on_a_plain_causal_prompt():
    q, k_cache, v_cache, tables, query_start, seq_lens = ragged([(45, 45)], heads=6, kv_heads=2)
    k, v = (cache[tables[0].long()].flatten(0, 1)[:45] for cache in (k_cache, v_cache))

    actual = paged.reference(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125)

    arguments = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *arguments, is_causal=True, scale=0.125, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_table_entries_behind_the_window_are_never_read():
    q, k_cache, v_cache, tables, query_start, seq_lens = ragged([(1, 200), (4, 180)])
    expected = paged.reference(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125, window=32)
    tables[0, : (200 - 32) // 16] = 2**30
    tables[1, : (176 - 31) // 16] = 2**30

    actual = paged.paged_attention(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125, window=32)

    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 128, 150])
def test_a_mixed_batch_equals_the_reference_for_every_block_size_and_chunk(block_size, chunk, dtype):
    check(ragged(MIXED, block_size=block_size, dtype=dtype), chunk=chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [512, 700])
def test_long_chunks_are_cut_into_pieces_and_merged(chunk, dtype):
    check(ragged([(1, 512), (1, 513), (1, 1700), (3, 1401), (1, 1401)], heads=8, kv_heads=1, dtype=dtype), chunk=chunk)


def test_a_window_and_a_chunk_together_show_what_both_show():
    check(ragged(MIXED), window=20, chunk=48)


@pytest.mark.parametrize("context", [1, 19, 20, 21, 40, 41, 60, 100])
def test_the_reference_agrees_with_torch_under_the_mask_of_equal_chunks(context):
    q, k_cache, v_cache, tables, query_start, seq_lens = ragged([(context, context)], heads=6, kv_heads=2)
    k, v = (cache[tables[0].long()].flatten(0, 1)[:context] for cache in (k_cache, v_cache))
    position = torch.arange(context)
    mine = position.unsqueeze(1) // 20 == position // 20

    actual = paged.reference(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125, chunk=20)

    arguments = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *arguments, attn_mask=mine.tril(), scale=0.125, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [paged.paged_attention, paged.reference])
def test_the_first_token_of_a_chunk_sees_itself_alone(attend):
    q, k_cache, v_cache, *rest = ragged([(1, 41), (1, 40)], heads=2, kv_heads=2)

    out = attend(q, k_cache, v_cache, *rest, scale=0.125, chunk=40)

    first = v_cache[rest[0][0, 40 // 16].long(), 40 % 16]
    torch.testing.assert_close(out[0], first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attend", [paged.paged_attention, paged.reference])
def test_table_entries_behind_the_chunk_are_never_read(attend):
    q, k_cache, v_cache, tables, query_start, seq_lens = ragged([(1, 200), (4, 180), (1, 151), (30, 180)])
    expected = paged.reference(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125, chunk=50)
    for row, first_query in enumerate([199, 176, 150, 150]):
        tables[row, : first_query // 50 * 50 // 16] = 2**30

    actual = attend(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125, chunk=50)

    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_alone_gives_bit_for_bit_what_it_gives_in_a_batch(threads, dtype):
    q, k_cache, v_cache, tables, query_start, seq_lens = ragged(MIXED, dtype=dtype)
    torch.set_num_threads(threads)
    together = paged.paged_attention(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125)

    for row, (tokens, _) in enumerate(MIXED):
        mine = slice(int(query_start[row]), int(query_start[row + 1]))
        alone = paged.paged_attention(
            q[mine],
            k_cache,
            v_cache,
            tables[row : row + 1],
            torch.tensor([0, tokens], dtype=torch.int32),
            seq_lens[row : row + 1],
            scale=0.125,
        )
        assert torch.equal(alone, together[mine]), f"row {row}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sight", [{}, {"window": 49}, {"window": 150}, {"chunk": 49}, {"chunk": 150}])
def test_a_prompt_gives_bit_for_bit_the_same_however_it_is_cut_into_pieces(sight, dtype):
    q, *caches, tables, _, _ = ragged([(300, 300)], heads=4, kv_heads=2, dtype=dtype)

    def piece(begin, end):
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        context = torch.tensor([end], dtype=torch.int32)
        return paged.paged_attention(q[begin:end], *caches, tables, starts, context, scale=0.125, **sight)

    whole = piece(0, 300)
    for cuts in ([0, 100, 300], [0, 37, 39, 260, 300], [0, 255, 300]):
        parts = [piece(begin, end) for begin, end in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), cuts


def test_queries_may_be_a_slice_of_wider_rows():
    q, *rest = ragged([(1, 20), (6, 30)], heads=4, kv_heads=2, width=64)
    qkv = torch.zeros(7, 8 * 64)
    qkv[:, :256] = q.flatten(1)
    view = qkv[:, :256].view(7, 4, 64)

    actual = paged.paged_attention(view, *rest, scale=0.125)

    assert torch.equal(actual, paged.paged_attention(q, *rest, scale=0.125))
    assert actual.is_contiguous()


def test_a_nan_key_spoils_only_the_rows_that_see_it():
    q, k_cache, v_cache, tables, query_start, seq_lens = ragged([(1, 30), (1, 30), (4, 30)])
    k_cache[tables[0, 1].long(), 2] = float("nan")

    out = paged.paged_attention(q, k_cache, v_cache, tables, query_start, seq_lens, scale=0.125)

    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


def test_large_scores_do_not_overflow():
    batch = ragged([(1, 100), (9, 100)])
    batch[0].mul_(40)

    check(batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_puts_each_token_in_its_slot_and_skips_negative_ones(dtype):
    k_cache, v_cache = (torch.zeros(4, 8, 2, 32, dtype=dtype) for _ in "kv")
    expected = k_cache.clone(), v_cache.clone()
    qkv = torch.randn(5, 4 * 64).to(dtype)
    k, v = qkv[:, 64:128].view(5, 2, 32), qkv[:, 128:192].view(5, 2, 32)
    slots = torch.tensor([31, 0, -1, 9, 10])

    paged.write_kv(k, v, k_cache, v_cache, slots)

    paged.write_reference(k, v, *expected, slots)
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])
    assert torch.equal(k_cache[3, 7], k[0])
