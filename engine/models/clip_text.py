"""CLIP's text encoder: token ids to one vector a prompt, the hidden state at the end of the text.

A pre-norm transformer with learnt positions, biases everywhere and a causal mask. Formulas: Radford et al. 2021,
"Learning Transferable Visual Models From Natural Language Supervision", section 2.4; names and the two ways of finding
the end as the published checkpoints have them.

Shapes: B prompts, L tokens, H hidden size, h heads of d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferfleet.engine.config import Fields
from inferfleet.engine.model_errors import BadModelConfig, UnsupportedModel

#: eos_token_id of the published files, whose tokenizer has another end: there the end is the highest id.
LEGACY_EOS = 2
#: No published encoder is nearly so large; a damaged configuration may claim anything.
MOST = 1 << 20


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ClipText(nn.Module):
    """Built on the meta device; its modules carry the checkpoint's names without the leading `text_model.`."""

    def __init__(self, config: Mapping[str, Any], *, dtype: torch.dtype) -> None:
        """config: of text_encoder/config.json. Raises BadModelConfig or UnsupportedModel."""
        super().__init__()
        fields = Fields(config, "text_encoder/config.json")
        self.hidden_size = fields.integer("hidden_size", most=MOST)
        self.max_positions = fields.integer("max_position_embeddings", 77, most=MOST)
        self.vocab_size = fields.integer("vocab_size", most=MOST)
        self.eos_token_id = fields.integer("eos_token_id", LEGACY_EOS, least=0)
        self.embeddings = _Embeddings(self.vocab_size, self.max_positions, self.hidden_size, dtype)
        self.encoder = _Encoder(fields, dtype)
        self.final_layer_norm = _norm(fields, dtype)

    @staticmethod
    def rename(name: str) -> str | None:
        """A checkpoint's name as the module's own; None for the rest of a whole CLIP, and for positions."""
        if name.startswith(("vision_model.", "visual_projection.", "text_projection.", "logit_scale")):
            return None
        own = name.removeprefix("text_model.")
        return None if own == "embeddings.position_ids" else own

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, part) of the parts whose weights are needed one after another."""
        yield "embeddings", self.embeddings
        yield from ((f"encoder.layers.{i}", layer) for i, layer in enumerate(self.encoder.layers))
        yield "final_layer_norm", self.final_layer_norm

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L], L <= max_positions -> [B, H]."""
        x = self.embeddings(ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)[torch.arange(len(ids), device=ids.device), self._ends(ids)]

    def _ends(self, ids: Tensor) -> Tensor:
        """Where each prompt's text ends: [B]. Padding may spell the end too, so the first one counts."""
        found = ids if self.eos_token_id == LEGACY_EOS else (ids == self.eos_token_id).int()
        return found.argmax(-1)


class _Embeddings(nn.Module):
    def __init__(self, num_tokens: int, num_positions: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_tokens, size, device="meta", dtype=dtype)
        self.position_embedding = nn.Embedding(num_positions, size, device="meta", dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, H]."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class _Encoder(nn.Module):
    """Only a name: the checkpoint has its layers below `encoder.`."""

    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        num_layers = fields.integer("num_hidden_layers", most=1024)
        self.layers = nn.ModuleList(_Layer(fields, dtype) for _ in range(num_layers))


class _Layer(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_norm1, self.self_attn = _norm(fields, dtype), _Attention(fields, dtype)
        self.layer_norm2, self.mlp = _norm(fields, dtype), _Mlp(fields, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        size = fields.integer("hidden_size")
        self.num_heads = fields.integer("num_attention_heads")
        if size % self.num_heads:
            raise BadModelConfig(f"{fields.where}: hidden_size {size} is no multiple of {self.num_heads} heads")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(size, size, device="meta", dtype=dtype) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, h, L, d]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return y


class _Mlp(nn.Module):
    def __init__(self, fields: Fields, dtype: torch.dtype) -> None:
        super().__init__()
        size, wide = fields.integer("hidden_size"), fields.integer("intermediate_size", most=MOST)
        name = fields.text("hidden_act", "quick_gelu")
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"{fields.where}: hidden_act {name!r} is not one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[name]
        self.fc1 = nn.Linear(size, wide, device="meta", dtype=dtype)
        self.fc2 = nn.Linear(wide, size, device="meta", dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def _norm(fields: Fields, dtype: torch.dtype) -> nn.LayerNorm:
    size, eps = fields.integer("hidden_size"), fields.number("layer_norm_eps", 1e-5)
    return nn.LayerNorm(size, eps, device="meta", dtype=dtype)
