"""FLUX's transformer around our own matrix products: diffusers' class, whose nn.Linear modules are replaced on meta.

    load_transformer   builds it without memory and streams the weights in, coded as they are read where that is asked
    replace_linears    every nn.Linear becomes a Projection; q, k and v of an attention become one

**A picture's numbers do not depend on the pictures beside it**, to the bit on a CPU. csrc/linear.cpp and
csrc/quantized_linear.cpp sum every output input by input whatever the rows are (measured: equal alone and in batches,
and not slower than F.linear from 64 to 8192 rows, float32 and bfloat16, 256 to 5120 inputs). torch's own products
choose their sums by the number of rows ([8, K] differs from [1, K] in the last bits), so where the weights are torch's
(CUDA, no compiler) each picture is a product of its own: with hundreds of rows each, that costs little. torch's
activations take another path where a loop ends than within it, so on a CPU they run picture by picture too. The rest
(norms, attention, sums) was found equal as it is.

**What is coded** where a quantization is asked for: the products inside the blocks. Modulations, a quarter of FLUX's
weights, are int8 whatever the others are: every number of a picture is scaled by them, and of the error of int4 and fp8
(one step of four random transformers) that takes 16 to 25 % away, as much as leaving them exact does. What comes before
and after the blocks stays exact: it is small, and all else passes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from inferfleet.engine.config import Fields
from inferfleet.engine.diffusion.deltas import Deltas
from inferfleet.engine.layers.linear import Linear
from inferfleet.engine.layers.slots import Slot, Slots, all_slots, fill
from inferfleet.engine.model_errors import BadModelConfig
from inferfleet.engine.place import Place
from inferfleet.kernels.linear import PackedLinear
from inferfleet.kernels.quantized import Quantized
from inferfleet.kernels.quantized_linear import QuantizedLinear

CONFIG = "transformer/config.json"
#: Blocks of the transformer, whose products may be coded.
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
#: Largest counts that a config.json may name: no model comes near, and a wrong one must not make us build for hours.
MOST = {"num_layers": 256, "num_single_layers": 256, "num_attention_heads": 256}
MAX_WIDTH = 1 << 16


class Projection(Linear):
    """A Linear over pictures, x [B, T, K] or [B, K] -> [B, (T,) N]: row b of the batch is computed as if alone.

    Deltas of adapters, if there are any, come on top of it.
    """

    def __init__(self, inputs: int, parts: Mapping[str, int], *, bias: bool, place: Place) -> None:
        super().__init__(inputs, parts, bias=bias, place=place)
        self.inputs, self.parts, self.place = inputs, dict(parts), place
        self.deltas: Deltas | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self._product_of(x)
        if self.deltas is not None:
            self.deltas.add_to(y, x)
        return y

    def _product_of(self, x: Tensor) -> Tensor:
        product = self._product
        assert isinstance(product, PackedLinear | QuantizedLinear), "finalize comes before the first product"
        if product.layout == "panels":
            return product(x)
        if product.layout == "onednn":
            return _each(product, x)
        weight = product.weight
        if isinstance(weight, Quantized):
            weight = weight.dequantised(x.dtype)  # once for all pictures
        assert isinstance(weight, Tensor), "only panels are of another type"
        return _products(x, weight, product.bias)


def _products(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, T, K] or [B, K] -> [B, (T,) N] by one product of torch's for each of the B."""
    rows = x.reshape(len(x), -1, x.shape[-1])
    y = x.new_empty(*rows.shape[:2], len(weight))
    for inputs, outputs in zip(rows, y, strict=True):
        if bias is None:
            torch.mm(inputs, weight.T, out=outputs)
        else:
            torch.addmm(bias, inputs, weight.T, out=outputs)
    return y.view(*x.shape[:-1], len(weight))


def _each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function of each picture by itself."""
    return function(x) if len(x) == 1 else torch.cat([function(x[index : index + 1]) for index in range(len(x))])


class Activation(nn.Module):
    """An activation, on a CPU picture by picture."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return _each(self.function, x) if x.device.type == "cpu" else self.function(x)


class WideGelu(nn.Module):
    """The first half of a feed-forward layer: a product, then tanh-GELU."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj, self.activation = proj, Activation(_gelu)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x))


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def replace_linears(transformer: nn.Module, place: Place) -> None:
    """Puts a Projection in the place of every nn.Linear, and memory in that of every other weight (norms).

    transformer: built on meta. The weights come later, through `slots_of`.
    """
    for path, module in list(transformer.named_modules()):
        if isinstance(module, FluxAttention):
            _fuse(module, place)
        elif (activation := _activation(module)) is not None:
            _put(transformer, path, activation)
    for path, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear):
            _put(transformer, path, _projection({path.rpartition(".")[2]: module}, _place_of(path, place)))
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = nn.Parameter(place.empty(*parameter.shape), requires_grad=False)
            setattr(module, name, empty)


def _place_of(path: str, place: Place) -> Place:
    if not path.startswith(BLOCKS):
        return place.exact
    is_modulation = path.endswith(".linear")
    return replace(place, quantization="int8") if is_modulation and place.quantization is not None else place


def _fuse(attention: FluxAttention, place: Place) -> None:
    """q, k and v of one input as one product, where diffusers' attention looks for it."""
    groups = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
    for fused, names in groups.items():
        if hasattr(attention, names[0]):
            _put(attention, fused, _projection({name: getattr(attention, name) for name in names}, place))
            for name in names:
                delattr(attention, name)
    attention.fused_projections = True


def _projection(linears: Mapping[str, nn.Linear], place: Place) -> Projection:
    """linears: over one input, by their names in the module that has them."""
    first = next(iter(linears.values()))
    sizes = {name: linear.out_features for name, linear in linears.items()}
    return Projection(first.in_features, sizes, bias=first.bias is not None, place=place)


def _activation(module: nn.Module) -> nn.Module | None:
    """What takes the place of one of diffusers' activations."""
    if isinstance(module, nn.SiLU):
        return Activation(F.silu)
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return Activation(_gelu)
    if isinstance(module, GELU) and module.approximate == "tanh":
        return WideGelu(module.proj)
    return None


def _put(transformer: nn.Module, path: str, module: nn.Module) -> None:
    """In the place of what is there, or as a new module."""
    parent, _, name = path.rpartition(".")
    transformer.get_submodule(parent).add_module(name, module)


def slots_of(transformer: Any) -> Slots:
    """Where the tensors of a checkpoint in diffusers' layout go."""
    found = all_slots(transformer)
    found.tensors |= {name: Slot.into(parameter.data) for name, parameter in transformer.named_parameters()}
    return found


def build_transformer(config: Mapping[str, Any], place: Place) -> FluxTransformer2DModel:
    """The transformer of a config.json without its weights. BadModelConfig or UnsupportedModel names the field."""
    sizes = _sizes(Fields(config, CONFIG))
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel(**sizes)
    replace_linears(transformer, place)
    return transformer.eval()


def load_transformer(
    config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]], place: Place
) -> FluxTransformer2DModel:
    """The transformer of a checkpoint, ready to run. weights: each is let go once it is copied or coded.

    Raises BadModelConfig or UnsupportedModel for the config, WeightsMismatch for the weights.
    """
    transformer: Any = build_transformer(config, place)
    fill(slots_of(transformer), weights)
    return transformer


def _sizes(fields: Fields) -> dict[str, Any]:
    """The fields that FluxTransformer2DModel takes, checked."""
    fields.refuse("_class_name", "FluxTransformer2DModel")
    fields.refuse("patch_size", 1)
    channels = fields.integer("in_channels", 64)
    fields.refuse("out_channels", channels)
    head = fields.integer("attention_head_dim", 128)
    axes = fields.list_of(int, "axes_dims_rope", [16, 56, 56])
    if len(axes) != 3 or sum(axes) != head or any(size < 2 or size % 2 for size in axes):
        raise BadModelConfig(
            f"{CONFIG}: axes_dims_rope must be three even numbers whose sum is attention_head_dim, {head}, not {axes}"
        )
    sizes = {
        "in_channels": channels,
        "num_layers": fields.integer("num_layers", 19),
        "num_single_layers": fields.integer("num_single_layers", 38),
        "attention_head_dim": head,
        "num_attention_heads": fields.integer("num_attention_heads", 24),
        "joint_attention_dim": fields.integer("joint_attention_dim", 4096),
        "pooled_projection_dim": fields.integer("pooled_projection_dim", 768),
    }
    for name, size in sizes.items():
        if size > (limit := MOST.get(name, MAX_WIDTH)):
            raise BadModelConfig(f"{CONFIG}: {name} is {size}; no such transformer has more than {limit}")
    return sizes | {"guidance_embeds": fields.boolean("guidance_embeds", False), "axes_dims_rope": tuple(axes)}
