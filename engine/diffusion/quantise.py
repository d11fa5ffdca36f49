"""`inferfleet quantize` for an image model: the report by which a load is let in, made ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferfleet.engine import hub
from inferfleet.engine.diffusion.components import read_components
from inferfleet.engine.diffusion.fetching import find_pipeline
from inferfleet.engine.diffusion.gate import measure, report_path
from inferfleet.engine.diffusion.licence import read_licence
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.model_errors import UnsupportedModel
from inferfleet.engine.progress import Progress
from inferfleet.engine.weights import local_folder
from inferfleet.kernels.quantized import Kind


def refuse_artefact(out: Path) -> None:
    """An image model is not written: UnsupportedModel says what to do instead."""
    raise UnsupportedModel(
        f"an image model is coded while it is loaded, and no coded folder is written to {out}: leave -o out, and set"
        " quantization where the model is served"
    )


def report_on(
    path: str, kind: Kind, *, revision: str | None, device: str, prompts: Sequence[str] | None
) -> dict[str, Any]:
    """Measures. prompts: None for those that come along, whose report is kept for the loads to come.

    Raises LoadError or a ModelError.
    """
    progress = Progress()
    folder = local_folder(path) or hub.fetch(path, revision, hub.PIPELINE_CONFIG_FILES, progress)
    components = read_components(folder)
    # Pictures that nobody gets to see are no service: who may fetch the model may measure it.
    accepted = read_licence(folder, guided=components.guided).tag
    spec = DiffusionSpec(path=path, revision=revision, device=device, quantization=kind, accept_licence=accepted)
    spec = replace(spec, path=str(find_pipeline(spec, progress)), revision=None)
    _, report = measure(spec, progress, prompts)
    kept = None if prompts is not None else str(report_path(spec))
    return report | {"model": path, "min_psnr": spec.min_psnr, "kept": kept}
