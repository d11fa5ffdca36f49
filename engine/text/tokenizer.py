"""A model's tokenizer, read from its folder as it is: tokenizer.json decides, nothing is rebuilt.

Text that merely spells a control token (a user writing "<|im_end|>") can be encoded as plain text: see
`encode_rendered`. No torch here; the API counts prompt tokens with this module.
"""

from __future__ import annotations

import json
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from inferfleet.engine.text.detokenizer import IncrementalDetokenizer
from inferfleet.engine.text.markers import Span
from inferfleet.engine.text.pieces import PieceDecoder, UnsupportedDecoder


class TokenizerError(ValueError):
    """The folder's tokenizer files cannot be used; says which and why."""


class Tokenizer:
    """Text to token ids and back. Encoding may be called from several threads."""

    def __init__(self, folder: str | Path) -> None:
        """folder holds tokenizer.json and, if the model has them, tokenizer_config.json, special_tokens_map.json,
        generation_config.json and config.json. Raises TokenizerError."""
        self.folder = Path(folder)
        text = _read_text(self.folder / "tokenizer.json")
        try:
            self._backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{self.folder / 'tokenizer.json'}: {error}") from error
        # Settings of training time that some folders carry along; a prompt is never cut or filled up.
        self._backend.no_truncation()
        self._backend.no_padding()
        try:
            self.pieces = PieceDecoder.from_json(text)
        except UnsupportedDecoder as error:
            raise TokenizerError(f"{self.folder / 'tokenizer.json'}: {error}") from error
        added = self._backend.get_added_tokens_decoder()
        #: Text -> id of the tokens that the library finds before anything else.
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        #: One more than the highest id that has a token; the model's logits may be wider.
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self._break, self._break_id = _add_break(self._backend, self.vocab_size)
        self._pieces: dict[int, bytes | None] = {}
        self.special_tokens = _special_tokens(self.folder)
        self._fill_missing_special_tokens()

    # ids of special meaning

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer: the tokenizer's own and those of generation_config.json.

        Chat models often end turns with a token that only generation_config.json lists.
        """
        ids = _configured_ids(self.folder, "eos_token_id")
        own = self._id_of("eos_token")
        return tuple(sorted(set(ids) | ({own} if own is not None else set())))

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _fill_missing_special_tokens(self) -> None:
        """Folders without tokenizer_config.json name special tokens by id only."""
        for name in ("bos_token", "eos_token", "pad_token"):
            ids = _configured_ids(self.folder, f"{name}_id")
            if name not in self.special_tokens and ids and (token := self._backend.id_to_token(ids[0])):
                self.special_tokens[name] = token

    # text -> ids

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """All token ids of the text, where text that spells an added token becomes that token.

        add_special_tokens: also what the tokenizer puts around a text (as bos), for prompts without a template.
        """
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_rendered(self, text: str, plain: Sequence[Span]) -> list[int]:
        """As `encode`, except that the spans in `plain`, which spell added tokens, stay ordinary text."""
        if not plain:
            return self.encode(text)
        if self._break is None:
            pieces, _ = _broken(text, plain, 0, whole=False)
            return [token_id for piece in pieces if piece for token_id in self.encode(piece)]
        pieces, spans = _broken(text, plain, len(self._break), whole=True)
        encoding = self._backend.encode(self._break.join(pieces), add_special_tokens=False)
        if self._any_special_in(spans, encoding):
            # Rare vocabularies have special tokens inside the spelling of others: leave no two characters together.
            pieces, _ = _broken(text, plain, len(self._break), whole=False)
            encoding = self._backend.encode(self._break.join(pieces), add_special_tokens=False)
        return [token_id for token_id in encoding.ids if token_id != self._break_id]

    def _any_special_in(self, spans: Sequence[Span], encoding: tokenizers.Encoding) -> bool:
        """Whether a special token was made of any of these characters. spans: in order."""
        starts = [start for start, _ in spans]
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.special_ids:
                before = bisect_left(starts, end) - 1  # the last span that begins before the token's end
                if before >= 0 and spans[before][1] > start:
                    return True
        return False

    # ids -> text

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole answer. Ids that the tokenizer does not know are no text."""
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return detokenizer.add(token_ids) + detokenizer.finish()

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id; None for padding."""
        if token_id == self._break_id or not 0 <= token_id < self.vocab_size:
            return None
        return self._backend.id_to_token(token_id)

    def piece(self, token_id: int, first: bool) -> bytes | None:
        if first:
            return self._make_piece(token_id, first=True)
        if token_id not in self._pieces:
            self._pieces[token_id] = self._make_piece(token_id, first=False)
        return self._pieces[token_id]

    def _make_piece(self, token_id: int, *, first: bool) -> bytes | None:
        token = self.token(token_id)
        return None if token is None else self.pieces.piece(token, first)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text; its own spelling for control tokens, nothing for padding."""
        return self.piece(token_id, False) or b""

    @cached_property
    def max_token_bytes(self) -> int:
        """The most bytes that one token can add to a text."""
        return max(len(self._make_piece(i, first=False) or b"") for i in range(self.vocab_size))


def _broken(text: str, plain: Sequence[Span], break_size: int, *, whole: bool) -> tuple[list[str], list[Span]]:
    """(text in pieces, the spans where they are once breaks stand between the pieces).

    Each span is broken behind its first character, or, if not left whole after that, behind every character.
    """
    pieces, spans, done, shift = [""], [], 0, 0
    for start, end in plain:
        pieces[-1] += text[done : start + 1]
        rest = [text[start + 1 : end]] if whole else list(text[start + 1 : end])
        pieces += rest
        spans.append((start + shift, end + shift + break_size * len(rest)))
        shift += break_size * len(rest)
        done = end
    pieces[-1] += text[done:]
    return pieces, spans


def _add_break(backend: tokenizers.Tokenizer, vocab_size: int) -> tuple[str | None, int | None]:
    """A token that no text contains: it parts the text before the model sees it, so nothing joins across it.

    Random private-use characters, so that nobody can write it on purpose. (None, None) in a vocabulary with gaps,
    where the library would give it another token's id.
    """
    if backend.get_vocab_size(with_added_tokens=True) != vocab_size:
        return None, None
    text = "".join(chr(0x100000 + secrets.randbelow(0xFFFD)) for _ in range(8))
    backend.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False)])
    return text, backend.token_to_id(text)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file. Raises TokenizerError."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return value


def _special_tokens(folder: Path) -> dict[str, str]:
    """Name -> text of bos_token, eos_token and the like, as chat templates see them."""
    values = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    extra = values.get("extra_special_tokens")
    named = values | (extra if isinstance(extra, dict) else {})
    texts = {name: _content(value) for name, value in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _content(value: object) -> str | None:
    """Special tokens are written as text or as {"content": text, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _configured_ids(folder: Path, name: str) -> tuple[int, ...]:
    """What generation_config.json says, else config.json (or its text part): an id, a list of ids, or nothing."""
    config = read_json(folder / "config.json")
    text_config = config.get("text_config") or {}
    for source in (read_json(folder / "generation_config.json"), config, text_config):
        value = source.get(name)
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    return ()
