"""What a job may ask for, checked at the door: the OpenAI chat body, and the job envelope around it.

Every number has a least and a greatest value and every list a length; an unknown field is refused by name. A request
that exists is a valid one, so the worker and the engine need not ask again. Knows no model: `check_card` compares a
request with what one model can do.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from inferfleet.tasks import strict_json
from inferfleet.tasks.errors import ContextLengthExceeded, InvalidRequest, UnsupportedFeature

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_MODEL_NAME = 256
MAX_N = 8
MAX_SEED = 2**63 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIAS = 300
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 8
MAX_STOP_CHARS = 64
MAX_STOP_TOKEN_IDS = 32
#: Of one request: n * max_tokens as well.
MAX_TOKENS = 1 << 20
MAX_METADATA = 16
#: Year 2100, so that a deadline in milliseconds by mistake is refused.
MAX_UNIX_SECONDS = 4_102_444_800
MAX_TIMEOUT_SECONDS = 7 * 86400
#: service_tier -> priority, where the request gives none. Lower runs first.
TIERS: dict[str | None, int] = {"priority": -50, "default": 0, "auto": 0, "flex": 50, None: 0}

#: Parts of the OpenAI API that would change the answer: refused, never silently dropped.
UNSUPPORTED = (
    "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "audio", "modalities", "prediction",
    "web_search_options", "reasoning_effort", "verbosity", "store", "prompt_logprobs", "chat_template",
)  # fmt: skip

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
UnixSeconds = Annotated[float, Field(ge=0, le=MAX_UNIX_SECONDS)]
#: Lower runs first.
Priority = Annotated[int, Field(ge=-100, le=100, description="lower runs first")]
Timeout = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)]
Tier = Literal["auto", "default", "flex", "priority"]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
]


class Contract(BaseModel):
    """Strict: no text for a number, no true for 1, no field that is not written here."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


C = TypeVar("C", bound=Contract)


def form(value: Any) -> str | None:
    """Which of the two forms a value takes; the tags are cut out of error paths."""
    if isinstance(value, str):
        return "<string>"
    return "<list>" if isinstance(value, list) else None


EITHER = Discriminator(
    form, custom_error_type="either", custom_error_message="Input should be a valid string or a valid list"
)


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


class QueueOptions(Contract):
    """How a job waits. Lower priority runs first; without one the service_tier gives it."""

    priority: Priority | None = None
    service_tier: Tier | None = None
    #: Unix seconds; a job that is not done by then expires.
    deadline: UnixSeconds | None = None
    metadata: Metadata | None = None


class ChatCompletionRequest(QueueOptions):
    """The body of POST /v1/chat/completions, with vLLM's sampling extras and the queue's options."""

    model: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    #: 0 = all tokens.
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    #: Token ids (as text, JSON has no other keys) -> -100..100.
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)] | None
    ) = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    #: Which slice of a MatFormer answers; None = what the worker's settings say.
    matformer_slice: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in UNSUPPORTED:
            if body.get(name) is not None:
                raise unsupported(f"{name} is not served", name)
        # A null is the SDK's way of saying "not given".
        return {name: value for name, value in body.items() if name not in UNSUPPORTED}

    @field_validator("logit_bias")
    @classmethod
    def keys_are_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
                raise refused(f"logit_bias keys are token ids between 0 and {MAX_TOKEN_ID}")
        if len({int(key) for key in bias or {}}) < len(bias or {}):
            raise refused("logit_bias names one token twice")
        return bias

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


class JobRequest(QueueOptions):
    """One line of an OpenAI batch file, plus options. Its JSON is the envelope that the ledger keeps."""

    custom_id: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    body: ChatCompletionRequest
    #: Seconds that the job may wait before its first start.
    start_timeout: Timeout | None = None
    #: Seconds that one run of the job may take.
    execution_timeout: Timeout | None = None

    @classmethod
    def from_chat(cls, body: ChatCompletionRequest) -> "JobRequest":
        """The job of a bare chat body; its queue options stay inside and count."""
        return cls(body=body)

    @property
    def effective_priority(self) -> int:
        """Lower runs first. The job's own options go before those in its body, a priority before a tier."""
        given = self.priority if self.priority is not None else self.body.priority
        return given if given is not None else TIERS[self.service_tier or self.body.service_tier]

    @property
    def deadline_ms(self) -> int | None:
        """Unix milliseconds; the earlier of the job's and the body's."""
        given = [value for value in (self.deadline, self.body.deadline) if value is not None]
        return round(min(given) * 1000) if given else None

    @property
    def start_timeout_ms(self) -> int | None:
        return None if self.start_timeout is None else max(1, round(self.start_timeout * 1000))

    @property
    def labels(self) -> dict[str, str] | None:
        """The metadata that the job is listed with."""
        return self.metadata if self.metadata is not None else self.body.metadata

    def envelope(self) -> bytes:
        """Canonical JSON of what was given: equal requests give equal bytes."""
        values = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def body_hash(envelope: bytes) -> str:
    """What an idempotency key is bound to."""
    return hashlib.sha256(envelope).hexdigest()


def parse_chat(raw: bytes) -> ChatCompletionRequest:
    """Bytes of a chat body -> request. InvalidJSON (400) or InvalidRequest (422) with `param` = dotted path."""
    return validated(ChatCompletionRequest, strict_json.loads(raw))


def parse_job(raw: bytes) -> JobRequest:
    """Bytes of a job -> request. Errors as in parse_chat."""
    return validated(JobRequest, strict_json.loads(raw))


def validated(contract: type[C], values: Any) -> C:
    """JSON values -> contract, with the first complaint as a typed error."""
    try:
        return contract.model_validate(values)
    except ValidationError as error:
        raise described(error) from None


def refused(message: str, field: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "field": field})


def unsupported(message: str, field: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{message}", {"message": message, "field": field})


def described(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    field = first.get("ctx", {}).get("field")
    path = [part for part in first["loc"] if not str(part).startswith("<")] + ([field] if field else [])
    param = strict_json.dotted(tuple(part for part in path if part != "[key]"))
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {param}", param=param)
    message = first["msg"] if first["type"] in ("refused", "unsupported") else f"{param or 'body'}: {first['msg']}"
    kind = UnsupportedFeature if first["type"] == "unsupported" else InvalidRequest
    return kind(message, param=param)


def check_card(request: ChatCompletionRequest, card: Mapping[str, Any]) -> None:
    """Compare a request with one model's card, without a tokenizer. InvalidRequest or ContextLengthExceeded."""
    vocabulary, context = card.get("vocab_size"), card.get("max_model_len")
    ids = [*(request.stop_token_ids or []), *(int(key) for key in request.logit_bias or {})]
    if vocabulary is not None and any(token >= vocabulary for token in ids):
        param = "stop_token_ids" if max(request.stop_token_ids or [-1]) >= vocabulary else "logit_bias"
        raise InvalidRequest(f"{param}: token ids of this model are below {vocabulary}", param=param)
    check_slice(request.matformer_slice, card.get("matformer_slices"))
    if context is None:
        return
    if (request.token_limit or 1) >= context:
        raise ContextLengthExceeded(f"max_tokens must be below the model's context of {context}", param="max_tokens")
    longest = card.get("max_token_bytes")
    least = sum(map(text_bytes, request.messages)) // longest if longest else 0
    if least + (request.token_limit or 1) > context:
        raise ContextLengthExceeded(
            f"the prompt has at least {least} tokens; with max_tokens = {request.token_limit or 1} it does not fit "
            f"the model's context of {context}",
            param="messages",
        )


def check_slice(name: str | None, slices: Sequence[str] | None) -> None:
    """slices: of the model, as its card lists them; None while no worker has told."""
    if name is None or slices is None or name in slices:
        return
    known = f"; its slices are {', '.join(map(repr, slices))}" if slices else ": it has none"
    raise InvalidRequest(f"the model has no MatFormer slice {name!r}{known}", param="matformer_slice")


def text_bytes(message: Message) -> int:
    parts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content]
    return sum(len(part.encode()) for part in parts)
