"""Counts a prompt's tokens at the door, with the model's own template and tokenizer. Loads no torch.

Works where the model's folder can be read on this machine; elsewhere the worker counts, and says the same.
"""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

from inferfleet.engine.text.chat import ChatTemplate, ChatTemplateError
from inferfleet.engine.text.tokenizer import Tokenizer, TokenizerError
from inferfleet.tasks.contracts import ChatCompletionRequest, text_bytes
from inferfleet.tasks.errors import ContextLengthExceeded, InvalidRequest
from inferfleet.tasks.settings import ModelSpec
from inferfleet.workers import logs

log = logs.get("api")

#: A prompt of fewer bytes is counted in less time than a thread takes to start.
INLINE_BYTES = 8192


class PromptCounter:
    """Renders and tokenizes prompts of the models whose folders are here."""

    def __init__(self, models: Mapping[str, ModelSpec]) -> None:
        self._models = models
        self._loaded: dict[str, tuple[Tokenizer, ChatTemplate] | None] = {}
        self._loading = threading.Lock()

    async def check(self, request: ChatCompletionRequest, limit: int | None) -> None:
        """`limit` is the model's context in tokens; None = not known here. Raises ContextLengthExceeded, or
        InvalidRequest when the template refuses the messages."""
        if limit is None or request.model not in self._models:
            return
        if request.model in self._loaded and sum(map(text_bytes, request.messages)) < INLINE_BYTES:
            count = self.count(request)
        else:
            count = await asyncio.to_thread(self.count, request)
        if count is not None:
            check_length(count, request.token_limit, limit)

    def count(self, request: ChatCompletionRequest) -> int | None:
        """Prompt tokens of a request; None where the model's files are not here."""
        parts = self._parts(request.model)
        if parts is None:
            return None
        tokenizer, template = parts
        options = request.chat_template_kwargs
        try:
            rendered = template.render(
                request.plain_messages(), **(options.model_dump(exclude_none=True) if options else {})
            )
        except ChatTemplateError as error:
            raise InvalidRequest(str(error), param="messages") from None
        return len(tokenizer.encode_rendered(rendered.text, rendered.plain))

    def _parts(self, model: str) -> tuple[Tokenizer, ChatTemplate] | None:
        with self._loading:
            if model not in self._loaded:
                self._loaded[model] = _load(Path(self._models[model].path))
        return self._loaded[model]


def check_length(count: int, max_tokens: int | None, limit: int) -> None:
    """Whether a prompt of `count` tokens and its answer fit a context of `limit` tokens. ContextLengthExceeded."""
    if count >= limit:
        raise ContextLengthExceeded(
            f"messages have {count} tokens; the model's context is {limit} tokens and must hold the answer too",
            param="messages",
        )
    if max_tokens is not None and count + max_tokens > limit:
        raise ContextLengthExceeded(
            f"messages have {count} tokens and max_tokens is {max_tokens}: together {count + max_tokens}, more than "
            f"the model's context of {limit} tokens",
            param="max_tokens",
        )


def _load(folder: Path) -> tuple[Tokenizer, ChatTemplate] | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = Tokenizer(folder)
        template = ChatTemplate.load(tokenizer)
    except (TokenizerError, ChatTemplateError) as error:
        # The worker meets the same files and says so when it loads the model; the API goes on without counting.
        log.warning("prompt_counter_unusable_folder", folder=str(folder), reason=str(error))
        return None
    return None if template is None else (tokenizer, template)
