"""Angles of the rotary position embedding: which frequencies a configuration asks for, and their cos and sin.

    freq_i = theta^(-2i/d)     default; the variants below stretch or drop some of them
    angle[t, i] = position[t] * freq_i,  laid out twice side by side (rotate_half), times an attention factor

Angles are computed per step in float32: a table over 131072 positions would cost more memory than a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from inferfleet.engine.config import Fields
from inferfleet.engine.model_errors import UnsupportedModel


class Rotary(nn.Module):
    """positions [T] -> (cos, sin), each [T, R] float32, where R <= head_dim is the part that turns."""

    def __init__(self, rope: Fields, head_dim: int, max_positions: int, *, device: torch.device) -> None:
        super().__init__()
        frequencies, self.factor = inverse_frequencies(rope, head_dim, max_positions)
        self.frequencies = frequencies.to(device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.unsqueeze(1).float() * self.frequencies
        angles = torch.cat((angles, angles), dim=1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.factor == 1.0 else (cos * self.factor, sin * self.factor)


def rope_fields(text: Fields) -> Fields:
    """The rotary settings of a configuration, in today's `rope_parameters` or yesterday's rope_theta + rope_scaling."""
    values = dict(text.section("rope_parameters", {}).values)
    values |= text.section("rope_scaling", {}).values
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in text:
            values.setdefault(name, text.values[name])
    return Fields(values, f"{text.where}: rope_parameters")


def inverse_frequencies(rope: Fields, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """(frequencies [R/2] float32, factor of cos and sin); raises UnsupportedModel for an unknown rope_type."""
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _KINDS:
        raise UnsupportedModel(f"{rope.where}: rope_type {kind!r} is not one of {', '.join(_KINDS)}")
    return _KINDS[kind](rope, head_dim, max_positions)


def _powers(rope: Fields, width: int, divisor: int) -> Tensor:
    """theta^(-2i/divisor) for the i < width/2."""
    theta = rope.number("rope_theta", 10_000.0)
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / divisor)


def _turning(rope: Fields, head_dim: int) -> int:
    return int(head_dim * rope.number("partial_rotary_factor", 1.0))


def _default(rope: Fields, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    # Qwen3 and Gemma 4 ignore partial_rotary_factor here: their default type turns the whole head.
    return _powers(rope, head_dim, head_dim), 1.0


def _linear(rope: Fields, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    width = _turning(rope, head_dim)
    return _powers(rope, width, width) / rope.number("factor"), 1.0


def _proportional(rope: Fields, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Exponents over the whole head; the slower frequencies are zero, so their pairs stand still."""
    turning = int(rope.number("partial_rotary_factor", 1.0) * head_dim // 2)
    frequencies = torch.zeros(head_dim // 2)
    frequencies[:turning] = _powers(rope, 2 * turning, head_dim)
    return frequencies / rope.number("factor", 1.0), 1.0


def _llama3(rope: Fields, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    width = _turning(rope, head_dim)
    frequencies = _powers(rope, width, width)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    turns = rope.integer("original_max_position_embeddings", max_positions) * frequencies / (2 * math.pi)
    # low == high leaves nothing to blend: then the ramp is a step.
    kept = ((turns - low) / (high - low)).clamp(0, 1) if high != low else (turns >= high).float()
    return frequencies * (kept + (1 - kept) / rope.number("factor")), 1.0


def _yarn(rope: Fields, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Waves that turn less than beta_slow times in the original context are stretched, above beta_fast kept."""
    width = _turning(rope, head_dim)
    frequencies = _powers(rope, width, width)
    original = rope.integer("original_max_position_embeddings", max_positions)
    factor = rope.number("factor", max_positions / original)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    log_theta = 2 * math.log(rope.number("rope_theta", 10_000.0))

    def dimension_of(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / log_theta

    low, high = dimension_of(fast), dimension_of(slow)
    if rope.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return frequencies / factor * (1 - kept) + frequencies * kept, _yarn_factor(rope, factor)


def _yarn_factor(rope: Fields, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in rope:
        return rope.number("attention_factor")
    mscale, mscale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)


_KINDS: dict[str, Callable[[Fields, int, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
}
