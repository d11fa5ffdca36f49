"""The API as its users meet it: a real uvicorn on loopback in a thread, a real Redis, and a worker by hand."""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
from hand_worker import HandWorker

from inferfleet.tasks.doorbell import Doorbell
from inferfleet.tasks.settings import Settings
from inferfleet.workers import logs
from inferfleet.workers.api.ringer import Ring
from inferfleet.workers.api.server import DrainingServer, create_app, listen


@dataclass(frozen=True)
class LiveApi:
    url: str
    settings: Settings
    #: Tells the server to stop, as a signal would.
    stop: Callable[[], None]
    _clients: ExitStack
    _worker: HandWorker | None = None

    @property
    def worker(self) -> HandWorker:
        assert self._worker is not None, "this API works with real workers"
        return self._worker

    def http(self, **kwargs: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, trust_env=False, timeout=30, **kwargs)

    def sdk(self, *, api_key: str = "none", max_retries: int = 0, **kwargs: Any) -> openai.OpenAI:
        url = f"{self.url}/v1"
        client = openai.OpenAI(base_url=url, api_key=api_key, max_retries=max_retries, timeout=60, **kwargs)
        return self._clients.enter_context(client)


@contextmanager
def running_api(
    redis_url: str, *, drain: int = 1, served: tuple[str, ...] = ("paper",), **settings: Any
) -> Iterator[LiveApi]:
    """An API and a worker by hand of the models `served`; `settings` go over the defaults, `drain` is the grace of the
    end in seconds."""
    namespace = f"api-{uuid.uuid4().hex}"
    chosen = Settings(redis_url=redis_url, namespace=namespace, drain_grace_seconds=drain, **settings)
    worker = HandWorker(redis_url, chosen.namespace, served)
    worker.start()
    try:
        with serving(chosen, worker.ring) as (url, clients, stop):
            yield LiveApi(url, chosen, stop, clients, worker)
    finally:
        worker.stop()


@contextmanager
def api_of_workers(redis_url: str, namespace: str, **settings: Any) -> Iterator[LiveApi]:
    """An API that rings for real workers."""
    chosen = Settings(redis_url=redis_url, namespace=namespace, drain_grace_seconds=1, **settings)
    bell = Doorbell(redis_url, namespace)
    try:
        with serving(chosen, bell.ring) as (url, clients, stop):
            yield LiveApi(url, chosen, stop, clients)
    finally:
        bell.close()


@contextmanager
def serving(settings: Settings, ring: Ring) -> Iterator[tuple[str, ExitStack, Callable[[], None]]]:
    """uvicorn in a thread: its address, a stack that closes clients before the server goes, and its stop."""
    logs.configure("warning", "json")
    server = DrainingServer(create_app(settings, ring), settings)

    def stop() -> None:
        server.should_exit = True

    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            _wait_until_up(url)
            with ExitStack() as clients:
                yield url, clients, stop
        finally:
            stop()
            thread.join(timeout=15)


def _wait_until_up(url: str) -> None:
    pause = threading.Event()
    for _ in range(500):
        try:
            if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pause.wait(0.02)
    raise AssertionError("the API did not come up within 10 s")
