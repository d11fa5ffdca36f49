"""How many blocks a KV cache gets: from an asked number of tokens, or from the memory that is left."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from inferfleet.engine.blocks import GroupSize
from inferfleet.engine.cache_spec import CacheSpec
from inferfleet.engine.costs import CacheCosts, in_units, most
from inferfleet.engine.errors import LoadError
from inferfleet.engine.group import ALONE, Group

#: Without a wish, a CPU engine makes room for this much context in every seat ...
DEFAULT_CONTEXT = 4096
#: ... within so many bytes, and within this share of the memory that is free.
CPU_CACHE_BYTES = 2 << 30
CPU_SHARE = 0.5
#: A context that was asked for by its length may take more of it.
CPU_WISH_SHARE = 0.9
#: Copies of recurrent states take at most this share of what the cache may have.
SNAPSHOT_SHARE = 0.25
#: A GPU engine takes what the weights left, less a reserve for activations, graphs and the allocator's gaps.
GPU_SHARE = 0.9
GPU_RESERVE_BYTES = 1 << 30


def group_sizes(
    spec: CacheSpec, tokens: int, block_size: int, *, max_num_seqs: int, max_num_batched_tokens: int
) -> list[GroupSize]:
    """Blocks of each group for a cache of so many tokens, null blocks included.

    A group of bounded sight needs no more than what all seats see at once plus one step's tokens: less than tokens.
    """
    full = -(-tokens // block_size)
    sizes = []
    for sight in spec.sights:
        blocks = full
        if sight.span is not None:
            # What is seen and the step's chunk may both begin and end inside a block, hence two more for a seat.
            seen = max_num_seqs * (-(-sight.span // block_size) + 2) + -(-max_num_batched_tokens // block_size)
            blocks = min(full, seen)
        sizes.append(GroupSize(sight, blocks + 1))
    return sizes


def cache_bytes(spec: CacheSpec, sizes: Sequence[GroupSize], block_size: int, itemsize: int) -> int:
    """Memory of all keys, values and latents."""
    return sum(
        size.num_blocks * block_size * spec.elements_per_token(group) * itemsize for group, size in enumerate(sizes)
    )


def cache_costs(spec: CacheSpec, dtype: torch.dtype) -> CacheCosts:
    """What one sequence costs, without the rounding to blocks."""
    sizes = [(sight.span, spec.elements_per_token(group) * dtype.itemsize) for group, sight in enumerate(spec.sights)]
    return CacheCosts(
        per_token=sum(size for span, size in sizes if span is None),
        spans=tuple((span, size) for span, size in sizes if span is not None),
        state=spec.state_bytes(dtype),
    )


def num_snapshots(state_bytes: int, budget: int, max_num_seqs: int) -> int:
    """Copies of states for the prefix cache: one for each seat, or what their share of a cache of so many bytes holds.

    state_bytes: of one sequence.
    """
    return max(1, min(max_num_seqs, int(budget * SNAPSHOT_SHARE) // state_bytes))


def sizes_within(
    spec: CacheSpec, budget: int, wanted: int, block_size: int, itemsize: int, *, max_num_seqs: int, max_batched: int
) -> list[GroupSize]:
    """The largest cache of up to wanted tokens that takes at most budget bytes; LoadError if there is none."""

    def sizes(blocks: int) -> list[GroupSize]:
        tokens = blocks * block_size
        return group_sizes(spec, tokens, block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_batched)

    blocks = most(
        -(-wanted // block_size), lambda count: cache_bytes(spec, sizes(count), block_size, itemsize) <= budget
    )
    if blocks == 0:
        raise LoadError(
            f"{in_units(max(budget, 0))} are left for the KV cache, which is less than {block_size} tokens take;"
            " free memory, or set max_model_len or max_num_seqs lower"
        )
    return sizes(blocks)


def held_tokens(sizes: Sequence[GroupSize], block_size: int, longest: int) -> int:
    """The longest context, up to `longest`, for which the layers that keep every token have blocks."""
    full = [(size.num_blocks - 1) * block_size for size in sizes if size.sight.span is None]
    return min(longest, *full) if full else longest


def cache_budget(device: torch.device, wish: int = 0, group: Group = ALONE) -> int:
    """Bytes that a cache of our own choice may take on each rank's device, once the model is loaded.

    wish: bytes that somebody asked for; a CPU gives them as long as they are there.
    """
    free = free_memory(device, group)
    if device.type == "cuda":
        return gpu_cache_budget(free)
    return max(min(CPU_CACHE_BYTES, int(free * CPU_SHARE)), min(wish, int(free * CPU_WISH_SHARE)))


def gpu_cache_budget(free: int) -> int:
    """Of so many bytes that the weights left on a GPU, those for the cache."""
    return max(0, int(free * GPU_SHARE) - GPU_RESERVE_BYTES)


def gpu_memory_for(cache: int) -> int:
    """What the weights must leave on a GPU for a cache of so many bytes: the inverse of `gpu_cache_budget`."""
    return math.ceil((cache + GPU_RESERVE_BYTES) / GPU_SHARE)


def free_memory(device: torch.device, group: Group = ALONE) -> int:
    """Bytes that the device can still give to each rank."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return group.share_of_memory(free, device)


def available_memory() -> int:
    """Bytes that this machine can still give without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the free pages alone, which is less
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
