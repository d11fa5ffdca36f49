"""What the queue costs: the same chats through API + Redis + Celery and through the offline engine.

    python ops/bench/queue_tax.py [--path FOLDER] [--jobs 64] [--max-tokens 64] [--passes 3] [--json]

Without a folder the model is the random one of 222 M parameters (random_model.py). Offline and fleet run one after
the other, never together, each in processes of its own; passes alternate, so that a drifting machine hits both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import random_model
from live import fleet

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "tree",
    "house",
    "water",
    "stone",
    "fire",
    "wind",
    "rain",
    "snow",
    "sun",
    "moon",
    "star",
    "road",
]
#: The random models are no chat models; this one joins what was said.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
FIRST_TOKEN_REPEATS = 15


def chats(count: int, salt: int) -> list[list[dict[str, str]]]:
    """Different dialogues for each salt, so that no prefix cache answers for the engine."""
    return [
        [
            {
                "role": "user",
                "content": " ".join([f"{salt} {job}", *(WORDS[(salt + job * 7 + i) % 20] for i in range(60))]),
            }
        ]
        for job in range(count)
    ]


def offline_child(path: str, jobs: int, max_tokens: int, salt: int) -> dict[str, float]:
    """Runs in a process of its own: tokens per second of all jobs at once, and one idle chat's first token."""
    from inferfleet.engine.offline import LLM
    from inferfleet.engine.sampling_params import SamplingParams

    llm = LLM(path)
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    llm.chat(chats(4, salt + 900), greedy)
    started = time.perf_counter()
    outputs = llm.chat(chats(jobs, salt), greedy)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    first = []
    for repeat in range(FIRST_TOKEN_REPEATS):
        started = time.perf_counter()
        llm.chat(chats(1, salt + 1000 + repeat), SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        first.append(time.perf_counter() - started)
    return {"tokens_per_s": tokens / seconds, "first_token_ms": 1000 * statistics.median(first)}


def body(messages: list[dict[str, str]], max_tokens: int, *, stream: bool = False) -> dict[str, Any]:
    return {
        "model": "bench", "messages": messages, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True,
        "stream": stream,
    }  # fmt: skip


async def drive(url: str, jobs: int, max_tokens: int, salt: int) -> dict[str, float]:
    """The same work through the public door: every chat is one waiting HTTP request."""
    limits = httpx2.Limits(max_connections=jobs + 8)
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=600, limits=limits) as client:

        async def ask(messages: list[dict[str, str]]) -> int:
            answer = await client.post("/v1/chat/completions", json=body(messages, max_tokens))
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        await asyncio.gather(*(ask(chat) for chat in chats(4, salt + 900)))
        started = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(chat) for chat in chats(jobs, salt))))
        seconds = time.perf_counter() - started
        first = [await first_token(client, chats(1, salt + 1000 + n)[0]) for n in range(FIRST_TOKEN_REPEATS)]
    return {"tokens_per_s": tokens / seconds, "first_token_ms": 1000 * statistics.median(first)}


async def first_token(client: httpx2.AsyncClient, messages: list[dict[str, str]]) -> float:
    """Seconds from sending a request to the first chunk with text, on an idle fleet."""
    started = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body(messages, 1, stream=True)) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    return time.perf_counter() - started
    raise SystemExit("a stream ended without text")


def offline(options: argparse.Namespace, salt: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--path", options.path, "--child", str(salt)]
    command += ["--jobs", str(options.jobs), "--max-tokens", str(options.max_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", help="a model folder with a chat template")
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(offline_child(options.path, options.jobs, options.max_tokens, options.child)))
        return
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as folder:
        options.path = str(Path(options.path).resolve() if options.path else random_chat_model(Path(folder)))
        report(options, *compare(options))


def random_chat_model(folder: Path) -> Path:
    path = random_model.write_model("qwen3-222m", folder)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


def compare(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of all passes: the offline engine's and the fleet's."""
    alone: list[dict[str, float]] = []
    queued: list[dict[str, float]] = []
    for salt in range(options.passes):
        alone.append(offline(options, salt))
        with fleet({"bench": options.path}) as url:
            queued.append(asyncio.run(drive(url, options.jobs, options.max_tokens, salt)))
    return summary(alone), summary(queued)


def report(options: argparse.Namespace, alone: dict[str, float], queued: dict[str, float]) -> None:
    figures = {
        "jobs": options.jobs,
        "passes": options.passes,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "offline": alone,
        "fleet": queued,
        "tax_percent": round(100 * (1 - queued["tokens_per_s"] / alone["tokens_per_s"]), 2),
        "added_first_token_ms": round(queued["first_token_ms"] - alone["first_token_ms"], 2),
    }
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
