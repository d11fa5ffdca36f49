"""Signs of life from within a step: on a CPU, one step of a large picture takes longer than a parent's patience.

Every layer says that it was computed. On a GPU it says so when it is queued; steps are short there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from inferfleet.engine.diffusion.pipeline import Pipeline


def listen(pipeline: Pipeline, alive: Callable[[], None]) -> None:
    """Has `alive` called after each layer of the transformer, the text encoders and the VAE."""

    def hook(*_: Any) -> None:
        alive()

    for layer in _layers(pipeline):
        layer.register_forward_hook(hook)


def _layers(pipeline: Pipeline) -> Iterator[nn.Module]:
    transformer: Any = pipeline.transformer
    vae: Any = pipeline.vae
    yield from transformer.transformer_blocks
    yield from transformer.single_transformer_blocks
    yield from pipeline.prompts.stages
    for module in (*vae.encoder.modules(), *vae.decoder.modules()):
        if isinstance(module, nn.Conv2d):
            yield module
