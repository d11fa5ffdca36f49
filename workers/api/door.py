"""The one way into the ledger: what must be true of a job before it is accepted, and how it is accepted once."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferfleet.tasks import names
from inferfleet.tasks.contracts import (
    Body,
    ChatCompletionRequest,
    ImageEditRequest,
    JobRequest,
    ResponseRequest,
    body_hash,
    check_card,
)
from inferfleet.tasks.contracts.contract import ENDPOINT_ID
from inferfleet.tasks.contracts.responses import in_own_names
from inferfleet.tasks.errors import ModelNotFound
from inferfleet.tasks.ledger import AsyncLedger
from inferfleet.tasks.records import Submitted
from inferfleet.tasks.settings import ModelSpec, Settings
from inferfleet.workers.api.prompt_counter import PromptCounter
from inferfleet.workers.api.ringer import Ringer
from inferfleet.workers.webhooks.guard import Policy

Card = dict[str, Any]

#: Cards change when workers come and go; a request need not ask for them again within this time.
CARDS_SECONDS = 1.0


@dataclass(frozen=True)
class Sealed:
    """A job with its envelope, which is made once: with a picture in it that takes a while."""

    request: JobRequest
    envelope: bytes
    hash: str

    @classmethod
    def of(cls, request: JobRequest) -> "Sealed":
        envelope = request.envelope()
        return cls(request, envelope, body_hash(envelope))


async def sealed(request: JobRequest) -> Sealed:
    """In a thread where the body holds a picture, so that others are answered meanwhile."""
    if isinstance(request.body, ImageEditRequest):
        return await asyncio.to_thread(Sealed.of, request)
    return Sealed.of(request)


class Door:
    """Checks and submits jobs of every route."""

    def __init__(self, settings: Settings, ledger: AsyncLedger, ringer: Ringer) -> None:
        self._settings = settings
        self._ledger = ledger
        self._ringer = ringer
        self._hooks = Policy.of(settings)
        self._counter = PromptCounter(settings.models)
        self._configured = {name: _unserved(name, spec) for name, spec in settings.models.items()}
        self._cards: dict[str, Card] = {}
        self._cards_until = 0.0

    async def check(self, request: Body) -> None:
        """Raises ModelNotFound, InvalidRequest or ContextLengthExceeded, each naming the field and the limit."""
        card = await self._card(request.model)
        check_card(request, card)
        if isinstance(request, ResponseRequest):
            with in_own_names():
                await self._counter.check(request.chat(), card.get("max_model_len"))
        elif isinstance(request, ChatCompletionRequest):
            await self._counter.check(request, card.get("max_model_len"))

    def check_webhook(self, target: str | None) -> None:
        """An endpoint's id, or a URL that events may go to. Raises UrlNotAllowed."""
        if target is not None and not ENDPOINT_ID.fullmatch(target):
            self._hooks.url(target)

    async def submit(
        self, job: Sealed, tenant: str, *, job_id: str | None = None, idempotency_key: str | None = None
    ) -> Submitted:
        """Accepts a checked job once. Raises UrlNotAllowed, QueueFull, IdempotencyKeyReuse, LedgerUnavailable."""
        request = job.request
        self.check_webhook(request.callback)
        submitted = await self._ledger.submit(
            job_id or names.new_job_id(),
            job.envelope,
            tenant=tenant,
            body_hash=job.hash,
            idempotency_key=idempotency_key,
            max_queued=self._settings.max_queued,
            **request.terms(),
        )
        if submitted.queued:
            self._ringer.ring(request.body.model)
        return submitted

    def ring(self, model: str) -> None:
        """For a job that waits again, as after a retry."""
        self._ringer.ring(model)

    async def cards(self) -> dict[str, Card]:
        """model -> card: what workers published, and what settings name though no worker serves it now."""
        served = await self._ledger.cards()
        self._cards = {name: self._configured.get(name, {}) | card for name, card in served.items()}
        self._cards_until = time.monotonic() + CARDS_SECONDS
        return self._configured | self._cards

    async def _card(self, model: str) -> Card:
        if time.monotonic() < self._cards_until and model in self._cards:
            return self._cards[model]
        cards = await self.cards()
        if model not in cards:
            raise ModelNotFound(f"no worker serves the model {model[:100]!r}", param="model")
        return cards[model]


def _unserved(name: str, spec: ModelSpec) -> Card:
    """What can be said of a model that no worker has loaded: its kind if its folder can be read on this machine."""
    folder = Path(spec.path)
    if spec.image is not None or (folder / "model_index.json").is_file():
        return {"id": name, "state": "unserved", "kind": "image"}
    kind = {"kind": "text"} if (folder / "config.json").is_file() else {}
    return {"id": name, "state": "unserved", "max_model_len": spec.max_model_len, **kind}
