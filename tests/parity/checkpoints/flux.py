"""FLUX.1: the folders are `small_pipeline`'s; the judge is diffusers' own pipeline with transformers' encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from small_pipeline import SHAPES, Shape, write
from transformers.utils import logging

__all__ = ["SHAPES", "Shape", "reference", "write"]


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """diffusers' pipeline of a folder, silent, on the CPU."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
