"""Token ids to text while they arrive: what is given out is final, whole code points only.

The text given out in all equals `Tokenizer.decode` of all ids, however they were cut into calls. For a byte-level
vocabulary that is also what the tokenizers library decodes. A byte-fallback vocabulary differs from the library
only when a run of byte tokens is not UTF-8: the library then replaces the whole run, valid characters included,
which nobody can know who streams; here only the bytes that are no character become U+FFFD. And where a Metaspace
decoder comes after the bytes, the library takes a U+2581 that was spelt in bytes for a space; here it stays itself.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Protocol

from inferfleet.engine.text.pieces import PieceDecoder

REPLACEMENT = "\ufffd"
_STRAY_BYTE = re.compile("[\udc80-\udcff]")


class Vocabulary(Protocol):
    """What the detokenizer needs of a tokenizer."""

    pieces: PieceDecoder

    def piece(self, token_id: int, first: bool) -> bytes | None:
        """Bytes of a token; None for an id that the tokenizer does not know."""

    def is_special(self, token_id: int) -> bool:
        """True for control tokens, which are no text."""


class IncrementalDetokenizer:
    """One text being written."""

    def __init__(self, tokenizer: Vocabulary, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._first = True
        self._lead, self._lead_left = tokenizer.pieces.lead
        # Byte-fallback replaces byte by byte, byte-level as the Unicode standard says: see _readable.
        errors = "surrogateescape" if tokenizer.pieces.byte_fallback else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def add(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty. Unknown ids (vocabulary padding) are no text."""
        data = b"".join(map(self._piece, token_ids))
        return self._readable(self._utf8.decode(data))

    def finish(self) -> str:
        """No more tokens: the rest, where an unfinished code point becomes U+FFFD."""
        return self._readable(self._utf8.decode(b"", final=True))

    def _piece(self, token_id: int) -> bytes:
        if self._skip_special and self._tokenizer.is_special(token_id):
            return b""
        piece = self._tokenizer.piece(token_id, self._first)
        if piece is None:
            return b""
        self._first = False
        return piece

    def _readable(self, text: str) -> str:
        text = _STRAY_BYTE.sub(REPLACEMENT, text)
        while self._lead_left and text:
            if not text.startswith(self._lead):
                self._lead_left = 0
                break
            text = text.removeprefix(self._lead)
            self._lead_left -= 1
        return text
