"""The OpenAI chat body. Knows no model."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from inferfleet.tasks import strict_json
from inferfleet.tasks.contracts.contract import (
    MAX_SEED,
    Contract,
    Ignored,
    ModelName,
    QueueOptions,
    User,
    refused,
    served,
    unsupported,
    validated,
)

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_N = 8
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIAS = 300
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 8
MAX_STOP_CHARS = 64
MAX_STOP_TOKEN_IDS = 32
#: Of one request: n * max_tokens as well.
MAX_TOKENS = 1 << 20

#: OpenAI's fields that nothing here answers to: the values that change nothing, and what to say to any other.
UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), "tools are not called here"),
    "tool_choice": (("auto", "none"), "tools are not called here"),
    "parallel_tool_calls": ((True, False), "tools are not called here"),
    "functions": (([],), "tools are not called here"),
    "function_call": (("auto", "none"), "tools are not called here"),
    "audio": ((), "only text is answered"),
    "modalities": ((["text"],), "only text is answered"),
    "prediction": ((), "leave it out, the answer is the same"),
    "web_search_options": ((), "nothing is searched here"),
    "reasoning_effort": ((), "use chat_template_kwargs.enable_thinking where the model has it"),
    "verbosity": (("medium",), "say it in the messages"),
    "store": ((False,), "submit a job to have the answer kept"),
    "prompt_logprobs": ((), "only the answer's logprobs are"),
    "chat_template": ((), "the model's own template is used"),
}

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,10}$"}}),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def form(value: Any) -> str | None:
    """Which of the two forms a value takes; the tags are cut out of error paths."""
    if isinstance(value, str):
        return "<string>"
    return "<list>" if isinstance(value, list) else None


EITHER = Discriminator(form, custom_error_type="either", custom_error_message="must be a string or a list")


class TextPart(Contract):
    """A part of a message. Other part types are valid OpenAI but not served."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def only_text(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") in ("image_url", "input_audio", "file", "video_url", "refusal"):
            raise unsupported(f"content parts of type {part['type']} are not served; use text")
        return part


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS), Tag("<list>")],
    EITHER,
]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")] | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("<list>")],
    EITHER,
]


class Message(Contract):
    """One turn of the dialogue. The SDK echoes an assistant's message with null extras; only null passes."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Contract):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Contract):
    type: Literal["text"]

    @model_validator(mode="before")
    @classmethod
    def only_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema", "grammar", "regex"):
            raise unsupported(f"response_format {value['type']} is not served; only text is")
        return value


class TemplateKwargs(Contract):
    """The only values that reach a chat template beside the messages."""

    enable_thinking: bool | None = None


class SampledText(QueueOptions):
    """What every body that asks for text may say of how it is made: OpenAI's sampling, vLLM's extras."""

    model: ModelName
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    #: 0 = all tokens.
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    #: Token ids (as text, JSON has no other keys) -> -100..100.
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    user: User | None = None
    #: Taken and without effect: equal prefixes are found without a key.
    prompt_cache_key: Ignored | None = None
    safety_identifier: Ignored | None = None
    #: Which slice of a MatFormer answers; None = what the worker's settings say.
    matformer_slice: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def keys_are_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
                raise refused(f"logit_bias keys are token ids between 0 and {MAX_TOKEN_ID}")
        if len({int(key) for key in bias or {}}) < len(bias or {}):
            raise refused("logit_bias names one token twice")
        return bias


class ChatCompletionRequest(SampledText):
    """The body of POST /v1/chat/completions, with the queue's options."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unserved(cls, body: Any) -> Any:
        return served(body, UNSERVED)

    @model_validator(mode="after")
    def fields_agree(self) -> "ChatCompletionRequest":
        limit = self.token_limit
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refused("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs needs logprobs = true", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options needs stream = true", "stream_options")
        if limit is not None and (self.min_tokens or 0) > limit:
            raise refused(f"min_tokens must be at most max_tokens = {limit}", "min_tokens")
        if limit is not None and (self.n or 1) * limit > MAX_TOKENS:
            raise refused(f"n * max_tokens must be at most {MAX_TOKENS}", "max_tokens")
        return self

    @property
    def token_limit(self) -> int | None:
        """Tokens of one answer; None = as many as the context holds."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages as JSON values, absent fields left out."""
        said = {"role", "content", "name", "tool_call_id"}
        return [message.model_dump(include=said, exclude_none=True) for message in self.messages]

    def sampling(self) -> dict[str, Any]:
        """What was given of the engine's SamplingParams fields."""
        same = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed", "n",
                "frequency_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "min_tokens")  # fmt: skip
        values = {name: getattr(self, name) for name in same}
        values["max_tokens"] = self.token_limit
        values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        values["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return {name: value for name, value in values.items() if value is not None}


def parse_chat(raw: bytes) -> ChatCompletionRequest:
    """Bytes of a chat body -> request. InvalidJSON (400) or InvalidRequest (422) with `param` = dotted path."""
    return validated(ChatCompletionRequest, strict_json.loads(raw))
