"""What one model can do, as its card says, compared with a request. What a card does not say is not compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from inferfleet.tasks import names
from inferfleet.tasks.contracts.chat import ChatCompletionRequest, Message
from inferfleet.tasks.contracts.images import ImageRequest
from inferfleet.tasks.contracts.jobs import Body
from inferfleet.tasks.contracts.responses import ResponseRequest, in_own_names
from inferfleet.tasks.errors import ContextLengthExceeded, InvalidRequest

#: Kind of a model -> where its jobs go.
URLS = {"text": f"{names.CHAT_URL} or {names.RESPONSES_URL}", "image": f"{names.IMAGES_URL} or {names.EDITS_URL}"}


def check_card(request: Body, card: Mapping[str, Any]) -> None:
    """Compare a request with one model's card. InvalidRequest or ContextLengthExceeded, naming the limit."""
    kind = "image" if isinstance(request, ImageRequest) else "text"
    of_model = card.get("kind", kind)
    if of_model != kind:
        url = URLS.get(of_model, "another url")
        raise InvalidRequest(f"{request.model!r} is a model of kind {of_model}: its jobs go to {url}", param="model")
    if isinstance(request, ImageRequest):
        check_image(request, card)
    elif isinstance(request, ResponseRequest):
        with in_own_names():
            check_chat(request.chat(), card)
    else:
        check_chat(request, card)


def check_image(request: ImageRequest, card: Mapping[str, Any]) -> None:
    limits = {
        "num_inference_steps": (request.num_inference_steps, card.get("max_steps")),
        "max_sequence_length": (request.max_sequence_length, card.get("max_sequence_length")),
    }
    for param, (value, limit) in limits.items():
        if value is not None and limit is not None and value > limit:
            raise InvalidRequest(f"{param} of this model is at most {limit}", param=param)
    check_sides(request, card)
    known = card.get("loras")
    for lora in request.loras or ():
        if known is not None and lora.name not in known:
            names_of = f"it has {', '.join(map(repr, known))}" if known else "it has none"
            raise InvalidRequest(f"the model has no LoRA adapter {lora.name!r}: {names_of}", param="loras")
    if card.get("guided") is False and request.guidance_scale:
        raise InvalidRequest("this model has no guidance: leave guidance_scale out", param="guidance_scale")


def check_sides(request: ImageRequest, card: Mapping[str, Any]) -> None:
    if (sides := request.sides) is None:
        return
    param = ("width", "height") if request.size is None else ("size", "size")
    step, longest, pixels = card.get("multiple_of"), card.get("max_side"), card.get("max_pixels")
    for name, side in zip(param, sides, strict=True):
        if step is not None and side % step:
            raise InvalidRequest(f"{name}: sides of this model's pictures are multiples of {step}", param=name)
        if longest is not None and side > longest:
            raise InvalidRequest(f"{name}: sides of this model's pictures are at most {longest}", param=name)
    if pixels is not None and sides[0] * sides[1] > pixels:
        raise InvalidRequest(f"width * height of this model's pictures is at most {pixels}", param=param[0])


def check_chat(request: ChatCompletionRequest, card: Mapping[str, Any]) -> None:
    """Without a tokenizer."""
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
    return len(message.text.encode())
