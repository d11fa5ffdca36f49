"""Messages to prompt text by the model's own chat template, as Hugging Face renders it.

What a message says cannot become a control token: see markers.py. Control tokens are the special tokens and, outside
the assistant's messages, all added tokens that the template itself writes (<tool_response>, <think>). An assistant's
message repeats what the model wrote, and those are the model's own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from inferfleet.engine.text.markers import LASTING, TRIMMED, Marks, Span, TokenMarker
from inferfleet.engine.text.sandbox import TemplateSandbox, literals
from inferfleet.engine.text.tokenizer import Tokenizer, TokenizerError, read_json

#: A prompt longer than this is no prompt; templates that run away stop here.
MAX_RENDERED_CHARACTERS = 16 * 1024 * 1024

#: Names under which clients send an assistant's reasoning; templates read the first.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """The template refuses or fails on these messages, or there is none; the message says which."""


@dataclass(frozen=True)
class Rendered:
    """A prompt's text; `plain` are the spellings of control tokens in it that came with the messages."""

    text: str
    plain: tuple[Span, ...] = ()


class ChatTemplate:
    """One compiled template with the control tokens of its tokenizer."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        added_tokens: Mapping[str, bool] | None = None,
        max_characters: int = MAX_RENDERED_CHARACTERS,
    ) -> None:
        """special_tokens: name -> text, visible to the template (bos_token, ...). added_tokens: text -> special or
        not. max_characters: bound of a rendered prompt. Raises ChatTemplateError when it does not compile."""
        environment = TemplateSandbox()
        try:
            self._template = environment.from_string(source)
            written = literals(source, environment)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens or {})
        self._max_characters = max_characters
        self._assistants, self._others = _markers(added_tokens or {}, written)
        self._knows_developer = "developer" in source
        #: Whether the template reads content given as a list of parts; if not, texts are joined by newlines.
        self.takes_parts = self._probe_parts()

    @classmethod
    def load(cls, tokenizer: Tokenizer, *, name: str = "default") -> ChatTemplate | None:
        """The template in the tokenizer's folder; None where the model has none. Raises ChatTemplateError."""
        source = _find_source(tokenizer.folder, name)
        if source is None:
            return None
        added = {text: tokenizer.is_special(token_id) for text, token_id in tokenizer.added_tokens.items()}
        return cls(source, special_tokens=tokenizer.special_tokens, added_tokens=added)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> Rendered:
        """The prompt of a conversation. kwargs are the template's own options (enable_thinking, ...).

        Raises ChatTemplateError when the template refuses (roles out of order, ...) or fails.
        """
        if not messages:
            raise ChatTemplateError("messages must hold at least one message")
        prepared = [self._prepare(message) for message in messages]
        rest = {**kwargs, "tools": tools, "documents": documents}
        given = {**self._special_tokens, "add_generation_prompt": add_generation_prompt}
        rendered, any_marks = self._render_marked(prepared, rest, given, Marks(LASTING))
        if not any_marks:
            return rendered
        exact = self._run({**given, **rest, "messages": prepared})
        if rendered.text == exact:
            return rendered
        # Where the template cut out a marked token, the mark may have kept it from trimming. Marks that are trimmed
        # may be lost with their meaning, so they count only if they find the template's own tokens and no others.
        other, _ = self._render_marked(prepared, rest, given, Marks(TRIMMED))
        own, others_own = (self._others.not_in(one.text, one.plain) for one in (rendered, other))
        return other if other.text == exact and own == others_own else rendered

    def _render_marked(
        self, messages: Sequence[Message], rest: Mapping[str, Any], given: Mapping[str, Any], marks: Marks
    ) -> tuple[Rendered, bool]:
        """(the prompt, whether anything in it needed a mark)."""
        marked = [self._marker_of(message).mark(message, marks) for message in messages]
        text = self._run({**given, **self._others.mark(rest, marks), "messages": marked})
        return Rendered(*self._others.unmark(text, marks)), marks.used

    def _marker_of(self, message: Message) -> TokenMarker:
        return self._assistants if message.get("role") == "assistant" else self._others

    def _prepare(self, message: Message) -> dict[str, Any]:
        """A message as templates know messages: nulls left out, roles and content of a kind they understand."""
        prepared = {key: value for key, value in message.items() if value is not None}
        if prepared.get("role") == "developer" and not self._knows_developer:
            prepared["role"] = "system"
        reasoning = next((prepared[name] for name in REASONING_FIELDS if name in prepared), None)
        if reasoning is not None:
            prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
        content = prepared.get("content")
        if isinstance(content, list | tuple) and not self.takes_parts:
            prepared["content"] = "\n".join(map(_text_of, content))
        return prepared

    def _probe_parts(self) -> bool:
        """Templates written for strings print a list as Python does, or drop it."""
        text = "a probe"
        try:
            as_text, as_parts = (
                self._run({**self._special_tokens, "messages": [{"role": "user", "content": content}]})
                for content in (text, [{"type": "text", "text": text}])
            )
        except ChatTemplateError:
            return False
        return text in as_text and as_text == as_parts

    def _run(self, given: Mapping[str, Any]) -> str:
        try:
            return "".join(self._bounded(self._template.generate(**{"tools": None, "documents": None, **given})))
        except ChatTemplateError:
            raise
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program: any of Python's errors may come out of it
            reason = f"{type(error).__name__}: {error}"
            raise ChatTemplateError(f"the model's chat template fails on these messages: {reason}") from error

    def _bounded(self, pieces: Iterator[str]) -> Iterator[str]:
        total = 0
        for piece in pieces:
            total += len(piece)
            if total > self._max_characters:
                raise ChatTemplateError(f"the rendered prompt is longer than {self._max_characters} characters")
            yield piece


def _text_of(part: Any) -> str:
    if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ChatTemplateError(f"this model's chat template takes content of text parts only, not {kind!r:.40}")
    text: str = part["text"]
    return text


def _markers(added_tokens: Mapping[str, bool], written: Iterable[str]) -> tuple[TokenMarker, TokenMarker]:
    """(for the assistant's messages, for everything else). Tokens of white space (Gemma's newlines) are no control."""
    text = "\0".join(written)  # no token spans two of them
    special = {token for token, is_special in added_tokens.items() if is_special}
    used = {token for token in added_tokens if token in text and not token.isspace()}
    return TokenMarker(special), TokenMarker(special | used)


def _find_source(folder: Path, name: str) -> str | None:
    """chat_template.jinja (or its neighbour of that name) wins over the template inside a JSON file."""
    file = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}") from error
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        source = read_json(path).get("chat_template")
        if source is not None:
            return _named(source, name, path)
    return None


def _named(source: object, name: str, path: Path) -> str:
    """The template itself, or one of a list of {"name", "template"}."""
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    if isinstance(source, dict):
        if name not in source:
            raise ChatTemplateError(f"{path} has no chat template {name!r}, only {sorted(source)}")
        source = source[name]
    if not isinstance(source, str):
        raise ChatTemplateError(f"{path}: chat_template must be text, not {type(source).__name__}")
    return source
