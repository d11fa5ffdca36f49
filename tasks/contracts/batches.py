"""What may be asked of files and batches: the fields of an upload, and the body that makes a batch."""

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from inferfleet.tasks import names
from inferfleet.tasks.contracts.contract import (
    NO_TWINS,
    TIERS,
    Contract,
    Metadata,
    Priority,
    Tier,
    is_a_webhook,
    named_once,
    refused,
)
from inferfleet.tasks.files import FILE_ID
from inferfleet.tasks.hook_url import MAX_URL_CHARS
from inferfleet.tasks.s3_url import MAX_URL_CHARS as MAX_S3_CHARS
from inferfleet.tasks.s3_url import BadS3Url, S3Url, parse_object, parse_prefix

MIN_KEEP, MAX_KEEP = 3600, 30 * 86400
WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])", re.ASCII)
WINDOW_UNITS = {"m": 60, "h": 3600, "d": 86400}
MAX_WINDOW = 30 * 86400
MAX_LINES = 50_000

S3_SCHEME = "s3://"
#: For the document alone: the parsers say better what is wrong, and more.
S3_SHAPE = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^/.\x00-\x1f\x7f][^/\x00-\x1f\x7f]*)"
BatchWords = Annotated[
    list[names.BatchEnd],
    Field(min_length=1, max_length=len(names.BATCH_ENDS), json_schema_extra=NO_TWINS),
]
CustomId = Annotated[str, Field(min_length=1, max_length=512)]


class ExpiresAfter(Contract):
    """When a file is forgotten."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_KEEP, le=MAX_KEEP)]


class FileFields(Contract):
    """The fields of an upload beside its file."""

    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


class BatchRequest(Contract):
    """The body of POST /v1/batches."""

    #: An uploaded file, or s3://bucket/key where the operator lets this tenant read.
    input_file_id: Annotated[
        str, Field(max_length=MAX_S3_CHARS, json_schema_extra={"pattern": f"^({FILE_ID.pattern}|{S3_SHAPE}+)$"})
    ]
    #: What its lines ask for.
    endpoint: names.JobUrl
    #: "24h", or any whole number of minutes, hours or days up to 30 days.
    completion_window: Annotated[str, Field(max_length=8, json_schema_extra={"pattern": f"^{WINDOW.pattern}$"})]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    #: Among batches; lower runs first. Online work comes before any of them. Without one the service_tier gives it.
    priority: Priority | None = None
    service_tier: Tier | None = None
    #: s3://bucket/prefix/ that the output and the error file are written to as well, where the operator lets this
    #: tenant write.
    output_url_prefix: (
        Annotated[str, Field(max_length=MAX_S3_CHARS, json_schema_extra={"pattern": f"^{S3_SHAPE}*/?$"})] | None
    ) = None
    #: An https URL, or the id of a webhook endpoint, that is told how the batch ends.
    webhook: Annotated[str, Field(min_length=1, max_length=MAX_URL_CHARS)] | None = None
    #: Which of its ends is told; None = each.
    webhook_events_filter: BatchWords | None = None

    _webhook = field_validator("webhook")(is_a_webhook)
    _words_once = field_validator("webhook_events_filter")(named_once)

    @field_validator("input_file_id")
    @classmethod
    def is_a_file_or_an_object(cls, text: str) -> str:
        if text.startswith(S3_SCHEME):
            return s3_text(parse_object, text)
        if not FILE_ID.fullmatch(text):
            raise refused("input_file_id is the id of a file, or s3://bucket/key")
        return text

    @field_validator("output_url_prefix")
    @classmethod
    def is_a_prefix(cls, text: str | None) -> str | None:
        return None if text is None else s3_text(parse_prefix, text)

    @field_validator("completion_window")
    @classmethod
    def is_a_time(cls, window: str) -> str:
        found = WINDOW.fullmatch(window)
        if not found or window_seconds(window) > MAX_WINDOW:
            raise refused("completion_window is a whole number and m, h or d, such as 24h, and at most 30d")
        return window

    @property
    def effective_priority(self) -> int:
        return self.priority if self.priority is not None else TIERS[self.service_tier]

    @property
    def input_url(self) -> str | None:
        """None = the input is an uploaded file."""
        return self.input_file_id if self.input_file_id.startswith(S3_SCHEME) else None

    @property
    def window_seconds(self) -> int:
        return window_seconds(self.completion_window)


class RetryRequest(Contract):
    """The body of POST /v1/batches/{id}/retry."""

    #: Only these of the lines that failed; None = all of them.
    custom_ids: Annotated[list[CustomId], Field(min_length=1, max_length=MAX_LINES)] | None = None


def s3_text(parse: Callable[[str], S3Url], text: str) -> str:
    try:
        return str(parse(text))
    except BadS3Url as error:
        raise refused(str(error)) from None


def window_seconds(window: str) -> int:
    """Seconds of a completion_window that matches WINDOW."""
    return int(window[:-1]) * WINDOW_UNITS[window[-1]]
