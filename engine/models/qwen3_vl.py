"""Qwen3-VL's language models, dense and mixture: Qwen3 and Qwen3-MoE inside a multimodal checkpoint.

What differs from the text-only families: where the tensors are (and that a mixture's stacks lie transposed in the
published files, which layers/experts.py tells by their shapes), no layer has a window, and a mixture's weights are
renormalised whatever norm_topk_prob says. The vision tower stays unloaded.

A token's rotary position is three numbers (time, row, column), of which each frequency uses one. Text has all three
equal, so here every frequency uses the same one and mrope_section decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from inferfleet.engine.config import Fields
from inferfleet.engine.models.qwen3 import Qwen3ForCausalLM
from inferfleet.engine.models.qwen3_moe import Qwen3MoeForCausalLM
from inferfleet.engine.place import Place

#: Fields that the reference does not read here, at the values that it behaves by.
FIXED = {"use_sliding_window": False, "layer_types": None, "norm_topk_prob": True}
VISION_TENSORS = r"model\.visual\..+"


class Qwen3VLForConditionalGeneration(Qwen3ForCausalLM):
    """The dense text model. A media placeholder without its medium is a token like any other, as in the reference."""

    prefix = "model.language_model."

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__(plain_text(config), place=place)

    def skipped_tensors(self) -> Iterable[str]:
        yield from super().skipped_tensors()
        yield VISION_TENSORS


class Qwen3VLMoeForConditionalGeneration(Qwen3MoeForCausalLM):
    """The mixture text model; placeholders as in the dense one."""

    prefix = "model.language_model."

    def __init__(self, config: Mapping[str, Any], *, place: Place) -> None:
        super().__init__(plain_text(config), place=place)

    def skipped_tensors(self) -> Iterable[str]:
        yield from super().skipped_tensors()
        yield VISION_TENSORS


def plain_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config.json with its text_config as the text-only families read it."""
    text = Fields(config).section("text_config")
    return {**config, "text_config": {"rope_theta": 500_000.0, **text.values, **FIXED}}
