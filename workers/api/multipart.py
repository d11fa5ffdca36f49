"""Reads a multipart/form-data body as it arrives, bounded in parts, headers and bytes. Knows no field names.

Starlette's own reader spools files to disk and lets go of what does not fit a field; here everything is held in memory,
within the limit that bodies have anyway, unless the caller takes it away as it comes; and whatever is odd is refused.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from inferfleet.tasks.errors import BodyTooLarge, FleetError, InvalidRequest
from inferfleet.tasks.strict_json import printable
from inferfleet.workers.api.body import check_plain, parts_of

MAX_PARTS = 64
#: Of a field that is no file; the longest prompt has 40,000 bytes.
MAX_TEXT_BYTES = 64 * 1024
MAX_NAME_BYTES = 256


@dataclass
class Part:
    """One field: a file if it came with a file name."""

    name: str
    is_file: bool
    data: bytearray = field(default_factory=bytearray)
    filename: str = ""

    @property
    def text(self) -> str:
        """Raises InvalidRequest if it is not UTF-8."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{self.name} must be UTF-8; byte {error.start} is not", param=self.name) from None


#: Told after each chunk what has come so far: bytes that it takes out of a part are held no longer.
Drain = Callable[[Sequence[Part]], Awaitable[None]]


async def read_form(request: Request, limit: int, drain: Drain | None = None) -> list[Part]:
    """The parts of a multipart/form-data body of at most `limit` bytes, in their order.

    Raises UnsupportedMediaType, BodyTooLarge, InvalidRequest.
    """
    check_plain(request)
    form = _Form()
    parser = MultipartParser(_boundary(request), form.callbacks())
    problem: FleetError | None = None
    async for chunk in parts_of(request, limit):
        # After a refusal the rest is read and dropped: closing now would reset the connection before it is heard.
        problem = problem or _refusal(parser, chunk)
        if drain is not None and problem is None:
            problem = await _drained(drain, form.parts)
    if problem is not None:
        raise problem
    if not form.ended:
        raise InvalidRequest("the multipart body ends before its closing boundary")
    return form.parts


def _refusal(parser: MultipartParser, chunk: bytes) -> FleetError | None:
    """Parses one chunk."""
    try:
        parser.write(chunk)
    except FormParserError as error:
        return InvalidRequest(f"the multipart body is damaged: {printable(str(error))}")
    except FleetError as error:
        return error
    return None


async def _drained(drain: Drain, parts: Sequence[Part]) -> FleetError | None:
    try:
        await drain(parts)
    except FleetError as error:
        return error
    return None


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    # RFC 2046, 5.1.1.
    if not 1 <= len(boundary) <= 70:
        raise InvalidRequest(
            "multipart/form-data needs a boundary of 1 to 70 characters in Content-Type", param="Content-Type"
        )
    return boundary


class _Form:
    """What the parser tells, put together."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._headers: dict[str, bytes] = {}
        self._name = b""
        self._value = b""

    def callbacks(self) -> Any:
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        told: dict[str, Callable[..., None]] = {f"on_{name}": getattr(self, f"on_{name}") for name in names}
        return told

    def on_part_begin(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise InvalidRequest(f"a form may have at most {MAX_PARTS} fields")
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value
        self._name = self._value = b""

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get("content-disposition", b""))
        name = options.get(b"name", b"")
        if kind != b"form-data" or not 1 <= len(name) <= MAX_NAME_BYTES:
            raise InvalidRequest(
                f"every part needs Content-Disposition: form-data with a name of 1 to {MAX_NAME_BYTES} bytes"
            )
        filename = printable(options.get(b"filename", b"").decode("utf-8", "backslashreplace"))
        part = Part(printable(name.decode("utf-8", "backslashreplace")), b"filename" in options, filename=filename)
        if self._headers.get("content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
            raise InvalidRequest(f"{part.name}: Content-Transfer-Encoding is not accepted", param=part.name)
        self.parts.append(part)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        part.data += data[start:end]
        if not part.is_file and len(part.data) > MAX_TEXT_BYTES:
            raise BodyTooLarge(
                f"{part.name} is larger than the limit of {MAX_TEXT_BYTES} bytes of a text field", param=part.name
            )

    def on_end(self) -> None:
        self.ended = True
