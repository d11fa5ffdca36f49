"""The bytes that each token of a vocabulary stands for, read from the decoder that tokenizer.json names.

    byte-level      "Ġcafé" in GPT-2's alphabet -> b" caf\\xc3\\xa9"; one token may hold half a code point
    byte-fallback   "<0xC3>" -> b"\\xc3", "▁the" -> b" the"; unknown characters are spelled byte by byte

Tokens are pieces of a byte stream; text appears only when the stream is decoded (detokenizer.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

#: Changes the spelling of one token; the flag says that it is the first of its text.
Step = Callable[[str, bool], str]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedDecoder(ValueError):
    """The file asks for a decoder that cannot be run token by token here."""


@dataclass(frozen=True)
class PieceDecoder:
    """How tokens become bytes, and how their stream becomes text."""

    steps: tuple[Step, ...] = ()
    byte_level: bool = False
    byte_fallback: bool = False
    #: Put between tokens; only tokenizers without any decoder have one.
    separator: str = ""
    #: (character, how many of them are cut from the start of the whole text).
    lead: tuple[str, int] = ("", 0)

    @classmethod
    def from_json(cls, text: str) -> PieceDecoder:
        """From the text of tokenizer.json. Raises UnsupportedDecoder naming the decoder's type."""
        config = json.loads(text).get("decoder")
        if config is None:
            return cls(separator=" ")
        parts = config["decoders"] if config["type"] == "Sequence" else [config]
        return cls(**_read(parts))

    def piece(self, token: str, first: bool) -> bytes:
        """The bytes of one token. first: it begins the text, where some vocabularies write a space too many."""
        for step in self.steps:
            token = step(token, first)
        if self.byte_level:
            return _from_alphabet(token)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return (token if first else self.separator + token).encode()


def _read(parts: list[dict[str, Any]]) -> dict[str, Any]:
    steps: list[Step] = []
    found: dict[str, Any] = {}
    fused = False
    for part in parts:
        kind = part["type"]
        if kind == "ByteLevel":
            found["byte_level"] = True
        elif kind == "ByteFallback":
            found["byte_fallback"] = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and part["stop"] == 0:
            found["lead"] = (part["content"], part["start"])
        elif kind == "Metaspace":
            steps.append(_metaspace(part))
        elif kind == "Replace" and (not fused or _is_single_character(part)):
            steps.append(_replace(part))
        else:
            raise UnsupportedDecoder(f"cannot decode token by token with {json.dumps(part)}")
    return found | {"steps": tuple(steps)}


def _is_single_character(part: dict[str, Any]) -> bool:
    """After the tokens are joined, only one-character patterns cannot match across two of them."""
    return len(part["pattern"].get("String", "")) == 1


def _replace(part: dict[str, Any]) -> Step:
    pattern, content = part["pattern"], part["content"]
    if "String" in pattern:
        return lambda token, first: token.replace(pattern["String"], content)
    expression = re.compile(pattern["Regex"])
    return lambda token, first: expression.sub(lambda match: content, token)


def _metaspace(part: dict[str, Any]) -> Step:
    mark = part["replacement"]
    prefixed = part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True)
    return lambda token, first: token.replace(mark, "" if first and prefixed else " ")


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's alphabet: every byte as one printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _from_alphabet(token: str) -> bytes:
    """Tokens with any character outside the alphabet (added ones) are ordinary text."""
    alphabet = _alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()
