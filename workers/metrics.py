"""What a worker measures, under vLLM's names with `inferfleet_` in front, and how it gets from worker to scrape.

A worker counts in a Prometheus registry of its own and lays a snapshot of it into Redis at every heartbeat; the API
renders the snapshots of all present workers, each with a `worker` label. So one page shows the fleet, and a worker
needs no open port (metrics_port gives it one).
"""

import json
import threading
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from inferfleet.tasks.call import Call
from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.records import Claim
from inferfleet.workers.flight import Flight
from inferfleet.workers.resident import Resident

# Seconds; vLLM's buckets, so that its dashboards fit.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
LATENCY_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip

#: Figures of an engine -> (name, help, counts up). Counters fall to 0 when an engine is started again.
ENGINE_FIGURES: dict[str, tuple[str, str, bool]] = {
    "running": ("num_requests_running", "Requests in the engine's batch.", False),
    "waiting": ("num_requests_waiting", "Requests that wait inside the engine.", False),
    "kv_usage": ("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", False),
    "batch_tokens": ("iteration_tokens", "Tokens in the last step.", False),
    "preemptions": ("num_preemptions", "Requests put back because the cache was full.", True),
    "prefix_queries": ("prefix_cache_queries", "Tokens looked up in the prefix cache.", True),
    "prefix_hits": ("prefix_cache_hits", "Tokens found in the prefix cache.", True),
}


class EngineFigures(Collector):
    """The engines' last figures, as they stand when somebody looks."""

    def __init__(self) -> None:
        self.residents: list[Resident] = []

    def collect(self) -> Iterable[Metric]:
        for key, (name, text, counts) in ENGINE_FIGURES.items():
            kind = CounterMetricFamily if counts else GaugeMetricFamily
            family = kind(f"inferfleet_{name}", text, labels=["model_name"])
            for resident in self.residents:
                family.add_metric([resident.model], float(resident.stats.get(key, 0)))
            yield family
        restarts = CounterMetricFamily("inferfleet_engine_restarts", "Engine deaths.", labels=["model_name"])
        for resident in self.residents:
            restarts.add_metric([resident.model], resident.num_restarts)
        yield restarts


class Meter:
    """Counts for one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engines = EngineFigures()
        self.registry.register(self.engines)
        self._jobs = self._counter("jobs", "Jobs ended by this worker.", "status")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended jobs.")
        self._new_tokens = self._counter("generation_tokens", "Tokens generated for ended jobs.")
        self._pictures = self._counter("pictures", "Pictures of completed jobs.")
        self._steps = self._counter("denoising_steps", "Denoising steps of ended jobs, over all their pictures.")
        self._leases_lost = self._counter("leases_lost", "Jobs that were given to somebody else meanwhile.")
        self._reasons = self._counter("request_success", "Answers by why they ended.", "finished_reason")
        self._reaped = Counter(
            "inferfleet_jobs_reaped", "Jobs taken back from lost workers.", ["how"], registry=self.registry
        )
        self._queued = self._seconds("request_queue_time_seconds", "From submit to claim.", LATENCY_BUCKETS)
        self._ttft = self._seconds("time_to_first_token_seconds", "From submit to the first token.", TTFT_BUCKETS)
        self._run = self._seconds("request_inference_time_seconds", "From claim to end.", LATENCY_BUCKETS)
        self._whole = self._seconds("e2e_request_latency_seconds", "From submit to end.", LATENCY_BUCKETS)
        self._lock = threading.Lock()

    def job_ended(self, claim: Claim, flight: Flight | None, state: str, now: float) -> dict[str, float]:
        """Count one job; returns its `metrics` in milliseconds. `now` is time.monotonic()."""
        if flight is None:
            return {}
        model = flight.model
        queued = max(0, claim.now_ms - claim.created_ms) / 1000
        run = now - flight.claimed_at
        self._jobs.labels(model, state).inc()
        self._prompt_tokens.labels(model).inc(flight.num_prompt_tokens)
        self._new_tokens.labels(model).inc(flight.num_new_tokens)
        self._queued.labels(model).observe(queued)
        self._run.labels(model).observe(run)
        self._whole.labels(model).observe(queued + run)
        self._steps.labels(model).inc(flight.num_steps)
        if state in ("completed", "incomplete"):
            self._pictures.labels(model).inc(flight.num_pictures_made)
            for reason in flight.finish_reasons:
                self._reasons.labels(model, reason).inc()
        measured = {"execution_ms": _ms(run)}
        if flight.first_token_at is not None:
            ttft = queued + flight.first_token_at - flight.claimed_at
            self._ttft.labels(model).observe(ttft)
            measured["ttft_ms"] = _ms(ttft)
        return measured

    def lease_lost(self, model: str) -> None:
        self._leases_lost.labels(model).inc()

    def reaped(self, tally: Tally[str]) -> None:
        for how, number in tally.items():
            self._reaped.labels(how).inc(number)

    def snapshot(self) -> list[list[Any]]:
        """The families as `snapshot_of` writes them."""
        return snapshot_of(self.registry)

    def serve(self, host: str, port: int) -> int:
        """Open a page of this worker alone; returns its port."""
        server, _ = start_http_server(port, host, self.registry)
        return int(server.server_address[1])

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"inferfleet_{name}", text, ["model_name", *labels], registry=self.registry)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"inferfleet_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)


def snapshot_of(registry: CollectorRegistry) -> list[list[Any]]:
    """Every family as `[name, help, type, [[sample, labels, value], ...]]`."""
    return [
        [
            family.name,
            family.documentation,
            family.type,
            [[s.name, s.labels, s.value] for s in family.samples if not s.name.endswith("_created")],
        ]
        for family in registry.collect()
    ]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def put_snapshot(worker: str, snapshot: list[list[Any]], ttl_seconds: float) -> Call[None]:
    """Lay a worker's snapshot into Redis for ttl_seconds. Zero takes it away."""
    body = json.dumps(snapshot, separators=(",", ":"))
    return Call("announce", ("metrics", worker, body, round(ttl_seconds * 1000)), lambda answer: None)


def fleet_families() -> Call[list[Metric]]:
    """The families of all present workers, each sample with a `worker` label; ready for a Prometheus registry."""

    def parse(answer: list[bytes]) -> list[Metric]:
        families: dict[str, Metric] = {}
        for worker, body in zip(answer[::2], answer[1::2], strict=True):
            for name, text, kind, samples in json.loads(body):
                family = families.setdefault(name, Metric(name, text, kind))
                family.samples += [_sample(sample, worker.decode()) for sample in samples]
        return list(families.values())

    return Call("present", ("metrics", ""), parse)


def _sample(sample: tuple[str, Mapping[str, str], float], worker: str) -> Sample:
    name, labels, value = sample
    return Sample(name, {**labels, "worker": worker}, value)


class Snapshots:
    """Lays this worker's snapshot down, and takes it away."""

    def __init__(self, ledger: Ledger, worker: str, meter: Meter, ttl_seconds: float) -> None:
        self._ledger = ledger
        self._worker = worker
        self._meter = meter
        self._ttl_seconds = ttl_seconds

    def publish(self) -> None:
        self._ledger.run(put_snapshot(self._worker, self._meter.snapshot(), self._ttl_seconds))

    def leave(self) -> None:
        self._ledger.run(put_snapshot(self._worker, [], 0))
