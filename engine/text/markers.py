"""Telling a message's spelling of a control token from the template's: marks that go through the template.

Every spelling gets marks beside it, never inside, so that the template still finds, splits at and tests for it. One
that begins a string has its mark behind only, one that ends a string before only: `startswith`, `endswith` and `trim`
see what they would see without marks. Each token has marks of its own, and a mark counts only beside its own token;
one that is left behind when the template cuts its token out means nothing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

#: What marks are made of. Private-use characters stay wherever a template puts the text beside them.
LASTING = "".join(map(chr, range(0xF0000, 0xF000B)))
#: Rare spaces: a trim takes them away, and with them what they would keep it from trimming.
TRIMMED = "".join(map(chr, range(0x2000, 0x200B)))

_BASE = len(LASTING)
_NUM_DIGITS = 5

#: (start, end) of characters in a text.
Span = tuple[int, int]


class Kind(IntEnum):
    """Where the token stands that a mark belongs to."""

    BEHIND_ME = 0  # and a BEFORE_ME closes it
    BEFORE_ME = 1
    BEHIND_ME_ALONE = 2
    BEFORE_ME_ALONE = 3
    #: No token: here two texts must not grow together.
    CUT = 4


Mark = tuple[Kind, str]


class Marks:
    """The marks of one rendering, random, so that no message can contain them."""

    def __init__(self, alphabet: str = LASTING) -> None:
        self._alphabet = alphabet
        self._sign = "".join(secrets.choice(alphabet) for _ in range(12))
        # Between two texts that must not grow together, so it has to last.
        self._cut = "".join(secrets.choice(LASTING) for _ in range(12))
        self._texts: dict[Mark, str] = {}
        self._meaning: dict[str, Mark] = {self._cut: (Kind.CUT, "")}
        #: Whether any were asked for.
        self.used = False

    def text(self, kind: Kind, token: str) -> str:
        """The mark itself."""
        self.used = True
        mark = kind, token
        if mark not in self._texts:
            text = self._sign + self._spell(len(self._texts))
            self._texts[mark], self._meaning[text] = text, mark
        return self._texts[mark]

    def cut(self) -> str:
        self.used = True
        return self._cut

    def take_out(self, text: str) -> tuple[str, dict[int, set[Mark]]]:
        """(text without marks, position in it -> the marks that stood there)."""
        found: dict[int, set[Mark]] = {}
        parts = re.split(f"({self._cut}|{self._sign}[{self._alphabet}]{{{_NUM_DIGITS}}})", text)
        position = 0
        for clean, mark in zip(parts[::2], parts[1::2], strict=False):
            position += len(clean)
            found.setdefault(position, set()).add(self._meaning[mark])
        return "".join(parts[::2]), found

    def _spell(self, number: int) -> str:
        return "".join(self._alphabet[number // _BASE**place % _BASE] for place in range(_NUM_DIGITS))


class TokenMarker:
    """Marks the spellings of a set of tokens, and finds them in the rendered text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(filter(None, tokens))
        self._spelling = re.compile(_longest_of(self._tokens))
        self._heads = frozenset(token[:size] for token in self._tokens for size in range(1, len(token)))
        self._longest_head = max(map(len, self._heads), default=0)

    def mark(self, value: Any, marks: Marks) -> Any:
        """A copy in plain containers with every string marked; keys only where they spell a whole token."""
        if isinstance(value, str):
            return self._mark_text(value, marks)
        if isinstance(value, Mapping):
            return {self._mark_key(key, marks): self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, marks) for item in value]
        return value

    def _mark_key(self, key: Any, marks: Marks) -> Any:
        return self._mark_text(key, marks) if isinstance(key, str) and self._spelling.search(key) else key

    def _mark_text(self, text: str, marks: Marks) -> str:
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        parts, done = [], 0
        for match in self._spelling.finditer(text):
            parts.append(self._cut_end(text[done : match.start()], marks))
            parts.append(_beside(match[0], match.start() == first, match.end() == last, marks))
            done = match.end()
        return "".join(parts) + self._cut_end(text[done:], marks)

    def _cut_end(self, text: str, marks: Marks) -> str:
        """A text may end with a token's beginning and the next go on with its rest: cut behind the first letter."""
        end = len(text.rstrip())
        for size in range(min(self._longest_head, end), 0, -1):
            if text[end - size : end] in self._heads:
                at = end - size + 1
                return text[:at] + marks.cut() + text[at:]
        return text

    def unmark(self, text: str, marks: Marks) -> tuple[str, tuple[Span, ...]]:
        """(text without marks, spans of the spellings in it that are not the template's)."""
        clean, found = marks.take_out(text)
        if not found:
            return clean, ()
        spans = (match.span() for match in self._spelling.finditer(clean))
        return clean, tuple(span for span in spans if _is_marked(clean, span, found))

    def not_in(self, text: str, spans: Iterable[Span]) -> list[str]:
        """The tokens that the text spells elsewhere than in these spans."""
        theirs = set(spans)
        return [match[0] for match in self._spelling.finditer(text) if match.span() not in theirs]


def _beside(token: str, first: bool, last: bool, marks: Marks) -> str:
    if first:
        return token + marks.text(Kind.BEFORE_ME_ALONE, token)
    if last:
        return marks.text(Kind.BEHIND_ME_ALONE, token) + token
    return marks.text(Kind.BEHIND_ME, token) + token + marks.text(Kind.BEFORE_ME, token)


def _is_marked(text: str, span: Span, found: Mapping[int, set[Mark]]) -> bool:
    start, end = span
    token = text[start:end]
    before, behind = found.get(start, set()), found.get(end, set())
    return (
        (Kind.BEHIND_ME_ALONE, token) in before
        or (Kind.BEFORE_ME_ALONE, token) in behind
        or ((Kind.BEHIND_ME, token) in before and (Kind.BEFORE_ME, token) in behind)
        or any(position in found for position in range(start + 1, end))
    )


def _longest_of(words: Iterable[str]) -> str:
    """A pattern for the longest of many words at a place; shared beginnings are tried once, so that a thousand
    reserved tokens cost no more than one."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    return _pattern(tree) if tree else r"(?!)"


def _pattern(tree: dict[str, Any]) -> str:
    """Recursion goes as deep as the longest word."""
    branches = [re.escape(char) + _pattern(rest) for char, rest in sorted(tree.items()) if char]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{joined})?" if "" in tree else joined
