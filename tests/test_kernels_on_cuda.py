"""What a CUDA device computes in Triton against the plain references: attention, norms, rotary, gates.

Here the kernels run under Triton's interpreter, which multiplies no bfloat16: float16 stands for the narrow dtypes.
Tests marked `gpu` run them compiled. The references run on the same device there, in float32 without TF32.
"""

import pytest
import test_kernels_attention as given
import torch
from interpreter import interpreted, needs_interpreter

from inferfleet.kernels import gated_activation, layer_norm, rms_norm, rotary
from inferfleet.kernels import paged_attention as paged

#: (query heads, kv heads, head width, block size, what is seen)
SHAPES = [
    (4, 4, 64, 16, {}),
    (6, 2, 40, 8, {"window": 50}),
    (14, 2, 24, 48, {"chunk": 40}),
    (8, 1, 128, 16, {"window": 20, "chunk": 48}),
    (20, 1, 16, 1, {"window": 1}),
    (4, 2, 256, 32, {"chunk": 128}),
    (2, 2, 512, 16, {}),
    (34, 2, 8, 16, {"chunk": 150}),
    (4, 2, 80, 16, {"window": 49}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

ATTENTION = """
import torch
import test_kernels_attention as given
import test_kernels_on_cuda as shapes
from inferfleet.kernels import paged_attention as paged, paged_attention_triton as kernel

torch.set_num_threads(1)
kernel.PIECE = 64
rows = [(1, 1), (5, 5), (0, 12), (1, 16), (19, 83), (1, 150)]
for number, (heads, kv_heads, width, block_size, sight) in enumerate(shapes.SHAPES[:5]):
    dtype = (torch.float32, torch.float16)[number % 2]
    shape = {"heads": heads, "kv_heads": kv_heads, "width": width, "block_size": block_size}
    batch = given.ragged(rows, **shape, dtype=dtype)
    shapes.check_cuts(kernel.paged_attention, batch, rows, sight)
for dtype in (torch.float32, torch.float16):
    shapes.check_writes(kernel.write_kv, dtype, "cpu")
print("same")
"""

ROWS = """
import torch
import test_kernels_on_cuda as shapes
from inferfleet.kernels import gated_activation_triton, norms_triton, rms_norm, rotary_triton

torch.set_num_threads(1)
for dtype in (torch.float32, torch.float16):
    shapes.check_norms(dtype, "cpu", norms_triton)
    shapes.check_turns(dtype, "cpu", rotary_triton)
    shapes.check_gates(dtype, "cpu", gated_activation_triton)
print("same")
"""


def same(actual, expected):
    assert actual.dtype == expected.dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_cuts(attend, batch, rows, sight):
    """A batch gives what the reference gives; pieces in one program or apart, and a row alone, give the same bits."""
    scale = batch[0].shape[2] ** -0.5
    whole = attend(*batch, scale=scale, **sight)
    given.assert_same(whole, paged.reference(*batch, scale=scale, **sight))
    assert torch.equal(attend(*batch, scale=scale, **sight, max_apart=0), whole)
    q, k_cache, v_cache, tables, query_start, seq_lens = batch
    starts = query_start.tolist()
    for row, (tokens, _) in enumerate(rows):
        mine, start = slice(starts[row], starts[row + 1]), torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
        of_row = tables[row : row + 1], start, seq_lens[row : row + 1]
        alone = attend(q[mine], k_cache, v_cache, *of_row, scale=scale, **sight, max_query_len=tokens)
        assert torch.equal(alone, whole[mine]), f"row {row}"


def check_writes(write, dtype, device):
    caches = [torch.zeros(4, 8, 2, 24, dtype=dtype, device=device) for _ in "kv"]
    expected = [cache.clone() for cache in caches]
    qkv, slots = torch.randn(5, 192).to(device, dtype), torch.tensor([31, 0, -1, 9, 10], device=device)
    k, v = qkv[:, 48:96].view(5, 2, 24), qkv[:, 96:144].view(5, 2, 24)

    write(k, v, *caches, slots)

    paged.write_reference(k, v, *expected, slots)
    assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1])
    assert torch.equal(caches[0][3, 7], k[0])


def numbers(*shape, dtype, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def check_norms(dtype, device, kernel):
    for shape in ((1, 1024), (7, 33), (3, 5, 64), (0, 16), (9, 1000)):
        x, residual = numbers(*shape, dtype=dtype, device=device), numbers(*shape, dtype=dtype, device=device) * 2
        weight, bias = (numbers(shape[-1], dtype=dtype, device=device) * factor for factor in (1, 3))
        for style, number in rms_norm.STYLES.items():
            for factor in (weight, None):
                expected = rms_norm.reference(x, factor, 1e-6, style=style)
                same(kernel.rms_norm(x, None, factor, 1e-6, number)[0], expected)
        same(kernel.layer_norm(x, None, weight, bias, 1e-5)[0], layer_norm.reference(x, weight, bias, 1e-5))
        if x.dim() == 2:
            normed, total = kernel.rms_norm(x, residual, weight, 1e-6, 1)
            expected, expected_total = rms_norm.add_reference(x, residual, weight, 1e-6, style="gemma")
            assert torch.equal(total, expected_total)
            same(normed, expected)
            normed, total = kernel.layer_norm(x, residual, weight, bias, 1e-5)
            same(normed, layer_norm.add_reference(x, residual, weight, bias, 1e-5)[0])
            assert torch.equal(total, expected_total)
    columns = numbers(9, 160, dtype=dtype, device=device)[:, 8:72]
    same(kernel.rms_norm(columns, None, None, 1e-6, 0)[0], rms_norm.reference(columns, None, 1e-6))


def check_turns(dtype, device, kernel):
    for tokens, heads, width, turned in ((5, 3, 64, 64), (4, 2, 40, 24), (1, 1, 16, 16), (6, 2, 256, 64)):
        x = numbers(tokens, heads * width + 16, dtype=dtype, device=device)[:, 16:].view(tokens, heads, width)
        angles = numbers(tokens, turned // 2, dtype=torch.float32, device=device)
        cos, sin = torch.cat((angles.cos(),) * 2, 1), torch.cat((angles.sin(),) * 2, 1)
        weight = numbers(width, dtype=dtype, device=device)
        same(kernel.turn(x, cos, sin), rotary.reference(x, cos, sin))
        same(kernel.turn(x, cos, sin, in_pairs=True), rotary.pairs_reference(x, cos, sin))
        for style, number in rms_norm.STYLES.items():
            expected = rotary.norm_reference(x, weight, 1e-6, cos, sin, style=style)
            same(kernel.turn(x, cos, sin, norm=(weight, 1e-6, number)), expected)
        same(kernel.turn(x, cos, sin, norm=(None, 1e-6, 0)), rotary.norm_reference(x, None, 1e-6, cos, sin))


def check_gates(dtype, device, kernel):
    for shape in ((3, 64), (2, 3, 26), (1, 3000), (0, 8)):
        gate_up = (numbers(*shape, dtype=torch.float32, device=device) * 2).to(dtype)
        for kind in ("silu", "gelu_tanh"):
            same(kernel.gated_activation(gate_up, kind), gated_activation.reference(gate_up, kind))


@needs_interpreter
def test_attention_in_triton_equals_the_reference_and_neither_batch_nor_pieces_show():
    done = interpreted(ATTENTION)
    assert done.stdout == "same\n", done.stderr


@needs_interpreter
def test_norms_turns_and_gates_in_triton_equal_their_references():
    done = interpreted(ROWS)
    assert done.stdout == "same\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_on_a_gpu_equals_the_reference_and_neither_batch_nor_pieces_show(shape, dtype):
    # Given rows of one token and of several, some longer than a piece,
    from inferfleet.kernels import paged_attention_triton

    heads, kv_heads, width, block_size, sight = shape
    rows = [*given.MIXED, (1, 513), (1, 1700), (300, 1300)]
    batch = given.ragged(rows, heads=heads, kv_heads=kv_heads, width=width, block_size=block_size, dtype=dtype)
    # when they are computed together, with pieces in one program, and each alone, then no bit differs.
    check_cuts(paged_attention_triton.paged_attention, [part.cuda() for part in batch], rows, sight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_kernels_on_a_gpu_equal_their_references(dtype):
    from inferfleet.kernels import gated_activation_triton, norms_triton, paged_attention_triton, rotary_triton

    check_writes(paged_attention_triton.write_kv, dtype, "cuda")
    check_norms(dtype, "cuda", norms_triton)
    check_turns(dtype, "cuda", rotary_triton)
    check_gates(dtype, "cuda", gated_activation_triton)


@pytest.mark.gpu
def test_public_functions_on_a_gpu_reach_the_kernels_and_never_wait_for_the_device():
    # Given inputs on a GPU and a torch that refuses to wait for it,
    batch = [part.cuda() for part in given.ragged([(1, 30), (9, 40)])]
    x = numbers(3, 2, 64, dtype=torch.float32, device="cuda")
    slots = torch.tensor([0, 5, -1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    # when each kernel is called as a model calls it, then none has to.
    try:
        paged.write_kv(x, x, batch[1].clone(), batch[2].clone(), slots)
        paged.paged_attention(*batch, scale=0.125, max_query_len=9)
        rms_norm.add_rms_norm(x[0], x[1], x[2, 0], 1e-6)
        layer_norm.layer_norm(x, x[0, 0], x[1, 0], 1e-6)
        rotary.norm_rotary(x, x[0, 0], 1e-6, x[:, 0], x[:, 1])
        gated_activation.gated_activation(x[0], "silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_nan_key_on_a_gpu_spoils_only_the_rows_that_see_it():
    batch = [part.cuda() for part in given.ragged([(1, 30), (1, 30), (4, 30)])]
    batch[1][batch[3][0, 1].long(), 2] = float("nan")

    out = paged.paged_attention(*batch, scale=0.125)

    assert out[0].isnan().all()
    assert not out[1:].isnan().any()
