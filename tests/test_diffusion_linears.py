"""FLUX's transformer around our products: diffusers' numbers, and a picture's own numbers whatever is beside it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from small_pipeline import SHAPES, Shape, enliven, transformer_config
from torch import Tensor, nn

from inferfleet.engine.diffusion import linears
from inferfleet.engine.diffusion.linears import Projection, load_transformer
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel, WeightsMismatch
from inferfleet.engine.place import Place
from inferfleet.kernels import linear, quantized_linear
from inferfleet.kernels.quantized import KINDS

#: Beside the small ones: heads as wide as the published model's.
WIDE = Shape(guided=True, heads=2, axes=(16, 56, 56), layers=1, single_layers=1)
#: Batch, latent height and width in tokens, tokens of the prompt.
BATCHES = ((2, 4, 4, 8), (8, 8, 8, 32), (5, 9, 7, 13), (3, 20, 24, 64))


def made(shape: Shape, seed: int = 0) -> tuple[dict[str, Any], FluxTransformer2DModel]:
    """A random transformer of diffusers, and its config.json."""
    config = transformer_config(shape)
    model = FluxTransformer2DModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    enliven(model, torch.Generator().manual_seed(seed))
    return config, model.requires_grad_(False).eval()


def ours(config, model, *, dtype=torch.float32, quantization=None) -> FluxTransformer2DModel:
    place = Place(dtype, torch.device("cpu"), quantization=quantization)
    return load_transformer(config, iter(model.state_dict().items()), place)


def inputs(config, size, seed: int = 0, dtype=torch.float32) -> dict[str, Any]:
    count, height, width, length = size
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    axes = [torch.arange(float(size)) for size in (1, height, width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return {
        "hidden_states": drawn(count, height * width, config["in_channels"]),
        "timestep": torch.rand(count, generator=random).to(dtype),
        "guidance": torch.rand(count, generator=random).to(dtype) * 5 if config["guidance_embeds"] else None,
        "pooled_projections": drawn(count, config["pooled_projection_dim"]),
        "encoder_hidden_states": drawn(count, length, config["joint_attention_dim"]),
        "txt_ids": torch.zeros(length, 3),
        "img_ids": grid.view(-1, 3),
    }


def alone(batch: dict[str, Any], index: int) -> dict[str, Any]:
    one = slice(index, index + 1)
    return {name: x if x is None or name.endswith("_ids") else x[one] for name, x in batch.items()}


def run(model, batch) -> Tensor:
    return model(**batch, return_dict=False)[0]


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_the_transformer_is_that_of_diffusers(seed):
    config, judge = made(SHAPES[seed], seed)
    model = ours(config, judge)
    for size in BATCHES:
        batch = inputs(config, size, seed)
        assert (run(model, batch) - run(judge, batch)).abs().max() < 1e-5


#: Width 48, then 48 with heads of 12, then 256; a third of the pairs runs always.
CASES = [
    pytest.param(shape, kind, dtype, marks=[] if (number + place) % 3 == 0 else [pytest.mark.slow])
    for number, shape in enumerate((SHAPES[1], SHAPES[2], WIDE))
    for place, (kind, dtype) in enumerate(product([None, *KINDS], [torch.float32, torch.bfloat16]))
]


@pytest.mark.parametrize(("shape", "quantization", "dtype"), CASES)
def test_a_picture_alone_is_the_same_picture_in_a_batch(shape, quantization, dtype):
    config, judge = made(shape)
    model = ours(config, judge, dtype=dtype, quantization=quantization)
    for size in BATCHES:
        # Given pictures at other steps, with other prompts and guidance beside them,
        batch = inputs(config, size, dtype=dtype)
        # when they are computed together, then each has the bits that it has alone.
        together = run(model, batch)
        assert together.isfinite().all()
        for index in range(size[0]):
            assert torch.equal(run(model, alone(batch, index))[0], together[index]), (size, index)


@pytest.mark.parametrize("layout", ["plain", "onednn"])
@pytest.mark.parametrize("quantization", [None, *KINDS])
def test_without_our_own_products_a_picture_is_a_product_of_its_own(layout, quantization, monkeypatch):
    # Given a machine without the C++ path, or a device that is no CPU,
    monkeypatch.setattr(linear, "best_layout", lambda weight: layout)
    monkeypatch.setattr(quantized_linear, "best_layout", lambda device, dtype: "rows")
    config, judge = made(SHAPES[1])
    model = ours(config, judge, quantization=quantization)
    # when pictures are computed together, then each has the bits that it has alone,
    batch = inputs(config, BATCHES[1])
    together = run(model, batch)
    assert all(torch.equal(run(model, alone(batch, index))[0], together[index]) for index in range(8))
    # and they are the numbers of the other path.
    monkeypatch.undo()
    assert (run(ours(config, judge, quantization=quantization), batch) - together).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-4, 0.01), ("fp8", 1e-3, 0.03), ("int4", 0.005, 0.15)])
def test_coded_blocks_come_near_and_the_rest_is_exact(kind, least, most):
    config, judge = made(WIDE)
    model = ours(config, judge, quantization=kind)
    batch = inputs(config, BATCHES[1])
    expected = run(judge, batch)
    assert least < (run(model, batch) - expected).norm() / expected.norm() < most
    products = {path: module._product for path, module in model.named_modules() if isinstance(module, Projection)}
    kinds = {path: getattr(product.weight, "kind", None) for path, product in products.items()}
    inside = {path for path in kinds if "blocks." in path}
    assert {path for path, coded in kinds.items() if coded is None} == kinds.keys() - inside
    assert {"x_embedder", "proj_out", "norm_out.linear", "context_embedder"} < kinds.keys() - inside
    # Modulations are int8 in any case.
    modulations = {path for path in inside if path.endswith(("norm1.linear", ".norm.linear"))}
    assert {kinds[path] for path in modulations} == {"int8"}
    assert {kinds[path] for path in inside if not path.endswith(".linear")} == {kind}
    assert not [module for module in model.modules() if isinstance(module, nn.Linear)]


def test_weights_are_let_go_as_they_are_coded():
    # Given a checkpoint that gives a tensor at a time and keeps none,
    config, judge = made(WIDE)
    names = list(judge.state_dict())
    lent: list[weakref.ref[Tensor]] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            assert sum(tensor() is not None for tensor in lent) <= 1, name
            tensor = judge.state_dict()[name].clone()
            lent.append(weakref.ref(tensor))
            yield name, tensor

    # when a coded model is loaded from it, then no tensor lives on: what there is are codes.
    place = Place(torch.float32, torch.device("cpu"), quantization="int8")
    model = load_transformer(config, weights(), place)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_every_difference_between_weights_and_config_is_told_at_once():
    config, judge = made(SHAPES[0])
    weights = dict(judge.state_dict())
    del weights["transformer_blocks.1.attn.to_k.bias"]
    weights["proj_out.weight"] = torch.zeros(3, 4)
    weights["transformer_blocks.9.attn.to_k.bias"] = torch.zeros(3)
    with pytest.raises(WeightsMismatch) as caught:
        load_transformer(config, weights.items(), Place(torch.float32, torch.device("cpu")))
    assert caught.value.missing == ("transformer_blocks.1.attn.to_k.bias",)
    assert caught.value.extra == ("transformer_blocks.9.attn.to_k.bias",)
    assert len(caught.value.misshapen) == 1


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"num_layers": 10**9}, BadModelConfig, "num_layers"),
        ({"num_attention_heads": 0}, BadModelConfig, "num_attention_heads"),
        ({"joint_attention_dim": 1 << 40}, BadModelConfig, "joint_attention_dim"),
        ({"axes_dims_rope": [4, 6]}, BadModelConfig, "axes_dims_rope"),
        ({"axes_dims_rope": [4, 6, 7]}, BadModelConfig, "axes_dims_rope"),
        ({"axes_dims_rope": [True, 6, 7]}, BadModelConfig, "axes_dims_rope"),
        ({"guidance_embeds": "yes"}, BadModelConfig, "guidance_embeds"),
        ({"patch_size": 2}, UnsupportedModel, "patch_size"),
        ({"out_channels": 32}, UnsupportedModel, "out_channels"),
        ({"_class_name": "SD3Transformer2DModel"}, UnsupportedModel, "_class_name"),
    ],
)
def test_a_config_that_is_no_flux_transformer_is_refused_by_its_field(changes, error, field):
    config = transformer_config(SHAPES[0]) | changes
    with pytest.raises(error, match=field):
        linears.build_transformer(config, Place(torch.float32, torch.device("meta")))
