"""Reads a request's body as bytes, bounded; knows nothing of what the bytes mean.

FastAPI's own JSON path accepts NaN, UTF-16 and `true` for an int and answers 500 to a lone surrogate, so no route
here declares a body model: the bytes go to `inferfleet.tasks.contracts`, which checks them strictly.
"""

import asyncio
from collections.abc import Callable
from email.message import Message
from typing import TypeVar

from fastapi import Request

from inferfleet.tasks.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType

#: A client that overshoots still has to read our 413: what it is sending is thrown away for this long before we close.
LINGER_SECONDS = 1.0
#: A larger body is parsed in a thread, so that others are answered meanwhile.
INLINE_BYTES = 64 * 1024

T = TypeVar("T")


async def read_contract(request: Request, limit: int, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the body. Raises what read_json_body and `parse` raise."""
    raw = await read_json_body(request, limit)
    return parse(raw) if len(raw) <= INLINE_BYTES else await asyncio.to_thread(parse, raw)


async def read_json_body(request: Request, limit: int) -> bytes:
    """The raw body of a JSON request. Raises UnsupportedMediaType, BodyTooLarge, InvalidRequest."""
    _check_media_type(request)
    return await read_body(request, limit)


async def read_body(request: Request, limit: int) -> bytes:
    """The raw body, at most `limit` bytes; a declared length is refused unread, a chunked one when it crosses."""
    declared = request.headers.get("content-length")
    if declared is not None:
        if not declared.isdigit():
            raise InvalidRequest("Content-Length must be a whole number of bytes", param="Content-Length")
        if int(declared) > limit:
            await _linger(request, limit)
            raise BodyTooLarge(_too_large(limit))
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            await _linger(request, limit)
            raise BodyTooLarge(_too_large(limit))
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> str:
    return f"the request body is larger than the limit of {limit} bytes (max_body_bytes)"


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


def _check_media_type(request: Request) -> None:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    media_type = header.get_content_type() if header["content-type"] else "none"
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(
            f"Content-Type must be application/json, not {media_type[:100]!r}", param="Content-Type"
        )
    charset = header.get_content_charset("utf-8")
    if charset.replace("_", "-") not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(f"the charset must be utf-8, not {charset[:40]!r}", param="Content-Type")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType("compressed request bodies are not accepted", param="Content-Encoding")
