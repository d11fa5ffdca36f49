"""Bytes -> plain JSON values, strictly. Python's own reader is too kind: it takes NaN, 1e400, UTF-16, lone surrogates
and doubled keys, and what passes the door would travel through the queue into the engine. Knows no field names.
"""

import json
import math
from typing import Any

from inferfleet.tasks.errors import InvalidJSON, InvalidRequest

MAX_DEPTH = 64
#: Digits of one number; Python's own limit is 4300 and quadratic below it.
MAX_DIGITS = 100


class DoubledKey(ValueError):
    """Raised inside the reader, which knows the key but not the path to it."""


def loads(raw: bytes) -> Any:
    """The values in `raw`, UTF-8 without a byte order mark. InvalidJSON, or InvalidRequest for NUL and doubled keys."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"the body must be UTF-8; byte {error.start} is not") from None
    if not text.strip():
        raise InvalidJSON("the body is empty")
    if text.startswith("\ufeff"):
        raise InvalidJSON("the body must not begin with a byte order mark")
    try:
        values = _reader.decode(text)
    except RecursionError:
        raise InvalidJSON(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except DoubledKey as error:
        raise InvalidRequest(f"the key {error} appears twice in one object", param=str(error)) from None
    except json.JSONDecodeError as error:
        raise InvalidJSON(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError as error:
        raise InvalidJSON(str(error)) from None
    _check(values)
    return values


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        last = {name: number for number, (name, _) in enumerate(pairs)}
        doubled, _ = next(pair for number, pair in enumerate(pairs) if last[pair[0]] != number)
        raise DoubledKey(printable(doubled))
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if len(digits) > MAX_DIGITS or not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large or too long")
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number may have at most {MAX_DIGITS} digits")
    return int(digits)


_reader = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int)


def _check(root: Any) -> None:
    """Walk without recursion: depth, and strings that could not be stored or shown."""
    todo: list[tuple[Any, tuple[str | int, ...]]] = [(root, ())]
    while todo:
        value, path = todo.pop()
        if isinstance(value, str):
            _check_string(value, path)
        elif isinstance(value, dict | list):
            if len(path) >= MAX_DEPTH:
                raise InvalidJSON(f"the body is nested deeper than {MAX_DEPTH} levels", param=dotted(path[:8]))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, item in items:
                if isinstance(name, str):
                    _check_string(name, path)
                if isinstance(item, str | dict | list):
                    todo.append((item, (*path, name)))


def _check_string(value: str, path: tuple[str | int, ...]) -> None:
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in _suspects(value)):
        raise InvalidJSON(f"{dotted(path) or 'the body'} holds half of a surrogate pair", param=dotted(path))
    if "\0" in value:
        raise InvalidRequest(f"{dotted(path) or 'the body'} holds the NUL character", param=dotted(path))


def _suspects(value: str) -> str:
    """The string itself where it cannot be encoded, else nothing: encoding is the fast way to ask."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return value
    return ""


def dotted(path: tuple[str | int, ...]) -> str | None:
    """messages.0.content; None for the whole body."""
    return printable(".".join(str(part) for part in path)) or None


def printable(name: str) -> str:
    """A name from outside, short and safe to put into an error."""
    return name[:200].encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
