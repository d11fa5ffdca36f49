"""From a spec to a running diffusion engine and the card that describes it. The one place that wires them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from inferfleet.engine.diffusion.engine import DiffusionEngine
from inferfleet.engine.diffusion.gate import load_gated
from inferfleet.engine.diffusion.limits import MAX_SIDE, MAX_STEPS
from inferfleet.engine.diffusion.pipeline import Pipeline
from inferfleet.engine.diffusion.smoke import smoke
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.progress import Progress
from inferfleet.kernels import threads


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """An engine of an image model and its card."""

    engine: DiffusionEngine
    card: dict[str, Any]


def load_images(spec: DiffusionSpec, progress: Progress | None = None) -> LoadedImages:
    """Load everything. Raises LoadError or a ModelError; each says what to do."""
    progress = progress or Progress()
    threads.use(spec.threads or threads.for_work())
    # Attention and the VAE are torch's own, and most of a step that is not products.
    threads.lend_to_torch()
    # By default cuDNN rounds the inputs of float32 convolutions to 10 bits, which shows in the VAE.
    torch.backends.cudnn.allow_tf32 = False
    pipeline, report = load_gated(spec, progress)
    progress.begin("engine")
    started = time.perf_counter()
    engine = DiffusionEngine(pipeline, spec)
    progress.begin("smoke")
    smoke(engine)
    pipeline.load_seconds["warm"] = round(time.perf_counter() - started, 3)
    return LoadedImages(engine, _card(pipeline, engine, spec) | {"quantization_report": report})


def _card(pipeline: Pipeline, engine: DiffusionEngine, spec: DiffusionSpec) -> dict[str, Any]:
    limits = engine.limits
    return {
        "kind": "image",
        "family": "flux",
        "architecture": "FluxPipeline",
        "guided": pipeline.guided,
        "licence": pipeline.licence.tag,
        "commit": pipeline.commit,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": str(pipeline.device),
        "quantization": spec.quantization,
        "loras": list(limits.lora_names),
        "default_size": limits.default_size,
        "default_steps": limits.default_steps,
        "default_guidance": limits.default_guidance,
        "max_sequence_length": limits.max_sequence_length,
        "max_pixels": limits.max_pixels,
        "max_side": MAX_SIDE,
        "multiple_of": limits.multiple_of,
        "max_steps": MAX_STEPS,
        "max_batch_size": spec.max_batch_size,
        "load_seconds": pipeline.load_seconds,
    }
