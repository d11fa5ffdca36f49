"""What a model needs and what fits, before anything is loaded: `python -m inferfleet.engine.plan PATH`, JSON on stdout.

The model is built without memory: its own slots say what its weights take, its cache_spec what a context takes. Of the
checkpoint only config.json and the headers of its safetensors are read, or fetched.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from inferfleet.engine import headers, hub
from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Latent, LayerKind
from inferfleet.engine.config import ModelConfig, read_config
from inferfleet.engine.costs import CacheCosts
from inferfleet.engine.errors import EngineError, LoadError
from inferfleet.engine.families import find_family
from inferfleet.engine.headers import StoredWeights
from inferfleet.engine.layers.slots import all_slots
from inferfleet.engine.place import Place
from inferfleet.engine.sizing import cache_costs, gpu_cache_budget, gpu_memory_for
from inferfleet.engine.weights import Checkpoint, commit_of, local_folder


@dataclass(frozen=True)
class Sources:
    """What is known of a checkpoint without its weights."""

    folder: Path
    config: ModelConfig
    #: None where there are no weights beside the configuration.
    stored: StoredWeights | None


@dataclass(frozen=True)
class Needs:
    """What a model takes in one number format."""

    num_weights: int
    weight_bytes: int
    costs: CacheCosts
    #: Layers of each kind, for a reader: {"kind", "layers", "span", "bytes_per_token" or "bytes_per_sequence"}.
    layers: list[dict[str, Any]]

    def gpu_bytes(self, tokens: int) -> int:
        """The memory of a GPU that holds one context of so many tokens beside the weights."""
        return self.weight_bytes + gpu_memory_for(self.costs.context(tokens))


def find_sources(path: str, revision: str | None = None) -> Sources:
    """A local folder, or a hub id of which only configuration and headers are fetched. Raises a ModelError."""
    local = local_folder(path)
    folder = local or hub.download_config(path, revision)
    config = read_config(folder)
    if files := _files(folder):
        return Sources(folder, config, headers.stored_weights(files))
    return Sources(folder, config, None if local else hub.stored_weights(path, revision))


def needs_of(config: ModelConfig, dtype: torch.dtype) -> Needs:
    """Builds the model on the meta device: shapes only."""
    _, model_class = find_family(config.architecture)
    model = model_class(config.raw, place=Place(dtype, torch.device("meta")))
    numbers = sum(math.prod(slot.shape) for slot in all_slots(model).tensors.values())
    spec = model.cache_spec
    return Needs(numbers, numbers * dtype.itemsize, cache_costs(spec, dtype), _layers(spec, dtype))


def plan(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    gpu_memory: int | None = None,
    max_model_len: int | None = None,
) -> dict[str, Any]:
    """Everything as JSON. Raises a ModelError."""
    sources = find_sources(path, revision)
    config = sources.config
    number = config.dtype(dtype)
    needs = needs_of(config, number)
    weights: dict[str, Any] = {"numbers": needs.num_weights, "resident_bytes": needs.weight_bytes, "stored": None}
    if sources.stored is not None:
        weights["stored"] = asdict(sources.stored)
    facts: dict[str, Any] = {
        "path": path,
        "commit": commit_of(sources.folder),
        "family": find_family(config.architecture)[0],
        "architecture": config.architecture,
        "dtype": str(number).removeprefix("torch."),
        "max_positions": config.max_positions,
        "weights": weights,
        "cache": {
            "bytes_per_token": needs.costs.per_token,
            "spans": [{"tokens": span, "bytes_per_token": size} for span, size in needs.costs.spans],
            "bytes_per_sequence": needs.costs.state,
            "layers": needs.layers,
        },
    }
    budget = None if gpu_memory is None else gpu_cache_budget(gpu_memory - needs.weight_bytes)
    lengths = dict.fromkeys(length for length in (config.max_positions, max_model_len) if length is not None)
    facts["contexts"] = [_context(needs, length, budget, config.max_positions) for length in lengths]
    if budget is not None:
        longest = needs.costs.longest(budget, config.max_positions)
        facts["memory"] = {"gpu_bytes": gpu_memory, "cache_bytes": budget, "longest_context": longest}
    return facts


def _context(needs: Needs, tokens: int, budget: int | None, max_positions: int) -> dict[str, Any]:
    """One context of so many tokens: what it takes, and how many of them fit."""
    size = needs.costs.context(tokens)
    sequences = None if budget is None else budget // max(size, 1)
    return {
        "tokens": tokens,
        "cache_bytes": size,
        "gpu_bytes": needs.gpu_bytes(tokens),
        "sequences": sequences,
        "within_positions": tokens <= max_positions,
    }


def _layers(spec: CacheSpec, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The kinds of layers in order of first use, and how many there are of each."""
    counts: dict[LayerKind, int] = {}
    for layer in spec.layers:
        counts[layer] = counts.get(layer, 0) + 1
    return [_layer(layer, count, dtype) for layer, count in counts.items()]


def _layer(layer: LayerKind, count: int, dtype: torch.dtype) -> dict[str, Any]:
    if not isinstance(layer, KeyValues | Latent):
        return {"kind": "state", "layers": count, "bytes_per_sequence": count * layer.num_bytes(dtype)}
    kind = "latent" if isinstance(layer, Latent) else "keys and values"
    if layer.sight.span is not None:
        kind += f" of a {'window' if layer.sight.chunk is None else 'chunk'}"
    size = count * layer.elements_per_token * dtype.itemsize
    return {"kind": kind, "layers": count, "span": layer.sight.span, "bytes_per_token": size}


def _files(folder: Path) -> tuple[Path, ...]:
    """The safetensors of a folder that has them all; of another the headers are fetched, or stay unknown."""
    try:
        return Checkpoint.open(folder).files
    except LoadError:
        return ()


def main() -> int:
    """Prints {"plan": {...}} or {"error": {"code", "message"}}; exit status 1 with an error."""
    parser = argparse.ArgumentParser(prog="python -m inferfleet.engine.plan", description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--revision")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--gpu-memory", type=int, help="bytes")
    parser.add_argument("--max-model-len", type=int)
    options = vars(parser.parse_args())
    try:
        answer = {"plan": plan(options.pop("path"), **options)}
    except EngineError as error:
        answer = {"error": {"code": error.code, "message": str(error)}}
    sys.stdout.write(json.dumps(answer) + "\n")
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())
