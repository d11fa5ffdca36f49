"""Carries deliveries from the outbox to their receivers: take, sign, send, record. Knows no Celery."""

import threading
import time
import uuid
from collections.abc import Callable
from functools import partial

from inferfleet.tasks.ledger import Ledger
from inferfleet.tasks.webhooks import Recorded, Taken, Verdict
from inferfleet.workers import logs
from inferfleet.workers.patience import until_answered
from inferfleet.workers.webhooks.schedule import allowed, judge
from inferfleet.workers.webhooks.sender import Sender
from inferfleet.workers.webhooks.signing import signed_headers

log = logs.get("webhooks")

#: One turn ends after so many, that others and a stop come in between.
MAX_A_TURN = 100


class Courier:
    """Sends what is due. Many threads use one; `on_attempt` is told how each attempt went."""

    def __init__(
        self,
        ledger: Ledger,
        sender: Sender,
        *,
        timeout_seconds: float,
        keep_seconds: float,
        on_attempt: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        self._ledger = ledger
        self._sender = sender
        # An attempt is over long before, also with a slow resolver: nothing need be renewed meanwhile.
        self._lease_ms = round(1500 * timeout_seconds) + 1000
        self._keep_ms = round(keep_seconds * 1000)
        self._on_attempt = on_attempt
        self.closing = threading.Event()

    def take_turn(self) -> int:
        """Send what is due, one after the other; how many attempts that were."""
        for number in range(MAX_A_TURN):
            if self.closing.is_set() or not self.send_one():
                return number
        return MAX_A_TURN

    def send_one(self) -> bool:
        """One attempt. False when nothing is due."""
        token = uuid.uuid4().hex
        taken = until_answered(lambda: self._ledger.take_delivery(token, self._lease_ms), self.closing)
        if taken is None:
            return False
        started = time.monotonic()
        verdict = self._attempt(taken)
        seconds = time.monotonic() - started
        recorded = until_answered(partial(self._ledger.record_delivery, taken, verdict, self._keep_ms), self.closing)
        self._on_attempt(recorded.word, seconds)
        self._tell(taken, verdict, recorded)
        return True

    def _attempt(self, taken: Taken) -> Verdict:
        if taken.attempts >= allowed(taken):  # senders were lost in the middle of all of them
            return Verdict("failed", error="sender_lost")
        headers = signed_headers(taken.event, taken.now_ms // 1000, taken.body, taken.secrets)
        return judge(taken, self._sender.post(taken.url, headers, taken.body))

    def _tell(self, taken: Taken, verdict: Verdict, recorded: Recorded) -> None:
        facts = {"delivery": taken.id, "type": taken.type, "attempt": taken.attempts + 1, "status": verdict.status}
        if recorded.word == "delivered":
            log.info("webhook_delivered", **facts)
        else:
            log.warning("webhook_not_delivered", **facts, outcome=recorded.word, error=verdict.error)
        if recorded.disabled is not None:
            log.error("webhook_receiver_disabled", **facts, reason=recorded.disabled)
