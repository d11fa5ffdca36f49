"""How a chat model and an image model share one worker: each alone, then both at once, through the public door.

    python ops/bench/sharing.py [--chat FOLDER] [--image FOLDER] [--seconds 30] [--chats 2] [--pictures 4] [--json]

Without folders they are the demo models. Chats are streams one after another, pictures are jobs one after another, so
many of each at a time; a phase starts with all of them and counts what ended or came within its seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import machine
from live import fleet

OPS = Path(__file__).resolve().parent.parent
PROMPTS = ("a red circle on a blue background", "a green square on a white background", "a small yellow triangle")


class Load:
    """What one phase saw: gaps between the chunks of a chat, seconds of each picture."""

    def __init__(self, client: httpx2.AsyncClient, until: float, steps: int | None) -> None:
        self._client, self._until, self._steps = client, until, steps
        self.gaps: list[float] = []
        self.pictures: list[float] = []

    async def chat(self, number: int) -> None:
        """Streams dialogues until the time is over; the wait for a first token is not a gap."""
        while time.perf_counter() < self._until:
            number += 100
            messages = [{"role": "user", "content": f"Count from {number} on."}]
            body = {"model": "chat", "messages": messages, "max_tokens": 256, "ignore_eos": True, "stream": True}
            last = None
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now

    async def paint(self, number: int) -> None:
        """Pictures until the time is over."""
        while time.perf_counter() < self._until:
            number += 100
            body = {"model": "image", "prompt": PROMPTS[number % len(PROMPTS)], "seed": number}
            if self._steps is not None:
                body["num_inference_steps"] = self._steps
            started = time.perf_counter()
            answer = await self._client.post("/v1/images/generations", json=body)
            answer.raise_for_status()
            self.pictures.append(time.perf_counter() - started)


async def phase(url: str, options: argparse.Namespace, *, chats: int, pictures: int) -> dict[str, float]:
    limits = httpx2.Limits(max_connections=chats + pictures + 4)
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=600, limits=limits) as client:
        load = Load(client, time.perf_counter() + options.seconds, options.steps)
        started = time.perf_counter()
        work: list[tuple[Callable[[int], Awaitable[None]], int]] = [(load.chat, n) for n in range(chats)]
        work += [(load.paint, n) for n in range(pictures)]
        await asyncio.gather(*(do(number) for do, number in work))
        seconds = time.perf_counter() - started
    found: dict[str, float] = {}
    if load.gaps:
        cuts = statistics.quantiles(load.gaps, n=100)
        found |= {"gap_p50_ms": 1000 * cuts[49], "gap_p95_ms": 1000 * cuts[94], "gap_p99_ms": 1000 * cuts[98]}
        found["chunks_per_s"] = len(load.gaps) / seconds
    if load.pictures:
        found |= {"pictures_per_s": len(load.pictures) / seconds, "picture_p50_s": statistics.median(load.pictures)}
    return {name: round(value, 2) for name, value in found.items()}


async def measure(url: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    chats, pictures = options.chats, options.pictures
    return {
        "chat alone": await phase(url, options, chats=chats, pictures=0),
        "pictures alone": await phase(url, options, chats=0, pictures=pictures),
        "both": await phase(url, options, chats=chats, pictures=pictures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chat", default=OPS / "demo_model", help="a chat model's folder")
    parser.add_argument("--image", default=OPS / "demo_image", help="an image model's folder")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--chats", type=int, default=2, help="streams at a time")
    parser.add_argument("--pictures", type=int, default=4, help="image jobs at a time")
    parser.add_argument("--steps", type=int, help="steps of a picture; the model's own without it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    models = {name: str(Path(getattr(options, name)).resolve()) for name in ("chat", "image")}
    with fleet(models) as url:
        phases = asyncio.run(measure(url, options))
    figures = {"machine": machine.describe(machine.device("cpu")), "models": models, "phases": phases}
    if options.json:
        print(json.dumps(figures))
        return
    print(*(f"{name:8} {value}" for name, value in figures["machine"].items()), sep="\n")
    for name, row in phases.items():
        print(f"{name:16}", "  ".join(f"{key} {value:g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
