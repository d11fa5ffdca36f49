"""Latents of pictures: noise, the packed form that the transformer reads, positions.

Shapes: B pictures, C channels, h x w latents (both even), T = h/2 * w/2 tokens of 2 x 2 latents, L tokens of text.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise(seed: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[1, C, h, w] on the CPU: what a seed means on every device, and what diffusers' FluxPipeline makes of it."""
    return draw(generator(seed), (1, channels, height, width), dtype)


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def draw(random: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers on the CPU, drawn in their own format as diffusers does."""
    return torch.randn(shape, generator=random, dtype=dtype)


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, T, 4 C]: a token's channels are (c, dy, dx)."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """[B, T, 4 C] -> [B, C, h, w]"""
    batch, _, features = packed.shape
    cells = packed.reshape(batch, height // 2, width // 2, features // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """[T, 3] float32: (0, row, column) of each token, for h x w latents."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


def text_ids(length: int, device: torch.device) -> Tensor:
    """[L, 3] float32 zeros: text has no place in the picture."""
    return torch.zeros(length, 3, device=device)
