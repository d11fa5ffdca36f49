"""Time of each kernel and its share of the machine's limit: `python ops/bench/kernels.py [--op linear ...]`.

Every row says what the work moves (bytes that must be read and written once) and computes, and which of the two is
slower at the rates measured in this very run: copying 256 MiB, and a product of large matrices in the same dtype.
`share` is that limit divided by the time. Working sets rotate, so that weights and caches come from memory as they
do in a model; a share above 100 % means that part of the set stayed in a cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import machine
import torch

from inferfleet.kernels import build
from inferfleet.kernels.gated_activation import gated_activation
from inferfleet.kernels.linear import PackedLinear
from inferfleet.kernels.moe import PackedExperts
from inferfleet.kernels.paged_attention import paged_attention, write_kv
from inferfleet.kernels.quantized import KINDS, quantise
from inferfleet.kernels.quantized_linear import QuantizedLinear
from inferfleet.kernels.rms_norm import add_rms_norm
from inferfleet.kernels.rotary import norm_rotary

#: A working set is repeated until it is larger than any cache.
ROTATED_BYTES = 128 * 2**20
BLOCK = 16


@dataclass(frozen=True)
class Work:
    """One measurement: `run` does it once, moving num_bytes and computing num_flops."""

    op: str
    shape: str
    run: Callable[[], object]
    num_bytes: float
    num_flops: float


@dataclass(frozen=True)
class Target:
    """Where and in which numbers the kernels run."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def copies(self, num_bytes: float) -> range:
        """As many working sets of this size as it takes to leave the caches."""
        return range(max(1, min(64, round(ROTATED_BYTES / num_bytes))))


def linears(target: Target) -> Iterator[Work]:
    for rows in (1, 8, 32, 128, 512):
        for outputs, inputs in ((4096, 1024), (1024, 3072), (32768, 1024)):
            size = target.dtype.itemsize
            num_bytes = size * (outputs * inputs + rows * (outputs + inputs))
            layers = cycle([PackedLinear(target.randn(outputs, inputs)) for _ in target.copies(num_bytes)])
            x = target.randn(rows, inputs)
            flops = 2 * rows * outputs * inputs
            yield Work("linear", f"{rows}x{inputs} @ {inputs}x{outputs}", next_of(layers, x), num_bytes, flops)


def quantised(target: Target) -> Iterator[Work]:
    """The shapes of `linears` that decoding meets, over weights of fewer bits."""
    for kind in KINDS:
        for rows in (1, 8, 32, 128):
            for outputs, inputs in ((4096, 1024), (1024, 3072)):
                weight = quantise(target.randn(outputs, inputs), kind)
                num_bytes = weight.nbytes + target.dtype.itemsize * rows * (outputs + inputs)
                layers = cycle([QuantizedLinear(weight, dtype=target.dtype) for _ in target.copies(num_bytes)])
                shape = f"{kind} {rows}x{inputs} @ {inputs}x{outputs}"
                call = next_of(layers, target.randn(rows, inputs))
                yield Work("quantised", shape, call, num_bytes, 2 * rows * outputs * inputs)


def next_of(layers: Iterator[Callable[..., object]], *arguments: Any) -> Callable[[], object]:
    """A call of the next layer at each run."""
    return lambda: next(layers)(*arguments)


def attentions(target: Target) -> Iterator[Work]:
    rows = [
        *[
            ("decode", [(1, context)] * count)
            for count, context in ((1, 160), (8, 160), (32, 160), (1, 4096), (8, 2048))
        ],
        *[("prefill", [(tokens, tokens)] * count) for count, tokens in ((1, 128), (8, 128), (1, 544), (1, 2048))],
        ("mixed", [(1, 512)] * 16 + [(256, 768)]),
    ]
    for heads, kv_heads, width in ((16, 8, 128), (8, 1, 256)):
        for kind, batch in rows:
            tokens, context = sum(n for n, _ in batch), sum(c for _, c in batch)
            num_bytes = target.dtype.itemsize * width * (2 * context * kv_heads + 2 * tokens * heads)
            flops = sum(4 * heads * width * (n * c - n * (n - 1) / 2) for n, c in batch)
            states = cycle([_paged(target, batch, heads, kv_heads, width) for _ in target.copies(num_bytes)])
            shape = f"{kind} {len(batch)} rows, {tokens} of {context} tokens, {heads}/{kv_heads} x {width}"
            yield Work("attention", shape, _attend(states, width), num_bytes, flops)


def _attend(states: Iterator[tuple[torch.Tensor, ...]], width: int) -> Callable[[], object]:
    return lambda: paged_attention(*next(states), scale=width**-0.5)


def _paged(
    target: Target, batch: list[tuple[int, int]], heads: int, kv_heads: int, width: int
) -> tuple[torch.Tensor, ...]:
    """(q, k_cache, v_cache, block_tables, query_start, seq_lens) with blocks in a shuffled order."""
    counts = [-(-context // BLOCK) for _, context in batch]
    order = torch.randperm(sum(counts)).to(torch.int32)
    tables = torch.zeros(len(batch), max(counts), dtype=torch.int32)
    begin = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[begin : begin + count]
        begin += count
    starts = torch.tensor([0, *(tokens for tokens, _ in batch)]).cumsum(0).to(torch.int32)
    caches = [target.randn(sum(counts), BLOCK, kv_heads, width) for _ in "kv"]
    lengths = torch.tensor([context for _, context in batch], dtype=torch.int32)
    q = target.randn(int(starts[-1]), heads, width)
    return (q, *caches, *(tensor.to(target.device) for tensor in (tables, starts, lengths)))


def experts(target: Target) -> Iterator[Work]:
    hidden, inner, count, top_k = 512, 384, 16, 4
    for tokens in (1, 8, 32, 128):
        x, scores = target.randn(tokens, hidden), torch.rand(tokens, count, device=target.device)
        weights, ids = scores.topk(top_k)
        one = 3 * inner * hidden
        num_bytes = target.dtype.itemsize * one * len(ids.unique())
        layers = cycle([_experts(target, count, hidden, inner) for _ in target.copies(num_bytes)])
        shape = f"{tokens} tokens, {top_k} of {count} experts of {hidden}x{inner}"
        yield Work("moe", shape, next_of(layers, x, ids, weights), num_bytes, 2 * tokens * top_k * one)


def _experts(target: Target, count: int, hidden: int, inner: int) -> PackedExperts:
    return PackedExperts(target.randn(count, 2 * inner, hidden), target.randn(count, hidden, inner), "silu")


def elementwise(target: Target) -> Iterator[Work]:
    size = target.dtype.itemsize
    for rows in (1, 32, 1024):
        x, residual, weight = target.randn(rows, 1024), target.randn(rows, 1024), target.randn(1024)
        yield Work("add_rms_norm", f"{rows}x1024", _call(add_rms_norm, x, residual, weight, 1e-6), 4 * x.nbytes, 0)
        heads, angle = target.randn(rows, 16, 128), torch.rand(rows, 128, device=target.device)
        head_weight = target.randn(128)
        turn = _call(norm_rotary, heads, head_weight, 1e-6, angle, angle)
        yield Work("norm_rotary", f"{rows}x16x128", turn, 2 * heads.nbytes + 2 * angle.nbytes, 0)
        gate_up = target.randn(rows, 6144)
        yield Work(
            "gated_activation", f"{rows}x6144", _call(gated_activation, gate_up, "silu"), 1.5 * gate_up.nbytes, 0
        )
        k, cache = target.randn(rows, 8, 128), [target.randn(128, BLOCK, 8, 128) for _ in "kv"]
        slots = torch.randperm(128 * BLOCK, device=target.device)[:rows]
        yield Work("write_kv", f"{rows}x8x128", _call(write_kv, k, k, *cache, slots), 4 * rows * 1024 * size, 0)


def _call(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


OPS = {"linear": linears, "quantised": quantised, "attention": attentions, "moe": experts, "elementwise": elementwise}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = machine.device(arguments.device)
    target = Target(device, getattr(torch, arguments.dtype))
    copied, computed = machine.copy_rate(device), machine.matrix_rate(device, target.dtype)
    rows = []
    for op in arguments.op:
        for work in OPS[op](target):
            time = machine.seconds(work.run, device, arguments.passes)
            limit = max(work.num_bytes / copied, work.num_flops / computed)
            rows.append(_row(work, time, limit))
    return {
        "command": " ".join(["python", *sys.argv]),
        "dtype": arguments.dtype,
        "passes": arguments.passes,
        "machine": machine.describe(device),
        "kernels": build.status().partition(" ")[0],
        "copy GB/s": round(copied / 1e9, 1),
        "matrix GFLOP/s": round(computed / 1e9, 1),
        "results": rows,
    }


def _row(work: Work, time: dict[str, float], limit: float) -> dict[str, Any]:
    return {
        "op": work.op,
        "shape": work.shape,
        "median us": round(1e6 * time["median"], 1),
        "best us": round(1e6 * time["best"], 1),
        "limit us": round(1e6 * limit, 1),
        "share %": round(100 * limit / time["best"], 1),
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    yield f"$ {report['command']}"
    facts = {**report["machine"], **{name: report[name] for name in ("kernels", "copy GB/s", "matrix GFLOP/s")}}
    yield f"{report['dtype']}, {report['passes']} passes, " + ", ".join(
        f"{name} {value}" for name, value in facts.items()
    )
    yield f"{'':64}{'median us':>11}{'best us':>11}{'limit us':>11}{'share %':>9}"
    for row in report["results"]:
        name = f"{row['op']} {row['shape']}"
        yield f"{name:64}{row['median us']:11.1f}{row['best us']:11.1f}{row['limit us']:11.1f}{row['share %']:9.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", nargs="*", default=list(OPS), choices=list(OPS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(table(report)))


if __name__ == "__main__":
    main()
