"""Small random LoRA adapters, in the formats that people share them in, and the full weights that they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
#: Black Forest Labs' names, with {} for the block, -> diffusers' modules under one another.
ORIGINAL: Mapping[str, tuple[str, ...]] = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.{name}" for name in _QKV),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.{name}" for name in _ADDED),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks.{}.linear1": tuple(f"single_transformer_blocks.{{}}.{name}" for name in (*_QKV, "proj_mlp")),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
XLABS: Mapping[str, tuple[str, ...]] = {
    "double_blocks.{}.processor.qkv_lora1": ORIGINAL["double_blocks.{}.img_attn.qkv"],
    "double_blocks.{}.processor.qkv_lora2": ORIGINAL["double_blocks.{}.txt_attn.qkv"],
    "double_blocks.{}.processor.proj_lora1": ORIGINAL["double_blocks.{}.img_attn.proj"],
    "double_blocks.{}.processor.proj_lora2": ORIGINAL["double_blocks.{}.txt_attn.proj"],
    "single_blocks.{}.processor.qkv_lora": tuple(f"single_transformer_blocks.{{}}.{name}" for name in _QKV),
    "single_blocks.{}.processor.proj_lora": ORIGINAL["single_blocks.{}.linear2"],
}


@dataclass
class Made:
    """An adapter's file, and what it adds to each weight at scale 1."""

    path: Path
    tensors: dict[str, Tensor]
    changes: dict[str, Tensor]

    def rewrite(self, **metadata: str) -> None:
        save_file(self.tensors, self.path, metadata={"format": "pt"} | metadata)


def linears_of(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def write_peft(folder: Path, transformer: nn.Module, seed: int, *, rank: int = 4, **config: Any) -> Made:
    """As PEFT saves it: every product of the transformer; alpha and the like in adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made = Made(folder / "adapter_model.safetensors", {}, {})
    random = torch.Generator().manual_seed(seed)
    ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    for path, linear in linears_of(transformer).items():
        own = next((size for name, size in ranks.items() if path.endswith(name)), config["r"])
        alpha = next((value for name, value in alphas.items() if path.endswith(name)), config["lora_alpha"])
        down, up = _pair(linear.in_features, linear.out_features, own, random)
        made.tensors |= {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
        made.changes[path] = alpha / (math.sqrt(own) if config.get("use_rslora") else own) * up @ down
    made.rewrite()
    return made


def write_diffusers(
    path: Path, transformer: nn.Module, seed: int, *, alpha: float | None = None, rank: int = 4, only: str = ""
) -> Made:
    """As diffusers' trainers save it; without alpha it is the rank. only: a part of the modules' names."""
    made = Made(path, {}, {})
    random = torch.Generator().manual_seed(seed)
    for module, linear in linears_of(transformer).items():
        if only not in module:
            continue
        down, up = _pair(linear.in_features, linear.out_features, rank, random)
        made.tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
        if alpha is not None:
            made.tensors[f"transformer.{module}.alpha"] = torch.tensor(alpha)
        made.changes[module] = (1.0 if alpha is None else alpha / rank) * up @ down
    made.rewrite()
    return made


def write_original(path: Path, transformer: nn.Module, seed: int, style: str, *, alpha: float = 3.0) -> Made:
    """With Black Forest Labs' names. style: "kohya", "comfyui" or "xlabs" (which has no alpha)."""
    made = Made(path, {}, {})
    random = torch.Generator().manual_seed(seed)
    linears = linears_of(transformer)
    for form, targets in (XLABS if style == "xlabs" else ORIGINAL).items():
        for block in range(4 if "{}" in form else 1):
            modules = [target.format(block) for target in targets]
            if modules[0] not in linears:
                continue
            sizes = [linears[module].out_features for module in modules]
            down, up = _pair(linears[modules[0]].in_features, sum(sizes), 5, random)
            made.tensors |= _named(style, form.format(block), down, up, alpha)
            whole = (1.0 if style == "xlabs" else alpha / 5) * up @ down
            if form.startswith("final_layer.adaLN"):
                whole = torch.cat(whole.chunk(2)[::-1])  # shift, scale; diffusers has scale, shift
            made.changes |= dict(zip(modules, whole.split(sizes), strict=True))
    made.rewrite()
    return made


def _named(style: str, module: str, down: Tensor, up: Tensor, alpha: float) -> dict[str, Tensor]:
    if style == "xlabs":
        return {f"{module}.down.weight": down, f"{module}.up.weight": up}
    if style == "comfyui":
        name = f"diffusion_model.{module}"
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    name = f"lora_unet_{module.replace('.', '_')}"
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}


def _pair(inputs: int, outputs: int, rank: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B whose product weighs a good part of an ordinary weight."""
    down = torch.randn(rank, inputs, generator=random) * inputs**-0.5
    return down, torch.randn(outputs, rank, generator=random) * 0.4 * rank**-0.5


def merge(transformer: nn.Module, changes: Mapping[str, Tensor], scale: float) -> None:
    """W + scale * change, in place."""
    linears = linears_of(transformer)
    with torch.no_grad():
        for module, change in changes.items():
            linears[module].weight += scale * change
