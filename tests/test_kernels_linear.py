"""Packed linears and mixtures of experts: against plain torch, and independent of the rows beside a row.

Tolerances: float32 to 1e-5 of the result's size; bfloat16 to one unit in the last place (2^-7) for one product, and
to 2^-5 for experts, whose three products are each rounded on the way.
"""

import pytest
import torch

from inferfleet.kernels import linear, moe

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["panels", "onednn", "plain"])
def layout(request, monkeypatch):
    """Every layout that this machine can multiply, not only the one it would choose."""
    if request.param == "panels" and linear.panels() is None:
        pytest.skip("no C++ compiler")
    if request.param == "onednn" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    monkeypatch.setattr(linear, "best_layout", lambda weight: request.param)
    return request.param


def assert_same(actual, expected, rounded=2**-7):
    tolerance = 1e-5 if actual.dtype == torch.float32 else rounded
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (2,), (33,), (2, 5), (1, 1)])
@pytest.mark.parametrize("inputs,outputs", [(64, 96), (100, 7), (1030, 33)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_packed_linear_equals_the_plain_one(inputs, outputs, rows, with_bias, dtype, layout):
    weight = numbers(outputs, inputs, dtype=dtype) / inputs**0.5
    bias = numbers(outputs, dtype=dtype, seed=1) if with_bias else None
    x = numbers(*rows, inputs, dtype=dtype, seed=2)

    assert_same(linear.PackedLinear(weight, bias)(x), linear.reference(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_to_float_gives_float32(dtype, layout):
    weight, bias, x = (
        numbers(40, 64, dtype=dtype) / 8,
        numbers(40, dtype=dtype, seed=1),
        numbers(5, 64, dtype=dtype, seed=2),
    )

    actual = linear.PackedLinear(weight, bias, to_float=True)(x)

    exact = linear.reference(x.float(), weight.float(), bias.float())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-5 if layout == "panels" else 2**-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 100), (130, 64), (65, 33), (1, 1), (200, 99)])
@pytest.mark.parametrize("compiled", [True, False], ids=["panels", "plain"])
def test_a_corner_of_a_weight_is_multiplied_where_it_lies(compiled, outputs, inputs, rows, dtype, monkeypatch):
    if compiled and linear.panels() is None:
        pytest.skip("no C++ compiler")
    if not compiled:
        monkeypatch.setattr(linear, "panels", lambda: None)
    weight, bias = numbers(200, 100, dtype=dtype) / 10, numbers(200, dtype=dtype, seed=1)
    x = numbers(rows, inputs, dtype=dtype, seed=2)
    packed = linear.PackedLinear(weight, bias, can_cut=True)

    held = packed.weight.data_ptr()
    actual = packed.corner(x, outputs)

    assert_same(actual, linear.reference(x, weight[:outputs, :inputs].contiguous(), bias[:outputs]))
    assert packed.layout == ("panels" if compiled else "plain")
    assert packed.weight.data_ptr() == held
    assert_same(
        packed(numbers(rows, 100, dtype=dtype)), linear.reference(numbers(rows, 100, dtype=dtype), weight, bias)
    )


def test_a_corner_of_rows_does_not_depend_on_the_rows_beside_it():
    packed = linear.PackedLinear(numbers(200, 100), can_cut=True)
    x = numbers(300, 77, seed=2)

    if packed.layout == "panels":
        assert torch.equal(packed.corner(x, 130)[250:251], packed.corner(x[250:251], 130))


@pytest.mark.parametrize(("outputs", "inputs"), [(49, 64), (48, 65), (300, 1)])
def test_a_corner_larger_than_the_weight_is_refused(outputs, inputs):
    packed = linear.PackedLinear(numbers(48, 64), can_cut=True)

    with pytest.raises(ValueError, match="no corner of"):
        packed.corner(numbers(2, inputs), outputs)


def test_a_weight_in_onednns_layout_has_no_corners_but_the_whole(monkeypatch):
    monkeypatch.setattr(linear, "best_layout", lambda weight: "onednn")
    weight, x = numbers(48, 64), numbers(3, 64, seed=1)
    packed = linear.PackedLinear(weight)

    assert_same(packed.corner(x, 48), linear.reference(x, weight))
    with pytest.raises(ValueError, match="in the layout onednn"):
        packed.corner(x, 20)


def test_a_packed_linear_takes_a_slice_of_wider_rows_and_no_rows(layout):
    weight, wide = numbers(48, 64), numbers(9, 100, seed=1)
    packed = linear.PackedLinear(weight)

    assert_same(packed(wide[:, 10:74]), linear.reference(wide[:, 10:74], weight))
    assert_same(packed(wide[:1, 10:74]), linear.reference(wide[:1, 10:74], weight))
    assert packed(wide[:0, :64]).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inputs,outputs", [(3072, 256), (2048, 1024), (640, 640)])
def test_a_row_is_bit_for_bit_the_same_whatever_comes_with_it(inputs, outputs, threads, dtype, layout):
    if layout == "plain":
        pytest.skip("plain torch sums by the number of rows")
    torch.set_num_threads(threads)
    packed = linear.PackedLinear(numbers(outputs, inputs, dtype=dtype) / inputs**0.5)
    x = numbers(200, inputs, dtype=dtype, seed=1)
    whole = packed(x)

    for count in (1, 2, 3, 8, 17, 32, 64, 130):
        assert torch.equal(packed(x[-count:]), whole[-count:]), f"{count} rows"


def test_a_row_of_the_wrong_size_or_dtype_is_refused():
    packed = linear.PackedLinear(numbers(48, 64))

    with pytest.raises(ValueError, match=r"\[..., 64\]"):
        packed(numbers(3, 65))
    with pytest.raises(ValueError, match=r"bfloat16"):
        packed(numbers(3, 64).bfloat16())


def test_float16_keeps_the_plain_weight():
    weight = numbers(8, 16).half()
    packed = linear.PackedLinear(weight)

    assert packed.layout == "plain"
    assert_same(packed(numbers(3, 16).half()).float(), (numbers(3, 16).half() @ weight.T).float())


def routed(tokens, experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, ids = scores.topk(top_k, dim=-1)
    return ids, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens,experts,top_k", [(1, 8, 2), (5, 4, 4), (70, 16, 3), (3, 32, 1), (0, 4, 2)])
def test_every_path_of_the_experts_equals_a_token_at_a_time(tokens, experts, top_k, activation, dtype, layout):
    hidden, inner = 64, 48
    gate_up, down = (
        numbers(experts, 2 * inner, hidden, dtype=dtype) / 8,
        numbers(experts, hidden, inner, dtype=dtype) / 7,
    )
    x, (ids, weights) = numbers(tokens, hidden, dtype=dtype, seed=3), routed(tokens, experts, top_k)

    expected = token_at_a_time(x, gate_up, down, ids, weights, activation)

    assert_same(moe.reference(x, gate_up, down, ids, weights, activation), expected, 2**-5)
    assert_same(moe.fused_experts(x, gate_up, down, ids, weights, activation), expected, 2**-5)
    assert_same(moe.PackedExperts(gate_up, down, activation)(x, ids, weights), expected, 2**-5)


def token_at_a_time(x, gate_up, down, ids, weights, activation):
    act = {"silu": torch.nn.functional.silu, "gelu_tanh": lambda g: torch.nn.functional.gelu(g, approximate="tanh")}
    out = torch.zeros(x.shape)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (gate_up[expert].float() @ x[token].float()).chunk(2)
            out[token] += weight * (down[expert].float() @ (act[activation](gate) * up))
    return out.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_experts_result_alone_and_in_a_batch(dtype, layout):
    if layout == "plain":
        pytest.skip("plain torch sums by the number of rows")
    gate_up, down = numbers(8, 96, 64, dtype=dtype) / 8, numbers(8, 64, 48, dtype=dtype) / 7
    x, (ids, weights) = numbers(40, 64, dtype=dtype, seed=1), routed(40, 8, 2)
    packed = moe.PackedExperts(gate_up, down, "silu")
    together = packed(x, ids, weights)

    for token in range(40):
        alone = packed(x[token : token + 1], ids[token : token + 1], weights[token : token + 1])
        assert torch.equal(alone[0], together[token]), f"token {token}"
