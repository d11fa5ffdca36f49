"""Messages to prompt token ids: one tokenizer with its chat template. Used by the engine, and by the API to count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inferfleet.engine.text.chat import ChatTemplate, ChatTemplateError, Message
from inferfleet.engine.text.tokenizer import Tokenizer


class PromptEncoder:
    """What a model reads, made from what a client sends."""

    def __init__(self, folder: str | Path) -> None:
        """folder: a model's folder. Raises TokenizerError, ChatTemplateError."""
        self.tokenizer = Tokenizer(folder)
        self.template = ChatTemplate.load(self.tokenizer)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **chat_template_kwargs: Any,
    ) -> list[int]:
        """Prompt token ids of a conversation. Raises ChatTemplateError, which names what the template refuses."""
        if self.template is None:
            raise ChatTemplateError("this model has no chat template, so it cannot take messages")
        rendered = self.template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **chat_template_kwargs
        )
        return self.tokenizer.encode_rendered(rendered.text, rendered.plain)

    def count_chat(self, messages: Sequence[Message], **kwargs: Any) -> int:
        """Tokens of a conversation's prompt; arguments and errors of `encode_chat`."""
        return len(self.encode_chat(messages, **kwargs))

    def encode_text(self, text: str) -> list[int]:
        """Prompt token ids of a bare text, with what the tokenizer puts around it (bos), for use without messages."""
        return self.tokenizer.encode(text, add_special_tokens=True)
