"""The Celery side: an app that speaks JSON only, queues without acknowledgement, a thread pool that wakes the loop.

What Celery 5.7 on Redis does by itself and what is asked of it here:
- A restart of Redis while messages are unacknowledged ends a stock worker. Turns and runs are consumed with `no_ack`,
  so nothing is ever unacknowledged; a turn that is lost with its worker is rung again, a run is its caller's to repeat.
- Kombu acknowledges even what was consumed with `no_ack`, later and from the event loop; if the connection broke in
  between, that ends the worker. Our tasks' requests acknowledge nothing.
- A prefetched turn is one that no other worker hears: prefetch is disabled, a worker holds as many as it has slots.
- With prefetch disabled a full worker hears of a free slot only when its event loop wakes, up to a second late: the
  pool wakes it.
- It waits up to 30 s between attempts to reach Redis again: here 2 s.
- A Redis that answers but refuses to write (disk or memory full, replicas gone) ends a stock worker: here that counts
  as a Redis that is away.
"""

import functools
import socket
import time
from functools import partial
from typing import Any

from celery import Celery, Task, bootsteps
from celery.concurrency.thread import ApplyResult, TaskPool
from celery.events.dispatcher import EventDispatcher
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu.asynchronous import Hub
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.transport import redis as kombu_redis
from redis import exceptions

from inferfleet.tasks import names
from inferfleet.tasks.doorbell import broker_url
from inferfleet.tasks.ledger import refuses_writes
from inferfleet.tasks.settings import Settings

RECONNECT_FIRST, RECONNECT_STEP, RECONNECT_MAX = 0.2, 0.3, 2.0
#: Seconds before the next attempt after Redis refused a write.
REFUSED_WAIT = 1.0
#: How long Celery keeps the result of an `inferfleet.run` for whoever called it.
RESULT_SECONDS = 86400


class FleetRequest(Request):
    """A message that was consumed with `no_ack`: there is nothing to acknowledge, and no channel to do it on."""

    #: Of the job that a turn carries just now.
    job_id: str | None = None

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect active` shows."""
        return super().info(safe) | ({"job_id": self.job_id} if self.job_id else {})

    def acknowledge(self) -> None:
        self.acknowledged = True

    def reject(self, requeue: bool = False) -> None:
        self.acknowledged = True


class FleetTask(Task):
    """A task of ours."""

    Request = FleetRequest


class FleetApp(Celery):
    """A Celery app that knows its intake."""

    task_cls = FleetTask
    intake: "Intake"


def make_app(settings: Settings, queues: list[str]) -> FleetApp:
    """An app that may consume `queues`; which of them it does is the intake's word."""
    url = broker_url(settings.redis_url)
    app = FleetApp("inferfleet", broker=url, backend=url, set_as_current=False)
    app.intake = Intake()
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        result_accept_content=["json"],
        result_expires=RESULT_SECONDS,
        task_queues=[Queue(name, Exchange(name), routing_key=name, no_ack=True) for name in queues],
        task_default_queue=names.run_queue(settings.namespace),
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        worker_consumer="inferfleet.workers.app:PatientConsumer",
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"queue_order_strategy": "round_robin", "socket_keepalive": True},
    )
    app.steps["consumer"].add(IntakeStep)
    return app


class WritesRefused(exceptions.ConnectionError):
    """Redis answers but does not write now. A connection error, for Celery mends those by trying again."""


@functools.cache
def patient(base: type) -> type:
    """A class of Redis connections like `base`, on which a refused write raises WritesRefused."""

    def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return base.read_response(self, *args, **kwargs)  # type: ignore[attr-defined]
        except exceptions.ResponseError as error:
            if refuses_writes(error):
                raise WritesRefused(str(error)) from error
            raise

    return type(f"Patient{base.__name__}", (base,), {"read_response": read_response})


class PatientChannel(kombu_redis.Channel):
    """Kombu's channel on patient connections, whichever kind the URL asks for."""

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        params: dict[str, Any] = super()._connparams(asynchronous)
        return params | {"connection_class": patient(params.get("connection_class") or self.connection_class)}


class PatientTransport(kombu_redis.Transport):
    """Kombu's transport with patient channels."""

    Channel = PatientChannel


class PatientConsumer(Consumer):
    """Celery's consumer, sooner back after Redis was away, and one that outlives a Redis that refuses to write."""

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        super().on_connection_error_before_connected(exc)
        _wait_if_refused(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        _wait_if_refused(exc)

    def ensure_connected(self, conn: Connection) -> Connection:
        sooner = {"interval_start": RECONNECT_FIRST, "interval_step": RECONNECT_STEP, "interval_max": RECONNECT_MAX}
        vars(conn)["get_transport_cls"] = lambda: PatientTransport
        vars(conn)["ensure_connection"] = partial(conn.ensure_connection, **sooner)
        return super().ensure_connected(conn)


def _wait_if_refused(exc: Exception) -> None:
    """Connecting works while writes are refused, so nothing else would slow the attempts down."""
    if isinstance(exc, WritesRefused):
        time.sleep(REFUSED_WAIT)


class WakingPool(TaskPool):
    """Celery's thread pool; a thread that is free again wakes the event loop, which then takes the next message."""

    def on_apply(self, *args: Any, **kwargs: Any) -> ApplyResult:
        result = super().on_apply(*args, **kwargs)
        result.f.add_done_callback(lambda _: self.app.intake.wake())
        return result


class Intake:
    """Which queues the worker takes messages from, changeable from any thread; and what wakes its event loop."""

    def __init__(self) -> None:
        self._read_end, self._write_end = socket.socketpair()
        self._read_end.setblocking(False)
        self._write_end.setblocking(False)
        self._wanted: set[str] = set()
        self._consumer: Consumer | None = None

    def open(self, queue: str) -> None:
        """Take messages from a queue, from now on and after every reconnection."""
        self._wanted.add(queue)
        self._changed()

    def close(self, queue: str) -> None:
        """Take no more messages from a queue."""
        self._wanted.discard(queue)
        self._changed()

    def wake(self) -> None:
        """Let the event loop look for work now."""
        try:
            self._write_end.send(b"w")
        except BlockingIOError:
            pass  # it has not read the last hundred thousand wakes yet: it is awake

    @property
    def dispatcher(self) -> EventDispatcher | None:
        """What sends events; another one after each reconnection."""
        return getattr(self._consumer, "event_dispatcher", None)

    def shut(self) -> None:
        """The event loop is gone for good."""
        self._read_end.close()
        self._write_end.close()

    def attach(self, consumer: Consumer, hub: Hub) -> None:
        """The event loop begins, for the first time or after a reconnection."""
        self._consumer = consumer
        hub.add_reader(self._read_end, self._drain)
        hub.call_soon(self._apply)

    def _drain(self) -> None:
        try:
            self._read_end.recv(4096)
        except BlockingIOError:
            pass

    def _changed(self) -> None:
        if self._consumer is not None and self._consumer.hub is not None:
            self._consumer.hub.call_soon(self._apply)
            self.wake()

    def _apply(self) -> None:
        """In the event loop's thread: make what is consumed equal to what is wanted."""
        consumer = self._consumer
        if consumer is None or consumer.task_consumer is None:
            return
        wanted = set(self._wanted)
        for queue in set(consumer.app.amqp.queues.consume_from) - wanted:
            consumer.cancel_task_queue(queue)
        for queue in wanted:
            if not consumer.task_consumer.consuming_from(queue):
                consumer.add_task_queue(queue)


class IntakeStep(bootsteps.StartStopStep):
    """Ties the intake to each new event loop."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def register_with_event_loop(self, consumer: Consumer, hub: Hub) -> None:
        consumer.app.intake.attach(consumer, hub)
