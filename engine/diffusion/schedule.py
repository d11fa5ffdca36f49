"""The noise schedule of a pipeline: what scheduler/scheduler_config.json says of it, and the noise levels it gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inferfleet.engine.config import Fields
from inferfleet.engine.model_errors import BadModelConfig


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """A flow-matching Euler schedule, as FLUX.1's files have it."""

    #: Stretches the noisy end: s -> shift * s / (1 + (shift - 1) * s). Not with dynamic shifting.
    shift: float = 1.0
    #: Stretch by how many latent tokens a picture has, between the two shifts below.
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ScheduleConfig:
        """BadModelConfig for an impossible value, UnsupportedModel for what FLUX.1 does not use."""
        fields = Fields(raw, "scheduler/scheduler_config.json")
        fields.refuse("num_train_timesteps", 1000)
        fields.refuse("time_shift_type", "exponential")
        fields.refuse("shift_terminal")
        others = "invert_sigmas use_karras_sigmas use_exponential_sigmas use_beta_sigmas stochastic_sampling"
        for name in others.split():
            fields.refuse(name, False)
        found = cls(
            shift=fields.number("shift", 1.0),
            use_dynamic_shifting=fields.boolean("use_dynamic_shifting", False),
            base_shift=fields.number("base_shift", 0.5),
            max_shift=fields.number("max_shift", 1.15),
            base_image_seq_len=fields.integer("base_image_seq_len", 256),
            max_image_seq_len=fields.integer("max_image_seq_len", 4096),
        )
        if found.shift <= 0:
            raise BadModelConfig(f"{fields.where}: shift must be above 0, not {found.shift}")
        if found.base_image_seq_len == found.max_image_seq_len:
            raise BadModelConfig(f"{fields.where}: base_image_seq_len and max_image_seq_len must differ")
        return found

    def sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """Noise levels of a picture of so many latent tokens, [num_steps + 1] float32 from 1 down to 0.

        1 to 1/n in even steps, then stretched (Esser et al. 2024, section 5.3.2, with e^mu for their shift).
        """
        even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).float()
        if self.use_dynamic_shifting:
            slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
            stretch = math.exp(self.base_shift + slope * (num_tokens - self.base_image_seq_len))
            stretched = stretch / (stretch + (1 / even - 1))
        else:
            stretched = self.shift * even / (1 + (self.shift - 1) * even)
        return torch.cat([stretched, torch.zeros(1)])
