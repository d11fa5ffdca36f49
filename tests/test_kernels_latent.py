"""Latent attention and its cache writes: the C++ path against the plain reference, over ragged batches.

Tolerances: float32 to 2e-5 (softmax in another order of sums); bfloat16 to one unit in the last place of numbers of
the size of the latents (2^-7).
"""

import itertools

import pytest
import torch
from interpreter import interpreted, needs_interpreter

from inferfleet.kernels import build
from inferfleet.kernels import latent_attention as latents
from inferfleet.kernels import paged_attention as paged

DTYPES = [torch.float32, torch.bfloat16]
needs_cpp = pytest.mark.skipif(build.find_compiler() is None, reason="torch's products sum as they please")
MIXED = [(1, 1), (1, 37), (5, 5), (1, 200), (40, 40), (0, 12), (19, 83), (1, 16), (130, 150), (1, 129)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ragged(rows, *, heads=4, rank=48, rope=16, block_size=16, dtype=torch.float32, seed=0):
    """A batch over a shuffled cache: rows is [(query tokens, context)]; stale slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // block_size) for _, context in rows]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    cache = torch.full((len(order), block_size, rank + rope), float("nan"), dtype=dtype)
    tables = torch.full((len(rows), max([1, *needed])), order[-1], dtype=torch.int32)
    for row, (_, context) in enumerate(rows):
        blocks = [order.pop(0) for _ in range(needed[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots = torch.tensor([blocks[t // block_size] * block_size + t % block_size for t in range(context)])
        latents.write_reference(torch.randn(context, rank + rope, generator=generator).to(dtype), cache, slots.long())
    lengths = [0, *(tokens for tokens, _ in rows)]
    q = torch.randn(sum(lengths), heads, rank + rope, generator=generator).to(dtype)
    query_start = torch.tensor(lengths).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([context for _, context in rows], dtype=torch.int32)
    return q, cache, tables, query_start, seq_lens


def assert_same(actual, expected):
    tolerance = 2e-5 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check(batch, rank=48):
    actual = latents.latent_attention(*batch, rank=rank, scale=0.125)
    assert actual.shape == (*batch[0].shape[:2], rank)
    assert_same(actual, latents.reference(*batch, rank=rank, scale=0.125))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 16, 20, 128, 144])
def test_a_mixed_batch_equals_the_reference_for_every_number_of_heads(heads, dtype):
    check(ragged(MIXED, heads=heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank,rope", [(512, 64), (8, 2), (20, 6), (64, 64), (65, 4), (130, 10), (31, 1)])
def test_a_mixed_batch_equals_the_reference_for_every_width_even_odd_ones(rank, rope, dtype):
    check(ragged(MIXED, rank=rank, rope=rope, dtype=dtype), rank=rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 48])
def test_a_mixed_batch_equals_the_reference_for_every_block_size(block_size, dtype):
    check(ragged(MIXED, block_size=block_size, dtype=dtype))


def test_the_reference_agrees_with_ordinary_attention_over_one_shared_head():
    # Given values that are the first numbers of their keys, when ordinary attention reads both, then it is the same.
    q, cache, tables, query_start, seq_lens = ragged(MIXED)
    keys = cache.unsqueeze(2)
    values = torch.cat((keys[..., :48], torch.zeros_like(keys[..., 48:])), dim=-1)
    expected = paged.reference(q, keys, values, tables, query_start, seq_lens, scale=0.125)

    actual = latents.reference(q, cache, tables, query_start, seq_lens, rank=48, scale=0.125)

    torch.testing.assert_close(actual, expected[..., :48], rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_a_row_alone_gives_bit_for_bit_what_it_gives_in_a_batch(threads, dtype):
    # With many threads a row alone is cut at its tiles of keys, and with one it is not: nor does that show.
    q, cache, tables, query_start, seq_lens = ragged(MIXED, heads=16, dtype=dtype)
    together = latents.latent_attention(q, cache, tables, query_start, seq_lens, rank=48, scale=0.125)
    torch.set_num_threads(threads)

    for row, (tokens, _) in enumerate(MIXED):
        mine = slice(int(query_start[row]), int(query_start[row + 1]))
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        alone = latents.latent_attention(
            q[mine], cache, tables[row : row + 1], starts, seq_lens[row : row + 1], rank=48, scale=0.125
        )
        assert torch.equal(alone, together[mine]), f"row {row}"


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 64])
def test_a_prompt_gives_bit_for_bit_the_same_however_it_is_cut_into_steps(threads, dtype):
    q, cache, tables, _, _ = ragged([(300, 300)], dtype=dtype)
    torch.set_num_threads(threads)

    def step(begin, end):
        starts, context = torch.tensor([0, end - begin]), torch.tensor([end])
        return latents.latent_attention(q[begin:end], cache, tables, starts, context, rank=48, scale=0.125)

    whole = step(0, 300)
    for cuts in ([0, 100, 300], [0, 37, 38, 39, 260, 300], [0, 255, 300], range(301)):
        parts = [step(begin, end) for begin, end in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), cuts


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_over_many_threads_equal_the_reference(dtype):
    batch = ragged([(1, 512), (1, 513), (3, 1300)], heads=16, dtype=dtype)
    torch.set_num_threads(8)
    check(batch)


def test_queries_may_be_a_slice_of_wider_rows():
    q, *rest = ragged([(1, 20), (6, 30)])
    wide = torch.zeros(7, 6 * 64)
    wide[:, :256] = q.flatten(1)

    actual = latents.latent_attention(wide[:, :256].view(7, 4, 64), *rest, rank=48, scale=0.125)

    assert torch.equal(actual, latents.latent_attention(q, *rest, rank=48, scale=0.125))


def test_a_nan_latent_spoils_only_the_rows_that_see_it():
    q, cache, tables, query_start, seq_lens = ragged([(1, 30), (1, 30), (4, 30)])
    cache[tables[0, 1].long(), 2] = float("nan")

    out = latents.latent_attention(q, cache, tables, query_start, seq_lens, rank=48, scale=0.125)

    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


def test_large_scores_do_not_overflow():
    batch = ragged([(1, 100), (9, 300)])
    batch[0].mul_(40)

    check(batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_latent_puts_each_token_in_its_slot_and_skips_negative_ones(dtype):
    cache = torch.zeros(4, 8, 40, dtype=dtype)
    expected = cache.clone()
    projected = torch.randn(5, 64).to(dtype)
    latent, slots = projected[:, :40], torch.tensor([31, 0, -1, 9, 10])

    latents.write_latent(latent, cache, slots)

    latents.write_reference(latent, expected, slots)
    assert torch.equal(cache, expected)
    assert torch.equal(cache[3, 7], latent[0])
    assert int((cache != 0).any(dim=2).sum()) == 4


UNDER_THE_INTERPRETER = """
import torch
import test_kernels_latent as given
from inferfleet.kernels import latent_attention as latents, latent_attention_triton as kernel

torch.set_num_threads(1)
kernel.PIECE = 64
rows = [(1, 1), (5, 5), (0, 12), (1, 150), (9, 83)]
one = torch.tensor([0, 1], dtype=torch.int32)
for heads, rank, dtype, tolerance in ((3, 21, torch.float32, 2e-5), (20, 64, torch.float16, 2**-8)):
    sizes = {"rank": rank, "scale": 0.125}
    batch = given.ragged(rows, heads=heads, rank=rank, rope=6, dtype=dtype)
    whole = kernel.latent_attention(*batch, **sizes, apart=False)
    torch.testing.assert_close(whole, latents.reference(*batch, **sizes), rtol=tolerance, atol=tolerance)
    assert torch.equal(kernel.latent_attention(*batch, **sizes, apart=True), whole)
    q, cache, tables, _, _ = batch
    alone = kernel.latent_attention(q[-7:-6], cache, tables[4:], one, one[1:] * 77, **sizes, apart=True)
    assert torch.equal(alone, whole[-7:-6])
cache = torch.zeros(4, 8, 40)
expected, latent, slots = cache.clone(), torch.randn(5, 64)[:, :40], torch.tensor([31, 0, -1, 9, 10])
kernel.write_latent(latent, cache, slots)
latents.write_reference(latent, expected, slots)
assert torch.equal(cache, expected)
print("same")
"""


@needs_interpreter
def test_the_triton_kernels_equal_the_reference_and_no_cut_of_their_work_shows():
    # Given the kernels under Triton's interpreter, when they run a ragged batch, in one program a tile or one a piece,
    # and a token of it alone,
    done = interpreted(UNDER_THE_INTERPRETER)
    # then they give what the reference gives, and the same bits each time.
    assert done.stdout == "same\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_on_a_gpu_equals_the_reference_and_no_cut_into_steps_shows(dtype):
    batch = ragged([*MIXED, (1, 3000)], heads=16, rank=512, rope=64, dtype=dtype)
    there = [tensor.cuda() for tensor in batch]

    actual = latents.latent_attention(*there, rank=512, scale=0.05).cpu()

    assert_same(actual, latents.reference(*batch, rank=512, scale=0.05))
    q, cache, tables, _, seq_lens = there
    last = latents.latent_attention(
        q[-1:], cache, tables[-1:], torch.tensor([0, 1]).cuda(), seq_lens[-1:], rank=512, scale=0.05
    )
    assert torch.equal(last.cpu(), actual[-1:])
