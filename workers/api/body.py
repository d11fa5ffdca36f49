"""Reads a request's body, bounded, and has its contract judge it; knows no contract itself.

FastAPI's own JSON path accepts NaN, UTF-16 and `true` for an int and answers 500 to a lone surrogate, so no route
here declares a body model: the bytes go to `inferfleet.tasks.contracts`, which checks them strictly.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from email.message import Message
from typing import TypeVar

from fastapi import Request

from inferfleet.tasks import strict_json
from inferfleet.tasks.contracts import validated
from inferfleet.tasks.contracts.contract import C
from inferfleet.tasks.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMediaType
from inferfleet.workers.api.services import services

#: A client that overshoots still has to read our 413: what it is sending is thrown away for this long before we close.
LINGER_SECONDS = 1.0
#: Below this rate a body is too slow, whatever its size; read_timeout_seconds is the head start that it gets.
MIN_BYTES_PER_SECOND = 1024
#: A larger body is parsed in a thread, so that others are answered meanwhile.
INLINE_BYTES = 64 * 1024

T = TypeVar("T")


async def read_contract(request: Request, limit: int, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the body. Raises what read_json_body and `parse` raise."""
    raw = await read_json_body(request, limit)
    return parse(raw) if len(raw) <= INLINE_BYTES else await asyncio.to_thread(parse, raw)


def parser(contract: type[C]) -> Callable[[bytes], C]:
    """What `read_contract` takes, for a body that is that contract and nothing more."""
    return lambda raw: validated(contract, strict_json.loads(raw))


async def read_json_body(request: Request, limit: int) -> bytes:
    """The raw body of a JSON request. Raises UnsupportedMediaType, BodyTooLarge, InvalidRequest."""
    check_json(request)
    return await read_body(request, limit)


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body, at most `limit` bytes."""
    return b"".join([part async for part in parts_of(request, limit)])


async def parts_of(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The raw body as it arrives; a declared length is refused unread, a chunked one when it crosses `limit`.

    Raises BodyTooLarge, InvalidRequest, RequestTimeout.
    """
    declared = request.headers.get("content-length")
    if declared is not None:
        if not declared.isdigit():
            raise InvalidRequest("Content-Length must be a whole number of bytes", param="Content-Length")
        if int(declared) > limit:
            await _linger(request, limit)
            raise BodyTooLarge(_too_large(limit))
    size = 0
    async for part in _in_time(request):
        size += len(part)
        if size > limit:
            await _linger(request, limit)
            raise BodyTooLarge(_too_large(limit))
        yield part


async def _in_time(request: Request) -> AsyncIterator[bytes]:
    """The body's parts. Only time spent waiting for the client counts. Raises RequestTimeout."""
    patience, loop = services(request).settings.read_timeout_seconds, asyncio.get_running_loop()
    size, waited, parts = 0, 0.0, request.stream()
    while True:
        started = loop.time()
        try:
            async with asyncio.timeout(patience + min(0.0, size / MIN_BYTES_PER_SECOND - waited)):
                part = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RequestTimeout(
                f"the body came too slowly: {size} bytes in {waited + loop.time() - started:.0f} s; after "
                f"{patience:g} s (read_timeout_seconds) it has to come at {MIN_BYTES_PER_SECOND} bytes/s"
            ) from None
        waited += loop.time() - started
        size += len(part)
        yield part


def _too_large(limit: int) -> str:
    return f"the request body is larger than this route's limit of {limit} bytes"


async def _linger(request: Request, limit: int) -> None:
    """Discards a bounded rest of the body: closing at once would reset the connection before the 413 is read."""
    dropped = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while dropped <= 4 * limit:
                message = await request.receive()
                dropped += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def media_type(request: Request) -> str:
    """The body's type by its header, in lower case and without parameters; empty without a header."""
    header = _content_type(request)
    return header.get_content_type() if header["content-type"] else ""


def check_json(request: Request, *, besides: str = "") -> None:
    """Raises UnsupportedMediaType; `besides` is what else the route takes, for the message."""
    found = media_type(request)
    if found != "application/json" and not found.endswith("+json"):
        given = f"is {found[:100]!r}" if found else "is missing"
        raise UnsupportedMediaType(f"Content-Type {given}; it must be application/json{besides}", param="Content-Type")
    charset = _content_type(request).get_content_charset("utf-8")
    if charset.replace("_", "-") not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(f"the charset must be utf-8, not {charset[:40]!r}", param="Content-Type")
    check_plain(request)


def check_plain(request: Request) -> None:
    """Raises UnsupportedMediaType for a compressed body, which could unpack to any size."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType("compressed request bodies are not accepted", param="Content-Encoding")


def _content_type(request: Request) -> Message:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    return header
