"""A small random checkpoint in the hub's layout, made without transformers: it is written and loaded in no time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from text_models import byte_level, write_folder

from inferfleet.engine.families import find_family
from inferfleet.engine.layers.slots import all_slots
from inferfleet.engine.place import Place

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "dtype": "float32",
}


def checkpoint(folder: Path, *, shards: int = 1, **config) -> dict[str, torch.Tensor]:
    """Writes one; returns its tensors by name, as they lie in the file."""
    write_folder(folder, byte_level())
    whole = CONFIG | config
    (folder / "config.json").write_text(json.dumps(whole))
    meta = Place(torch.float32, torch.device("meta"))
    model = find_family(whole["architectures"][0])[1](whole, place=meta)
    generator = torch.Generator().manual_seed(0)
    slots = all_slots(model).named(model._checkpoint_name).tensors
    tensors = {name: torch.randn(slot.shape, generator=generator) * 0.2 for name, slot in slots.items()}
    rewrite(folder, tensors, shards)
    return tensors


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """The weights of a folder anew."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    names = list(tensors)
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::shards]}, folder / file)
    weight_map = {name: files[number % shards] for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
