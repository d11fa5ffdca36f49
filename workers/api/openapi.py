"""The OpenAPI document's bodies and answers, written by hand where routes read raw bytes."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from inferfleet.tasks.calls import MAX_KEY_CHARS
from inferfleet.tasks.contracts import (
    ChatCompletionRequest,
    Contract,
    ImageEditRequest,
    ImageGenerationRequest,
    JobRequest,
    Priority,
    ResponseRequest,
    UnixSeconds,
)
from inferfleet.tasks.job_object import Job
from inferfleet.tasks.lookup import MAX_KEYS
from inferfleet.tasks.names import State

REF = "#/components/schemas/{model}"
EDIT_FORM = "ImageEditForm"
#: Of an idempotency key.
KEY_PATTERN = "^[!-~]([ -~]{0,253}[!-~])?$"


class ErrorBody(BaseModel):
    """What went wrong; `code` is stable, `param` the dotted path of the field to change."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every error of every route."""

    error: ErrorBody


class ChatMessage(BaseModel):
    role: str
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: dict[str, Any] | None


class ChatCompletion(BaseModel):
    """The `chat.completion` object of OpenAI; `stream` sends `chat.completion.chunk` events instead."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: dict[str, Any]


class ResponseAnswer(BaseModel):
    """The `response` object of OpenAI; `output` holds one message once it has ended by itself."""

    id: str
    object: str
    created_at: int
    status: str
    background: bool
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: dict[str, Any] | None
    metadata: dict[str, str]


class InputItems(BaseModel):
    """Messages, the last first unless asked otherwise."""

    object: str
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class PictureData(BaseModel):
    """One picture: where it is until `url_expires_at`, or the file itself with `response_format` b64_json."""

    index: int
    #: Gives this very picture again, with n = 1.
    seed: int
    url: str | None = None
    #: Unix seconds.
    url_expires_at: int | None = None
    b64_json: str | None = None


class ImageTokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class ImageUsage(BaseModel):
    """Tokens of the prompt, and latent tokens of the pictures."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: ImageTokenDetails


class ImagesAnswer(BaseModel):
    """OpenAI's images response, and the model and licence that the pictures were made with."""

    created: int
    data: list[PictureData]
    size: str
    output_format: str
    model: str
    licence: str
    usage: ImageUsage


class JobPageAnswer(BaseModel):
    """Jobs, newest first."""

    object: str
    data: list[Job]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobUpdate(Contract):
    """What may change while a job waits; at least one. Lower priority runs first."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["priority"], "properties": {"priority": {"type": "integer"}}},
                {"required": ["deadline"], "properties": {"deadline": {"type": "number"}}},
            ]
        }
    )

    priority: Priority | None = None
    #: Unix seconds.
    deadline: UnixSeconds | None = None


class JobLookup(Contract):
    """Idempotency keys of the caller's, to be asked for their jobs."""

    idempotency_keys: Annotated[
        list[Annotated[str, Field(max_length=MAX_KEY_CHARS, json_schema_extra={"pattern": KEY_PATTERN})]],
        Field(min_length=1, max_length=MAX_KEYS),
    ]


class KeyAnswer(BaseModel):
    """An idempotency key and its job: its id and state, or null where the ledger holds none."""

    idempotency_key: str
    job_id: str | None
    status: State | None


class JobLookupAnswer(BaseModel):
    """The keys in the order of the request."""

    object: str
    data: list[KeyAnswer]


class ModelCard(BaseModel):
    """A served model; `status` is ready, loading, or unserved when only the settings name it. More as its kind has."""

    id: str
    object: str
    created: int
    owned_by: str
    status: str
    #: text or image; unknown until a worker has loaded it.
    kind: str | None = None
    #: The model's licence tag. This and all below: of image models.
    licence: str | None = None
    #: Names of adapters that a job may choose.
    loras: list[str] | None = None
    default_size: int | None = None
    default_steps: int | None = None
    max_steps: int | None = None
    max_pixels: int | None = None
    max_sequence_length: int | None = None


class ModelList(BaseModel):
    object: str
    data: list[ModelCard]


MODELS: tuple[type[BaseModel], ...] = (
    ChatCompletionRequest, ChatCompletion, ResponseRequest, ResponseAnswer, InputItems, ImageGenerationRequest,
    ImageEditRequest, ImagesAnswer, JobRequest, JobUpdate, Job, JobPageAnswer, JobLookup, JobLookupAnswer, ModelCard,
    ModelList, ErrorAnswer,
)  # fmt: skip


def components(*more: type[BaseModel]) -> dict[str, Any]:
    """The schemas that the routes below refer to, and those of `more`."""
    wanted = [(model, "validation") for model in (*MODELS, *more)]
    _, document = models_json_schema(wanted, ref_template=REF)  # type: ignore[arg-type]
    schemas: dict[str, Any] = document["$defs"]
    schemas[EDIT_FORM] = edit_form(schemas[ImageEditRequest.__name__])
    return schemas


def edit_form(edit: dict[str, Any]) -> dict[str, Any]:
    """The schema of an edit as a form: its image is a file, all else as in JSON, written as text."""
    properties = {**edit["properties"], "image": {"type": "string", "format": "binary"}}
    text = "An edit as a form; lists and objects are JSON in one field, or name[0][key] and name[key]."
    return {**edit, "title": EDIT_FORM, "description": text, "properties": properties}


def ref(model: type[BaseModel] | str) -> dict[str, str]:
    return {"$ref": REF.format(model=model if isinstance(model, str) else model.__name__)}


def body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref(model)}}}}


def answer(text: str, model: type[BaseModel] | None = None, media: str = "application/json") -> dict[str, Any]:
    return {"description": text, "content": {media: {"schema": ref(model) if model else {"type": "string"}}}}


#: One event of a stream, as a reader of it sees them.
EVENT = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "the sequence_number, where the stream can be taken up again"},
        "event": {"type": "string", "description": "the type, where the stream names types"},
        "data": {"type": "string", "description": "JSON, or [DONE] at the end of a chat"},
    },
    "required": ["data"],
}


def answers(extra: dict[str, Any], *errors: int) -> dict[str, Any]:
    """Those of one route: its own, the errors that it names, and those that any route may give."""
    texts = {
        400: "the body is not JSON", 403: "the url's signature does not fit, or it has expired",
        404: "no such model, or nothing of that id", 408: "the body came too slowly",
        409: "its state, or a reused key, forbids it", 413: "the body is too large",
        415: "not a media type of this route", 422: "a field is wrong: `param` names it",
        429: "the queue is full: see Retry-After", 504: "the job's time was over",
        500: "the job failed, or its file is damaged: `code` says why",
        502: "the receiver of a webhook gave no answer",
    }  # fmt: skip
    named = {str(status): answer(texts[status], ErrorAnswer) for status in errors}
    always = {"401": answer("the API key is missing or unknown", ErrorAnswer),
              "503": answer("the ledger (Redis) or the store is away", ErrorAnswer)}  # fmt: skip
    return {"responses": extra | named | always}


def header(name: str, text: str, **schema: Any) -> dict[str, Any]:
    schema = {"type": "string", **schema}
    return {"name": name, "in": "header", "required": False, "description": text, "schema": schema}


def key_header(what: str) -> dict[str, Any]:
    """A space at either end of a header is not part of it."""
    text = f"1 to 255 printable characters; the same key and body give the same {what}"
    return header("Idempotency-Key", text, pattern=KEY_PATTERN, maxLength=MAX_KEY_CHARS)


KEY = key_header("job")
PREFER = header("Prefer", "`respond-async`: answer 202 at once; `wait=N`: answer 202 after N seconds, at most 60")

_JOB = answer("the job", Job)
_ACCEPTED = answer("the job; poll its `Location`", Job)
BODY_ERRORS = (400, 408, 413, 415, 422)

CHAT = body(ChatCompletionRequest) | {"parameters": [KEY, PREFER]} | answers(
    {
        "200": {
            "description": "the completion; with `stream` its chunks as server-sent events, ended by `[DONE]`",
            "content": {
                "application/json": {"schema": ref(ChatCompletion)},
                "text/event-stream": {"schema": EVENT},
            },
        },
        "202": _ACCEPTED,
    },
    *BODY_ERRORS, 404, 409, 429, 500, 504,
)  # fmt: skip
_STREAMED = {
    "description": "the response; with `stream` its events as server-sent events with `sequence_number`",
    "content": {
        "application/json": {"schema": ref(ResponseAnswer)},
        "text/event-stream": {"schema": EVENT},
    },
}
CREATE_RESPONSE = body(ResponseRequest) | {"parameters": [KEY]} | answers(
    {"200": _STREAMED}, *BODY_ERRORS, 404, 409, 429, 500, 504
)  # fmt: skip
GET_RESPONSE = answers({"200": _STREAMED}, 404, 422)
CANCEL_RESPONSE = answers({"200": answer("the response, cancelled or as it ended", ResponseAnswer)}, 404, 422)
DELETE_RESPONSE = answers({"200": {"description": "gone"}}, 404, 409)
INPUT_ITEMS = answers({"200": answer("one page", InputItems)}, 404, 422)
_IMAGE_ANSWERS = answers(
    {"200": answer("the pictures, as urls or in base64", ImagesAnswer), "202": _ACCEPTED},
    *BODY_ERRORS, 404, 409, 429, 500, 504,
)  # fmt: skip
IMAGES = body(ImageGenerationRequest) | {"parameters": [KEY, PREFER]} | _IMAGE_ANSWERS
EDITS = body(ImageEditRequest) | {"parameters": [KEY, PREFER]} | _IMAGE_ANSWERS
EDITS["requestBody"]["content"]["multipart/form-data"] = {"schema": ref(EDIT_FORM)}
OUTPUT = answers(
    {
        "200": {
            "description": "the file, with its SHA-256 as ETag",
            "content": {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
                        for kind in ("png", "jpeg", "webp")},
        },
        "307": {"description": "the file is there for a minute: s3.public_links is set"},
        "304": {"description": "the client has it: its ETag was in If-None-Match"},
    },
    403, 404, 422, 500,
)  # fmt: skip
CREATE_JOB = body(JobRequest) | {"parameters": [KEY, PREFER]} | answers(
    {"200": answer("the job, which has ended", Job), "202": _ACCEPTED}, *BODY_ERRORS, 404, 409, 429
)  # fmt: skip
PUT_JOB = body(JobRequest) | answers({"202": _ACCEPTED}, *BODY_ERRORS, 404, 409, 429)
LIST_JOBS = answers({"200": answer("one page", JobPageAnswer)}, 404, 422)
LOOKUP_JOBS = body(JobLookup) | answers({"200": answer("the keys' jobs", JobLookupAnswer)}, *BODY_ERRORS)
GET_JOB = answers({"200": _JOB}, 404, 422)
PATCH_JOB = body(JobUpdate) | answers({"200": _JOB}, *BODY_ERRORS, 404, 409)
CANCEL_JOB = answers({"202": answer("the job, cancelling or cancelled", Job)}, 404, 409)
RETRY_JOB = answers({"202": _ACCEPTED}, 404, 409)
RESULT = answers(
    {
        "200": {
            "description": "the answer alone",
            "content": {
                "application/json": {"schema": {"anyOf": [ref(ChatCompletion), ref(ResponseAnswer), ref(ImagesAnswer)]}}
            },
        }
    },
    404, 409, 500, 504,
)  # fmt: skip
EVENTS = answers(
    {
        "200": {
            "description": "server-sent events with `sequence_number`",
            "content": {"text/event-stream": {"schema": EVENT}},
        },
        "204": {"description": "the job has ended and has no later events: do not connect again"},
    },
    404, 422,
)  # fmt: skip
DELETE_JOB = answers({"200": {"description": "gone"}}, 404, 409)
LIST_MODELS = answers({"200": answer("the models", ModelList)})
READY = {"responses": {"200": {"description": "ready"}, "503": answer("the ledger (Redis) is away", ErrorAnswer)}}
STATS = answers({"200": {"description": "waiting, running, backlog and oldest_age_s by model"}})
METRICS = answers({"200": answer("Prometheus text", media="text/plain")})
GET_MODEL = answers({"200": answer("the model", ModelCard)}, 404)
