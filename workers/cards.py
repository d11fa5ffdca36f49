"""Tells the fleet what this worker is and which models it serves. What is not repeated in time is forgotten."""

import os
import socket
import time
from collections.abc import Iterable
from typing import Any

from inferfleet.tasks import roster
from inferfleet.tasks.call import Call
from inferfleet.tasks.ledger import Ledger
from inferfleet.workers.resident import Resident, State

#: Lives of a card, in heartbeats: one may come late, and one may be lost.
LIVES = 3


def card_of(resident: Resident, worker: str) -> dict[str, Any]:
    """A model's card: id, state, how far loading is, and what the engine said about it once it was ready."""
    card = {"id": resident.model, "state": resident.state.value, "worker": worker, **resident.card}
    if (loading := resident.loading) is not None:
        card["loading"] = loading.to_dict()
    if resident.failure is not None:
        card["error"] = resident.failure
    return card


class Cards:
    """Publishes this worker's entry and its models' cards."""

    def __init__(self, ledger: Ledger, worker: str, *, slots: int, heartbeat_seconds: float) -> None:
        self._ledger = ledger
        self._worker = worker
        self._ttl = LIVES * heartbeat_seconds
        self._info = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slots": slots,
            "started_at": int(time.time()),
        }

    def publish(self, residents: Iterable[Resident], *, state: str) -> None:
        """Renew everything. `state` is serving or draining."""
        residents = list(residents)
        models = {resident.model: resident.state.value for resident in residents}
        self._ledger.put_worker(self._worker, {**self._info, "state": state, "models": models}, self._ttl)
        for resident in residents:
            self.publish_one(resident)

    def publish_one(self, resident: Resident) -> None:
        """Renew one model's card; one that was stopped leaves."""
        ttl = 0.0 if resident.state is State.STOPPED else self._ttl
        self._ledger.put_card(resident.model, card_of(resident, self._worker), self._worker, ttl)

    def served_elsewhere(self, model: str) -> bool:
        """Whether another worker has this model, or may soon have it."""
        cards = self._ledger.run(Call("present", ("model", ""), roster.bodies))
        mine = f"{model}\n{self._worker}"
        others = (card for name, card in cards.items() if name.partition("\n")[0] == model and name != mine)
        return any(card.get("state") not in ("failed", "stopped") for card in others)

    def leave(self, residents: Iterable[Resident]) -> None:
        """Take everything back."""
        for resident in residents:
            self._ledger.put_card(resident.model, {}, self._worker, 0)
        self._ledger.put_worker(self._worker, {}, 0)
