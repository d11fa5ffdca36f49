"""The grouped product and what a mixture of experts makes of it: against plain torch, on every path of this machine.

Tolerances: float32 to 1e-5 of the result's size, bfloat16 to one unit in the last place (2^-7). The CUDA kernel runs
here under Triton's interpreter, which multiplies no bfloat16: float16 stands for the narrow dtypes.
"""

import pytest
import torch
from interpreter import interpreted, needs_interpreter

from inferfleet.kernels import grouped_linear as grouped
from inferfleet.kernels import linear, moe

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(*counts):
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def assert_same(actual, expected):
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2**-7
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


#: Rows of each group: none, one, some; groups without rows first, last and between.
COUNTS = [(0, 3, 0, 7, 1, 0), (5,), (0, 0, 1), (0, 0), (1, 1, 1, 1), (40, 0, 130)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs,outputs", [(64, 48), (33, 7)])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_reference_multiplies_each_row_by_its_groups_matrix(counts, inputs, outputs, dtype):
    x, weight = (
        numbers(sum(counts), inputs, dtype=dtype),
        numbers(len(counts), outputs, inputs, dtype=dtype, seed=1) / 8,
    )

    actual = grouped.reference(x, offsets(*counts), weight)

    group_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("nk,nmk->nm", x.float(), weight[group_of].float())
    assert_same(actual, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs,outputs", [(64, 48), (33, 7)])
@pytest.mark.parametrize("layout", ["onednn", "plain"])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_layout_of_a_grouped_product_equals_the_reference(counts, layout, inputs, outputs, dtype, monkeypatch):
    if layout == "onednn" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    monkeypatch.setattr(linear, "best_layout", lambda weight: layout)
    x, weight = (
        numbers(sum(counts), inputs, dtype=dtype),
        numbers(len(counts), outputs, inputs, dtype=dtype, seed=1) / 8,
    )

    actual = grouped.GroupedLinear(weight)(x, offsets(*counts))

    assert_same(actual, grouped.reference(x, offsets(*counts), weight))


def test_a_grouped_product_takes_a_slice_of_wider_rows():
    wide, weight = numbers(9, 100), numbers(2, 48, 64, seed=1)

    for begin in (8, 9):
        rows = wide[:, begin : begin + 64]
        assert_same(grouped.grouped_linear(rows, offsets(4, 5), weight), grouped.reference(rows, offsets(4, 5), weight))


def test_rows_are_sorted_by_group_and_keep_their_order_in_it():
    order, ends = grouped.sort_by_group(torch.tensor([3, 0, 3, 1, 0]), 5)

    assert order.tolist() == [1, 4, 3, 0, 2]
    assert ends.tolist() == [0, 2, 3, 3, 5, 5] and ends.dtype == torch.int32


def test_sorting_reads_nothing_that_would_wait_for_a_device():
    # Given groups that have no numbers, only a shape, then whatever looked at one would raise.
    order, ends = grouped.sort_by_group(torch.empty(9, dtype=torch.int64, device="meta"), 4)
    assert order.shape == (9,) and ends.shape == (5,)


def test_a_mixture_that_scales_its_inputs_needs_no_path_of_its_own():
    # Given choices whose weight multiplies what goes into the expert,
    gate_up, down = numbers(6, 96, 64) / 8, numbers(6, 64, 48, seed=1) / 7
    x, scales, ids = numbers(9, 64, seed=2), torch.rand(9, 2), torch.rand(9, 6).topk(2).indices
    packed = moe.PackedExperts(gate_up, down, "silu")
    # when each choice is passed as a row of its own, scaled before, with weight one after,
    rows = (x.unsqueeze(1) * scales.unsqueeze(2)).flatten(0, 1)
    actual = packed(rows, ids.view(-1, 1), torch.ones(18, 1)).view(9, 2, 64).sum(1)
    # then the sum is that of the experts of the scaled inputs.
    expected = torch.zeros(9, 64)
    for token in range(9):
        for expert, scale in zip(ids[token], scales[token], strict=True):
            gate, up = (gate_up[expert] @ (scale * x[token])).chunk(2)
            expected[token] += down[expert] @ (torch.nn.functional.silu(gate) * up)
    assert_same(actual, expected)


UNDER_THE_INTERPRETER = """
import torch
from inferfleet.kernels import grouped_linear as grouped, grouped_linear_triton as kernel

def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

torch.set_num_threads(1)
for counts in COUNTS:
    for inputs, outputs in ((64, 48), (70, 65)):
        offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        wide, weight = numbers(sum(counts), inputs + 3), numbers(len(counts), outputs, inputs, seed=1) / 8
        x = wide[:, 3:]
        expected = grouped.reference(x, offsets, weight)
        actual = kernel.grouped_linear(x, offsets, weight)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        half = kernel.grouped_linear(x.half(), offsets, weight.half())
        torch.testing.assert_close(half.float(), expected, rtol=2**-8, atol=2**-7)
        for group, count in enumerate(counts):
            if count:
                begin = int(offsets[group])
                alone = torch.tensor([0] * (group + 1) + [1] * (len(counts) - group), dtype=torch.int32)
                assert torch.equal(kernel.grouped_linear(x[begin : begin + 1], alone, weight)[0], actual[begin])
print("same")
"""


@needs_interpreter
def test_the_triton_kernel_equals_the_reference_and_a_row_alone_equals_itself_among_others():
    # Given the kernel under Triton's interpreter,
    program = UNDER_THE_INTERPRETER.replace("COUNTS", repr(COUNTS))
    # when it multiplies every routing of this file, then it gives what the reference gives.
    done = interpreted(program)
    assert done.stdout == "same\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixture_on_a_gpu_equals_the_one_on_the_cpu(dtype):
    gate_up, down = numbers(8, 256, 128, dtype=dtype) / 11, numbers(8, 128, 128, dtype=dtype, seed=1) / 11
    x, ids = numbers(70, 128, dtype=dtype, seed=2), torch.rand(70, 8).topk(3).indices
    weights = torch.rand(70, 3)

    there = moe.PackedExperts(gate_up.cuda(), down.cuda(), "silu")(x.cuda(), ids.cuda(), weights.cuda())

    expected = moe.reference(x, gate_up, down, ids, weights, "silu")
    rounded = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(there.cpu(), expected, rtol=rounded, atol=rounded)
