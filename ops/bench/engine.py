"""Speed of the engine alone, without queue and HTTP, on a random-weight model: `python ops/bench/engine.py`.

    ttft      one prompt of 128 tokens -> 1 token, on an idle engine
    decode    B prompts of 128 tokens; tokens per second = B * 63 / (time for 64 tokens - time for 1)
    offline   64 prompts of 128 tokens -> 64 tokens each, all given at once; output tokens per second
    prefix    8 prompts of 512 + 32 tokens -> 8. Cold: every prompt has a beginning of its own. Warm: they share
              one whose blocks are cached. The figure is cold time / warm time
    overhead  a model with next to nothing to compute: milliseconds per decoding step at B rows

Every prompt is fresh, greedy, ignores the end token, and every answer's length is checked. Figures are the median
and the best of all passes.
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
from functools import partial
from pathlib import Path
from typing import Any

import machine
import random_model
import torch

from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

BATCHES = (1, 8, 32)
NULL_BATCHES = (1, 8, 32, 64)
PROMPT, ANSWER = 128, 64
PREFIX_SHARED, PREFIX_OWN, PREFIX_ANSWER, PREFIX_PROMPTS = 512, 32, 8, 8


class Bench:
    """One loaded model and a stream of prompts that were never used before."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.llm = LLM(
            str(folder),
            dtype=arguments.dtype,
            device=arguments.device,
            threads=arguments.threads,
            kv_cache_tokens=16384,
            max_num_seqs=64,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
        )
        self._random = random.Random(7)

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(256, random_model.FIRST_SPECIAL) for _ in range(length)]

    def seconds(self, prompts: list[list[int]], answer: int) -> float:
        """Time of one generate call; raises if an answer has another length."""
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        outputs = self.llm.generate(given, sampling)
        taken = time.perf_counter() - started
        lengths = {len(output.outputs[0].token_ids) for output in outputs}
        if lengths != {answer}:
            raise RuntimeError(f"answers of {sorted(lengths)} tokens where {answer} were asked for")
        return taken

    def fresh(self, count: int, answer: int) -> float:
        return self.seconds([self.prompt(PROMPT) for _ in range(count)], answer)


def ttft(bench: Bench) -> float:
    return 1e3 * bench.fresh(1, 1)


def decode(bench: Bench, rows: int) -> float:
    return rows * (ANSWER - 1) / _decode_seconds(bench, rows)


def overhead(bench: Bench, rows: int) -> float:
    return 1e3 * _decode_seconds(bench, rows) / (ANSWER - 1)


def _decode_seconds(bench: Bench, rows: int) -> float:
    first = bench.fresh(rows, 1)
    return bench.fresh(rows, ANSWER) - first


def offline(bench: Bench) -> float:
    return 64 * ANSWER / bench.fresh(64, ANSWER)


def prefix(bench: Bench) -> float:
    def prompts(shared: list[int] | None) -> list[list[int]]:
        return [(shared or bench.prompt(PREFIX_SHARED)) + bench.prompt(PREFIX_OWN) for _ in range(PREFIX_PROMPTS)]

    cold = bench.seconds(prompts(None), PREFIX_ANSWER)
    shared = bench.prompt(PREFIX_SHARED)
    bench.seconds([shared + bench.prompt(1)], 1)
    return cold / bench.seconds(prompts(shared), PREFIX_ANSWER)


def workloads(full: Bench, null: Bench) -> dict[str, tuple[str, Callable[[], float]]]:
    """Name -> (unit, one measurement)."""
    rows: dict[str, tuple[str, Callable[[], float]]] = {"ttft": ("ms", partial(ttft, full))}
    for count in BATCHES:
        rows[f"decode.b{count}"] = ("tok/s", partial(decode, full, count))
    rows["offline64"] = ("tok/s", partial(offline, full))
    rows["prefix512"] = ("x", partial(prefix, full))
    for count in NULL_BATCHES:
        rows[f"overhead.b{count}"] = ("ms/step", partial(overhead, null, count))
    return rows


def limits(config: dict[str, Any], read: float, flops: float, itemsize: int) -> dict[str, float]:
    """What memory (bytes/s) and matrix (operations/s) rates allow, for a dense model: the roofline's figures.

    A decode step reads every weight once and computes 2 operations a weight and row; the slower of both counts.
    """
    parts = random_model.shapes(config)
    body = sum(_product(shape) for name, shape in parts.items() if "embed" not in name)
    head = _product(parts["model.embed_tokens.weight"])
    step = {b: max((body + head) * itemsize / read, 2 * b * (body + head) / flops) for b in (*BATCHES, 64)}
    prefill = 2 * body * PROMPT / flops
    found = {f"decode.b{b}": b / step[b] for b in BATCHES}
    found |= {"ttft": 1e3 * (prefill + 2 * head / flops)}
    return found | {"offline64": 64 * ANSWER / (64 * prefill + ANSWER * step[64])}


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every chosen workload `passes` times, interleaved so that a slow minute of the machine hits all of them."""
    device, dtype = machine.device(arguments.device), getattr(torch, arguments.dtype)
    about = machine.describe(device)
    read, flops = machine.read_rate(device), machine.matrix_rate(device, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        names = (arguments.model, "null")
        full, null = (Bench(random_model.write_model(name, Path(temporary)), arguments) for name in names)
        chosen = {k: v for k, v in workloads(full, null).items() if not arguments.only or k in arguments.only}
        samples: dict[str, list[float]] = {name: [] for name in chosen}
        for number in range(arguments.passes + 1):
            for name, (_, work) in chosen.items():
                value = work()
                if number:  # the first pass warms up
                    samples[name].append(value)
    config = random_model.MODELS[arguments.model]
    bounds = {} if "num_experts" in config else limits(config, read, flops, dtype.itemsize)
    return {
        "command": " ".join(["python", *sys.argv]),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "passes": arguments.passes,
        "machine": about,
        "rates": {"read GB/s": round(read / 1e9, 1), "matrix GFLOP/s": round(flops / 1e9, 1)},
        "results": {name: _summary(samples[name], unit, bounds.get(name)) for name, (unit, _) in chosen.items()},
    }


def _summary(samples: list[float], unit: str, limit: float | None) -> dict[str, Any]:
    lower_is_better = unit.startswith("ms")
    return {
        "unit": unit,
        "median": round(statistics.median(samples), 2),
        "best": round(min(samples) if lower_is_better else max(samples), 2),
        "limit": None if limit is None else round(limit, 1),
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    about = report["machine"]
    yield f"$ {report['command']}"
    yield f"{report['model']} {report['dtype']}, {report['passes']} passes, " + ", ".join(
        f"{name} {value}" for name, value in {**about, **report["rates"]}.items()
    )
    yield f"{'':14}{'median':>10}{'best':>10}{'limit':>10}  unit"
    for name, row in report["results"].items():
        limit = "" if row["limit"] is None else f"{row['limit']:.1f}"
        yield f"{name:14}{row['median']:10.2f}{row['best']:10.2f}{limit:>10}  {row['unit']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default="qwen3-222m", choices=[name for name in random_model.MODELS if name != "null"]
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the engine")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of workloads, e.g. ttft decode.b1")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = measure(arguments)
    print(json.dumps(report, indent=1) if arguments.json else "\n".join(table(report)))


if __name__ == "__main__":
    main()
