"""Speed of every text family at a shape of 200 to 300 million parameters: `python ops/bench/families.py`.

    prefill    B prompts of 128 tokens -> 1 token each; prompt tokens per second
    decode     B prompts of 128 tokens; tokens per second = B * 31 / (time for 32 tokens - time for 1)

Weights are random, written in the hub's layout from the names that each family's own layers ask for. Every prompt is
fresh, greedy and ignores the end token. Figures are the median of all passes, after a short warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import random_model
import torch
from family_shapes import SHAPES, VOCAB
from safetensors.torch import save_file

from inferfleet.engine.families import find_family
from inferfleet.engine.layers.slots import all_slots
from inferfleet.engine.offline import LLM
from inferfleet.engine.place import Place
from inferfleet.engine.sampling_params import SamplingParams

BATCHES = (1, 8, 32)
PROMPT, ANSWER = 128, 32
DTYPES = ("float32", "bfloat16")


def write_checkpoint(name: str, folder: Path) -> int:
    """Writes SHAPES[name] with random weights into a folder; returns how many parameters it has."""
    config = SHAPES[name]
    (folder / "config.json").write_text(json.dumps(config))
    random_model.write_tokenizer(folder)
    _, kind = find_family(config["architectures"][0])
    model = kind(config, place=Place(torch.bfloat16, torch.device("meta")))
    slots = all_slots(model).named(model._checkpoint_name).tensors
    generator = torch.Generator().manual_seed(0)
    tensors = {slot_name: _values(slot_name, slot.shape, generator) for slot_name, slot in slots.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(math.prod(slot.shape) for slot in slots.values())


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name and name.endswith("weight") and len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


class Bench:
    """One loaded model and a stream of prompts that were never used before."""

    def __init__(self, folder: Path, dtype: str, arguments: argparse.Namespace) -> None:
        self.llm = LLM(
            str(folder),
            dtype=dtype,
            device=arguments.device,
            threads=arguments.threads,
            kv_cache_tokens=16384,
            max_num_seqs=max(BATCHES),
        )
        self._random = random.Random(7)

    def prefill(self, rows: int) -> float:
        return rows * PROMPT / self._seconds(rows, 1)

    def decode(self, rows: int) -> float:
        first = self._seconds(rows, 1)
        return rows * (ANSWER - 1) / (self._seconds(rows, ANSWER) - first)

    def _seconds(self, rows: int, answer: int) -> float:
        prompts = [{"prompt_token_ids": self._random.choices(range(256, VOCAB - 8), k=PROMPT)} for _ in range(rows)]
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling)
        taken = time.perf_counter() - started
        if {len(output.outputs[0].token_ids) for output in outputs} != {answer}:
            raise RuntimeError(f"an answer has not the {answer} tokens that were asked for")
        return taken


def measure_family(name: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of one family in one dtype."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_checkpoint(name, Path(folder))
        bench = Bench(Path(folder), dtype, arguments)
    bench.decode(BATCHES[0])  # warms up
    samples: dict[str, list[float]] = {}
    for _ in range(arguments.passes):
        for rows in BATCHES:
            samples.setdefault(f"prefill.b{rows}", []).append(bench.prefill(rows))
            samples.setdefault(f"decode.b{rows}", []).append(bench.decode(rows))
    figures = {work: round(statistics.median(values), 1) for work, values in samples.items()}
    return {"family": name, "dtype": dtype, "million parameters": round(parameters / 1e6, 1), **figures}


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in arguments.only or SHAPES:
        for dtype in arguments.dtypes:
            yield measure_family(name, dtype, arguments)
            gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), help="families to measure")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the engine")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    about = machine.describe(machine.device(arguments.device))
    about["command"] = " ".join(["python", *sys.argv])
    print(json.dumps(about) if arguments.json else ", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    for row in rows(arguments):
        line = json.dumps(row) if arguments.json else "  ".join(f"{value!s:>12}" for value in row.values())
        print(line, flush=True)


if __name__ == "__main__":
    main()
