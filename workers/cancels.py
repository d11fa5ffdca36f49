"""Hears at once which running jobs are cancelled. A message that is lost costs a heartbeat: `beat` says it again."""

import threading
from collections.abc import Callable

import redis

from inferfleet.tasks.ledger import Ledger
from inferfleet.workers import logs

log = logs.get("cancels")

_LISTEN_SECONDS = 0.5
_RETRY_SECONDS = 1.0


class Cancels:
    """One thread a worker; `on_cancel` is told a job's id, whoever carries the job."""

    def __init__(self, ledger: Ledger, on_cancel: Callable[[str], None]) -> None:
        self._redis = ledger.redis
        self._channel = f"{ledger.prefix}cancel"
        self._on_cancel = on_cancel
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cancels", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                log.warning("cancel_channel_lost", error=type(error).__name__)
                self._stopping.wait(_RETRY_SECONDS)

    def _listen(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(self._channel)
            while not self._stopping.is_set():
                message = channel.get_message(timeout=_LISTEN_SECONDS)
                if message is not None:
                    self._on_cancel(message["data"].decode())
