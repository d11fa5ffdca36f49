"""The API's own Prometheus metrics, and the queue's, read from the ledger at scrape time."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)


class HttpMetrics:
    """Counts of this process alone; a scrape sees one process, so run one API process a port."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for every first one, which no dashboard reads
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "inferfleet_http_requests",
            "HTTP requests answered (streams: when they ended).",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "inferfleet_http_request_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ["method", "route"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answered request; status 0 = the client left before an answer."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)


class _Snapshot(Collector):
    """Families made just now; prometheus_client collects synchronously, while the ledger is read asynchronously."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(
    http: HttpMetrics,
    stats: Mapping[str, Mapping[str, Any]] | None,
    cards: Mapping[str, Mapping[str, Any]],
    workers: Iterable[Metric],
    failovers: int | None,
) -> bytes:
    """The whole exposition: this process, the queues, and what workers laid down. `stats` None = the ledger is away,
    which is itself a metric."""
    registry = CollectorRegistry()
    registry.register(_Snapshot([*_fleet_families(stats, cards, failovers), *workers]))
    return generate_latest(http.registry) + generate_latest(registry)


def _fleet_families(
    stats: Mapping[str, Mapping[str, Any]] | None, cards: Mapping[str, Mapping[str, Any]], failovers: int | None
) -> list[Metric]:
    up = GaugeMetricFamily("inferfleet_ledger_up", "1 while the ledger (Redis) answers.")
    up.add_metric([], 0.0 if stats is None else 1.0)
    took_over = CounterMetricFamily("inferfleet_ledger_failovers", "Times that another Redis took over.")
    if failovers is not None:
        took_over.add_metric([], failovers)
    depth = _gauge("inferfleet_queue_depth", "Jobs that wait.")
    running = _gauge("inferfleet_queue_running", "Jobs that a worker holds.")
    oldest = _gauge("inferfleet_queue_oldest_job_age_seconds", "Age of the job that has waited longest.")
    for model, numbers in sorted((stats or {}).items()):
        depth.add_metric([model], numbers["waiting"])
        running.add_metric([model], numbers["running"])
        oldest.add_metric([model], numbers["oldest_age_s"] or 0.0)
    loaded = GaugeMetricFamily("inferfleet_model_loaded", "1 while a worker serves the model.", labels=["model_name"])
    for model, card in sorted(cards.items()):
        loaded.add_metric([model], 1.0 if card.get("state") == "ready" else 0.0)
    return [up, took_over, depth, running, oldest, loaded]


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=["model_name"])
