"""What may be asked of files and batches: the fields of an upload, and the body that makes a batch."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from inferfleet.tasks.contracts.contract import Contract, Metadata, Priority, refused

MIN_KEEP, MAX_KEEP = 3600, 30 * 86400
WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])", re.ASCII)
WINDOW_UNITS = {"m": 60, "h": 3600, "d": 86400}
MAX_WINDOW = 30 * 86400
MAX_LINES = 50_000

#: What lines of a batch may ask for.
BatchEndpoint = Literal["/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"]
FileIdText = Annotated[str, Field(pattern=r"^file-[0-9a-f]{32}$")]
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

    input_file_id: FileIdText
    endpoint: BatchEndpoint
    #: "24h", or any whole number of minutes, hours or days up to 30 days.
    completion_window: Annotated[str, Field(max_length=8, json_schema_extra={"pattern": f"^{WINDOW.pattern}$"})]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    #: Among batches; lower runs first. Online work comes before any of them.
    priority: Priority | None = None

    @field_validator("completion_window")
    @classmethod
    def is_a_time(cls, window: str) -> str:
        found = WINDOW.fullmatch(window)
        if not found or window_seconds(window) > MAX_WINDOW:
            raise refused("completion_window is a whole number and m, h or d, such as 24h, and at most 30d")
        return window

    @property
    def window_seconds(self) -> int:
        return window_seconds(self.completion_window)


class RetryRequest(Contract):
    """The body of POST /v1/batches/{id}/retry."""

    #: Only these of the lines that failed; None = all of them.
    custom_ids: Annotated[list[CustomId], Field(min_length=1, max_length=MAX_LINES)] | None = None


def window_seconds(window: str) -> int:
    """Seconds of a completion_window that matches WINDOW."""
    return int(window[:-1]) * WINDOW_UNITS[window[-1]]
