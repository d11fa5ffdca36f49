"""Seconds of a picture and of a step, ours and diffusers' own, on random weights: `python ops/bench/diffusion.py`.

    python ops/bench/diffusion.py                                     a CPU: about 100 M parameters at 256 x 256
    python ops/bench/diffusion.py --shape schnell --size 1024         a GPU: the published shape, bfloat16, 4 steps
    python ops/bench/diffusion.py --shape dev --size 1024             the same with guidance, 28 steps

B jobs of one picture each are given at once. A step is the time of all steps but the first, divided by their number:
so what comes before and after the steps (noise, VAE, PNG) is in seconds a picture, not in the step. "share" is the part
of the matrix rate, measured in the same run, that the operations of B pictures' steps make up. Prompts are embedded
beforehand on both sides. Passes of both sides alternate, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import machine
import random_flux
import torch
from random_flux import SHAPES, Shape

from inferfleet.engine.diffusion.engine import DiffusionEngine
from inferfleet.engine.diffusion.output import Picture
from inferfleet.engine.diffusion.params import ImageParams
from inferfleet.engine.diffusion.spec import DiffusionSpec
from inferfleet.engine.place import Place
from inferfleet.kernels import threads

PROMPT = "a red circle on a blue background"
#: Side of a latent token in pixels.
TOKEN = 16

#: (pictures at once, steps of each) -> seconds until the last is a file.
Run = Callable[[int, int], float]


class Ours:
    """Our engine on a pipeline in memory."""

    def __init__(self, shape: Shape, place: Place, options: argparse.Namespace) -> None:
        self._size, self._place, self._numbers = options.size, place, count()
        pipeline = random_flux.pipeline(shape, place)
        pipeline.prompts.embed(PROMPT, shape.sequence)
        spec = DiffusionSpec(path="random", device=options.device, max_batch_size=max(options.batches))
        self._engine = DiffusionEngine(pipeline, spec)

    def __call__(self, batch: int, steps: int) -> float:
        started = time.perf_counter()
        for seed in range(batch):
            params = ImageParams(
                prompt=PROMPT, seed=seed, width=self._size, height=self._size, num_inference_steps=steps
            )
            self._engine.add(f"job-{next(self._numbers)}", params)
        pictures = 0
        while self._engine.has_work:
            said = self._engine.step()
            if said.errors:
                raise RuntimeError(said.errors[0][1].message)
            pictures += sum(isinstance(delta, Picture) for delta in said.deltas)
        if pictures != batch:
            raise RuntimeError(f"{pictures} pictures where {batch} were asked for")
        return time.perf_counter() - started


class Theirs:
    """diffusers' pipeline with the same weights, the pictures of a batch as one call."""

    def __init__(self, shape: Shape, place: Place, options: argparse.Namespace) -> None:
        self._size, self._shape, self._place = options.size, shape, place
        self._pipeline = random_flux.theirs(shape, place.dtype, place.device)
        self._prompt = random_flux.RandomPrompts(shape, place.dtype, place.device).embed(PROMPT, shape.sequence)

    def __call__(self, batch: int, steps: int) -> float:
        started = time.perf_counter()
        self._pipeline(
            prompt_embeds=self._prompt.t5.expand(batch, -1, -1),
            pooled_prompt_embeds=self._prompt.pooled.expand(batch, -1),
            width=self._size,
            height=self._size,
            num_inference_steps=steps,
            guidance_scale=3.5,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(batch)],
        )
        return time.perf_counter() - started


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every batch on both sides, `passes` times after one that warms up."""
    shape, device = SHAPES[options.shape], machine.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    steps, place = options.steps or shape.steps, Place(dtype, device)
    if device.type == "cpu":
        threads.use(options.threads)
        threads.lend_to_torch()
    about, rate = machine.describe(device), machine.matrix_rate(device, dtype)
    sides: dict[str, Run] = {"ours": Ours(shape, place, options)}
    if not options.alone:
        sides["diffusers"] = Theirs(shape, place, options)
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for number in range(options.passes + 1):
        for batch in options.batches:
            for name, run in sides.items():
                one, whole = run(batch, 1), run(batch, steps)
                if number:
                    taken.setdefault((name, batch), []).append((whole, (whole - one) / max(1, steps - 1)))
    flops = shape.flops((options.size // TOKEN) ** 2)
    return {
        "command": " ".join(["python", *sys.argv]),
        "parameters": random_flux.num_parameters(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "size": options.size,
        "steps": steps,
        "passes": options.passes,
        "machine": about,
        "matrix TFLOP/s": round(rate / 1e12, 3),
        "TFLOP a picture and step": round(flops / 1e12, 3),
        "results": [row(*key, runs, flops / rate) for key, runs in taken.items()],
    }


def row(name: str, batch: int, runs: list[tuple[float, float]], limit: float) -> dict[str, Any]:
    """limit: seconds of one picture's step at the matrix rate."""
    whole, step = (statistics.median(values) for values in zip(*runs, strict=True))
    return {
        "side": name,
        "batch": batch,
        "s/picture": round(whole / batch, 4),
        "s/step": round(step, 4),
        "best s/step": round(min(value for _, value in runs), 4),
        "share": round(batch * limit / step, 3) if step > 0 else None,
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    yield f"$ {report['command']}"
    head = {name: value for name, value in report.items() if name not in ("command", "machine", "results")}
    yield ", ".join(f"{name} {value}" for name, value in {**head, **report["machine"]}.items())
    for line in report["results"]:
        yield "  ".join(f"{name} {value}" for name, value in line.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--size", type=int, default=256, help="side of a picture in pixels")
    parser.add_argument("--steps", type=int, help="steps of a picture; 4 or 28 by shape without it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="pictures at once")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without diffusers' pipeline, which wants transformers")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args()
    with torch.inference_mode():
        report = measure(options)
    print(json.dumps(report, indent=1) if options.json else "\n".join(table(report)))


if __name__ == "__main__":
    main()
