"""Refuses a quantised image model whose pictures are too far from full precision, by figures and not by rumour.

Diffusion models suffer more from coded weights than language models do, and how much depends on the model. So the first
load with a quantization measures (quality.py): it loads the model in full precision, paints, lets go of it, loads it
coded and paints again. The report is kept in the user's cache folder, named by a hash of everything that the figures
depend on, so that later loads only read it. `inferfleet quantize` makes the same report ahead of time, also on another
device.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inferfleet.engine.costs import in_units
from inferfleet.engine.diffusion import quality
from inferfleet.engine.diffusion.components import Components, read_components
from inferfleet.engine.diffusion.fetching import find_pipeline
from inferfleet.engine.diffusion.pipeline import Pipeline, compute_dtype, load_pipeline
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import InvalidRequest, LoadError, NumericalError, OutOfMemory
from inferfleet.engine.families import find_device
from inferfleet.engine.headers import stored_weights
from inferfleet.engine.place import Place
from inferfleet.engine.progress import Progress
from inferfleet.engine.sizing import free_memory
from inferfleet.engine.weights import commit_of
from inferfleet.kernels.quantized import Kind

log = logging.getLogger(__name__)

Report = dict[str, Any]


def load_gated(spec: DiffusionSpec, progress: Progress) -> tuple[Pipeline, Report | None]:
    """The pipeline, and what its quantization costs (None without one, or where nobody could measure it).

    Raises LoadError where it costs more than spec.min_psnr allows, or cannot be measured, unless the spec allows that.
    """
    if spec.quantization is None:
        return load_pipeline(spec, progress), None
    spec = replace(spec, path=str(find_pipeline(spec, progress)), revision=None)
    report, pipeline = read_report(spec), None
    if report is None:
        try:
            pipeline, report = measure(spec, progress)
        except Unmeasurable as error:
            if not spec.allow_low_psnr:
                raise
            log.warning("the quantised model is served unmeasured", extra={"fields": {"reason": error.message}})
        _free()
    if report is not None:
        judge(report, spec)
    return pipeline or load_pipeline(spec, progress), report


class Unmeasurable(LoadError):
    """The model's full precision does not fit here, so that nothing can be compared with it."""


def judge(report: Report, spec: DiffusionSpec) -> None:
    """LoadError with the figures where they are worse than the spec takes."""
    found, error = report["psnr"]["mean"], report["latent_error"]["mean"]
    if found >= spec.min_psnr or spec.allow_low_psnr:
        return
    raise LoadError(
        f"{report['quantization']} moves this model's pictures too far: {found:.1f} dB PSNR against full precision,"
        f" where min_psnr is {spec.min_psnr:g} (latents differ by {error:.1%}; {report['pictures']} pictures of"
        f" {report['side']} x {report['side']} in {report['steps']} steps). Take another quantization, or serve it as"
        " it is with allow_low_psnr = true under image",
        param="quantization",
    )


def measure(spec: DiffusionSpec, progress: Progress, prompts: Sequence[str] | None = None) -> tuple[Pipeline, Report]:
    """Paints with full precision and with codes; gives the coded pipeline and the report.

    It is kept, unless it is over other prompts than those that come along (prompts is None).
    Raises Unmeasurable, or LoadError for a model whose pictures are not finite.
    """
    components = read_components(Path(spec.path))
    began = time.perf_counter()
    try:
        full = _painted_in_full(spec, components, progress, prompts)
        pipeline = load_pipeline(spec, progress)
        progress.begin("measure")
        setup = quality.Setup.of(pipeline)
        coded = quality.paint(pipeline, spec, prompts)
    except (InvalidRequest, NumericalError) as error:
        raise LoadError(
            f"the quality of {spec.quantization} cannot be measured: {error}", param="quantization"
        ) from error
    assert spec.quantization is not None, "there is nothing to measure without a quantization"
    report = {
        "kind": "image",
        "version": quality.VERSION,
        "model": spec.path,
        "commit": pipeline.commit,
        "quantization": spec.quantization,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": str(pipeline.device),
        "pictures": len(coded),
        "side": setup.side,
        "steps": setup.steps,
        "guidance_scale": setup.guidance,
        **quality.distances(full, coded),
        "weights": {
            "bytes_before": transformer_bytes(components, pipeline.dtype, None),
            "bytes_after": transformer_bytes(components, pipeline.dtype, spec.quantization),
        },
        "seconds": round(time.perf_counter() - began, 3),
    }
    log.info(
        "quantization measured", extra={"fields": {k: report[k] for k in ("quantization", "psnr", "latent_error")}}
    )
    if prompts is None:
        keep_report(report, spec)
    return pipeline, report


def _painted_in_full(
    spec: DiffusionSpec, components: Components, progress: Progress, prompts: Sequence[str] | None
) -> list[quality.Painted]:
    """With the weights as they are; they are let go before this returns."""
    device, dtype = find_device(spec.device), _dtype(spec, components)
    needed, free = transformer_bytes(components, dtype, None), free_memory(device)
    told = (
        f"whether {spec.quantization} is good enough can only be measured beside full precision, which needs"
        f" {in_units(needed)} for the transformer alone, and {in_units(free)} are free on {device}. Measure it where"
        f" there is room, as in `inferfleet quantize {spec.path} --quantization {spec.quantization} --device cpu`, and"
        f" keep {report_path(spec).name} in {report_path(spec).parent}; or serve it unmeasured with"
        " allow_low_psnr = true under image"
    )
    if needed > free:
        raise Unmeasurable(told, param="quantization")
    try:
        return _paint_in_full(replace(spec, quantization=None, loras={}), progress, prompts)
    except (OutOfMemory, torch.OutOfMemoryError) as error:
        raise Unmeasurable(told, param="quantization") from error
    finally:
        _free()


def _paint_in_full(spec: DiffusionSpec, progress: Progress, prompts: Sequence[str] | None) -> list[quality.Painted]:
    # A function of its own, because its pipeline has to be gone when the next one is loaded.
    pipeline = load_pipeline(spec, progress)
    progress.begin("measure")
    return quality.paint(pipeline, spec, prompts)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def transformer_bytes(components: Components, dtype: torch.dtype, kind: Kind | None) -> int:
    """Memory of the transformer's weights."""
    from inferfleet.engine.diffusion.linears import build_transformer, slots_of

    place = Place(dtype, torch.device("meta"), quantization=kind)
    return sum(slot.num_bytes for slot in slots_of(build_transformer(components.transformer, place)).tensors.values())


def report_path(spec: DiffusionSpec) -> Path:
    """Where the report of a local folder's model under these settings is kept, or will be."""
    components = read_components(Path(spec.path))
    dtype = _dtype(spec, components)
    parts = [str(quality.VERSION), _identity(components), str(spec.quantization), str(dtype)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inferfleet" / "quality" / f"{name}.json"


def _dtype(spec: DiffusionSpec, components: Components) -> torch.dtype:
    return compute_dtype(spec.dtype, stored_weights(components.checkpoints["transformer"].files))


def _identity(components: Components) -> str:
    """Of a model's files: the hub's commit, or the names, sizes and times of the files that shape a picture."""
    if (commit := commit_of(components.folder)) is not None:
        return commit
    files = sorted(path for path in components.folder.glob("*/*") if path.suffix in (".safetensors", ".json", ".txt"))
    stats = [(str(path.relative_to(components.folder)), path.stat()) for path in files]
    return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def read_report(spec: DiffusionSpec) -> Report | None:
    """What was measured before, or None. A damaged file counts as none."""
    path = report_path(spec)
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
        figures = report["psnr"]["mean"], report["latent_error"]["mean"], report["pictures"], report["steps"]
        return report if all(isinstance(figure, int | float) for figure in figures) and report["side"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "the kept quality report is not readable", extra={"fields": {"path": str(path), "error": str(error)}}
        )
        return None


def keep_report(report: Report, spec: DiffusionSpec) -> None:
    """Moved into place whole. A cache that cannot be written is no reason to serve nothing: it is measured again."""
    path = report_path(spec)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
            json.dump(report, file, indent=2)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the quality report is not kept", extra={"fields": {"path": str(path), "error": str(error)}})
