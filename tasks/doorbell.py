"""Rings for jobs and webhooks: puts turns on a Celery queue. Loads Celery at the first ring, not before.

A turn only says "somebody, carry one job of this model". A lost ring costs a second, until the sweeper rings again; a
doubled one costs nothing. So a ring that fails is reported and never raised.
"""

import functools
import threading
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from inferfleet.tasks import names

if TYPE_CHECKING:
    from celery import Celery

#: Seconds that one connection attempt may take: whoever submits should not wait for a broker that is away.
CONNECT_TIMEOUT = 2.0
#: No more turns than this wait for one model. Where no worker takes them they would pile up for ever, since a cancelled
#: job leaves its turn behind; the sweeper rings for jobs that wait beyond it.
MAX_RUNG = 10_000


def broker_url(redis_url: str) -> str:
    """The same server in kombu's words: there a Unix socket has another scheme, and TLS is not verified unasked."""
    url = urlsplit(redis_url)
    query = dict(parse_qsl(url.query))
    if url.scheme == "unix":
        database = query.pop("db", "0")
        return f"redis+socket://{url.netloc}{url.path}?{urlencode(query | {'virtual_host': database})}"
    if url.scheme == "rediss":
        query.setdefault("ssl_cert_reqs", "required")
        return urlunsplit(url._replace(query=urlencode(query)))
    return redis_url


class Doorbell:
    """A JSON-only Celery producer without a result backend. Threads may share it."""

    def __init__(self, redis_url: str, namespace: str = "inferfleet") -> None:
        self._redis_url = redis_url
        self._namespace = namespace
        self._lock = threading.Lock()

    def ring(self, model: str, times: int = 1) -> bool:
        """Ask that somebody carry `times` jobs of a model, unless MAX_RUNG turns wait. False when the broker could not
        be told."""
        return self._send(names.TURN_TASK, [model], names.turn_queue(model, self._namespace), times)

    def ring_webhooks(self, times: int = 1) -> bool:
        """Ask that somebody send the webhooks that are due. False when the broker could not be told."""
        return self._send(names.DELIVER_TASK, [], names.deliver_queue(self._namespace), times)

    def _send(self, task: str, args: list[str], queue: str, times: int) -> bool:
        with self._lock:  # two first rings would make two apps
            app = self._app
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        try:
            with app.producer_pool.acquire(block=True) as producer:
                # The broker is Redis, where kombu keeps a queue in a list of its name.
                room = MAX_RUNG - producer.channel.client.llen(queue)
                for _ in range(min(times, room)):
                    app.send_task(
                        task,
                        args=args,
                        queue=queue,
                        producer=producer,
                        ignore_result=True,
                        retry=False,
                    )
        except (OperationalError, RedisError, OSError):
            return False
        return True

    def close(self) -> None:
        """Give the broker's connections back."""
        with self._lock:
            app = self.__dict__.pop("_app", None)
        if app is not None:
            app.close()

    @functools.cached_property
    def _app(self) -> "Celery":
        from celery import Celery

        app = Celery("inferfleet.doorbell", broker=broker_url(self._redis_url), set_as_current=False)
        app.conf.update(
            accept_content=["json"],
            task_serializer="json",
            result_backend=None,
            broker_connection_timeout=CONNECT_TIMEOUT,
            broker_transport_options={"socket_connect_timeout": CONNECT_TIMEOUT, "socket_timeout": CONNECT_TIMEOUT},
        )
        return app
