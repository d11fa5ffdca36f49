"""Writes a checkpoint and gives its judge: transformers, run eagerly.

Weights are lively on purpose: norms are not ones, scalars differ, logits reach the softcap, routers decide, so that
a forgotten factor shows.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from parity.checkpoints import ARCHITECTURES
from parity.checkpoints.architecture import BOS, EOS, PAD, SPECIAL_TOKENS, Architecture, Normal, Shape
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

Lively = Callable[[str, Tensor, Normal], Tensor | None]


@dataclass
class Reference:
    """transformers' own model of a checkpoint."""

    model: PreTrainedModel
    tolerance: float
    vocab_size: int
    folder: Path
    _memory: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def logits(self, ids: list[int]) -> Tensor:
        """[T, V] float32 for one prompt, mask passed: without it transformers would mask every pad id."""
        key = tuple(ids)
        if key not in self._memory:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                self._memory[key] = self.model(tokens, attention_mask=torch.ones_like(tokens)).logits[0].float()
        return self._memory[key]

    def in_dtype(self, dtype: torch.dtype) -> Reference:
        """The same checkpoint as transformers loads it from the folder in another dtype."""
        return self.loaded_from(self.folder, dtype)

    def loaded_from(self, folder: Path, dtype: torch.dtype = torch.float32) -> Reference:
        """A checkpoint of the same architecture as transformers loads it."""
        model = type(self.model).from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        return Reference(model.eval(), self.tolerance, self.vocab_size, folder)

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """`count` greedy tokens after a prompt, and how far each was ahead of the second best."""
        sequence, margins = list(ids), []
        with torch.no_grad():
            fed, cache = torch.tensor([sequence]), None
            for _ in range(count):
                mask = torch.ones(1, len(sequence), dtype=torch.long)
                out = self.model(fed, attention_mask=mask, past_key_values=cache, use_cache=True)
                best = out.logits[0, -1].float().topk(2)
                sequence.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                fed, cache = torch.tensor([sequence[-1:]]), out.past_key_values
        return sequence[len(ids) :], margins


def write(
    name: str | Architecture,
    seed: int,
    folder: Path,
    *,
    layout: str = "hub",
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Reference:
    """Writes a random checkpoint of an architecture, by its name or itself, to `folder` and returns its judge.

    Seed i takes shape i modulo the number of shapes. layout "saved": as transformers 5 writes it; "hub": as the model's
    authors publish it (older config keys, tensors the model does not use); "stacked": experts of a layer as one tensor.
    """
    logging.disable_progress_bar()
    architecture = ARCHITECTURES[name] if isinstance(name, str) else name
    shape = architecture.shapes[seed % len(architecture.shapes)]
    model = architecture.build(shape)
    model.config._attn_implementation = "eager"
    enliven(model, seed, architecture.lively)
    round_to(model, dtype)
    model.save_pretrained(folder)
    _rewrite_config(folder, layout, shape, dtype, architecture)
    _rewrite_weights(folder, layout, shape, dtype, shards, architecture)
    write_tokenizer(folder)
    model.set_attn_implementation("eager")
    return Reference(model.eval(), architecture.tolerance, shape["vocab_size"], folder)


def enliven(model: PreTrainedModel, seed: int, lively: Lively) -> None:
    """Random weights under which every factor of the model matters and logits spread over several units."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    stored = ("layer_scalar", "e_score_correction_bias")
    tensors = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith(stored)}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if (own := lively(name, tensor, normal)) is not None:
                tensor.copy_(own)
            elif name.endswith(("layer_scalar", "per_expert_scale")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif re.fullmatch(r"model\.(language_model\.)?norm\.weight", name):
                # Random signs: else a tied head prefers the very token that was put in, and greedy text repeats it.
                tensor.copy_((3 + normal(tensor, 0.9)) * torch.randn(tensor.shape, generator=generator).sign())
            elif "model.layers" in name.replace("language_", "") and name.endswith(("q_norm.weight", "k_norm.weight")):
                # Sizes that a trained model has: scores of a few units. Sharper ones would amplify rounding.
                tensor.copy_(1.2 + normal(tensor, 0.3))
            elif name.endswith(("norm.weight", "layernorm.weight", "router.scale")) or "layernorm_" in name:
                tensor.copy_(1 + normal(tensor, 0.3))
            elif name.endswith(".bias"):
                tensor.copy_(normal(tensor, 0.5))
            elif "embed_tokens" in name or name.startswith("lm_head"):
                tensor.copy_(normal(tensor, 2 * model.config.get_text_config().hidden_size ** -0.5))
            else:
                gain = 2.0 if name.endswith(("router.proj.weight", "mlp.gate.weight")) else 1.2
                tensor.copy_(normal(tensor, gain * tensor.shape[-1] ** -0.5))


def round_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Leaves the model in float32 with weights that `dtype` can hold. (`model.to` would round the rotary table too.)"""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensor.to(dtype).float())
            assert tensor.dtype == torch.float32, name


def _rewrite_config(folder: Path, layout: str, shape: Shape, dtype: torch.dtype, architecture: Architecture) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if layout == "hub":
        architecture.hub_config(config, shape)
        generation = {"eos_token_id": [EOS, 260], "bos_token_id": BOS, "pad_token_id": PAD, "temperature": 0.6}
        (folder / "generation_config.json").write_text(json.dumps(generation))
    path.write_text(json.dumps(config, indent=2))


def _rewrite_weights(
    folder: Path, layout: str, shape: Shape, dtype: torch.dtype, shards: int, architecture: Architecture
) -> None:
    single = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(single).items()}
    if layout == "hub":
        tensors = architecture.hub_tensors(tensors, shape)
    if layout == "stacked":
        tensors = _stack_experts(tensors)
    if shards == 1:
        save_file(tensors, single, metadata={"format": "pt"})
        return
    single.unlink()
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`experts.N.gate_proj.weight` and the like of each layer as `experts.gate_up_proj` and `experts.down_proj`."""
    one = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    kept = {name: tensor for name, tensor in tensors.items() if not one.fullmatch(name)}
    places = {m[1] for name in tensors if (m := one.fullmatch(name))}
    for place in places:
        numbers = sorted({int(m[2]) for name in tensors if (m := one.fullmatch(name)) and m[1] == place})
        parts = {
            k: torch.stack([tensors[f"{place}.{n}.{k}_proj.weight"] for n in numbers]) for k in ("gate", "up", "down")
        }
        kept[f"{place}.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
        kept[f"{place}.down_proj"] = parts["down"]
    return kept


@functools.cache
def _tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer.to_str()


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with five special tokens."""
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    template = "{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}<|turn>model\n"
    (folder / "chat_template.jinja").write_text(template)
