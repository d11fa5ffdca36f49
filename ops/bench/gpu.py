"""What a CUDA device does with our kernels and engine, and without them: `python ops/bench/gpu.py [kernels engine]`.

    kernels    each kernel against its reference in torch, by device time. limit: what its bytes take at the rate of a
               large copy, or its operations at that of a large product, whichever is slower, both measured in this run
    engine     a random model made in the device's memory. decode: B rows after prompts of 128 tokens each, tokens per
               second over steps that only decode; prefill: prompt tokens per second; ttft: a prompt of 128 tokens on an
               idle engine, in milliseconds. Each in three ways: "torch" is our engine on torch's own operations (what
               ran before there were kernels in Triton), "kernels" with them, "replay" with recorded steps as well

A model's answers do not matter here; tests/ compares them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import machine
import random_model
import torch
from triton.testing import do_bench

from inferfleet.engine.config import read_config
from inferfleet.engine.engine import Engine
from inferfleet.engine.families import LoadedModel, find_family
from inferfleet.engine.loader import EngineSpec, build_engine
from inferfleet.engine.place import Place
from inferfleet.engine.sampling_params import SamplingParams
from inferfleet.engine.text.tokenizer import Tokenizer
from inferfleet.kernels import gated_activation, on_cuda, paged_attention, rms_norm, rotary
from inferfleet.kernels.quantized import KINDS, quantise
from inferfleet.kernels.quantized_linear import QuantizedLinear

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
BLOCK = 16
#: What ran in torch before.
OURS = ("paged_attention_triton", "norms_triton", "rotary_triton", "gated_activation_triton")
PROMPT = 128
WAYS = ["torch", "kernels", "replay"]
#: (heads, kv heads, head width): Qwen3 of 8 B, Gemma's wide heads.
HEADS = ((32, 8, 128), (16, 8, 256))
BATCHES = {
    "decode 1 x 4096": [(1, 4096)],
    "decode 32 x 1024": [(1, 1024)] * 32,
    "decode 128 x 2048": [(1, 2048)] * 128,
    "prompt 1 x 2048": [(2048, 2048)],
    "prompts 8 x 512": [(512, 512)] * 8,
    "chunk 512 of 8192": [(512, 8192)],
    "64 x 1024 and a chunk of 1024": [(1, 1024)] * 64 + [(1024, 1024)],
}
SHAPES = {
    # 7.1 G parameters: Qwen3-8B with a smaller vocabulary.
    "qwen3-8b": random_model._dense(36, 4096, 12288, 32, 8, 128),
    # 15 G parameters, 1.6 G of them active: Qwen3-30B-A3B with half of its layers.
    "qwen3moe-15b": random_model._dense(24, 2048, 6144, 32, 4, 128)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


@contextmanager
def only_torch() -> Iterator[None]:
    """Without the kernels that took the place of torch's operations."""
    found = on_cuda._module
    with patch.object(on_cuda, "_module", lambda name: None if name in OURS else found(name)):
        yield


def device_us(work: Callable[[], object]) -> float:
    """Median microseconds of `work` on the device, its inputs out of the caches."""
    return 1e3 * float(do_bench(work, warmup=10, rep=40, return_mode="median"))


def kernels() -> Iterator[dict[str, Any]]:
    copied, computed = machine.copy_rate(DEVICE), machine.matrix_rate(DEVICE, DTYPE)
    yield {"copy TB/s": round(copied / 1e12, 2), "product TFLOP/s": round(computed / 1e12)}

    def row(name: str, work: Callable[[], object], num_bytes: float, num_flops: float = 0) -> dict[str, Any]:
        with only_torch():
            before = device_us(work)
        after, limit = device_us(work), 1e6 * max(num_bytes / copied, num_flops / computed)
        return {"name": name, "torch us": round(before, 1), "us": round(after, 1), "limit us": round(limit, 1)}

    for heads, kv_heads, width in HEADS:
        for name, batch in BATCHES.items():
            arguments = paged(batch, heads, kv_heads, width)
            tokens, context = sum(n for n, _ in batch), sum(c for _, c in batch)
            flops = sum(4 * heads * width * (n * c - n * (n - 1) / 2) for n, c in batch)
            longest = max(n for n, _ in batch)
            yield row(
                f"attention {heads}/{kv_heads} x {width}, {name}",
                lambda a=arguments, n=longest: paged_attention.paged_attention(*a, scale=0.1, max_query_len=n),
                2 * width * (2 * context * kv_heads + 2 * tokens * heads),
                flops,
            )
            del arguments
    yield from coded()
    for rows in (1, 32, 2048):
        x, residual, weight = randn(rows, 4096), randn(rows, 4096), randn(4096)
        yield row(
            f"add_rms_norm {rows} x 4096",
            lambda x=x, r=residual, w=weight: rms_norm.add_rms_norm(x, r, w, 1e-6),
            4 * x.nbytes,
        )
        q, angle, head_weight = randn(rows, 32, 128), torch.rand(rows, 128, device=DEVICE), randn(128)
        yield row(
            f"norm_rotary {rows} x 32 x 128",
            lambda q=q, w=head_weight, a=angle: rotary.norm_rotary(q, w, 1e-6, a, a),
            2 * q.nbytes + 2 * angle.nbytes,
        )
        gate_up = randn(rows, 24576)
        yield row(
            f"gated_activation {rows} x 24576",
            lambda g=gate_up: gated_activation.gated_activation(g, "silu"),
            1.5 * gate_up.nbytes,
        )


def coded() -> Iterator[dict[str, Any]]:
    """A product with coded weights beside the plain one."""
    weight = randn(12288, 4096) * 0.02
    for rows in (1, 32):
        x = randn(rows, 4096)
        plain = device_us(lambda x=x: torch.nn.functional.linear(x, weight))
        times = {}
        for kind in KINDS:
            layer = QuantizedLinear(quantise(weight, kind), dtype=DTYPE)
            times[f"{kind} us"] = round(device_us(lambda x=x, layer=layer: layer(x)), 1)
        yield {"name": f"linear {rows} x 4096 @ 4096 x 12288", "bfloat16 us": round(plain, 1), **times}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def paged(batch: list[tuple[int, int]], heads: int, kv_heads: int, width: int) -> tuple[torch.Tensor, ...]:
    """(q, k_cache, v_cache, block_tables, query_start, seq_lens) with blocks in a shuffled order."""
    counts = [-(-context // BLOCK) for _, context in batch]
    order = torch.randperm(sum(counts)).to(torch.int32)
    tables = torch.zeros(len(batch), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        tables[row, : len(blocks)] = blocks
    starts = torch.tensor([0, *(tokens for tokens, _ in batch)]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([context for _, context in batch], dtype=torch.int32)
    caches = [randn(sum(counts), BLOCK, kv_heads, width) for _ in "kv"]
    return (randn(int(starts[-1]), heads, width), *caches, *(t.to(DEVICE) for t in (tables, starts, lengths)))


class Resident:
    """An engine around a random model that was never a file."""

    def __init__(self, name: str, max_num_seqs: int) -> None:
        config = SHAPES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "config.json").write_text(json.dumps(config))
            random_model.write_tokenizer(folder)
            self.config = read_config(folder)
            tokenizer = Tokenizer(folder)
        family, model_class = find_family(self.config.architecture)
        model = model_class(self.config.raw, place=Place(DTYPE, DEVICE))
        model.load((name, self._weight(name, shape)) for name, shape in random_model.shapes(config).items())
        model.finalize()
        loaded = LoadedModel(model, self.config, family, Path(), None, DTYPE, DEVICE, {})
        torch.cuda.empty_cache()
        spec = EngineSpec(path="", max_num_seqs=max_num_seqs, max_num_batched_tokens=8192, prefix_caching=False)
        self.engine: Engine = build_engine(loaded, tokenizer, spec)[0]
        self.weight_bytes = 2 * sum(torch.Size(shape).numel() for shape in random_model.shapes(config).values())
        self._replay, self._random, self._added = self.engine.replay, random.Random(7), 0

    @staticmethod
    def _weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape, device=DEVICE, dtype=DTYPE) if name.endswith("norm.weight") else randn(*shape) * 0.02

    def replaying(self, wanted: bool) -> None:
        self.engine.replay = self._replay if wanted else None

    def add(self, count: int, length: int, answer: int) -> None:
        for _ in range(count):
            ids = [self._random.randrange(256, random_model.FIRST_SPECIAL) for _ in range(length)]
            sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
            self.engine.add(f"request-{self._added}", ids, sampling)
            self._added += 1

    def difference(self, length: int) -> float:
        """Largest distance of logits with and without the kernels, in standard deviations of the logits."""
        ids = [self._random.randrange(256, random_model.FIRST_SPECIAL) for _ in range(length)]
        with only_torch():
            plain = self.engine.score(ids)
        return round(float((self.engine.score(ids) - plain).abs().max() / plain.std()), 4)

    def step(self) -> int:
        """One step; the number of tokens it computed."""
        out = self.engine.step()
        for _, error in out.errors:
            raise error
        return out.batch_tokens

    def decode(self, rows: int, steps: int) -> float:
        """Tokens per second of `steps` steps that only decode."""
        self.add(rows, PROMPT, steps + 16)
        scheduler = self.engine.scheduler
        while scheduler.num_waiting or not all(request.output_token_ids for request in scheduler.running):
            self.step()
        self.step()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            assert self.step() == rows
        taken = time.perf_counter() - started
        while self.engine.has_work:
            self.step()
        return rows * steps / taken

    def seconds(self, count: int, length: int) -> float:
        """Of the first token of all of `count` prompts."""
        self.add(count, length, 1)
        torch.cuda.synchronize()
        started = time.perf_counter()
        while self.engine.has_work:
            self.step()
        return time.perf_counter() - started


def engine(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    started = time.perf_counter()
    resident = Resident(options.model, max(options.batches))
    yield {
        "model": options.model,
        "weights GB": round(resident.weight_bytes / 1e9, 1),
        "longest context": resident.engine.scheduler.blocks.max_request_tokens,
        "made in s": round(time.perf_counter() - started, 1),
    }
    yield {"logits of torch and kernels differ by": resident.difference(300)}
    for way in options.ways:
        resident.replaying(way == "replay")
        for rows in options.batches:
            steps = 48 if way != "torch" else max(2, 32 // rows)
            if way == "torch":
                with only_torch():
                    found = [resident.decode(rows, steps)]
            else:
                found = [resident.decode(rows, steps) for _ in range(options.passes + 1)][1:]
            yield {"way": way, "decode rows": rows, "tok/s": round(statistics.median(found), 1)}
        if way == "replay":
            continue  # prompts are not recorded
        for count, length in ((1, 128), (1, 2048), (8, 1024)):
            if way == "torch":
                with only_torch():
                    found = [resident.seconds(count, length) for _ in range(2)][1:]
            else:
                found = [resident.seconds(count, length) for _ in range(options.passes + 1)][1:]
            taken = statistics.median(found)
            yield {
                "way": way,
                "prompts": f"{count} x {length}",
                "ms": round(1e3 * taken, 1),
                "tok/s": round(count * length / taken),
            }
    if options.trace is not None:
        profile(resident, options.trace)


def profile(resident: Resident, trace: Path) -> None:
    """Where the time of decoding and of a prompt goes, by kernel, as a text file."""
    from torch.profiler import ProfilerActivity

    resident.replaying(True)
    jobs: dict[str, Callable[[], object]] = {
        "decode 1": lambda: resident.decode(1, 8),
        "decode 32": lambda: resident.decode(32, 8),
        "prompt 2048": lambda: resident.seconds(1, 2048),
    }
    with trace.open("a") as file:
        for name, job in jobs.items():
            with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                job()
            for order in ("self_cuda_time_total", "self_cpu_time_total"):
                table = profiler.key_averages().table(sort_by=order, row_limit=22, max_name_column_width=60)
                file.write(f"== {name} by {order}\n{table}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="*", default=["kernels", "engine"], choices=["kernels", "engine"])
    parser.add_argument("--model", default="qwen3-8b", choices=SHAPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--trace", type=Path, help="file for a profile of the engine")
    options = parser.parse_args()
    print(json.dumps({"command": " ".join(["python", *sys.argv]), **machine.describe(DEVICE)}), flush=True)
    for part in options.part:
        for line in kernels() if part == "kernels" else engine(options):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
