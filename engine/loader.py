"""From a spec to a running engine: model, tokenizer, cache size, scheduler. The one place that wires them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from inferfleet.engine.admission import Admission
from inferfleet.engine.blocks import BlockManager, GroupSize
from inferfleet.engine.costs import in_units
from inferfleet.engine.engine import Engine
from inferfleet.engine.errors import LoadError
from inferfleet.engine.families import LoadedModel, load_model
from inferfleet.engine.followers import Followers
from inferfleet.engine.group import ALONE
from inferfleet.engine.layout import CacheLayout
from inferfleet.engine.matformer import read_table
from inferfleet.engine.prefix import PrefixHasher
from inferfleet.engine.progress import Progress
from inferfleet.engine.replay import Replay
from inferfleet.engine.sampler import Sampler
from inferfleet.engine.scheduler import Scheduler
from inferfleet.engine.sizing import (
    DEFAULT_CONTEXT,
    cache_budget,
    cache_bytes,
    cache_costs,
    free_memory,
    group_sizes,
    held_tokens,
    num_snapshots,
    sizes_within,
)
from inferfleet.engine.smoke import smoke
from inferfleet.engine.spec_checks import check_counts, check_quantization, refuse_unknown
from inferfleet.engine.text.prompt import PromptEncoder
from inferfleet.engine.text.tokenizer import Tokenizer
from inferfleet.engine.weights import find_folder
from inferfleet.kernels import on_cuda, threads
from inferfleet.kernels.quantized import Kind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Which model to run and how. LoadError names a field outside its limits."""

    #: A folder in the hub layout, or a hub id.
    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    #: "int8", "int4" or "fp8": weights of linear layers and experts are coded while they are read.
    quantization: Kind | None = None
    #: Tokens of prompt and answer together; None = what the checkpoint allows, or the most that memory holds.
    max_model_len: int | None = None
    block_size: int = 16
    #: Tokens that the cache holds; None = from the memory that is free.
    kv_cache_tokens: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    paged_attn: bool = True
    prefix_caching: bool = True
    #: Copies of recurrent states that the prefix cache may hold; None = up to one a seat, as memory allows.
    state_snapshots: int | None = None
    #: CPU threads of the kernels; None = as many as torch has. Torch itself then keeps one, see kernels/threads.py.
    threads: int | None = None
    #: Processes that hold the model together, each a share of it: on as many GPUs, from `device` on.
    tensor_parallel_size: int = 1
    #: A table of MatFormer slices that requests may ask for (see matformer.py). What none of them uses is not loaded.
    matformer_config_path: str | None = None
    #: The slice for requests that name none; None = they get the whole model.
    matformer_slice_name: str | None = None

    def __post_init__(self) -> None:
        counts = ("block_size", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size")
        check_counts(self, counts, optional=("max_model_len", "kv_cache_tokens", "state_snapshots", "threads"))
        if self.matformer_slice_name is not None and self.matformer_config_path is None:
            raise LoadError("matformer_slice_name needs matformer_config_path", param="matformer_slice_name")
        check_quantization(self.quantization)

    @property
    def model_settings(self) -> dict[str, Any]:
        """What `load_model` wants to know, beside the folder: the same on every rank."""
        return {"dtype": self.dtype, "device": self.device, "quantization": self.quantization}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineSpec:
        """LoadError for an unknown field."""
        refuse_unknown(cls, values, "an engine")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and what belongs to its model: how chats become prompts, and the card that describes it."""

    engine: Engine
    prompts: PromptEncoder
    card: dict[str, Any]
    #: The other ranks, where the model is split.
    followers: Followers | None = None


def load_engine(spec: EngineSpec, progress: Progress | None = None) -> Loaded:
    """Load everything. Raises LoadError, a ModelError, TokenizerError or ChatTemplateError; each says what to do."""
    progress = progress or Progress()
    count = spec.threads or threads.for_work()
    if spec.tensor_parallel_size == 1:
        threads.use(count)
        return _load(spec, progress, None)
    # Ranks on one CPU share its cores.
    threads.use(max(1, count // spec.tensor_parallel_size))
    spec = replace(spec, path=str(find_folder(spec.path, spec.revision, progress)), revision=None)
    followers = Followers(spec.tensor_parallel_size)
    try:
        table = spec.matformer_config_path
        matformer = None if table is None else (table, spec.matformer_slice_name)
        followers.load(spec.path, spec.model_settings, matformer, threads.for_work())
        return _load(spec, progress, followers)
    except BaseException:
        followers.close()
        raise


def _load(spec: EngineSpec, progress: Progress, followers: Followers | None) -> Loaded:
    group = ALONE if followers is None else followers.group
    path = spec.matformer_config_path
    slices = None if path is None else read_table(path, spec.matformer_slice_name)
    loaded = load_model(
        spec.path, revision=spec.revision, progress=progress, group=group, slices=slices, **spec.model_settings
    )
    if followers is not None:
        followers.wait_for_load()
    progress.begin("engine")
    started = time.perf_counter()
    prompts = PromptEncoder(loaded.folder)
    engine, kv_cache_tokens = build_engine(loaded, prompts.tokenizer, spec, followers)
    built = time.perf_counter()
    progress.begin("smoke")
    smoke(engine, prompts)
    seconds = {"engine": round(built - started, 3), "warm": round(time.perf_counter() - built, 3)}
    seconds = dict(loaded.load_seconds) | seconds
    return Loaded(engine, prompts, _card(loaded, engine, kv_cache_tokens, seconds), followers)


def build_engine(
    loaded: LoadedModel, tokenizer: Tokenizer, spec: EngineSpec, followers: Followers | None = None
) -> tuple[Engine, int]:
    """An engine around a loaded model (rank 0's share of one, with followers), and how many tokens its cache holds."""
    longest = _context(spec, loaded.config.max_positions)
    # A contiguous cache is one whose blocks are as long as a context.
    block_size = spec.block_size if spec.paged_attn else min(longest, spec.kv_cache_tokens or longest)
    hasher = PrefixHasher(_identity(loaded), block_size) if spec.prefix_caching and spec.paged_attn else None
    snapshots = _snapshots(loaded, spec) if hasher is not None else None
    num_states = spec.max_num_seqs + (snapshots or 0) if loaded.model.cache_spec.has_states else 0
    state_bytes = num_states * loaded.model.cache_spec.state_bytes(loaded.dtype)
    sizes = _cache_sizes(loaded, spec, block_size, longest, state_bytes)
    counts = [size.num_blocks for size in sizes]
    held = held_tokens(sizes, block_size, longest)
    blocks = BlockManager(
        sizes,
        block_size,
        max_num_seqs=spec.max_num_seqs,
        max_model_len=held,
        hasher=hasher,
        num_snapshots=snapshots,
    )
    held = min(held, blocks.max_request_tokens)
    if held < longest:
        _cut_or_refuse(loaded, spec, _context_bytes(loaded, spec, block_size, longest) + state_bytes, longest, held)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        border=loaded.model.border,
    )
    ends = frozenset(loaded.config.eos_token_ids) | frozenset(tokenizer.eos_token_ids)
    admission = Admission(loaded.config.vocab_size, held, ends, loaded.slices)
    layout = CacheLayout(
        num_blocks=counts,
        block_size=block_size,
        num_states=num_states,
        is_paged=spec.paged_attn,
        max_num_seqs=spec.max_num_seqs,
        table_width=blocks.tables[0].shape[1],
        max_num_batched_tokens=spec.max_num_batched_tokens,
    )
    cache = layout.cache(loaded.model.cache_spec, loaded.dtype, loaded.device)
    model = loaded.model if followers is None else followers.lead(loaded.model, layout, loaded.device)
    replay = Replay(loaded.model) if _can_replay(loaded, spec) else None
    engine = Engine(model, cache, scheduler, Sampler(), tokenizer, admission, loaded.device, replay)
    return engine, (max(counts) - 1) * block_size


def _can_replay(loaded: LoadedModel, spec: EngineSpec) -> bool:
    if loaded.device.type != "cuda" or not on_cuda.has_triton():
        return False  # without the kernels attention reads a batch's sizes on the host, which no graph can record
    return loaded.group.size == 1 and spec.paged_attn and loaded.model.can_replay


def _context(spec: EngineSpec, max_positions: int) -> int:
    if spec.max_model_len is not None and spec.max_model_len > max_positions:
        raise LoadError(
            f"max_model_len {spec.max_model_len} is more than the {max_positions} positions of this model",
            param="max_model_len",
        )
    return spec.max_model_len or max_positions


def _snapshots(loaded: LoadedModel, spec: EngineSpec) -> int | None:
    """Copies of states that are kept: as asked, or within their share of the cache's memory; None without states."""
    if not loaded.model.cache_spec.has_states:
        return None
    if spec.state_snapshots is not None:
        return spec.state_snapshots
    each = loaded.model.cache_spec.state_bytes(loaded.dtype)
    return num_snapshots(each, cache_budget(loaded.device, group=loaded.group), spec.max_num_seqs)


def _cache_sizes(
    loaded: LoadedModel, spec: EngineSpec, block_size: int, longest: int, state_bytes: int
) -> list[GroupSize]:
    """Blocks of each group, beside the states: for the tokens asked for, or as seats and memory suggest."""
    cache_spec, itemsize = loaded.model.cache_spec, loaded.dtype.itemsize
    seats, chunk = spec.max_num_seqs, spec.max_num_batched_tokens
    if spec.kv_cache_tokens is None:
        # A CPU's memory is also for others: room for ordinary contexts in all seats, or for one of the longest.
        seat = longest if loaded.device.type == "cuda" else min(longest, DEFAULT_CONTEXT)
        wanted = max(longest, seats * seat)
        wish = 0 if spec.max_model_len is None else _context_bytes(loaded, spec, block_size, longest) + state_bytes
        budget = cache_budget(loaded.device, wish, loaded.group) - state_bytes
        return sizes_within(cache_spec, budget, wanted, block_size, itemsize, max_num_seqs=seats, max_batched=chunk)
    sizes = group_sizes(cache_spec, spec.kv_cache_tokens, block_size, max_num_seqs=seats, max_num_batched_tokens=chunk)
    needed = cache_bytes(cache_spec, sizes, block_size, itemsize) + state_bytes
    free = free_memory(loaded.device, loaded.group)
    if needed > free:
        raise LoadError(
            f"a KV cache of {spec.kv_cache_tokens} tokens needs {in_units(needed)}"
            f" ({cache_costs(cache_spec, loaded.dtype)}), but only {in_units(free)} are free on {loaded.device};"
            " set kv_cache_tokens lower",
            param="kv_cache_tokens",
        )
    return sizes


def _context_bytes(loaded: LoadedModel, spec: EngineSpec, block_size: int, tokens: int) -> int:
    """What a cache takes that holds one context of so many tokens, the windows of all seats included."""
    cache_spec, seats, chunk = loaded.model.cache_spec, spec.max_num_seqs, spec.max_num_batched_tokens
    sizes = group_sizes(cache_spec, tokens, block_size, max_num_seqs=seats, max_num_batched_tokens=chunk)
    return cache_bytes(cache_spec, sizes, block_size, loaded.dtype.itemsize)


def _cut_or_refuse(loaded: LoadedModel, spec: EngineSpec, needed: int, longest: int, held: int) -> None:
    """The cache holds no context of `longest` tokens. Whoever asked for it is refused; a model's own is cut."""
    if spec.kv_cache_tokens is not None:
        there = f"the cache that was asked for holds {spec.kv_cache_tokens} tokens (kv_cache_tokens)"
    else:
        budget = cache_budget(loaded.device, 0 if spec.max_model_len is None else needed, loaded.group)
        there = f"{in_units(budget)} are free for it on {loaded.device}"
    costs = cache_costs(loaded.model.cache_spec, loaded.dtype)
    figures = f"a context of {longest} tokens needs {in_units(needed)} of KV cache ({costs}); {there}"
    if spec.max_model_len is not None:
        raise LoadError(f"{figures}: the longest that fits is {held}; set max_model_len to it", param="max_model_len")
    log.warning("the model's own context does not fit", extra={"fields": {"served": held, "reason": figures}})


def _identity(loaded: LoadedModel) -> str:
    """Names the weights and their number format: caches of two such models never meet."""
    return f"{loaded.folder}@{loaded.commit}:{loaded.config.architecture}:{loaded.dtype}:{loaded.quantization}"


def _card(loaded: LoadedModel, engine: Engine, kv_cache_tokens: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    return {
        "max_model_len": engine.admission.max_model_len,
        "max_positions": loaded.config.max_positions,
        "vocab_size": loaded.config.vocab_size,
        "max_token_bytes": engine.tokenizer.max_token_bytes,
        "family": loaded.family,
        "architecture": loaded.config.architecture,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "tensor_parallel_size": loaded.group.size,
        "quantization": loaded.quantization,
        "kv_cache_tokens": kv_cache_tokens,
        "matformer_slices": [] if loaded.slices is None else list(loaded.slices.names),
        "matformer_slice": None if loaded.slices is None else loaded.slices.default,
        "load_seconds": dict(seconds),
    }
