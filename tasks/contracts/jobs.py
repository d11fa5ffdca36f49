"""The envelope around every body: one line of an OpenAI batch file, plus options. Its url says what the body is."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from inferfleet.tasks import names, strict_json
from inferfleet.tasks.contracts.chat import ChatCompletionRequest
from inferfleet.tasks.contracts.contract import TIERS, QueueOptions, Timeout, validated
from inferfleet.tasks.contracts.images import ImageEditRequest, ImageGenerationRequest
from inferfleet.tasks.contracts.responses import ResponseRequest
from inferfleet.tasks.contracts.work import work_of
from inferfleet.tasks.records import Work

Body = ChatCompletionRequest | ResponseRequest | ImageGenerationRequest | ImageEditRequest

BODIES: dict[str, type[Body]] = {
    names.CHAT_URL: ChatCompletionRequest,
    names.RESPONSES_URL: ResponseRequest,
    names.IMAGES_URL: ImageGenerationRequest,
    names.EDITS_URL: ImageEditRequest,
}


class JobRequest(QueueOptions):
    """One line of an OpenAI batch file, plus options. Its JSON is the envelope that the ledger keeps."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    method: Literal["POST"] = "POST"
    url: names.JobUrl = "/v1/chat/completions"
    #: Of the class that belongs to the url.
    body: Body
    #: Seconds that the job may wait before its first start.
    start_timeout: Timeout | None = None
    #: Seconds that one run of the job may take.
    execution_timeout: Timeout | None = None

    @field_validator("body", mode="before")
    @classmethod
    def of_its_url(cls, body: Any, info: ValidationInfo) -> Any:
        """One class is asked, not all, so that a complaint names the path in the body that was meant."""
        kind = BODIES.get(info.data.get("url", ""))
        # Without a kind the url was refused already, and that is the first complaint.
        return body if kind is None else kind.model_validate(body)

    @classmethod
    def from_body(cls, body: Body) -> "JobRequest":
        """The job of a bare body; its queue options stay inside and count."""
        url = next(url for url, kind in BODIES.items() if type(body) is kind)
        return validated(cls, {"url": url, "body": body})

    @property
    def wished_priority(self) -> int | None:
        """The job's own options go before those in its body, a priority before a tier. None where it leaves the choice
        to whoever carries it: it names neither, or the tier `auto`."""
        given = self.priority if self.priority is not None else self.body.priority
        tier = self.service_tier or self.body.service_tier
        return TIERS[tier] if given is None and tier not in (None, "auto") else given

    @property
    def effective_priority(self) -> int:
        """Lower runs first."""
        return TIERS[None] if self.wished_priority is None else self.wished_priority

    @property
    def deadline_ms(self) -> int | None:
        """Unix milliseconds; the earlier of the job's and the body's."""
        given = [value for value in (self.deadline, self.body.deadline) if value is not None]
        return round(min(given) * 1000) if given else None

    @property
    def start_timeout_ms(self) -> int | None:
        return None if self.start_timeout is None else max(1, round(self.start_timeout * 1000))

    @property
    def callback(self) -> str | None:
        """Where the job's events go: a URL or the id of a webhook endpoint."""
        return self.webhook if self.webhook is not None else self.body.webhook

    @property
    def callback_words(self) -> tuple[str, ...]:
        """What of the job's life is told there."""
        given = (
            self.webhook_events_filter if self.webhook_events_filter is not None else self.body.webhook_events_filter
        )
        return names.WEBHOOK_ENDS if given is None else tuple(given)

    @property
    def work(self) -> Work:
        """How much it asks for."""
        return work_of(self.body)

    @property
    def labels(self) -> dict[str, str] | None:
        """The metadata that the job is listed with."""
        return self.metadata if self.metadata is not None else self.body.metadata

    def terms(self) -> dict[str, Any]:
        """What the ledger's `submit` is told of a job beside its envelope, whoever submits it."""
        return {
            "model": self.body.model,
            "priority": self.effective_priority,
            "deadline_ms": self.deadline_ms,
            "start_timeout_ms": self.start_timeout_ms,
            "custom_id": self.custom_id,
            "endpoint": self.url,
            "metadata": self.labels,
            "webhook": self.callback,
            "webhook_words": self.callback_words,
            "work": self.work,
        }

    def envelope(self) -> bytes:
        """Canonical JSON of what was given: equal requests give equal bytes."""
        values = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def body_hash(envelope: bytes) -> str:
    """What an idempotency key is bound to."""
    return hashlib.sha256(envelope).hexdigest()


def parse_job(raw: bytes) -> JobRequest:
    """Bytes of a job -> request. InvalidJSON (400) or InvalidRequest (422) with `param` = dotted path."""
    return validated(JobRequest, strict_json.loads(raw))
