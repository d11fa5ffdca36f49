"""What an image pipeline needs, before anything is loaded: its part of `inferfleet models plan`.

The networks are built without memory and say what their weights take. What pictures take besides depends on their size
and their number; it comes out of what the weights leave.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from inferfleet.engine import headers, hub
from inferfleet.engine.diffusion.components import PIPELINE, STEMS, Components, read_components
from inferfleet.engine.diffusion.filling import parameter_slots
from inferfleet.engine.diffusion.licence import read_licence
from inferfleet.engine.diffusion.pipeline import build_vae, compute_dtype, require_diffusers
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.errors import LoadError
from inferfleet.engine.headers import StoredWeights
from inferfleet.engine.layers.slots import Slot
from inferfleet.engine.models.clip_text import ClipText
from inferfleet.engine.models.t5_encoder import T5Encoder
from inferfleet.engine.place import Place
from inferfleet.engine.weights import Checkpoint, commit_of
from inferfleet.kernels.quantized import Kind

META = torch.device("meta")


def plan_pipeline(
    path: str,
    folder: Path,
    *,
    is_remote: bool,
    dtype: str = "auto",
    gpu_memory: int | None = None,
    quantization: Kind | None = None,
) -> dict[str, Any]:
    """Everything as JSON; bytes are the device's. is_remote: of the hub's `path` only `folder`'s files are here.

    Raises a LoadError.
    """
    DiffusionSpec(path=path, dtype=dtype, quantization=quantization)
    if is_remote:
        wanted = (name for name in hub.PIPELINE_CONFIG_FILES if not name.startswith("tokenizer"))
        hub.fetch(path, folder.name, wanted)
    components = read_components(folder)
    require_diffusers()
    stored = {name: _stored(path if is_remote else None, folder, name) for name in STEMS}
    # Only the files know their number format: where there are none, that of the published ones.
    number = compute_dtype(dtype, stored["transformer"] or StoredWeights(numbers={"BF16": 0}))
    parts = [
        {**part, "stored": None if (files := stored[part["name"]]) is None else asdict(files)}
        for part in _parts(components, number, quantization)
    ]
    licence = read_licence(folder, guided=components.guided)
    return {
        "kind": "image",
        "path": path,
        "commit": commit_of(folder),
        "family": "flux",
        "architecture": PIPELINE,
        "guided": components.guided,
        "licence": {"tag": licence.tag, "url": licence.url, "needs_acceptance": licence.needs_acceptance},
        "dtype": str(number).removeprefix("torch."),
        "quantization": quantization,
        "default_size": components.default_size,
        "components": parts,
        "resident_bytes": sum(part["resident_bytes"] for part in parts),
        "offloaded_bytes": sum(part["offloaded_bytes"] for part in parts),
        "memory": None if gpu_memory is None else _memory(parts, gpu_memory),
    }


def _memory(parts: list[dict[str, Any]], gpu_memory: int) -> dict[str, Any]:
    """What the weights leave of a GPU for pictures, with the encoders on it and with them offloaded."""
    left = {
        "resident": gpu_memory - sum(part["resident_bytes"] for part in parts),
        "offloaded": gpu_memory - sum(part["offloaded_bytes"] for part in parts),
    }
    encoders = next((name for name, size in left.items() if size > 0), None)
    return {"gpu_bytes": gpu_memory, "left_bytes": left, "encoders": encoders}


def _parts(components: Components, dtype: torch.dtype, quantization: Kind | None) -> Iterable[dict[str, Any]]:
    """Each network's numbers and bytes; of an offloaded encoder, what it has on the device at most."""
    from inferfleet.engine.diffusion.linears import build_transformer, slots_of

    transformer: Any = build_transformer(components.transformer, Place(dtype, META, quantization=quantization))
    yield _part("transformer", slots_of(transformer).tensors.values())
    yield _part("vae", parameter_slots(build_vae(components.vae, dtype)).tensors.values())
    encoders: dict[str, ClipText | T5Encoder] = {
        "text_encoder": ClipText(components.text_encoder, dtype=dtype),
        "text_encoder_2": T5Encoder(components.text_encoder_2, dtype=dtype),
    }
    for name, encoder in encoders.items():
        largest = max(sum(tensor.nbytes for tensor in part.state_dict().values()) for _, part in encoder.stages())
        yield _part(name, parameter_slots(encoder).tensors.values()) | {"offloaded_bytes": largest}


def _part(name: str, slots: Iterable[Slot]) -> dict[str, Any]:
    slots = list(slots)
    size = sum(slot.num_bytes for slot in slots)
    numbers = sum(math.prod(slot.shape) for slot in slots)
    return {"name": name, "numbers": numbers, "resident_bytes": size, "offloaded_bytes": size}


def _stored(repo: str | None, folder: Path, component: str) -> StoredWeights | None:
    """What the headers of a component's files say; None where a local folder lacks them."""
    stem = STEMS[component]
    try:
        return headers.stored_weights(Checkpoint.open(folder / component, stem).files)
    except LoadError:
        if repo is None:
            return None
    index = folder / component / f"{stem}.safetensors.index.json"
    names = {f"{stem}.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return hub.stored_files(repo, folder.name, [f"{component}/{name}" for name in sorted(names)])
