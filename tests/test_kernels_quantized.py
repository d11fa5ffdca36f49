"""Weights of small codes: what coding loses, and products over them against plain torch with the decoded weight.

Tolerances as in test_kernels_linear.py: float32 to 1e-5 of the result's size, bfloat16 to one unit in the last place.
"""

from dataclasses import replace

import pytest
import torch

from inferfleet.kernels import moe, quantized_linear
from inferfleet.kernels.quantized import KINDS, Quantized, joined, packed, quantise, unpacked
from inferfleet.kernels.quantized_experts import FusedExperts, SingleExperts, can_fuse
from inferfleet.kernels.quantized_linear import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["panels", "rows"])
def layout(request, monkeypatch):
    if request.param == "panels" and quantized_linear.panels() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(quantized_linear, "best_layout", lambda device, dtype: request.param)
    return request.param


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(weight: Quantized) -> torch.Tensor:
    """The formula at the top of kernels/quantized.py, number by number."""
    outputs, inputs = weight.shape
    plain = torch.empty(outputs, inputs)
    for n in range(outputs):
        for k in range(inputs):
            if weight.kind == "int4":
                code = float(int(weight.codes[n, k // 2]) >> 4 * (k % 2) & 15)
            else:
                code = float(weight.codes[n, k])
            zero = 8.0 if weight.kind == "int4" else 0.0
            if weight.zeros is not None:
                zero = float(weight.zeros[n, k // weight.group])
            place = k if weight.order is None else int(weight.order[k])
            plain[n, place] = (code - zero) * float(weight.scales[n, k // weight.group])
    return plain


def random_codes(kind, outputs, inputs, group, *, zeros=False, order=False, seed=0):
    """Every code that a byte can hold, whatever a coder would choose."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    codes = torch.randint(0, 16 if kind == "int4" else 256, (outputs, inputs), generator=generator).to(torch.uint8)
    if kind == "int4":
        codes = packed(codes)
    elif kind == "int8":
        codes = codes.view(torch.int8)
    else:
        codes[(codes & 0x7F) == 0x7F] = 0x7E
        codes = codes.view(torch.float8_e4m3fn)
    scales = (torch.rand(outputs, groups, generator=generator) + 0.5) / {"int8": 1000, "int4": 60, "fp8": 3000}[kind]
    limits = (0, 16) if kind == "int4" else (-128, 129)
    own = torch.randint(*limits, (outputs, groups), generator=generator).to(torch.int16) if zeros else None
    places = torch.randperm(inputs, generator=generator) if order else None
    return Quantized(kind, inputs, group, codes, scales, own, places)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros,order", [(False, False), (True, True)])
def test_decoding_follows_the_formula(kind, zeros, order):
    weight = random_codes(kind, 5, 37, 8, zeros=zeros and kind != "fp8", order=order)

    assert torch.equal(weight.dequantised(), by_hand(weight))


@pytest.mark.parametrize("kind,loss", [("int8", 0.012), ("int4", 0.13), ("fp8", 0.035)])
@pytest.mark.parametrize("inputs", [96, 1100])
def test_coding_loses_no_more_than_the_kind_must(kind, loss, inputs):
    # Given normal weights of which some rows are large, some empty and some lean to one side,
    weight = numbers(70, inputs) * torch.logspace(-3, 3, 70).unsqueeze(1)
    weight[3] = 0
    weight[5] = weight[5].abs()
    # when they are coded, then each row keeps its own size.
    error = (quantise(weight, kind).dequantised() - weight).norm(dim=1)
    assert float((error / weight.norm(dim=1).clamp(min=1e-9)).max()) < loss
    assert float(error[3]) == 0


def test_int4_spends_its_levels_where_the_group_has_numbers():
    # Given a group whose numbers are all of one sign, then its error is that of sixteen levels over their span.
    weight = numbers(8, 128).abs() + 0.1
    span = float(weight.max())

    assert float((quantise(weight, "int4").dequantised() - weight).abs().max()) <= span / 15 * 0.52


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_coded_alike_alone_and_among_others(kind, monkeypatch):
    from inferfleet.kernels import quantized

    weight = numbers(40, 96)
    whole = quantise(weight, kind)
    monkeypatch.setattr(quantized, "CHUNK_ELEMENTS", 300)
    pieces = joined([quantise(weight[:7], kind), quantise(weight[7:], kind)])

    assert torch.equal(whole.dequantised(), pieces.dequantised())


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_weight_shows_in_its_own_outputs_only(kind, layout):
    weight = numbers(6, 64)
    weight[2, 5] = float("nan")

    out = QuantizedLinear(quantise(weight, kind), dtype=torch.float32)(numbers(3, 64, seed=1))

    assert bool(out[:, 2].isnan().all()) and bool(out[:, [0, 1, 3, 4, 5]].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_come_apart_between_groups_and_bytes_only(kind):
    # Given a weight in groups of 32 and one with a scale a row,
    generator = torch.Generator().manual_seed(3)
    rows = quantise(torch.randn(6, 90, generator=generator), kind)
    scales = torch.rand(6, 3, generator=generator)
    groups = replace(rows, group=32, scales=scales, zeros=None)
    single = replace(rows, group=90, scales=scales[:, :1], zeros=None)
    # when inputs are taken between groups, or anywhere in a row that has one, then they mean what they meant,
    for weight, begin, end in [(groups, 32, 64), (groups, 64, 90), (single, 10, 54), (single, 0, 90)]:
        part = weight.columns(begin, end)
        assert part is not None and torch.equal(part.dequantised(), weight.dequantised()[:, begin:end])
    # and through a group, or a byte of two codes, there is nothing to be had.
    assert groups.columns(0, 40) is None and groups.columns(16, 90) is None
    assert (single.columns(0, 45) is None) == (kind == "int4")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_unlike_formats_are_not_joined(kind):
    part, ordered = random_codes(kind, 4, 32, 8), random_codes(kind, 4, 32, 8, order=True)
    other = random_codes(kind, 4, 32, 16)

    assert joined([part, other]) is None
    assert joined([part, ordered]) is None
    assert joined([ordered, random_codes(kind, 4, 32, 8, order=True, seed=1)]) is None
    again = joined([ordered, replace(ordered, order=ordered.order.clone())])
    assert torch.equal(again.dequantised(), ordered.dequantised().repeat(2, 1))


def test_four_bits_pack_two_inputs_to_a_byte_and_come_back():
    codes = torch.randint(0, 16, (3, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)

    assert packed(codes).shape == (3, 4)
    assert torch.equal(unpacked(packed(codes), 7), codes)


def test_codes_that_do_not_fit_their_inputs_are_refused():
    fine = random_codes("int4", 4, 32, 8)

    with pytest.raises(ValueError, match="does not lie"):
        replace(fine, scales=fine.scales[:, :3])
    with pytest.raises(ValueError, match="must be even"):
        random_codes("int8", 4, 33, 11)


def assert_product(weight, x, bias, packed_product):
    exact = torch.nn.functional.linear(x.float(), weight.dequantised(), None if bias is None else bias.float())
    tolerance = 1e-5 if x.dtype == torch.float32 else 2**-7
    actual = packed_product(x)
    assert actual.dtype == x.dtype
    torch.testing.assert_close(actual.float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "inputs,outputs,group", [(64, 96, 64), (101, 7, 32), (1030, 65, 128), (600, 33, 600), (7, 3, 2)]
)
@pytest.mark.parametrize("rows", [(1,), (9,), (2, 5)])
def test_a_product_over_codes_equals_one_with_the_decoded_weight(rows, inputs, outputs, group, kind, dtype, layout):
    for zeros in (False, True)[: 1 if kind == "fp8" else 2]:
        weight = random_codes(kind, outputs, inputs, group, zeros=zeros, order=zeros)
        bias = numbers(outputs, dtype=dtype, seed=1) if zeros else None
        x = numbers(*rows, inputs, dtype=dtype, seed=2) / inputs**0.5

        assert_product(weight, x, bias, QuantizedLinear(weight, bias, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fp8_number_is_decoded_exactly(dtype, layout):
    # Given a weight that holds every number of the format, and one that holds its two NaN,
    every = torch.arange(256, dtype=torch.uint8)
    is_nan = (every & 127) == 127
    codes = every[~is_nan].view(torch.float8_e4m3fn).unsqueeze(0)
    linear = QuantizedLinear(Quantized("fp8", 254, 254, codes, torch.ones(1, 1)), dtype=dtype)
    spoiled = every[is_nan].view(torch.float8_e4m3fn).unsqueeze(1)
    nan = QuantizedLinear(Quantized("fp8", 1, 1, spoiled, torch.ones(2, 1)), dtype=dtype)
    # when rows pick them one by one, then each is what torch says it is.
    assert torch.equal(linear(torch.eye(254, dtype=dtype)).flatten().float(), codes.float().flatten())
    assert bool(nan(torch.ones(1, 1, dtype=dtype)).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_bit_for_bit_the_same_whatever_comes_with_it(threads, kind, dtype):
    if quantized_linear.panels() is None:
        pytest.skip("plain torch sums by the number of rows")
    torch.set_num_threads(threads)
    linear = QuantizedLinear(quantise(numbers(200, 1100) / 33, kind), dtype=dtype)
    x = numbers(200, 1100, dtype=dtype, seed=1)
    whole = linear(x)

    for count in (1, 2, 3, 8, 17, 130):
        assert torch.equal(linear(x[-count:]), whole[-count:]), f"{count} rows"


def test_a_product_takes_a_slice_of_wider_rows_and_no_rows(layout):
    weight = quantise(numbers(48, 64), "int8")
    linear, wide = QuantizedLinear(weight, dtype=torch.float32), numbers(9, 100, seed=1)

    assert_product(weight, wide[:, 10:74], None, linear)
    assert linear(wide[:0, :64]).shape == (0, 48)
    with pytest.raises(ValueError, match=r"\[..., 64\]"):
        linear(wide)


def routed(tokens, experts, top_k, seed=0):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    weights, ids = scores.topk(top_k, dim=-1)
    return ids, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens,experts,top_k,inner", [(1, 8, 2, 48), (70, 16, 3, 80), (0, 4, 2, 48)])
def test_coded_experts_equal_plain_ones_with_decoded_weights(
    tokens, experts, top_k, inner, activation, kind, dtype, layout
):
    gate_up = [quantise(numbers(2 * inner, 64, seed=e) / 8, kind) for e in range(experts)]
    down = [quantise(numbers(64, inner, seed=99 + e) / 7, kind) for e in range(experts)]
    plain = [torch.stack([w.dequantised() for w in some]) for some in (gate_up, down)]
    x, (ids, weights) = numbers(tokens, 64, dtype=dtype, seed=3), routed(tokens, experts, top_k)
    expected = moe.reference(x.float(), *plain, ids, weights, activation)

    if can_fuse(gate_up, x.device, dtype) and can_fuse(down, x.device, dtype):
        mixture = FusedExperts(gate_up, down, activation, dtype=dtype)
        assert gate_up == down == []
    else:
        assert layout == "rows"
        linears = [tuple(QuantizedLinear(w, dtype=dtype) for w in pair) for pair in zip(gate_up, down, strict=True)]
        mixture = SingleExperts(linears, activation)

    tolerance = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(mixture(x, ids, weights).float(), expected, rtol=tolerance, atol=tolerance)


def test_experts_of_unlike_formats_do_not_run_as_one():
    same = [random_codes("int4", 8, 32, 16), random_codes("int4", 8, 32, 16, seed=1)]
    device, dtype = torch.device("cpu"), torch.float32

    assert can_fuse(same, device, dtype) == (quantized_linear.panels() is not None)
    for other in (
        random_codes("int4", 8, 32, 8),
        random_codes("int8", 8, 32, 16),
        random_codes("int4", 8, 32, 16, order=True),
    ):
        assert not can_fuse([*same, other], device, dtype)
