"""A linear of its own for each head: against plain torch, and independent of the tokens beside a token."""

import pytest
import torch

from inferfleet.kernels import build, head_linear

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(actual, expected):
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("heads,inputs,outputs", [(1, 16, 64), (16, 128, 512), (5, 21, 70), (3, 512, 12)])
def test_each_head_is_multiplied_by_its_own_weight(heads, inputs, outputs, tokens, dtype):
    weight = (numbers(heads, outputs, inputs) * inputs**-0.5).to(dtype)
    x = numbers(tokens, heads, inputs, dtype=dtype, seed=1)

    out = head_linear.PackedHeads(weight)(x)

    assert out.is_contiguous()
    assert_same(out, head_linear.reference(x.float(), weight.float()).to(dtype))


def test_without_a_compiler_the_reference_multiplies(monkeypatch):
    monkeypatch.setattr(head_linear, "_native", lambda: None)
    weight, x = numbers(3, 20, 8), numbers(4, 3, 8, seed=1)

    heads = head_linear.PackedHeads(weight)

    assert heads.layout == "plain"
    assert torch.equal(heads(x), head_linear.reference(x, weight))


@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_bit_for_bit_the_same_alone_as_among_others(dtype):
    heads = head_linear.PackedHeads(numbers(16, 96, 64, dtype=dtype))
    x = numbers(40, 16, 64, dtype=dtype, seed=1)

    together = heads(x)

    assert heads.layout == "panels"
    for token in range(40):
        assert torch.equal(heads(x[token : token + 1]), together[token : token + 1])


def test_heads_may_be_a_slice_of_wider_ones():
    heads, wide = head_linear.PackedHeads(numbers(4, 24, 16)), numbers(6, 4, 40, seed=1)

    assert torch.equal(heads(wide[..., :16]), heads(wide[..., :16].contiguous()))


def test_another_shape_is_refused():
    heads = head_linear.PackedHeads(numbers(4, 24, 16))

    with pytest.raises(ValueError, match=r"takes \[T, 4, 16\] of torch.float32, not \[2, 4, 15\]"):
        heads(numbers(2, 4, 15))
