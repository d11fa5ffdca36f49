"""Telling a message's spelling of a control token from the template's: marks that go through the template.

Every spelling gets private characters beside it, never inside, so that the template still finds, splits at and tests
for it. One that begins a string has its mark behind only, one that ends a string before only: `startswith`,
`endswith` and `trim` see what they would see without marks. Each token has marks of its own, and a mark counts only
beside its own token; what a template leaves behind when it cuts a token out means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

#: Private-use plane 15; Marks takes characters that the messages do not use.
_MARKS = range(0xF0000, 0xFFFFE)

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


@dataclass
class Marks:
    """The marks of one conversation: characters that occur nowhere in it."""

    values: object
    _meaning: dict[str, tuple[Kind, str]] = field(default_factory=dict)
    _char: dict[tuple[Kind, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        used = {char for text in _strings(self.values) if not text.isascii() for char in text}
        self._free = (char for char in map(chr, _MARKS) if char not in used)

    def char(self, kind: Kind, token: str = "") -> str:
        key = kind, token
        if key not in self._char:
            self._char[key] = next(self._free)
            self._meaning[self._char[key]] = key
        return self._char[key]

    def take_out(self, text: str) -> tuple[str, dict[int, set[tuple[Kind, str]]]]:
        """(text without marks, position in it -> the marks that stood there)."""
        found: dict[int, set[tuple[Kind, str]]] = {}
        if not self._meaning:
            return text, found
        parts = re.split(f"([{''.join(self._meaning)}])", text)
        position = 0
        for clean, mark in zip(parts[::2], [*parts[1::2], ""], strict=True):
            position += len(clean)
            if mark:
                found.setdefault(position, set()).add(self._meaning[mark])
        return "".join(parts[::2]), found


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
            return self._mark_text(self._cut_end(value, marks), marks)
        if isinstance(value, Mapping):
            return {self._mark_key(key, marks): self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, marks) for item in value]
        return value

    def _mark_key(self, key: Any, marks: Marks) -> Any:
        return self._mark_text(key, marks) if isinstance(key, str) else key

    def _mark_text(self, text: str, marks: Marks) -> str:
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())

        def marked(match: re.Match[str]) -> str:
            token = match[0]
            if match.start() == first:
                return token + marks.char(Kind.BEFORE_ME_ALONE, token)
            if match.end() == last:
                return marks.char(Kind.BEHIND_ME_ALONE, token) + token
            return marks.char(Kind.BEHIND_ME, token) + token + marks.char(Kind.BEFORE_ME, token)

        return self._spelling.sub(marked, text)

    def _cut_end(self, text: str, marks: Marks) -> str:
        """A text may end with a token's beginning and the next go on with its rest: cut behind the first letter."""
        end = len(text.rstrip())
        for size in range(min(self._longest_head, end), 0, -1):
            if text[end - size : end] in self._heads:
                at = end - size + 1
                return text[:at] + marks.char(Kind.CUT) + text[at:]
        return text

    def unmark(self, text: str, marks: Marks) -> tuple[str, tuple[Span, ...]]:
        """(text without marks, spans of the spellings in it that are not the template's)."""
        clean, found = marks.take_out(text)
        if not found:
            return clean, ()
        spans = (match.span() for match in self._spelling.finditer(clean))
        return clean, tuple(span for span in spans if _is_marked(clean, span, found))


def _is_marked(text: str, span: Span, found: Mapping[int, set[tuple[Kind, str]]]) -> bool:
    start, end = span
    token = text[start:end]
    before, behind = found.get(start, set()), found.get(end, set())
    return (
        (Kind.BEHIND_ME_ALONE, token) in before
        or (Kind.BEFORE_ME_ALONE, token) in behind
        or ((Kind.BEHIND_ME, token) in before and (Kind.BEFORE_ME, token) in behind)
        or any(position in found for position in range(start + 1, end))
    )


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


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
