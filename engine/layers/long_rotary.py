"""LongRoPE: rotary frequencies stretched one by one, by a short and a long set of factors, and which of them to take.

    freq_i = 1 / (factor_i * theta^(2i/d)),   cos and sin times the set's own mscale

Every key of a sequence has to be turned by the set that its queries are turned by. So the set belongs to the sequence
(its variant) and not to a position, and the tokens of one step may need both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inferfleet.engine.batch import Batch
from inferfleet.engine.border import Border
from inferfleet.engine.config import Fields
from inferfleet.engine.model_errors import BadModelConfig

SHORT, LONG = "short", "long"


class LongRotary(nn.Module):
    """positions [T] -> (cos, sin), each [T, d] float32, every token by the set of its row."""

    def __init__(self, rope: Fields, head_dim: int, *, device: torch.device) -> None:
        super().__init__()
        self.border = Border(rope.integer("original_max_position_embeddings"), within=SHORT, beyond=LONG)
        self.frequencies = torch.stack([_frequencies(rope, name, head_dim) for name in (SHORT, LONG)]).to(device)
        scales = [rope.number(f"{name}_mscale") for name in (SHORT, LONG)]
        self.scales = torch.tensor(scales, dtype=torch.float32, device=device)

    def forward(self, positions: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        sets = _sets(batch).to(positions.device)
        angles = positions.unsqueeze(1).float() * self.frequencies[sets]
        angles, scales = torch.cat((angles, angles), dim=1), self.scales[sets].unsqueeze(1)
        return angles.cos() * scales, angles.sin() * scales


def _sets(batch: Batch) -> Tensor:
    """[T] int64: 1 for the tokens of rows that the long set computes, else 0."""
    chosen = torch.tensor([int(row.variant == LONG) for row in batch.rows])
    return chosen.repeat_interleave(torch.tensor([tokens for tokens, _ in batch.row_lens]))


def _frequencies(rope: Fields, name: str, head_dim: int) -> Tensor:
    factors = rope.list_of(object, f"{name}_factor")
    numbers = [factor for factor in factors if isinstance(factor, int | float) and 0 < factor < float("inf")]
    if len(numbers) != head_dim // 2 or numbers != factors:
        raise BadModelConfig(f"{rope.where}: {name}_factor must hold {head_dim // 2} positive numbers")
    powers = rope.number("rope_theta", 10_000.0) ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return 1.0 / (torch.tensor(numbers, dtype=torch.float32) * powers)
