"""Names of tensors in LoRA files, as what they are to diffusers' FLUX transformer. Strings only: no torch, no files.

PEFT       base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight
diffusers  transformer.transformer_blocks.0.attn.to_q.lora_A.weight, with or without transformer....to_q.alpha
kohya      lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight
ComfyUI    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight
XLabs      double_blocks.0.processor.qkv_lora1.down.weight

The last three have Black Forest Labs' modules, of which one may be several of diffusers', one under another.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["down", "up", "alpha"]

#: Ends of names -> what the tensor is. A is "down", B is "up".
ENDS: Mapping[str, Role] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".alpha": "alpha",
}
#: Beginnings of names that say nothing.
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "lora_transformer_", "lora_unet_")
#: What is found in names of what is not applied -> why not. The first that is found counts.
FOREIGN: tuple[tuple[str, str], ...] = (
    (r"^(text_encoder|text_encoders|lora_te)\d?[._]|^base_model\.model\.text_model\.", "is for a text encoder"),
    (r"lora_magnitude_vector|dora_scale", "is DoRA's, which rescales whole weights"),
    (r"\.(hada|lokr|oft|boft|glora|vera|ia3|poly)_", "is of another method than LoRA"),
    (r"\.bias$|\.diff_b$", "changes a bias"),
    (r"\.diff$|\.modules_to_save\.", "replaces a whole weight"),
)

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
#: Black Forest Labs' names within a block, and XLabs', -> diffusers'.
_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn_qkv": _QKV,
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": _ADDED_QKV,
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
    "processor_qkv_lora1": _QKV,
    "processor_qkv_lora2": _ADDED_QKV,
    "processor_proj_lora1": ("attn.to_out.0",),
    "processor_proj_lora2": ("attn.to_add_out",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "processor_qkv_lora": _QKV,
    "processor_proj_lora": ("proj_out",),
}
_OUTSIDE: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_BLOCK = re.compile(r"(double|single)_blocks_(\d{1,4})_(\w+)")


class ForeignName(ValueError):
    """The name is of something that is not applied; the message goes on after the name."""


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs."""

    role: Role
    #: The modules of diffusers' transformer whose outputs lie one under another in its B.
    modules: tuple[str, ...]
    #: Whether the two halves of its B change places: shift and scale of the last norm.
    is_swapped: bool = False


def place_of(name: str, known: Container[str], flat: Mapping[str, str]) -> Place:
    """Where the tensor of this name belongs. known: the transformer's modules; flat: them with "_" for "." -> them."""
    for pattern, why in FOREIGN:
        if re.search(pattern, name):
            raise ForeignName(why)
    end = next((end for end in ENDS if name.endswith(end)), None)
    if end is None:
        raise ForeignName("is no A, B or alpha of a LoRA adapter")
    module = name.removesuffix(end)
    for prefix in PREFIXES:
        module = module.removeprefix(prefix)
    modules, is_swapped = _modules_of(module, known, flat)
    absent = [path for path in modules if path not in known]
    if absent or not modules:
        raise ForeignName(f"is for {(absent or [module])[0]}, which this transformer does not have")
    return Place(ENDS[end], modules, is_swapped)


def _modules_of(module: str, known: Container[str], flat: Mapping[str, str]) -> tuple[tuple[str, ...], bool]:
    if module in known:
        return (module,), False
    name = module.replace(".", "_")
    if name in flat:
        return (flat[name],), False
    if (outside := _OUTSIDE.get(name)) is not None:
        return (outside,), outside == "norm_out.linear"
    if (found := _BLOCK.fullmatch(name)) is None:
        return (), False
    kind, number, rest = found.groups()
    table, blocks = (_DOUBLE, "transformer_blocks") if kind == "double" else (_SINGLE, "single_transformer_blocks")
    return tuple(f"{blocks}.{int(number)}.{inside}" for inside in table.get(rest, ())), False
