"""The body of POST /v1/responses: text in and text out, with the chat body's sampling and the queue's options.

It is carried as a chat: `chat` gives the dialogue that the engine reads. What OpenAI's tools, reasoning and stored
conversations would change is refused by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, ValidationError, model_validator

from inferfleet.tasks import strict_json
from inferfleet.tasks.contracts.chat import (
    EITHER,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKENS,
    ChatCompletionRequest,
    ResponseFormat,
    SampledText,
)
from inferfleet.tasks.contracts.contract import (
    Contract,
    Ignored,
    QueueOptions,
    described,
    refused,
    served,
    unsupported,
    validated,
)
from inferfleet.tasks.errors import InvalidRequest

#: OpenAI's fields that nothing here answers to: the values that change nothing, and what to use instead of others.
UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "tools are not called here"),
    "tool_choice": (("auto", "none"), "tools are not called here"),
    "parallel_tool_calls": ((True, False), "tools are not called here"),
    "max_tool_calls": ((), "tools are not called here"),
    "reasoning": ((), "use chat_template_kwargs.enable_thinking where the model has it"),
    "previous_response_id": ((), "send the whole dialogue as input"),
    "conversation": ((), "send the whole dialogue as input"),
    "context_management": ((), "send the whole dialogue as input"),
    "prompt": ((), "use instructions and input"),
    "include": (([],), "nothing of a response is left out"),
    "top_logprobs": ((0,), "use /v1/chat/completions"),
    "truncation": (("disabled",), "an input that is too long is refused"),
    "moderation": ((), "nothing is moderated here"),
}
#: Fields of the chat body -> what they are called here.
OWN_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens"}

Id = Annotated[str, Field(min_length=1, max_length=128)]


class InputPart(Contract):
    """A part of a message. A response's own output comes back with notes that are empty here."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def only_text(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") in ("input_image", "input_file", "input_audio", "refusal"):
            raise unsupported(f"content parts of type {part['type']} are not served; use input_text")
        return part


class InputMessage(Contract):
    """One turn of the dialogue, or one that an earlier response gave."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        Annotated[str, Tag("<string>")]
        | Annotated[list[InputPart], Field(min_length=1, max_length=MAX_PARTS), Tag("<list>")],
        EITHER,
    ]
    id: Id | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Ignored | None = None

    @model_validator(mode="before")
    @classmethod
    def only_messages(cls, item: Any) -> Any:
        if isinstance(item, dict) and item.get("type", "message") != "message" and isinstance(item["type"], str):
            raise unsupported(f"items of type {item['type'][:64]} are not served; only messages are")
        return item

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextOptions(Contract):
    format: ResponseFormat | None = None
    verbosity: None = None


class ObfuscationOptions(Contract):
    include_obfuscation: Literal[False] | None = None


class ResponseRequest(SampledText):
    """The body of POST /v1/responses."""

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag("<string>")]
        | Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES - 1), Tag("<list>")],
        EITHER,
    ]
    #: A system message before the input.
    instructions: str | None = None
    #: Answer at once with the queued response, which is then looked at, followed or cancelled by its id.
    background: bool | None = None
    stream: bool | None = None
    stream_options: ObfuscationOptions | None = None
    #: false: the response is forgotten once it has been answered. Not in the background.
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    text: TextOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unserved(cls, body: Any) -> Any:
        return served(body, UNSERVED)

    @model_validator(mode="after")
    def fields_agree(self) -> "ResponseRequest":
        if self.background and self.store is False:
            raise refused("a response in the background has to be stored: leave store out", "store")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options needs stream = true", "stream_options")
        try:
            self.chat()  # what fields mean together (min_tokens, max_output_tokens) is the chat body's business
        except ValidationError as error:
            complaint = described(error)
            raise refused(complaint.message, OWN_NAMES.get(complaint.param or "", complaint.param)) from None
        return self

    @property
    def messages(self) -> list[InputMessage]:
        """The input as messages."""
        return [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else list(self.input)

    def chat(self) -> ChatCompletionRequest:
        """The same as a chat body, which is what a worker carries."""
        messages = [{"role": message.role, "content": message.text} for message in self.messages]
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        shared = SampledText.model_fields.keys() - QueueOptions.model_fields.keys()
        same = self.model_dump(include=shared, exclude_none=True)
        return ChatCompletionRequest.model_validate(
            {**same, "messages": messages, "max_completion_tokens": self.max_output_tokens}
        )


@contextmanager
def in_own_names() -> Iterator[None]:
    """What is wrong with the chat that a response is carried as is told by the names of the response's fields."""
    try:
        yield
    except InvalidRequest as error:
        error.param = OWN_NAMES.get(error.param or "", error.param)
        raise


def parse_response(raw: bytes) -> ResponseRequest:
    """Bytes of a responses body -> request. InvalidJSON (400) or InvalidRequest (422) with `param` = dotted path."""
    return validated(ResponseRequest, strict_json.loads(raw))
