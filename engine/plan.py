"""What a model needs and what fits, before anything is loaded: `python -m inferfleet.engine.plan PATH`, JSON on stdout.

The model is built without memory: its own slots say what its weights take, its cache_spec what a context takes. Of the
checkpoint only config.json and the headers of its safetensors are read, or fetched.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inferfleet.engine import headers, hub
from inferfleet.engine.cache_spec import CacheSpec, KeyValues, Latent, LayerKind
from inferfleet.engine.config import ModelConfig, read_config
from inferfleet.engine.costs import CacheCosts, most
from inferfleet.engine.diffusion.components import is_pipeline
from inferfleet.engine.diffusion.plan import plan_pipeline
from inferfleet.engine.errors import EngineError, LoadError
from inferfleet.engine.families import find_family, refuse_pairs, refuse_unsplit
from inferfleet.engine.group import Group
from inferfleet.engine.headers import StoredWeights
from inferfleet.engine.layers.slots import all_slots
from inferfleet.engine.loader import EngineSpec
from inferfleet.engine.place import Place
from inferfleet.engine.quantized.scheme import read_scheme
from inferfleet.engine.sizing import (
    cache_bytes,
    cache_costs,
    gpu_cache_budget,
    gpu_memory_for,
    group_sizes,
    num_snapshots,
)
from inferfleet.engine.weights import Checkpoint, commit_of, local_folder
from inferfleet.kernels.quantized import KINDS, Kind

#: Where nothing else is said, a cache is laid out as the loader would with its own settings.
USUAL = EngineSpec(path="")


class RankOnPaper(Group):
    """The last of so many ranks, which has no less than any other; it meets none of them."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = size - 1, size


@dataclass(frozen=True)
class Sources:
    """What is known of a checkpoint without its weights."""

    folder: Path
    config: ModelConfig
    #: None where there are no weights beside the configuration.
    stored: StoredWeights | None


@dataclass(frozen=True)
class Needs:
    """What a model takes in one number format; of a split model, what one rank takes."""

    #: Of the whole model.
    num_weights: int
    weight_bytes: int
    spec: CacheSpec
    dtype: torch.dtype

    @property
    def costs(self) -> CacheCosts:
        return cache_costs(self.spec, self.dtype)

    def stored_in(self, num_bytes: int) -> Needs:
        """The same for coded weights, which stay about as large as they came: so many bytes, shared by the ranks."""
        plain = self.num_weights * self.dtype.itemsize
        return replace(self, weight_bytes=min(self.weight_bytes, num_bytes * self.weight_bytes // plain))

    def cache(self, tokens: int, seats: int, budget: int = 0) -> int:
        """A cache for one context of so many tokens that has so many seats: what the loader would lay out for it.

        budget: bytes that the cache may have in all; more of them buy more copies of recurrent states.
        """
        size = USUAL.block_size
        sizes = group_sizes(
            self.spec, tokens, size, max_num_seqs=seats, max_num_batched_tokens=USUAL.max_num_batched_tokens
        )
        return cache_bytes(self.spec, sizes, size, self.dtype.itemsize) + self._states(seats, budget)

    def longest(self, budget: int, seats: int, limit: int) -> int:
        """The longest context of up to `limit` tokens in a cache of so many bytes; 0 if there is none."""
        return most(limit, lambda tokens: self.cache(tokens, seats, budget) <= budget)

    def sequences(self, budget: int, tokens: int) -> int:
        """How many contexts of so many tokens each a cache of so many bytes holds at once."""
        whole = -(-tokens // USUAL.block_size) * USUAL.block_size
        limit = budget // max(self.costs.context(tokens), 1)
        return most(limit, lambda count: self.cache(count * whole, count, budget) <= budget)

    def _states(self, seats: int, budget: int) -> int:
        each = self.costs.state
        return each * (seats + num_snapshots(each, budget, seats)) if each else 0


def find_sources(folder: Path, repo: str | None, revision: str | None) -> Sources:
    """Of a local folder, or of one with a repository's configuration, whose headers are fetched. A ModelError."""
    config = read_config(folder)
    if files := _files(folder):
        return Sources(folder, config, headers.stored_weights(files))
    return Sources(folder, config, None if repo is None else hub.stored_weights(repo, revision))


def needs_of(config: ModelConfig, dtype: torch.dtype, ranks: int = 1, quantization: Kind | None = None) -> Needs:
    """Builds the model on the meta device: shapes only. LoadError for a number of ranks that cannot share it."""
    _, model_class = find_family(config.architecture)
    refuse_unsplit(config.architecture, model_class, ranks)
    model = model_class(config.raw, place=Place(dtype, torch.device("meta"), RankOnPaper(ranks), quantization))
    slots = all_slots(model).tensors.values()
    numbers = sum(math.prod(slot.shape) for slot in slots)
    return Needs(numbers, sum(slot.num_bytes for slot in slots), model.cache_spec, dtype)


def plan(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    gpu_memory: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 1,
    tensor_parallel_size: int = 1,
    quantization: Kind | None = None,
) -> dict[str, Any]:
    """Everything as JSON; bytes are those of one GPU. Raises a LoadError."""
    local = local_folder(path)
    folder = local or hub.download_config(path, revision)
    if is_pipeline(folder):
        _refuse_text_settings(max_model_len, max_num_seqs, tensor_parallel_size)
        return plan_pipeline(
            path, folder, is_remote=local is None, dtype=dtype, gpu_memory=gpu_memory, quantization=quantization
        )
    sources = find_sources(folder, None if local else path, revision)
    config = sources.config
    number = config.dtype(dtype)
    scheme = read_scheme(config.raw)
    coded = quantization if scheme is None else scheme.name
    refuse_pairs(find_family(config.architecture)[0], coded, quantization, None)
    needs = needs_of(config, number, tensor_parallel_size, quantization)
    if scheme is not None and sources.stored is not None:
        needs = needs.stored_in(sources.stored.num_bytes)
    weights: dict[str, Any] = {"numbers": needs.num_weights, "resident_bytes": needs.weight_bytes, "stored": None}
    if sources.stored is not None:
        weights["stored"] = asdict(sources.stored)
    facts: dict[str, Any] = {
        "kind": "text",
        "path": path,
        "commit": commit_of(sources.folder),
        "family": find_family(config.architecture)[0],
        "architecture": config.architecture,
        "dtype": str(number).removeprefix("torch."),
        "max_positions": config.max_positions,
        "quantization": coded,
        "max_num_seqs": max_num_seqs,
        "tensor_parallel_size": tensor_parallel_size,
        "weights": weights,
        "cache": _cache(needs),
    }
    budget = None if gpu_memory is None else gpu_cache_budget(gpu_memory - needs.weight_bytes)
    lengths = dict.fromkeys(length for length in (config.max_positions, max_model_len) if length is not None)
    facts["contexts"] = [_context(needs, length, max_num_seqs, budget, config.max_positions) for length in lengths]
    if budget is not None:
        longest = {seats: needs.longest(budget, seats, config.max_positions) for seats in (max_num_seqs, _seats())}
        facts["memory"] = {
            "gpu_bytes": gpu_memory,
            "cache_bytes": budget,
            "longest_context": longest[max_num_seqs],
            "usual": {"max_num_seqs": _seats(), "longest_context": longest[_seats()]},
        }
    return facts


def _refuse_text_settings(max_model_len: int | None, max_num_seqs: int, tensor_parallel_size: int) -> None:
    """LoadError for what only a plan of a language model knows."""
    told = {
        "max_model_len": max_model_len is not None,
        "max_num_seqs": max_num_seqs != 1,
        "tensor_parallel_size": tensor_parallel_size != 1,
    }
    for name in (name for name, is_told in told.items() if is_told):
        raise LoadError(f"{name} is set, but this is an image model: the setting is for language models", param=name)


def _seats() -> int:
    return USUAL.max_num_seqs


def _context(needs: Needs, tokens: int, seats: int, budget: int | None, max_positions: int) -> dict[str, Any]:
    """One context of so many tokens: what it takes, and how many of them fit."""
    cache = needs.cache(tokens, seats, budget or 0)
    return {
        "tokens": tokens,
        "cache_bytes": cache,
        "gpu_bytes": needs.weight_bytes + gpu_memory_for(cache),
        "fits": None if budget is None else cache <= budget,
        "sequences": None if budget is None else needs.sequences(budget, tokens),
        "within_positions": tokens <= max_positions,
    }


def _cache(needs: Needs) -> dict[str, Any]:
    """What one sequence costs, without rounding; and the kinds of layers, how many there are of each, in order."""
    costs, counts = needs.costs, dict[LayerKind, int]()
    for layer in needs.spec.layers:
        counts[layer] = counts.get(layer, 0) + 1
    return {
        "bytes_per_token": costs.per_token,
        "spans": [{"tokens": span, "bytes_per_token": size} for span, size in costs.spans],
        "bytes_per_sequence": costs.state,
        "layers": [_layer(layer, count, needs.dtype) for layer, count in counts.items()],
    }


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
    parser.add_argument("--max-num-seqs", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--quantization", choices=KINDS)
    options = vars(parser.parse_args())
    try:
        answer = {"plan": plan(options.pop("path"), **options)}
    except EngineError as error:
        answer = {"error": {"code": error.code, "message": str(error)}}
    sys.stdout.write(json.dumps(answer) + "\n")
    return int("error" in answer)


if __name__ == "__main__":
    sys.exit(main())
