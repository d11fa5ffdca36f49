"""What a job may ask for, checked at the door: the bodies, the job envelope around them, and one model's limits."""

from inferfleet.tasks.contracts.cards import check_card, text_bytes
from inferfleet.tasks.contracts.chat import MAX_TOKENS, UNSERVED, ChatCompletionRequest, parse_chat
from inferfleet.tasks.contracts.contract import Contract, Priority, UnixSeconds, validated
from inferfleet.tasks.contracts.images import (
    ImageEditRequest,
    ImageGenerationRequest,
    ImageRequest,
    data_url,
    parse_edit,
    parse_images,
)
from inferfleet.tasks.contracts.jobs import Body, JobRequest, body_hash, parse_job
from inferfleet.tasks.contracts.responses import InputMessage, ResponseRequest, parse_response
from inferfleet.tasks.contracts.webhooks import EndpointCreate, EndpointTest, EndpointUpdate, SecretRotation

__all__ = [
    "MAX_TOKENS",
    "UNSERVED",
    "Body",
    "ChatCompletionRequest",
    "Contract",
    "EndpointCreate",
    "EndpointTest",
    "EndpointUpdate",
    "ImageEditRequest",
    "ImageGenerationRequest",
    "ImageRequest",
    "InputMessage",
    "JobRequest",
    "Priority",
    "ResponseRequest",
    "SecretRotation",
    "UnixSeconds",
    "body_hash",
    "check_card",
    "data_url",
    "parse_chat",
    "parse_edit",
    "parse_images",
    "parse_job",
    "parse_response",
    "text_bytes",
    "validated",
]
