"""What a family's file gives the parity tests: random shapes, how the reference builds them, and the hub's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

#: Byte-level characters 0..255 and then the special tokens; model vocabularies are larger, as the real ones are.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>")
PAD, EOS, BOS = 256, 257, 258
TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}

#: A dictionary of config fields.
Shape = dict[str, Any]
#: normal(tensor, std): random numbers of the tensor's shape.
Normal = Callable[[Tensor, float], Tensor]


def as_saved(config: dict[str, Any], shape: Shape) -> None:
    """The hub's configuration has the keys that transformers saves."""


def nothing_more(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The hub's files hold what transformers saves."""
    return tensors


def nothing_special(name: str, tensor: Tensor, normal: Normal) -> Tensor | None:
    """No weight needs values of its own kind."""
    return None


@dataclass(frozen=True)
class Architecture:
    """One architecture of the test matrix."""

    #: At least three; seed i takes shape i modulo their number.
    shapes: tuple[Shape, ...]
    build: Callable[[Shape], PreTrainedModel]
    #: How much a logit may differ from the reference's.
    tolerance: float
    #: Changes the saved config.json to the keys of the published files.
    hub_config: Callable[[dict[str, Any], Shape], None] = as_saved
    #: The tensors as saved -> as published: names, layouts, and what the model has no use for.
    hub_tensors: Callable[[dict[str, Tensor], Shape], dict[str, Tensor]] = nothing_more
    #: Random values of a weight whose meaning the general rules of `enliven` do not know; None = they do.
    lively: Callable[[str, Tensor, Normal], Tensor | None] = nothing_special
    #: Mean KL(float32 || bfloat16) over positions, in nats, that the tiny models stay under. A mixture's is larger:
    #: rounding sends some tokens to other experts. A wrong factor gives whole units.
    bfloat16_kl: float = 0.05


def sizes(vocab: int, hidden: int, wide: int, heads: int, kv: int, d: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": d,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
    }
